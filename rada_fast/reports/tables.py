"""The tables of a report: each set of images, base and new classes, each class, and the comparison of two runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rada_fast.errors import UserError
from rada_fast.reports.measures import Spread, calibration_error, paired_test, spread, wilson
from rada_fast.reports.results import Answer, Evaluation
from rada_fast.reports.summary import harmonic_mean

Row = dict[str, Any]
"""One row of a table: the columns by their names, with plain values."""
BEFORE_AND_AFTER = ("zero_shot", "adapted")
SPREAD_COLUMNS = ("std", "low", "high")


def measures_of(evaluation: Evaluation) -> Row:
    """Return the measures of one run on one set of images. Accuracies and errors are in percent."""
    answers = evaluation.answers
    row: Row = {"images": len(answers), "unreadable": sum(not answer.before for answer in answers)}
    for place, name in enumerate(BEFORE_AND_AFTER):
        right = [answer.right_after if place else answer.right_before for answer in answers]
        best = [answer.after if place else answer.before for answer in answers]
        row[f"{name}_top1"] = 100 * sum(right) / len(answers)
        among = (answer.label in five[:5] for answer, five in zip(answers, best, strict=True))
        row[f"{name}_top5"] = 100 * sum(among) / len(answers)
        row[f"{name}_mean_class"] = 100 * fmean(
            fmean(answer.right_after if place else answer.right_before for answer in own)
            for own in _by_label(answers).values()
        )
        interval = wilson(sum(right), len(answers))
        assert interval is not None
        row[f"{name}_low"], row[f"{name}_high"] = interval
        row[f"{name}_ece"] = calibration_error(
            (answer.confidence[place], correct)
            for answer, correct in zip(answers, right, strict=True)
            if answer.confidence is not None
        )
    gained = sum(answer.right_after and not answer.right_before for answer in answers)
    lost = sum(answer.right_before and not answer.right_after for answer in answers)
    return row | {"wrong_to_right": gained, "right_to_wrong": lost, "p": paired_test(lost, gained).p}


def run_rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """Return a row for every run and set of images, with Wilson's interval of the accuracy."""
    labels = method_labels(evaluations)
    return [
        {
            "folder": str(one.folder), "method": labels[one.method], "trained_on": one.trained_on, "data": one.data,
            "part": one.part, "seed": one.seed, **measures_of(one),
        }
        for one in evaluations
    ]  # fmt: skip


def set_rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """Return a row for every set of images, with the mean over the seeds of every measure.

    With several seeds, low and high are the ends of the interval of the mean by Student's t. With one seed, and for an
    accuracy that no seed changes, such as the zero-shot one, they are those of Wilson's interval.
    """
    labels = method_labels(evaluations)
    rows = []
    for group in repetitions(evaluations):
        first, found = group[0], [measures_of(one) for one in group]
        row: Row = {
            "method": labels[first.method], "trained_on": first.trained_on, "data": first.data, "part": first.part,
            "seeds": " ".join(str(one.seed) for one in group), "images": found[0]["images"],
            "unreadable": fmean(one["unreadable"] for one in found),
        }  # fmt: skip
        for name in BEFORE_AND_AFTER:
            accuracies = [one[f"{name}_top1"] for one in found]
            row |= _spread_columns(f"{name}_top1", spread(accuracies))
            row[f"{name}_interval"] = f"t over {len(group)} seeds"
            if len(set(accuracies)) == 1:
                row |= {f"{name}_top1_low": found[0][f"{name}_low"], f"{name}_top1_high": found[0][f"{name}_high"]}
                row[f"{name}_interval"] = "Wilson"
            for measure in ("top5", "mean_class", "ece"):
                values = [one[f"{name}_{measure}"] for one in found]
                row[f"{name}_{measure}"] = None if None in values else fmean(values)
        row |= {name: fmean(one[name] for one in found) for name in ("wrong_to_right", "right_to_wrong")}
        rows.append(row | {"p": found[0]["p"] if len(group) == 1 else None})
    return rows


def average_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the averages over the sets of images that the same training was evaluated on.

    rows: the rows of set_rows. Base and new classes have averages of their own; see base_to_new_rows.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["part"] not in ("base", "new"):
            groups.setdefault((row["method"], row["trained_on"], row["part"]), []).append(row)
    return [
        {
            "method": method, "trained_on": trained_on, "data": f"average of {len(own)} sets", "part": part,
            **{name: fmean(row[name] for row in own) for name in ("zero_shot_top1", "adapted_top1")},
        }
        for (method, trained_on, part), own in groups.items() if len(own) > 1
    ]  # fmt: skip


def base_to_new_rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """Return a row for every set whose classes were trained in halves, and one of the averages over several sets.

    A row has the accuracies on base and new classes and their harmonic mean, each before and after adaptation, as means
    over the seeds. Over several sets, mean_of_harmonic_means is the mean of the sets' harmonic means, and
    harmonic_mean_of_means that of the mean accuracies, which is what publications call H of the average.
    """
    labels = method_labels(evaluations)
    by_method: dict[str, list[Row]] = {}
    halves = [group for group in repetitions(evaluations) if group[0].part in ("base", "new")]
    for base in (group for group in halves if group[0].part == "base"):
        first = base[0]
        news = {one.folder: one for group in halves for one in group if one.part == "new"}
        pairs = [(one, news[one.folder]) for one in base if one.folder in news]
        if not pairs:
            continue
        row: Row = {"method": labels[first.method], "trained_on": first.trained_on, "data": first.data}
        row["seeds"] = " ".join(str(one.seed) for one, _ in pairs)
        for name in BEFORE_AND_AFTER:
            found = [[measures_of(one)[f"{name}_top1"] for one in pair] for pair in pairs]
            columns = {
                "base": [one for one, _ in found],
                "new": [other for _, other in found],
                "harmonic_mean": [mean for one, other in found if (mean := harmonic_mean(one, other)) is not None],
            }
            for column, values in columns.items():
                row |= _spread_columns(f"{name}_{column}", spread(values))
        by_method.setdefault(first.method, []).append(row)
    rows = []
    for own in by_method.values():
        rows += own
        if len(own) > 1:
            rows.append(average_row(own))
    return rows


def average_row(rows: Sequence[Row]) -> Row:
    """Return the averages of rows of base_to_new_rows over their sets."""
    average: Row = {"method": rows[0]["method"], "trained_on": None, "data": f"average of {len(rows)} sets"}
    average["seeds"] = rows[0]["seeds"] if len({row["seeds"] for row in rows}) == 1 else "various"
    for name in BEFORE_AND_AFTER:
        base, new, mean = (
            fmean(row[f"{name}_{column}"] for row in rows) for column in ("base", "new", "harmonic_mean")
        )
        average |= {f"{name}_base": base, f"{name}_new": new, f"{name}_mean_of_harmonic_means": mean}
        average[f"{name}_harmonic_mean_of_means"] = harmonic_mean(base, new)
    return average


def class_rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """Return a row for every class of every set, with the accuracies as means over the seeds.

    The column taken_for names the class that most of the wrong answers after adaptation give.
    """
    labels = method_labels(evaluations)
    rows = []
    for group in repetitions(evaluations):
        first = group[0]
        names = {number: name for one in reversed(group) for number, name in one.class_names.items()}
        by_label = [_by_label(one.answers) for one in group]
        for label in sorted({label for own in by_label for label in own}):
            answers = [own[label] for own in by_label if label in own]
            accuracies = {
                "zero_shot_top1": [100 * fmean(answer.right_before for answer in own) for own in answers],
                "adapted_top1": [100 * fmean(answer.right_after for answer in own) for own in answers],
            }
            every = [answer for own in answers for answer in own]
            wrong = Counter(answer.after[0] for answer in every if answer.after and not answer.right_after)
            row: Row = {
                "method": labels[first.method], "data": first.data, "part": first.part, "label": label,
                "name": names.get(label), "images": len(answers[0]),
            }  # fmt: skip
            for name, values in accuracies.items():
                over_seeds = spread(values)
                assert over_seeds is not None
                row |= {name: over_seeds.mean, f"{name}_std": over_seeds.std}
            row["wrong_to_right"] = sum(a.right_after and not a.right_before for a in every) / len(answers)
            row["right_to_wrong"] = sum(a.right_before and not a.right_after for a in every) / len(answers)
            most = wrong.most_common(1)
            rows.append(row | {"taken_for": names.get(most[0][0], most[0][0]) if most else None})
    return rows


def _by_label(answers: Sequence[Answer]) -> dict[int, list[Answer]]:
    """Return the answers about the images of each class."""
    found: dict[int, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.label, []).append(answer)
    return found


def comparison_rows(first: Sequence[Evaluation], second: Sequence[Evaluation]) -> list[Row]:
    """Compare two runs on the sets of images that both have, image by image, by McNemar's test.

    Raises UserError if no set of the two has the same images with the same classes.
    """
    rows, reasons = [], []
    alone = len(first) == len(second) == 1
    for one in first:
        for other in second:
            if not alone and (one.data, one.part) != (other.data, other.part):
                continue
            if (reason := _difference(one, other)) is not None:
                reasons.append(f"{one.data} ({one.part}): {reason}")
                continue
            pairs = [(answer, other.by_id[answer.id]) for answer in one.answers]
            lost = sum(a.right_after and not b.right_after for a, b in pairs)
            gained = sum(b.right_after and not a.right_after for a, b in pairs)
            test = paired_test(lost, gained)
            right = [100 * fmean(pair[place].right_after for pair in pairs) for place in (0, 1)]
            rows.append(
                {
                    "first": str(one.folder), "second": str(other.folder), "data": one.data, "part": one.part,
                    "images": len(pairs), "first_top1": right[0], "second_top1": right[1],
                    "only_first_right": lost, "only_second_right": gained, "p": test.p, "test": test.method,
                }
            )  # fmt: skip
    if not rows:
        why = "; ".join(reasons[:3]) or "they have no set of images in common"
        raise UserError(f"compare must name two runs on the same images: {why}")
    return rows


def _difference(one: Evaluation, other: Evaluation) -> str | None:
    """Say why the images of two runs cannot be compared. Returns None where they are the same."""
    if differing := sorted(one.by_id.keys() ^ other.by_id.keys()):
        return f"{len(differing)} images are in one of the two runs alone, such as {differing[0]}"
    odd = [id for id, answer in one.by_id.items() if answer.label != other.by_id[id].label]
    if odd:
        return f"the classes of {len(odd)} images differ, such as that of {odd[0]}"
    return None


def repetitions(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Group evaluations that differ in their seed alone. Each group is sorted by seed.

    A second run of the same seed begins another group, because it is no independent repetition.
    """
    groups: dict[tuple[Any, ...], list[Evaluation]] = {}
    for one in sorted(evaluations, key=lambda one: one.seed):
        common = (one.method, one.trained_on, one.data, one.part)
        number = 0
        while any(other.seed == one.seed for other in groups.get((*common, number), ())):
            number += 1
        groups.setdefault((*common, number), []).append(one)
    order = {id(one): index for index, one in enumerate(evaluations)}
    return sorted(groups.values(), key=lambda group: min(order[id(one)] for one in group))


def method_labels(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Return a readable name of every method: its command, and the options in which methods of the command differ."""
    methods = {one.method: one for one in evaluations}
    labels = {}
    for method, one in methods.items():
        others = [other for other in methods.values() if other.command == one.command]
        differing = [
            f"{name.replace('_', '-')} {_shown(value)}"
            for name, value in sorted(one.options.items())
            if any(other.options.get(name) != value for other in others)
        ]
        labels[method] = ", ".join([one.command, *differing])
    repeated = Counter(labels.values())
    return {method: label if repeated[label] == 1 else f"{label} ({method[:6]})" for method, label in labels.items()}


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _spread_columns(name: str, over_seeds: Spread | None) -> Row:
    if over_seeds is None:
        return {name: None} | {f"{name}_{column}": None for column in SPREAD_COLUMNS}
    # Without any spread, the interval by Student's t would have no width.
    low, high = over_seeds.interval if over_seeds.interval and over_seeds.std else (None, None)
    return {name: over_seeds.mean, f"{name}_std": over_seeds.std, f"{name}_low": low, f"{name}_high": high}


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns of some rows, in the order in which they first occur."""
    return list(dict.fromkeys(name for row in rows for name in row))
