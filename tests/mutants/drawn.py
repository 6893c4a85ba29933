"""Bugs that are drawn at random: small changes of expressions and statements, of the kinds that people make.

A list of bugs that somebody has thought of shows that the tests catch what somebody thought of. Drawn bugs ask about
the rest. They replace text, as the listed ones do, so that one that no test catches can be copied into a list.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from tests.mutants.entries import ROOT, Mutant


def _files(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{folder}/test_{name}.py" for name in names)


KERNELS = _files(
    "kernels", "drawn_calls", "special_problems", "reductions", "rational_adapter", "launches", "launch", "in_context"
)
CPU = _files("ops", "drawn_calls", "cpu_backend", "empty_inputs", "projected", "instruction_sets")
TESTS = {
    "kernels/view_selection": _files("kernels", "view_selection", "launch_counts"),
    "kernels/scaled_projections": _files("kernels", "scaled_projections"),
    "kernels/output_projection": _files("kernels", "output_projection_gradients"),
    "kernels/parameter_gradients": _files("kernels", "parameter_gradients") + KERNELS,
    "kernels/rational_projections_backward": _files("kernels", "rational_projections_backward") + KERNELS,
    "kernels/_launch": _files("kernels", "launch") + KERNELS,
    "kernels/": KERNELS,
    "rada_fast/ops/_backends/triton_views": (*_files("kernels", "view_selection"), "tests/ops/backends"),
    "rada_fast/ops/_backends/triton": (*KERNELS, *_files("kernels", "scaled_projections"), "tests/ops/backends"),
    "rada_fast/ops/": (*CPU, "tests/ops"),
    "csrc/cpu/augmix": _files("ops", "augmix", "instruction_sets"),
    "csrc/cpu/view_selection": _files("ops", "view_selection", "empty_inputs"),
    "csrc/cpu/view_": _files("ops", "multi_view_crops", "augmix", "instruction_sets", "empty_inputs"),
    "csrc/cpu/prediction": _files("ops", "prediction_losses", "view_selection", "empty_inputs"),
    "csrc/cpu/multi_view": _files("ops", "multi_view_crops", "empty_inputs"),
    "csrc/cpu/episodic": _files("ops", "episodic_optimizer", "empty_inputs"),
    "csrc/shared/episodic": _files("ops", "episodic_optimizer") + _files("cuda", "episodic_optimizer"),
    "csrc/cpu/encoder": _files("ops", "encoder_attention", "empty_inputs"),
    "csrc/cpu/small_transformer": _files("ops", "small_transformer", "instruction_sets"),
    "csrc/cpu/transformer": _files("ops", "small_transformer", "instruction_sets"),
    "csrc/cpu/": CPU,
    "csrc/cuda/augmix": _files("cuda", "augmix"),
    "csrc/cuda/episodic": _files("cuda", "episodic_optimizer"),
    "csrc/cuda/multi_view": _files("cuda", "multi_view_crops"),
    "csrc/cuda/view_resize": _files("cuda", "multi_view_crops", "augmix"),
    "csrc/cuda/view_selection": _files("cuda", "view_selection"),
    "csrc/cuda/prediction": _files("cuda", "prediction_losses", "view_selection"),
}
"""The tests of each source, those that catch the most first. The first key counts with which a path begins."""
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
UNSEEN = ("tiles.py", "_tiles.py", "_torch.cpp", "__init__.py", "_shared_memory.py", "choice.py")
"""Ends of paths without arithmetic: tables, the glue of PyTorch, which only a device executes, and messages."""
QUIET = {"num_warps", "num_stages", "fmt"}
"""Arguments that change no result."""

Change = tuple[int, int, str]
"""What a bug replaces: where it begins and ends in a source, and what stands there then."""

COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
SYMBOLS = (
    (r"(?<=\w|\)|\]) < (?=[\w(-])", " <= "), (r" <= ", " < "), (r" > (?=[\w(-])", " >= "), (r" >= ", " > "),
    (r" \+ (?=[\w(])", " - "), (r" - (?=[\w(])", " + "), (r" (?:\+|-|\*|/) [\w.]+(?=[;,)\]])", ""),
    (r" (?:\+|-|\*)= ", " = "), (r" && [^&|?;{}()]+(?=[;)])", ""), (r"\bstd::(?:min|max)\((\w+), (\w+)\)", r"\1"),
    (r"\((\w+), (\w+)(?=[,)])", r"(\2, \1"), (r"\[(\w+)\]", r"[\1 + 1]"), (r"\.contiguous\(\)", ""),
    (r"(?<=[ (])0(?=[;,)])", "1"), (r"(?<=[ (])1(?=[;,)])", "0"), (r" % (?=\w)", " / "),
    (r"\? ([\w.]+) : ([\w.(-]+\)?)", r"? \2 : \1"),
    (r"(?m)^ +(?!return|const|using|auto|break|static)[\w.]+(?:\(|\[| [+*-]?= ).*;$", ""),
)  # fmt: skip
"""Regular expressions for C++, and what replaces a match."""


def changes_of_python(source: str) -> Iterator[Change]:
    """Yield the changes of the expressions and statements of functions."""
    lines = source.splitlines(keepends=True)
    starts = [0, *accumulate(map(len, lines))]

    def place(line: int, column: int) -> int:
        # A column counts bytes.
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)

    def text(node: ast.expr) -> str:
        return source[slice(*span(node))]

    def replace(node: ast.expr | ast.stmt, becomes: str) -> Change:
        return *span(node), becomes

    def changes(node: ast.AST) -> Iterator[Change]:
        match node:
            case ast.Raise() | ast.JoinedStr() | ast.Assert() | ast.Import() | ast.ImportFrom() | ast.AnnAssign():
                return
            case ast.keyword(arg=name) if name in QUIET:
                return
            case ast.FunctionDef():
                for statement in node.body:
                    yield from changes(statement)
                return
            case ast.Compare(left=left, ops=[operation], comparators=[right]) if type(operation) in COMPARISONS:
                yield replace(node, f"{text(left)} {COMPARISONS[type(operation)]} {text(right)}")
            case ast.BinOp(left=left, op=operation, right=right):
                yield replace(node, text(left))
                yield replace(node, text(right))
                if isinstance(operation, ast.Add | ast.Sub):
                    other = "-" if isinstance(operation, ast.Add) else "+"
                    yield replace(node, f"({text(left)} {other} {text(right)})")
            case ast.BoolOp(values=values):
                yield from (replace(node, text(value)) for value in values)
            case ast.UnaryOp(operand=operand):
                yield replace(node, text(operand))
            case ast.IfExp(body=body, orelse=other):
                yield replace(node, text(body))
                yield replace(node, text(other))
            case ast.Constant(value=bool(value)):
                yield replace(node, str(not value))
            case ast.Constant(value=int(value)):
                yield replace(node, str(value + 1))
            case ast.If(test=test):
                yield replace(test, "False")
                yield replace(test, "True")
            case ast.AugAssign(target=target, value=value):
                yield replace(node, f"{text(target)} = {text(value)}")
                yield replace(node, "pass")
            case ast.Expr(value=ast.Call()):
                yield replace(node, "pass")
            case ast.Call(func=function, args=arguments):
                kept = [text(each) for each in node.args]
                named = [f"{each.arg}={text(each.value)}" for each in node.keywords if each.arg]
                for index in range(len(kept) - 1):
                    swapped = [*kept[:index], kept[index + 1], kept[index], *kept[index + 2 :]]
                    yield replace(node, f"{text(function)}({', '.join([*swapped, *named])})")
                name = function.attr if isinstance(function, ast.Attribute) else text(function)
                if name in {"where", "min", "max", "minimum", "maximum"}:
                    yield from (replace(node, text(each)) for each in arguments)
                if isinstance(function, ast.Attribute) and name in {"to", "contiguous", "float", "expand", "clone"}:
                    yield replace(node, text(function.value))
                if name in {"load", "store"} and len(node.keywords) > 0:
                    yield replace(node, f"{text(function)}({', '.join(kept)})")
        for child in ast.iter_child_nodes(node):
            yield from changes(child)

    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            yield from changes(node)


def changes_of_cpp(source: str) -> Iterator[Change]:
    """Yield the changes that SYMBOLS makes outside of comments and of lines for the preprocessor."""
    comments = [match.span() for match in re.finditer(r"//.*|/\*[\s\S]*?\*/|(?m:^#.*)|\"[^\"\n]*\"|<[\w, :]+>", source)]
    for pattern, becomes in SYMBOLS:
        for match in re.finditer(pattern, source):
            if not any(begin < match.end() and match.start() < end for begin, end in comments):
                yield match.start(), match.end(), match.expand(becomes)


def as_mutant(file: str, source: str, change: Change) -> Mutant | None:
    """Return a change as a bug to plant, with the whole lines of text that it takes to find it; None without tests."""
    tests = next((tests for start, tests in TESTS.items() if file.startswith(start)), None)
    begin, end, becomes = change
    first, last = source.rfind("\n", 0, begin) + 1, source.find("\n", end)
    while source.count(source[first:last]) > 1:
        first = source.rfind("\n", 0, first - 1) + 1
    text, changed = source[first:last], source[first:begin] + becomes + source[end:last]
    if tests is None or text == changed:
        return None
    digest = hashlib.sha256(f"{file}{text}{changed}".encode()).hexdigest()[:8]
    name = f"drawn-{Path(file).stem.strip('_')}-{source.count(chr(10), 0, begin) + 1}-{digest}"
    return Mutant(name, file, "arithmetic", text, changed, tests)


def draw(places: list[str], count: int, seed: int) -> list[Mutant]:
    """Return drawn bugs for the sources whose paths begin with one of `places`, each with its share, or for all."""
    generator = random.Random(seed)
    files = sorted(
        str(path.relative_to(ROOT))
        for top in ("csrc", "kernels", "rada_fast/ops")
        for path in (ROOT / top).rglob("*")
        if path.suffix in SUFFIXES and not path.name.endswith(UNSEEN)
    )
    pools: list[list[Mutant]] = []
    for file in (file for file in files if file.startswith(tuple(places) or "")):
        source = (ROOT / file).read_text(encoding="utf-8")
        changes = changes_of_python(source) if file.endswith(".py") else changes_of_cpp(source)
        pool = {mutant.name: mutant for change in changes if (mutant := as_mutant(file, source, change))}
        if pool:
            pools.append(generator.sample(list(pool.values()), len(pool)))
    drawn: list[Mutant] = []
    while pools and len(drawn) < count:
        generator.shuffle(pools)
        drawn += [pool.pop() for pool in pools]
        pools = [pool for pool in pools if pool]
    return drawn[:count]
