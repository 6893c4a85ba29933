"""A run prints each warning once and in one line, keeps it for the summary, and never ends because of it."""

from __future__ import annotations

import io
import sys
import warnings

import pytest

from rada_fast.errors import UserError
from rada_fast.system import notices


def test_a_warning_is_printed_once_in_a_run_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with notices.collecting():
        notices.warn("the first\nof two")
        notices.warn("a file \x1b[31m\udc80")
        notices.warn("the first\nof two")
        notices.note("good to know")
        assert notices.so_far() == ["the first of two", r"a file \x1b[31m\udc80"]
        with notices.collecting():
            assert notices.so_far() == []
            notices.warn("another")
            assert notices.so_far() == ["another"]
        assert notices.so_far() == ["the first of two", r"a file \x1b[31m\udc80"]
    assert capsys.readouterr().err.splitlines() == [
        "rada-fast: warning: the first of two",
        r"rada-fast: warning: a file \x1b[31m\udc80",
        "rada-fast: note: good to know",
        "rada-fast: warning: another",
    ]


def test_collecting_decorates_a_command() -> None:
    @notices.collecting()
    def command() -> list[str]:
        notices.warn("something")
        return notices.so_far()

    assert command() == command() == ["something"]


def test_held_messages_are_printed_when_the_run_begins(capsys: pytest.CaptureFixture[str]) -> None:
    with notices.collecting(hold=True):
        notices.warn("first")
        assert capsys.readouterr().err == ""
        notices.release()
        assert capsys.readouterr().err == "rada-fast: warning: first\n"
        notices.note("second")
        assert capsys.readouterr().err == "rada-fast: note: second\n"


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, OSError])
def test_a_refused_run_prints_none_of_its_held_messages(
    error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    @notices.collecting(hold=True)
    def command() -> None:
        notices.warn("noticed on the way")
        raise error

    with pytest.raises(error):
        command()
    assert capsys.readouterr().err == ("" if error is UserError else "rada-fast: warning: noticed on the way\n")


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stream", [None, Closed()])
def test_a_closed_standard_error_loses_only_the_line(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with notices.collecting():
        notices.warn("nobody reads this")
        assert notices.so_far() == ["nobody reads this"]


def test_warnings_of_python_are_printed_and_kept_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rada_fast import cli

    kept: list[str] = []

    @notices.collecting()
    def command(arguments: object) -> int:
        warnings.warn("of some library:\nbeware", UserWarning, stacklevel=1)
        kept.extend(notices.so_far())
        return 0

    monkeypatch.setattr(cli, "_run_command", command)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["ttt"]) == 0
    assert kept == ["of some library: beware"]
    assert capsys.readouterr().err == "rada-fast: warning: of some library: beware\n"
