"""Hostile adapters, weights and folders of models."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from rada_fast import save_adapter
from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter
from tests.hostile.planting import (
    MARK,
    Evil,
    Opener,
    case,
    evil_zip,
    features,
    given,
    lying_safetensors,
    on_pictures,
    ttt,
)
from tests.miniatures import write_coop
from tests.tiny_models import (
    made,
    write_archive,
    write_openclip_folder,
    write_transformers_folder,
)

for label, payload in {"program": Evil(), "file": Opener()}.items():

    @case(f"adapter: pickle with a {label}")
    def _(folder: Path, payload: Any = payload) -> list[str]:
        (folder / "a.pt").write_bytes(pickle.dumps(payload))
        return ttt(folder, adapter=folder / "a.pt")

    @case(f"adapter: torch file with a {label}")
    def _(folder: Path, payload: Any = payload) -> list[str]:
        torch.save({"model": payload}, folder / "a.pt")
        return ttt(folder, adapter=folder / "a.pt")

    @case(f"weights: torch file with a {label}")
    def _(folder: Path, payload: Any = payload) -> list[str]:
        torch.save({"state_dict": {"logit_scale": payload}}, folder / "w.pt")
        return on_pictures(folder, model="Small-ViT", pretrained=folder / "w.pt")

    @case(f"model archive: data.pkl with a {label}")
    def _(folder: Path, payload: Any = payload) -> list[str]:
        evil_zip(folder / "m.pt", payload)
        return on_pictures(folder, model=f"openai:{folder / 'm.pt'}")

    @case(f"split: pickle with a {label}")
    def _(folder: Path, payload: Any = payload) -> list[str]:
        data = write_coop(folder, "dtd")
        (data / "split_fewshot").mkdir()
        for seed in range(4):
            (data / "split_fewshot" / f"shot_16-seed_{seed}.pkl").write_bytes(pickle.dumps({"train": payload}))
        return ["eft", *given(folder, {"train": f"coop:{data}", "test": f"coop:{data}", "seed": 1, "epochs": 1})]


@case("adapter: zip with code")
def _(folder: Path) -> list[str]:
    evil_zip(folder / "a.pt")
    return ttt(folder, adapter=folder / "a.pt")


@case("adapter: safetensors with a lying header")
def _(folder: Path) -> list[str]:
    lying_safetensors(folder / "a.safetensors", w={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]})
    return ttt(folder, adapter=folder / "a.safetensors")


@case("adapter: safetensors with a header of 2^60 bytes")
def _(folder: Path) -> list[str]:
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    return ttt(folder, adapter=folder / "a.safetensors")


@case("adapter: safetensors whose configuration is code")
def _(folder: Path) -> list[str]:
    config = f"__import__('os').system('touch {MARK}')"
    content = save(
        RationalAdapter(AdapterConfig.official(16)).state_dict(), {"format": "rada_fast.adapter.v1", "config": config}
    )
    (folder / "a.safetensors").write_bytes(content)
    return ttt(folder, adapter=folder / "a.safetensors")


@case("method: safetensors whose configuration is code")
def _(folder: Path) -> list[str]:
    run = folder / "run"
    run.mkdir()
    save_adapter(RationalAdapter(AdapterConfig.official(16)), run / "adapter.safetensors")
    save_file({"x": torch.zeros(1)}, run / "method.safetensors", {"method": "{'__reduce__': os.system}", "format": "x"})
    (run / "run.json").write_text('{"format": "rada_fast.run.v1", "identity": {"command": "eft", "options": {}}}')
    return [
        "eval",
        *given(folder, {"data": features(folder), "text-features": f"features:{folder}/text.npz", "adapter": run}),
    ]


@case("weights: safetensors with a lying header")
def _(folder: Path) -> list[str]:
    lying_safetensors(folder / "w.safetensors", logit_scale={"dtype": "F32", "shape": [], "data_offsets": [0, 2**40]})
    return on_pictures(folder, model="Small-ViT", pretrained=folder / "w.safetensors")


@case("weights: TorchScript whose program is replaced", 0, 2)
def _(folder: Path) -> list[str]:
    write_archive(folder / "good.pt")
    with zipfile.ZipFile(folder / "good.pt") as good, zipfile.ZipFile(folder / "w.pt", "w") as bad:
        for entry in good.namelist():
            content = good.read(entry)
            if "/code/" in entry and entry.endswith(".py"):
                content = f"import os\nos.system('touch {MARK}')\n".encode() + content
            bad.writestr(entry, content)
    return on_pictures(folder, model="Small-ViT", pretrained=folder / "w.pt")


@case("open_clip folder: pickled weights")
def _(folder: Path) -> list[str]:
    write_openclip_folder(folder / "m", "Small-ViT")
    (folder / "m" / "open_clip_model.safetensors").unlink()
    torch.save({"logit_scale": Evil()}, folder / "m" / "open_clip_pytorch_model.bin")
    return on_pictures(folder, model=f"openclip:{folder / 'm'}")


@case("open_clip folder: code of its own")
def _(folder: Path) -> list[str]:
    write_openclip_folder(folder / "m", "Small-ViT")
    path = folder / "m" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": str(folder / "m"),
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    path.write_text(json.dumps(config))
    own_code(folder / "m")
    return on_pictures(folder, model=f"openclip:{folder / 'm'}")


@case("open_clip folder: a tokenizer with code of its own")
def _(folder: Path) -> list[str]:
    write_openclip_folder(folder / "m", "Small-ViT")
    path = folder / "m" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": str(folder / "m")}
    path.write_text(json.dumps(config))
    own_code(folder / "m")
    return on_pictures(folder, model=f"openclip:{folder / 'm'}")


def own_code(folder: Path) -> None:
    """Write modules that make MARK when they are imported, and descriptions that name them."""
    for name in ("configuration_own", "modeling_own", "tokenization_own", "processing_own"):
        (folder / f"{name}.py").write_text(f"open({str(MARK)!r}, 'w')\nclass Own: pass\n")
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    path.write_text(json.dumps(known | own))


@case("transformers folder: code of its own")
def _(folder: Path) -> list[str]:
    own_code(folder)
    auto = {"AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    return on_pictures(folder, model=f"transformers:{folder}")


@case("transformers folder: weights elsewhere and pickled")
def _(folder: Path) -> list[str]:
    write_transformers_folder(folder / "m", "clip")
    own_code(folder / "m")
    (folder / "m" / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "m" / "pytorch_model-1.bin")
    index = {"metadata": {}, "weight_map": {"logit_scale": "../../victim", "x": "pytorch_model-1.bin"}}
    (folder / "m" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return on_pictures(folder, model=f"transformers:{folder / 'm'}")


@case("transformers folder: kernels, quantisation and weights from a network", 0, 2)
def _(folder: Path) -> list[str]:
    write_transformers_folder(folder / "m", "clip")
    own_code(folder / "m")
    config = json.loads((folder / "m" / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModel": "modeling_own.Own"}, "attn_implementation": "evil/kernels",
        "_attn_implementation": "evil/kernels", "_name_or_path": "evil/model",
    }  # fmt: skip
    (folder / "m" / "config.json").write_text(json.dumps(config))
    (folder / "m" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "evil/model", "peft_type": "LORA", "task_type": null}'
    )
    return on_pictures(folder, model=f"transformers:{folder / 'm'}")


@case("weights of a run: it started from a pickle")
def _(folder: Path) -> list[str]:
    run = folder / "run"
    run.mkdir()
    torch.save({"logit_scale": Evil()}, run / "start.pt")
    options = {"model": {"model": "Small-ViT", "pretrained": str(run / "start.pt")}, "run": {"seed": 0}}
    identity = {"command": "fft", "options": options, "model": None}
    (run / "run.json").write_text(json.dumps({"format": "rada_fast.run.v1", "identity": identity, "inputs": {}}))
    save_file(dict(made("Small-ViT").visual.state_dict()), run / "rada-ft-model.safetensors", {"format": "pt"})
    return on_pictures(folder, model="Small-ViT", pretrained=run)
