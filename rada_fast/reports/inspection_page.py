"""The page of an inspection: one HTML file that holds its pictures and needs neither a network nor a script."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rada_fast.reports.inspection import NEAR, Inspection, change_of_class, mask_statistics
from rada_fast.runs.machine import versions

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --soft: #5c5c5c; --line: #d0d0d0; --band: #f3f3f3;
  --gain: #00694d; --loss: #a84300; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --paper: #17181a; --soft: #a8a8a8; --line: #43464b; --band: #22252a;
    --gain: #4fd1a5; --loss: #ff9a5c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
nav a { margin-right: 0.9rem; display: inline-block; padding: 0.2rem 0; }
a { color: inherit; }
figure { margin: 1rem 0; }
figure div { overflow-x: auto; }
figure img { max-width: 100%; height: auto; display: block; background: #ffffff; border-radius: 0.4rem; }
@media (max-width: 40rem) { figure.wide img { max-width: none; width: 56rem; } }
figcaption, .note { color: var(--soft); font-size: 0.92rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.5rem 0; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child, .text { text-align: left; }
thead th { background: var(--band); }
tbody th { font-weight: normal; }
.gain { color: var(--gain); } .loss { color: var(--loss); }
summary { cursor: pointer; padding: 0.4rem 0; }
""".strip()
MEASURES = {
    "top 1, %": "top1",
    "top 5, %": "top5",
    "mean over classes, %": "mean_class",
    "calibration error, %": "ece",
}
"""The measures of the first table, by the words for them."""
OPEN_ROWS = 60
"""A table with more rows than these is folded until the reader opens it."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The policy that a browser applies to the page, by which it loads nothing from elsewhere and runs no script."""


def page_of(inspection: Inspection, pictures: Mapping[str, bytes], facts: Mapping[str, Any]) -> str:
    """Return the page as HTML.

    pictures: the contents of the PNG files by their names.
    facts: what is said about the run at the top, such as its model, by the words for it.
    """
    parts = [
        ("results", "Results", _results(inspection)),
        ("mask", "The mask", _mask(inspection, pictures)),
        ("matrices", "Rational matrices", _matrices(inspection, pictures)),
        ("projection", "Images in a plane", _projection(inspection, pictures)),
        ("classes", "Classes", _classes(inspection, pictures)),
        ("reliability", "Calibration", _reliability(inspection, pictures)),
    ]
    links = "".join(f'<a href="#{id}">{title}</a>' for id, title, _ in parts)
    body = "".join(
        f'<section aria-labelledby="{id}"><h2 id="{id}">{title}</h2>{text}</section>\n' for id, title, text in parts
    )
    made_by = f"rada-fast inspect {versions()['rada_fast']}"
    about = _table(("", ""), [(name, value) for name, value in facts.items()], text=(1,), heading=False)
    title = f"What the adapter changes on {Path(inspection.evaluation.data.partition(':')[2]).name}"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>
{STYLE}
</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
{about}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}</main>
<footer class="note">Made by {_text(made_by)}. The numbers are in inspect.json beside this file.</footer>
</body>
</html>
"""
    # A file name may hold bytes that are no text.
    return page.encode("utf-8", "backslashreplace").decode()


def _results(inspection: Inspection) -> str:
    measures = inspection.measures()
    rows = []
    for title, name in MEASURES.items():
        before, after = measures[f"zero_shot_{name}"], measures[f"adapted_{name}"]
        change = None if before is None or after is None else after - before
        better = change is not None and (change < 0 if name == "ece" else change > 0)
        rows.append((title, _number(before), _number(after), _signed(change, better)))
    ends = [f"{measures[f'{name}_low']:.1f} to {measures[f'{name}_high']:.1f} %" for name in ("zero_shot", "adapted")]
    words = (
        f"{measures['images']} images of {len(inspection.classes())} classes"
        + (f", {measures['unreadable']} of them unreadable, which count as wrong" if measures["unreadable"] else "")
        + f". Wilson's 95 % interval of top 1 is {ends[0]} zero-shot and {ends[1]} adapted. Adaptation put "
        f"{measures['wrong_to_right']} answers right and {measures['right_to_wrong']} wrong "
        f"(McNemar's p = {measures['p']:.2g})."
    )
    return _table(("measure", "zero-shot", "adapted", "change"), rows) + f"<p>{_text(words)}</p>"


def _mask(inspection: Inspection, pictures: Mapping[str, bytes]) -> str:
    facts = mask_statistics(inspection.matrices.mask)
    rows = [
        ("mean", f"{facts['mean']:.4f}"),
        ("standard deviation", f"{facts['std']:.4f}"),
        ("smallest and largest", f"{facts['min']:.3f} and {facts['max']:.3f}"),
        *((f"{float(at):.0%} lie below", f"{value:.3f}") for at, value in facts["quantiles"].items()),
        (f"within {NEAR:g} of 1", f"{facts['share_near_1']:.2%}"),
        (f"within {NEAR:g} of 0", f"{facts['share_near_0']:.2%}"),
        ("below 0", f"{facts['share_below_0']:.2%}"),
    ]
    words = (
        f"The values are those of {facts['images']} images, {facts['values']:,} elements. A 1 leaves an element of R "
        "as it is, a 0 removes it, and a negative value turns its sign round."
    )
    alt = f"Histogram of the mask values: mean {facts['mean']:.3f}, standard deviation {facts['std']:.3f}."
    return _figure(pictures, "mask.png", alt, words) + _table(("measure", "value"), rows)


def _matrices(inspection: Inspection, pictures: Mapping[str, bytes]) -> str:
    names = ", ".join(inspection.matrices.ids[index] for index in inspection.shown)
    single = (
        "A row is a class, the most probable ones first, and a column a dimension of the embedding. The sum of a row, "
        "times the multiplier, is the class's logit; beside the name stand the probabilities before and after. The "
        "mark ▸ is on the right class."
    )
    means = (
        "The row of a class is the mean, over the images of that class, of the class's own row. It shows which "
        "dimensions speak for a class, and how the mask weighs them."
    )
    return _figure(pictures, "heat-maps.png", f"Heat maps of M, R and M∘R of {names}.", single, wide=True) + _figure(
        pictures, "class-averages.png", "Heat maps of the means of M, R and M∘R of each class.", means, wide=True
    )


def _projection(inspection: Inspection, pictures: Mapping[str, bytes]) -> str:
    before, after = inspection.projections
    words = (
        f"A point is an image, and close points have rational matrices that are alike, by {before.method}. Distances "
        "between far points, directions and the sizes of groups have no meaning."
    )
    if before.same_class is not None and after.same_class is not None:
        words += (
            f" In the whole matrices, the nearest other image is of the same class for {before.same_class:.1%} of the "
            f"images by R, and for {after.same_class:.1%} by M∘R."
        )
    alt = f"Two scatter plots of {len(before.points)} images, by R and by M∘R, coloured by class."
    return _figure(pictures, "projection.png", alt, words, wide=True)


def _classes(inspection: Inspection, pictures: Mapping[str, bytes]) -> str:
    rows = sorted(inspection.classes(), key=lambda row: (-change_of_class(row), row["label"]))
    gained, lost = ([row for row in rows if sign * change_of_class(row) > 0] for sign in (1, -1))
    words = (
        f"{len(gained)} classes gained, {len(lost)} lost, and {len(rows) - len(gained) - len(lost)} have as many right "
        "answers as before."
    )
    headings = (
        "class",
        "images",
        "zero-shot, %",
        "adapted, %",
        "wrong to right",
        "right to wrong",
        "net",
        "mostly taken for",
    )
    cells = [
        (
            row["name"], row["images"], f"{row['zero_shot_top1']:.1f}", f"{row['adapted_top1']:.1f}",
            round(row["wrong_to_right"]), round(row["right_to_wrong"]),
            _signed(change_of_class(row), change_of_class(row) > 0, digits=0), row["taken_for"] or "",
        )
        for row in rows
    ]  # fmt: skip
    alt = "Accuracy of each class, zero-shot and adapted; the table below has the numbers."
    table = _table(headings, cells, text=(7,))
    is_open = " open" if len(rows) <= OPEN_ROWS else ""
    return (
        _figure(pictures, "classes.png", alt, words)
        + f"<details{is_open}><summary>Answers that flipped, by class</summary>{table}</details>"
    )


def _reliability(inspection: Inspection, pictures: Mapping[str, bytes]) -> str:
    rows = [
        (
            f"{a.low:.2f} to {a.high:.2f}",
            *(text for one in (a, b) for text in (one.answers, _share(one.confidence), _share(one.accuracy))),
        )
        for a, b in zip(*inspection.bins(), strict=True)
        if a.answers or b.answers
    ]
    headings = (
        "confidence",
        "answers, zero-shot",
        "mean confidence",
        "right",
        "answers, adapted",
        "mean confidence",
        "right",
    )
    words = (
        "Bars above the dashed line are answers that are right more often than they claim, and bars below it are too "
        "sure. The calibration error is the mean length of the orange lines, each counted once for every answer."
    )
    measures = inspection.measures()
    ends = [_number(measures[f"{name}_ece"]) for name in ("zero_shot", "adapted")]
    alt = f"Reliability diagrams: calibration error {ends[0]} % zero-shot and {ends[1]} % adapted."
    return _figure(pictures, "reliability.png", alt, words, wide=True) + (
        f"<details><summary>The numbers of the diagrams</summary>{_table(headings, rows)}</details>"
    )


class _Markup(str):
    """A text that is HTML already."""


def _text(value: object) -> str:
    """Return a value as HTML that shows it."""
    return str(value) if isinstance(value, _Markup) else html.escape(str(value))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _signed(value: float | None, better: bool, digits: int = 2) -> str:
    """Return a change with its sign, in the colour of a gain or a loss."""
    if not value or value is None:
        return "-" if value is None else "0"
    return _Markup(f'<span class="{"gain" if better else "loss"}">{value:+.{digits}f}</span>')


def _figure(pictures: Mapping[str, bytes], name: str, alt: str, caption: str, *, wide: bool = False) -> str:
    """Return a picture with its caption. wide: whether a narrow screen scrolls it, because it would be too small."""
    content = base64.b64encode(pictures[name]).decode()
    return (
        f"<figure{' class=wide' if wide else ''}><div{' tabindex=0' if wide else ''}>"
        f'<img src="data:image/png;base64,{content}" alt="{_text(alt)}"></div>'
        f"<figcaption>{_text(caption)}</figcaption></figure>\n"
    )


def _table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], *, text: Sequence[int] = (), heading: bool = True
) -> str:
    """Return a table. text: the columns, besides the first, that hold texts and not numbers."""
    kind = [" class=text" if place in text else "" for place in range(len(headings))]
    head = "".join(f"<th scope=col{one}>{_text(name)}</th>" for name, one in zip(headings, kind, strict=True))
    body = "".join(
        f"<tr><th scope=row>{_text(row[0])}</th>"
        + "".join(f"<td{one}>{_text(cell)}</td>" for cell, one in zip(row[1:], kind[1:], strict=True))
        + "</tr>\n"
        for row in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if heading else ""
    return f"<div class=table tabindex=0><table>{top}<tbody>\n{body}</tbody></table></div>"
