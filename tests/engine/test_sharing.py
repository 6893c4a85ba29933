"""Several processes take the steps of the single process, whatever is trained and however their batches are divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from rada_fast.config.commands import EFTOptions, FFTOptions
from rada_fast.config.method import AdapterConfig
from rada_fast.config.methods import EFT_METHODS, FFT_METHODS
from rada_fast.config.options import RunOptions, TuningOptions
from rada_fast.data.open import open_source
from rada_fast.engine.efficient_training import TunedEncoders, efficient_plan, efficient_step
from rada_fast.engine.full_training import stage_plan, stage_step, stages_of
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.sharded_encoders import ScalerOfParts
from rada_fast.engine.sharing import whole_tensor
from rada_fast.engine.training import train_epochs
from rada_fast.models.encoder_tuning import EncoderTuning, captions_of
from rada_fast.models.image_features import features_of
from rada_fast.models.prompts import resolve_prompts
from rada_fast.models.vision_language import load_model
from rada_fast.modules.classifier import Classifier
from rada_fast.modules.heads import new_head
from rada_fast.modules.rational_adapter import new_adapter
from rada_fast.system import ranks
from tests.processes import run_ranks

NAMES = ["red circle", "blue square", "green star"]
TUNING = TuningOptions(context_tokens=2, prompt_depth=2, adapter_depth=2, adapter_width=4)
EFT: dict[str, dict[str, Any]] = {
    "rada": {},
    "rada, batches of one": {"batch_size": 1},
    "coop": {"method": "coop"},
    "rada+adapter": {"method": "rada+adapter"},
    "prompt, crops": {"method": "prompt", "train_views": "crop"},
}
FFT: dict[str, dict[str, Any]] = {
    "rada": {},
    "rada, parts of one": {"micro_batch": 1},
    "lp-ft, center": {"method": "lp-ft", "train_views": "center"},
    "l2-sp, checkpoints": {"method": "l2-sp", "grad_checkpointing": True},
    "ft, sharded": {"method": "ft", "shard": "full"},
    "rada, sharded, parts of one": {"shard": "full", "micro_batch": 1, "grad_checkpointing": True},
    "flyp": {"method": "flyp"},
    "flyp, parts of one": {"method": "flyp", "micro_batch": 1},
    "flyp, sharded": {"method": "flyp", "shard": "full", "micro_batch": 2},
}

CASES = [*(("eft", name) for name in EFT), *(("fft", name) for name in FFT)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write seven pictures of noise in three classes, one of which cannot be read."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(7):
        path = root / NAMES[index % 3] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    (root / NAMES[1] / "4.png").write_bytes(b"no picture")
    return root


def trained(setting: str, name: str, pictures: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Train for two epochs of batches of up to five images. Returns the weights and the records of the epochs."""
    changes = (EFT if setting == "eft" else FFT)[name]
    common: dict[str, Any] = {"train": str(pictures), "run": RunOptions(output="unused"), "lr": 1e-3, "epochs": 2}
    common |= {"batch_size": 5} | changes
    vlm, source = load_model("embedded"), open_source(f"imagefolder:{pictures}", "train")
    text, scale, device = vlm.encode_texts(NAMES), vlm.logit_scale, torch.device("cpu")
    adapter = new_adapter(AdapterConfig.official(vlm.embed_dim, num_heads=4), 0)
    torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.1, generator=torch.Generator().manual_seed(0))
    features = features_of(source, vlm, title="encode", workers=0)
    records: list[dict[str, Any]] = []
    if setting == "eft":
        eft = EFTOptions(**({"test": "unused"} | common))
        method, tuned = EFT_METHODS[eft.method], None
        module = nn.ModuleList([new_head(method.head, adapter, seed=0, ratio=0.2)])
        if method.tuning is not None:
            tuning = EncoderTuning(method.tuning, vlm, "a photo of a {}.", TUNING, 0)
            tuned = TunedEncoders(tuning, vlm, tuning.tokens_of(NAMES))
            module.append(tuning)
        step = efficient_step(cast(Any, module[0]), text, scale, eft, tuned)
        plan = efficient_plan(eft, source, features, vlm, device, lambda images: None, tuned)
        records += train_epochs(step, module, plan)
        weights = module.state_dict()
    else:
        common = {"test": ("unused",), "finetune_lr": 1e-4, "finetune_epochs": 2, "finetune_from": 2} | common
        fft = FFTOptions(**common)
        head = new_head(FFT_METHODS[fft.method].head, adapter, seed=0, ratio=0.2)
        classifier = Classifier(text, head, scale)
        for stage in stages_of(fft):
            captions = captions_of(vlm, NAMES, resolve_prompts(["simple"])) if stage.contrastive else None
            with stage_step(stage, classifier, vlm if stage.trains_encoder else None, fft, captions) as made:
                plan = stage_plan(stage, fft, source, features, vlm, device, lambda images: None)
                records += train_epochs(made.step, made.trained, plan)
        weights = classifier.state_dict() | vlm.model.state_dict()
    return weights, [{name: record[name] for name in ("loss", "penalty", "train_top1", "images")} for record in records]


def cases_of(count: int) -> list[tuple[str, str]]:
    """Return the cases that are trained in two or in three processes, half of them in each."""
    return [case for number, case in enumerate(CASES) if (number + count) % 2]


def check_scaler(group: ranks.Ranks) -> None:
    """Check that all processes skip a step if a part of the gradients in one of them has overflowed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer, whole = nn.Linear(4, 6, bias=False), nn.Parameter(torch.ones(3))
    fully_shard(layer, mesh=init_device_mesh("cpu", (group.count,)))
    optimizer = training_optimizer([whole, *layer.parameters()], "sgd", lr=1.0, weight_decay=0.0)
    scaler = ScalerOfParts("cpu", init_scale=4.0)
    start = whole_tensor(layer.weight).detach().clone()
    for last_is_infinite in (True, False):
        optimizer.zero_grad()
        given = torch.ones(1, 4)
        given[0, 0] = torch.inf if last_is_infinite and group.rank == group.count - 1 else 1.0
        scaler.scale(layer(given).sum()).backward()
        whole.grad = torch.full((3,), 4.0 if last_is_infinite else 2.0)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert torch.equal(whole, torch.full((3,), 1.0 if last_is_infinite else 0.0))
        moved = whole_tensor(layer.weight).detach() - start
        torch.testing.assert_close(moved, torch.zeros(6, 4) if last_is_infinite else -torch.ones(6, 4))


def train_all(pictures: Path, folder: Path) -> None:
    """Train as one of several processes, and write what came out."""
    with ranks.joined() as group:
        check_scaler(group)
        for setting, name in cases_of(group.count):
            torch.save(trained(setting, name, pictures), folder / f"{setting} {name} {group.rank}.pt")


@pytest.fixture(scope="module")
def alone(pictures: Path) -> dict[str, Any]:
    """Return what this process alone trains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other
    try:
        return {f"{setting} {name}": trained(setting, name, pictures) for setting, name in CASES}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_train_what_one_trains(count: int, pictures: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    """Losses agree to six digits. A weight differs by less than two steps move it, and most by far less.

    AdamW divides a gradient by its size, so that weights whose gradients are nearly zero move by rounding errors alone.
    Those of the keys' biases are exactly zero, but for such errors, and are left out.
    """
    run_ranks(count, tmp_path, train_all, pictures, tmp_path)
    for case in map(" ".join, cases_of(count)):
        weights, records = alone[case]
        for rank in range(count):
            found, found_records = torch.load(tmp_path / f"{case} {rank}.pt")
            assert found_records == [pytest.approx(record, rel=2e-6, abs=2e-6) for record in records], case
            for name, expected in weights.items():
                value = found[name]
                if name.endswith("in_proj_bias"):
                    value, expected = (torch.cat([one.chunk(3)[0], one.chunk(3)[2]]) for one in (value, expected))
                difference = (value - expected).abs()
                assert float(difference.max()) < 2e-4, (case, name)
                assert float(difference.double().square().mean().sqrt()) < 1e-6, (case, name)
