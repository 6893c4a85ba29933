"""Make models of the kinds that the commands read, of a few layers and with random weights, and their files.

The classes are those of the real models: open_clip's CLIP with a transformer, a ResNet or timm's transformer, a
TorchScript archive with OpenAI's names, and the models of transformers, which are imported when they are made.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import nn

WORDS = 49408
"""The number of tokens of CLIP's tokenizer."""
TEXT = {"context_length": 16, "vocab_size": WORDS, "width": 64, "heads": 1, "layers": 1}
SIGLIP_TEXT = TEXT | {
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Small-ViT": {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
        "text_cfg": TEXT,
    },
    "Small-RN": {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "patch_size": None},
        "text_cfg": TEXT,
    },
    "Small-Sigmoid": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": SIGLIP_TEXT,
    },
}
"""Configurations of open_clip: a CLIP of OpenAI, one with a ResNet, and a SigLIP."""


@contextmanager
def known_to_open_clip(folder: Path) -> Iterator[None]:
    """Let open_clip know the CONFIGS by their names, by files in a folder."""
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    try:
        yield
    finally:
        open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
        open_clip.factory._MODEL_CONFIGS.clear()
        open_clip.factory._rescan_model_configs()


def made(name: str) -> Any:
    """Make one of the CONFIGS with random weights, always the same."""
    config = dict(CONFIGS[name])
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**config).eval()


def write_archive(path: Path, name: str = "Small-ViT") -> nn.Module:
    """Write a model as OpenAI writes it: a traced program in float16 with three numbers. Returns the model before."""
    model = made(name)
    numbers = {"input_resolution": 32, "context_length": TEXT["context_length"], "vocab_size": WORDS}
    traced = made(name).half()
    for key, value in numbers.items():
        traced.__dict__.pop(key, None)
        traced.register_buffer(key, torch.tensor(value))
    inputs = {"encode_image": torch.ones(1, 3, 32, 32).half(), "encode_text": torch.zeros(1, 16, dtype=torch.long)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but published weights are in its format
        program = torch.jit.trace_module(traced, inputs, check_trace=False)
        torch.jit.save(program, path)
    return model


def write_openclip_folder(folder: Path, name: str) -> nn.Module:
    """Write a model as open_clip does, and return it."""
    folder.mkdir(parents=True)
    model = made(name)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    described = {"model_cfg": CONFIGS[name], "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def write_tokenizer(folder: Path, specials: Sequence[str] = ("<pad>", "<unk>", "<s>", "</s>")) -> int:
    """Write a tokenizer of a few words as transformers does. Returns the number of its tokens.

    specials: the tokens for padding, unknown words, the start and the end, with the ids 0 to 3.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["a", "photo", "of", ".", "red", "plain", "square", "blue", "ring"]
    vocabulary = {word: index for index, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{specials[2]} $A {specials[3]}", special_tokens=[(specials[2], 2), (specials[3], 3)]
    )
    padding, unknown, start, end = specials
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=padding, unk_token=unknown, bos_token=start, eos_token=end
    ).save_pretrained(folder)
    return len(vocabulary)


def write_transformers_folder(folder: Path, kind: str) -> Any:
    """Write a model of transformers with its tokenizer and preprocessing, and return it.

    kind: clip, siglip or align.
    """
    import transformers

    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": write_tokenizer(folder), "max_position_embeddings": 16,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    images: dict[str, Any] = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    match kind:
        case "clip":
            config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
            images["size"], images["crop_size"] = {"shortest_edge": 32}, {"height": 32, "width": 32}
        case "siglip":
            config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        case _:
            small = {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 64}
            config = transformers.AlignConfig(text_config=text, vision_config=small, projection_dim=32)
            # These are the values of the published model, but for the sizes.
            images |= {"size": {"height": 38, "width": 38}, "crop_size": {"height": 32, "width": 32}}
            images |= {"do_center_crop": True, "resample": 2, "do_normalize": False, "include_top": False}
            images |= {"rescale_factor": 1 / 127.5, "rescale_offset": True}
    names = {"clip": "CLIPModel", "siglip": "SiglipModel", "align": "AlignModel"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, names[kind])(config).eval()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):  # the library's own weights would let ALIGN's features vanish
                nn.init.kaiming_normal_(layer.weight)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return model
