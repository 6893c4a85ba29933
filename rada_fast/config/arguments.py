"""Read a command's arguments and options files into its configuration.

The fields of the configuration are the options; nothing else describes them. An error is one line that names the
option.
"""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import errno
import json
import os
import re
import stat
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rada_fast.errors import UserError

PATHS = ("output", "pretrained", "adapter", "classes", "templates", "ensemble", "runs", "compare", "root", "folders")
"""These fields hold a path or several; some may hold a name instead, and templates may hold a template."""
KINDS_AND_PATHS = ("data", "train", "test", "new_test", "evaluate_on", "text_features", "model")
"""These fields hold KIND:PATH; the model may be a name instead."""
MAX_OPTIONS_BYTES = 2**24
"""A larger options file is refused."""


@dataclass(frozen=True)
class Option:
    """An Option describes one option of a command.

    name: the name of its field; kind: bool, int, float or str; choices: the values that it may have, or () where any
    value of its kind will do; many: whether it takes several values; optional: whether it may be None; required:
    whether it has no default.
    """

    name: str
    kind: type
    choices: tuple[Any, ...] = ()
    many: bool = False
    optional: bool = False
    required: bool = False

    @property
    def flag(self) -> str:
        """Return the option as it is written on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """Return the words of an error message that say what a value must be."""
        if self.choices:
            values = f"one of {', '.join(map(str, self.choices))}"
        else:
            values = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[self.kind]
        return values + (" or None" if self.optional else "")

    def convert(self, value: Any) -> Any:
        """Convert a value from the command line (a text) or from an options file to this option's kind.

        Raises UserError where that is not possible.
        """
        if self.optional and (value is None or value in ("None", "none")):
            return None
        converted = value
        if isinstance(value, str) and self.kind in (int, float):
            try:
                converted = self.kind(value)
            except ValueError:  # also for a number of thousands of digits
                converted = None
        elif self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                converted = float(value)
            except OverflowError:
                converted = None
        if type(converted) is not self.kind or (self.choices and converted not in self.choices):
            raise UserError(f"{self.flag} must be {self.expected}, got {shortened(value)}")
        if isinstance(converted, str) and (not converted.strip() or "\0" in converted):
            raise UserError(f"{self.flag} must neither be empty nor hold a NUL character, got {shortened(value)}")
        return converted

    def convert_all(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Convert several values. Raises UserError where there is none, or where one cannot be converted."""
        if not values:
            raise UserError(f"{self.flag} needs at least one value: {self.expected}")
        return tuple(self.convert(value) for value in values)


def shortened(value: Any) -> str:
    """Return the repr of a value, cut where it is too long for a message."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or a list in a list in a list
        return f"a very long {type(value).__name__}"
    return shown if len(shown) <= 100 else f"{shown[:60]}... ({len(shown)} characters)"


def options_of(config_type: type) -> dict[str, Option]:
    """Return a configuration's options by field name, with those of the configurations that are its fields."""
    found: dict[str, Option] = {}
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            found |= options_of(hint)
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        parts = typing.get_args(hint)
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in parts
        if optional:
            (hint,) = (part for part in parts if part is not type(None))
        many = typing.get_origin(hint) is tuple
        if many:
            hint = typing.get_args(hint)[0]
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        kind = type(choices[0]) if choices else hint
        found[field.name] = Option(field.name, kind, choices, many, optional, required)
    return found


def read(config_type: type, command: str, arguments: Sequence[str]) -> Any:
    """Read the configuration that a command line asks for. The command line wins over options files.

    Raises UserError with one line that names the option.
    """
    options = options_of(config_type)
    files, from_command_line = _split(options, command, arguments, getattr(config_type, "WITHOUT_FLAG", None))
    values: dict[str, Any] = {}
    for path in files:
        values |= _values_of_file(path, options, command)
    values |= from_command_line
    if missing := [option.flag for option in options.values() if option.required and option.name not in values]:
        raise UserError(f"{' and '.join(missing)} must be given; 'rada-fast {command} --help' shows an example")
    try:
        return _build(config_type, values)
    except UserError as error:
        raise UserError(named_in(str(error), config_type)) from None


def named_in(message: str, config_type: type) -> str:
    """Return an error's line with --option in place of the field's name, where the line begins with that name."""
    options = options_of(config_type)
    words = message.split()
    flags = {"--options", *(option.flag for option in options.values())}
    if any(word.strip(".,:;'\"()") in flags for word in words):
        return message
    first = words[0].rstrip(":") if words else ""
    return options[first].flag + message[len(first) :] if first in options else message


def name_option(message: str, config: Any) -> str:
    """Do as named_in, and put the option in front of a message that mentions only the path that the option gave."""
    named = named_in(message, type(config))
    if named == message and not message.startswith("--"):
        found = []
        for flag, path in paths_of(config):
            # The path must be a word of its own: not every "o" in a message is the folder named "o".
            if match := re.search(rf"(?<![\w./-]){re.escape(path)}(?![\w/-])", message):
                found.append((match.start(), flag))
        if found:
            _, flag = min(found, key=lambda one: one[0])  # a message begins with what it is about
            return message if flag in message.split() else f"{flag}: {message}"
    return named


def paths_of(config: Any) -> list[tuple[str, str]]:
    """Return a pair (option, path) for every file or folder that a configuration names."""
    paths: list[tuple[str, str]] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            paths += paths_of(value)
            continue
        flag = "--" + field.name.replace("_", "-")
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str):
                continue
            if field.name in KINDS_AND_PATHS and ":" in text:
                paths.append((flag, text.partition(":")[2]))
            elif field.name in PATHS and "{" not in text:
                paths.append((flag, text))
    return paths


def _build(config_type: type, values: Mapping[str, Any]) -> Any:
    """Make a configuration and those that are its fields, each from the values of its own fields."""
    hints = typing.get_type_hints(config_type)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config_type):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            names = {part.name for part in dataclasses.fields(inner)}
            own = {name: value for name, value in values.items() if name in names}
            # Start from the outer configuration's default, which may differ from the inner one's own.
            changes[field.name] = dataclasses.replace(field.default, **own)  # type: ignore[type-var]
        elif field.name in values:
            changes[field.name] = values[field.name]
    return config_type(**changes)


def _split(
    options: Mapping[str, Option], command: str, arguments: Sequence[str], without_flag: str | None
) -> tuple[list[str], dict[str, Any]]:
    """Return the options files that a command line names, and the values of its other options.

    without_flag: the field that takes the values that follow no option, or None where there must be none.
    """
    files: list[str] = []
    values: dict[str, Any] = {}
    tokens = list(arguments)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("-") and without_flag is not None:
            values[without_flag] = (*values.get(without_flag, ()), options[without_flag].convert(token))
            continue
        if not token.startswith("-") or token == "-":
            raise UserError(
                f"{shortened(token)} belongs to no option of 'rada-fast {command}'; an option begins with --"
            )
        flag, equals, value = token.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag == "--options":
            if not equals and not tokens:
                raise UserError("--options needs a file")
            files.append(value if equals else tokens.pop(0))
            continue
        off = name.startswith("no_") and name[3:] in options and options[name[3:]].kind is bool
        option = options.get(name[3:] if off else name) if flag.startswith("--") else None
        if option is None:
            raise UserError(_unknown_option(flag, options, command))
        if option.kind is bool:
            if equals:
                opposite = option.flag if off else f"--no-{option.flag[2:]}"
                raise UserError(f"{flag} takes no value, got {shortened(value)}; {opposite} is its opposite")
            values[option.name] = not off
        elif option.many:
            several = [value] if equals else []
            while tokens and not equals and not _is_option(tokens[0]):
                several.append(tokens.pop(0))
            values[option.name] = option.convert_all(several)
        else:
            if not equals:
                if not tokens or _is_option(tokens[0]):
                    raise UserError(f"{option.flag} needs a value: {option.expected}")
                value = tokens.pop(0)
            values[option.name] = option.convert(value)
    return files, values


def _is_option(token: str) -> bool:
    """Say whether a token begins an option. A value that begins with -- has to be given as --option=value."""
    return token.startswith("--")


def _unknown_option(flag: str, options: Mapping[str, Option], command: str) -> str:
    flags = [option.flag for option in options.values()] + (["--options"] if flag != "--options" else [])
    close = difflib.get_close_matches(flag.replace("_", "-").lower(), flags, n=1) if flag.strip("-") else []
    advice = f"; did you mean {close[0]}?" if close else f"; 'rada-fast {command} --help' lists them"
    return f"{shortened(flag)[1:-1]} is no option of 'rada-fast {command}'{advice}"


def check_file_kind(flag: str, path: Path, *, pipes: bool = False) -> None:
    """Raise UserError where a path exists but is neither a file nor a folder, or may not be read.

    A device or a pipe might never end. pipes: whether a pipe that the shell made, as in <(command), may be read.

    A path that does not exist is accepted: whoever reads it refuses it.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} cannot be read: {reason_of(error)}") from None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
            raise UserError(f"{flag} {path} cannot be read: {os.strerror(errno.EACCES)}")
        return
    of_shell = str(path).startswith(("/dev/fd/", "/proc/self/fd/", "/dev/stdin"))
    if not (pipes and of_shell and stat.S_ISFIFO(mode)):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise UserError(f"{flag} {path} must be a file or a folder, got {kinds.get(stat.S_IFMT(mode), 'a device')}")


def reason_of(error: OSError | ValueError) -> str:
    """Return what the system says about why a path cannot be used."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _values_of_file(path: str, options: Mapping[str, Option], command: str) -> dict[str, Any]:
    """Read the options of an options file. Each is checked as on the command line."""
    content = _content_of_file(path)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        option = options.get(name)
        if isinstance(value, dict):
            raise UserError(f"--options file {path} must be flat: {key} is a table")
        if option is None:
            flag = "--" + name.strip("_").replace("_", "-")
            raise UserError(f"--options file {path}: {_unknown_option(flag, options, command)}")
        if name in values:
            raise UserError(f"--options file {path} gives {option.flag} twice")
        try:
            if option.many:
                values[name] = option.convert_all(value if isinstance(value, list) else [value])
            else:
                values[name] = option.convert(value)
        except UserError as error:
            raise UserError(f"--options file {path}: {error}") from None
    return values


def _content_of_file(name: str) -> dict[str, Any]:
    """Read the table of an options file."""
    if "\0" in name or not name.strip():
        raise UserError(f"--options must name a TOML or JSON file, got {shortened(name)}")
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"--options file {name} begins with a home folder that is not known here") from None
    check_file_kind("--options file", path, pipes=True)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_OPTIONS_BYTES + 1)
    except OSError as error:
        raise UserError(f"--options file {path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_OPTIONS_BYTES:
        raise UserError(f"--options file {path} is larger than {MAX_OPTIONS_BYTES // 2**20} MiB")
    try:
        text = _decode(raw)
        is_json = path.suffix.lower() == ".json" or text.lstrip().startswith("{")
        content = json.loads(text, object_pairs_hook=_with_unique_keys) if is_json else tomllib.loads(text)
    except UserError as error:
        raise UserError(f"--options file {path} {error}") from None
    except RecursionError:
        raise UserError(f"--options file {path} is nested too deeply: it must be flat") from None
    except ValueError as error:  # not TOML, JSON or text, or a number of thousands of digits
        raise UserError(f"--options file {path} is neither TOML nor JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--options file {path} must hold a table of options, got {type(content).__name__}")
    return content


def _decode(raw: bytes) -> str:
    """Decode a text from UTF-8, or from the Unicode encoding of its byte-order mark, which some editors write."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if raw.startswith(mark):
            return raw.decode(encoding)
    return raw.decode("utf-8")


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of a JSON object. Raises UserError where a key occurs twice, which JSON itself allows."""
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"gives {next(name for name in names if names.count(name) > 1)} twice")
    return content
