"""The command eval: what a run has trained is evaluated on sets of images, each with classes of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any, TypeVar

import torch

from rada_fast.config.inference import EvalOptions, InspectOptions
from rada_fast.loops.evaluate import EvaluationData, encode_evaluation, evaluate_sets, trained_sets
from rada_fast.loops.identity import open_folder
from rada_fast.loops.setup import Setup, open_data_and_model, open_setup
from rada_fast.loops.trained import with_trained_weights
from rada_fast.loops.zero_shot import check_answers
from rada_fast.models.class_features import ClassGroup, text_features
from rada_fast.models.class_names import class_names_of
from rada_fast.reports.summary import accuracy_of, already_finished, finish
from rada_fast.runs.machine import reset_peak_memory
from rada_fast.system import notices

IMAGES = "images.jsonl"
Options = TypeVar("Options", EvalOptions, InspectOptions)


def run_eval(options: EvalOptions) -> dict[str, Any]:
    """Evaluate what was trained on every set of images, and write the summary. Returns the summary.

    Raises UserError naming an option that cannot be used.
    """
    setup, evaluation = open_sets("eval", options, options.data)
    # The lines are written at once when everything is evaluated, so no data decide anything before.
    with open_folder(setup, setup.sources, deciding=(), names=setup.names, text=setup.text) as folder:
        scope = {"limit": options.run.limit}
        if (summary := folder.finished_summary(scope)) is not None:
            return already_finished(folder, summary, resumed=len(evaluation))
        reset_peak_memory()
        start = time.perf_counter()
        # The features of a set are cached on disk, so an interrupted run encodes no set twice.
        sets = encode_evaluation(evaluation, setup)
        for one in sets:
            check_answers(one.images, one.text, one.names, f"--data {one.name}", setup)
        folder.accept_inputs()
        records = evaluate_sets(sets, setup, folder, trained_sets(sets, evaluation, setup))
        lines = [{"data": name} | record for name, found in records.items() for record in found]
        folder.write_lines(IMAGES, lines)
        results: dict[str, Any] = {}
        for one in sets:
            accuracy = accuracy_of(records[one.name], before="zero_shot", after="adapted")
            results[one.name] = {"classes": len(one.names)} | accuracy
        if len(sets) > 1:
            for name in ("zero_shot_top1", "adapted_top1"):
                results[f"average_{name}"] = round(fmean(results[one.name][name] for one in sets), 3)
        results["unreadable"] = sum(line["status"] == "unreadable" for line in lines)
        results["time"] = {"seconds": round(time.perf_counter() - start, 3)}
        return finish(folder, setup.facts(), results, scope=scope, resumed=0)


def open_sets(command: str, options: Options, data: Sequence[str]) -> tuple[Setup, list[EvaluationData]]:
    """Open the data, the model and the adapter. Returns the set-up and the sets of images to evaluate on.

    command: the name of the command; options: its options; data: the sets as KIND:PATH.

    Raises UserError naming an option that cannot be used.
    """
    options, stored = with_trained_weights(options)
    parts = {spec: f"data {spec}" for spec in data}
    opened = open_data_and_model(options, {part: spec for spec, part in parts.items()})
    prompts = options.text.text_features is None
    evaluation = []
    for spec, part in parts.items():
        source = opened.sources[part]
        names = class_names_of(source, options.text.classes, prompts=prompts)
        group = ClassGroup(names, data=spec)
        (text,) = text_features(
            options.text, [group], opened.model, opened.text_file, uses_classifier=stored is not None
        )
        evaluation.append(EvaluationData(spec, source, text, names))
    names = tuple(name for one in evaluation for name in one.names)
    every = torch.cat([one.text for one in evaluation if one.text is not None])
    setup = open_setup(command, options, opened, names, every, stored)
    if options.adapter.adapter is None:
        notices.note("no --adapter is given: a new adapter changes nothing, so adapted answers are the zero-shot ones")
    return setup, evaluation
