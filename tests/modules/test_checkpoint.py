"""Our own and the published checkpoints are loaded in all their variants; damaged and hostile ones are refused."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rada_fast.config.method import AdapterConfig
from rada_fast.errors import UserError
from rada_fast.modules import RationalAdapter, load_adapter, save_adapter

CONFIG = AdapterConfig.official(16)


def random_adapter(config: AdapterConfig = CONFIG) -> RationalAdapter:
    adapter = RationalAdapter(config)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    return adapter


def assert_equal(left: RationalAdapter, right: RationalAdapter) -> None:
    assert left.config == right.config
    assert left.state_dict().keys() == right.state_dict().keys()
    assert all(torch.equal(tensor, right.state_dict()[name]) for name, tensor in left.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        AdapterConfig.paper(24),
        AdapterConfig.official(16, num_layers=2),
        AdapterConfig.paper(8, mask_function="mlp"),
    ],
)
def test_own_files_round_trip_and_appear_whole(tmp_path: Path, config: AdapterConfig) -> None:
    adapter = random_adapter(config)
    save_adapter(adapter, tmp_path / "a.safetensors")
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert_equal(loaded, adapter)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def published_state(adapter: RationalAdapter, prefix: str = "mha.") -> dict[str, Any]:
    """Return the state of a published model: the adapter among the tensors of the frozen model."""
    state = {f"{prefix}{name}": tensor for name, tensor in adapter.state_dict().items()}
    return state | {
        "logit_scale": torch.tensor(4.6),
        "image_encoder.conv1.weight": torch.zeros(2, 2),
        "text_encoder.transformer.resblocks.0.attn.out_proj.weight": torch.zeros(4, 4),
        "ln_final.weight": torch.ones(4),
    }


class Scheduler:
    """Scheduler is pickled with its optimiser into published checkpoints, as their code does with its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def published_file(path: Path, state: dict[str, Any]) -> Path:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])
    content = {
        "state_dict": state, "epoch": 13, "optimizer": optimizer.state_dict(),
        "scheduler": {"successor": Scheduler(optimizer)}, "val_result": None,
    }  # fmt: skip
    torch.save(content, path)
    return path


def test_a_published_checkpoint_with_pickled_objects_is_loaded(tmp_path: Path) -> None:
    adapter = random_adapter()
    path = published_file(tmp_path / "model.pth.tar-13", published_state(adapter))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert_equal(load_adapter(path), adapter)


def test_variants_of_published_checkpoints_are_loaded(tmp_path: Path) -> None:
    adapter = random_adapter()
    cases = {
        "bare": adapter.state_dict(),
        "module": {f"module.{name}": tensor for name, tensor in published_state(adapter).items()},
        "alpha": published_state(adapter) | {"mha.alpha": torch.ones(3)},
        "bare_alpha": adapter.state_dict() | {"alpha": torch.ones(3)},
        "half": {name: tensor.half() for name, tensor in published_state(adapter).items()},
        "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in published_state(adapter).items()},
    }
    for name, state in cases.items():
        torch.save({"state_dict": state} if name != "bare" else state, tmp_path / name)
        loaded = load_adapter(tmp_path / name)
        assert loaded.config == CONFIG
        assert loaded.k_proj.weight.dtype == torch.float32
        torch.testing.assert_close(loaded.k_proj.weight, adapter.k_proj.weight, rtol=1e-3, atol=1e-3)


def test_the_query_key_variant_has_its_own_names_and_scale(tmp_path: Path) -> None:
    adapter = random_adapter()
    state = {name.replace("q_proj1", "q_proj"): tensor for name, tensor in published_state(adapter).items()}
    loaded = load_adapter(published_file(tmp_path / "model", state))
    assert loaded.config.input_scale_factor == 4.0
    assert torch.equal(loaded.q_proj1.weight, adapter.q_proj1.weight)


def test_a_run_folder_gives_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "output" / "RAda"
    folder.mkdir(parents=True)
    old, new = random_adapter(), random_adapter()
    published_file(folder / "model.pth.tar-5", published_state(old))
    published_file(folder / "model.pth.tar-13", published_state(new))
    (folder / "checkpoint").write_text("model.pth.tar-13\n")
    assert_equal(load_adapter(tmp_path / "output"), new)
    with pytest.raises(UserError, match="holds no file named 'checkpoint'"):
        load_adapter(folder.parent.parent)


def test_torchs_older_file_format_is_loaded(tmp_path: Path) -> None:
    adapter = random_adapter()
    torch.save(adapter.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_equal(load_adapter(tmp_path / "old.pth"), adapter)


def test_a_given_configuration_replaces_the_stored_one(tmp_path: Path) -> None:
    adapter = random_adapter()
    save_adapter(adapter, tmp_path / "a.safetensors")
    config = AdapterConfig.official(16, temperature=0.5)
    assert load_adapter(tmp_path / "a.safetensors", config).config == config


class Hostile:
    """Unpickling Hostile calls a function."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_hostile_files_execute_nothing(tmp_path: Path) -> None:
    import os
    import subprocess

    adapter = random_adapter()
    mark = tmp_path / "executed"
    calls = {
        "system": Hostile(os.system, f"touch {mark}"),
        "popen": Hostile(subprocess.Popen, ["touch", str(mark)]),
        "eval": Hostile(eval, f"open({str(mark)!r}, 'w')"),
        "open": Hostile(open, str(mark), "w"),
    }
    for name, call in calls.items():
        path = tmp_path / name
        torch.save({"state_dict": published_state(adapter), "scheduler": call}, path)
        try:
            loaded = load_adapter(path)
        except UserError as error:
            assert "without executing code" in str(error)  # noqa: PT017 (either outcome is safe)
        else:
            assert_equal(loaded, adapter)
        assert not mark.exists(), name

        # A bare pickle without torch's container executes nothing either.
        path.write_bytes(pickle.dumps({"state_dict": call}))
        with pytest.raises(UserError, match="without executing code"):
            load_adapter(path)
        assert not mark.exists(), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "without executing code"),
        (b"not a checkpoint at all", "without executing code"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}", "not readable safetensors|without executing code"),
        (b"PK\x03\x04 torn zip", "without executing code"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path / "file")


def test_a_torn_copy_of_a_good_file_is_refused(tmp_path: Path) -> None:
    save_adapter(random_adapter(), tmp_path / "good")
    published_file(tmp_path / "published", published_state(random_adapter()))
    for name in ("good", "published"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / "torn").write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=r"adapter checkpoint .*torn"):
            load_adapter(tmp_path / "torn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("v_proj.weight"), "lacks v_proj.weight"),
        (lambda s: s.update({"k_proj.bias": torch.zeros(3)}), r"wrong shapes: k_proj.bias \(3,\) instead of \(16,\)"),
        (lambda s: s["k_proj.bias"].fill_(float("nan")), "k_proj.bias holds NaN"),
        (lambda s: s.update({"k_proj.bias": torch.zeros(16, dtype=torch.long)}), "must be a floating-point tensor"),
        (lambda s: s.clear(), "must hold one rational adapter"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "unexpected extra.weight"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    state = {name: tensor.clone() for name, tensor in random_adapter().state_dict().items()}
    change(state)
    for name, write in (("a.safetensors", save_file), ("a.pt", torch.save)):
        write(state, str(tmp_path / name))
        with pytest.raises(UserError, match=message):
            load_adapter(tmp_path / name)


def test_missing_files_and_other_content_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_adapter(tmp_path / "nowhere")
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(UserError, match="must hold a dictionary of tensors, got list"):
        load_adapter(tmp_path / "list")
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("readme", "no checkpoint")
    with pytest.raises(UserError, match="without executing code"):
        load_adapter(tmp_path / "zip")
