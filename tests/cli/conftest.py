"""Make the files and folders that the tests give to the commands, good ones and bad ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter, save_adapter
from tests.pictures import write_class_folders, write_picture

LABELS = np.array([0, 1, 0, 1])


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of inputs once for all tests; no test writes into it."""
    root = tmp_path_factory.mktemp("inputs")
    write_class_folders(root / "pictures", ("red plain square", "blue plain ring"), each=2)
    write_class_folders(root / "other", ("green plain ring", "red plain square"))
    write_class_folders(root / "latin", (os.fsdecode(b"\xff ring"), "blue plain ring"))
    write_picture(root / "flat" / "0.png")
    (root / "empty").mkdir()
    (root / "file").write_text("")
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to(root / "loop")

    features = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)

    def feature_file(name: str, **arrays: np.ndarray) -> None:
        np.savez(root / f"{name}.npz", **arrays)

    feature_file("good", features=features, labels=LABELS)
    feature_file("text", features=features[:2], labels=LABELS[:2])
    feature_file("wide", features=np.ones((2, 32), np.float32), labels=LABELS[:2])
    feature_file("nan", features=np.where(np.eye(4, 16) > 0, np.nan, features), labels=LABELS)
    feature_file("zero", features=np.zeros((4, 16), np.float32), labels=LABELS)
    feature_file("whole", features=np.ones((4, 16), np.int64), labels=LABELS)
    feature_file("flat", features=np.ones(16, np.float32), labels=LABELS)
    feature_file("short", features=features, labels=LABELS[:3])
    feature_file("negative", features=features, labels=np.array([0, 1, -1, 1]))
    feature_file("huge", features=features, labels=np.array([0, 1, 2147483647, 1]))
    feature_file("real", features=features, labels=LABELS.astype(np.float32))
    feature_file("scale", features=features, labels=LABELS, logit_scale=np.array(-5.0))
    feature_file("unlabelled", features=features)
    feature_file("none", features=features[:0], labels=LABELS[:0])
    feature_file("names", features=features, labels=LABELS, class_names=np.array(["one"]))
    feature_file("bytes", features=features, labels=LABELS, class_names=np.array([b"\xff", b"a"]))
    feature_file("true", features=features, labels=LABELS.astype(bool))
    feature_file("unsigned", features=features, labels=np.array([0, 1, 2**64 - 1, 1], np.uint64))
    feature_file("complex", features=features.astype(np.complex64), labels=LABELS)
    feature_file("deep", features=features.reshape(4, 2, 2, 4), labels=LABELS)
    feature_file("objects", features=features, labels=LABELS, class_names=np.array(["a", 1], dtype=object))
    (root / "torn.npz").write_bytes((root / "good.npz").read_bytes()[:300])

    save_adapter(RationalAdapter(AdapterConfig.official(16)), root / "narrow.safetensors")
    save_file({"a": torch.zeros(1)}, root / "other.safetensors")
    (root / "torn.safetensors").write_bytes((root / "narrow.safetensors").read_bytes()[:500])

    texts = {
        "three.txt": "a\nb\nc\n",
        "none.txt": "\n",
        "numbers.json": "[1, 2]",
        "half.json": '["\\ud800", "b"]',
        "torn.json": '["a", ',
        "deep.json": "[" * 100_000,
        "torn.toml": "steps = \n",
        "unknown.toml": "stepz = 3\n",
        "own.toml": "options = 'other.toml'\n",
        "type.toml": 'steps = "three"\n',
        "real.toml": "steps = 3.5\n",
        "true.toml": "steps = true\n",
        "number.toml": "overwrite = 1\n",
        "text.toml": "model = 5\n",
        "date.toml": "data = 2020-01-01\n",
        "list.toml": "steps = [1, 2]\n",
        "empty_list.toml": "queries = []\n",
        "table.toml": "[run]\nseed = 1\n",
        "double.toml": "view_kind = 'crop'\nview-kind = 'augmix'\n",
        "double.json": '{"steps": 1, "steps": 2}',
        "nan.json": '{"lr": NaN}',
        "inf.json": '{"lr": Infinity}',
        "null.json": '{"steps": null}',
        "array.json": "[1]",
        "long.json": '{"seed": ' + "9" * 5000 + "}",
        "long.toml": "seed = " + "9" * 5000 + "\n",
        "deep_options.json": '{"steps": ' + "[" * 100_000,
        "deep_options.toml": "steps = " + "[" * 100_000,
        "nul.json": '{"output": "a\\u0000b"}',
        "empty_value.json": '{"output": ""}',
        "range.toml": "steps = -1\n",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (root / "latin.toml").write_bytes("data = 'caf\xe9'\n".encode("latin-1"))
    return root
