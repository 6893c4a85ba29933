"""The prepared image encoder computes what open_clip's module computes, and leaves to it whatever it does not know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import LayerNormFp32
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from rada_fast import _env
from rada_fast.models import image_encoder
from rada_fast.models.image_encoder import (
    ImageEncoder,
    SmallVisionTransformer,
    VisionTransformer,
    reason_not_served,
    serves_as_small,
)
from rada_fast.models.vision_language import VisionLanguageModel, load_model
from rada_fast.ops import use_backend

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}


def build(*, quick_gelu: bool = False, cast_dtype: torch.dtype | None = None, **options: Any) -> CLIP:
    """Return a tiny CLIP whose parameters are all random: open_clip would start with ones and zeros in some of them."""
    text = CLIPTextCfg(context_length=4, vocab_size=8, width=16, heads=2, layers=1)
    vision = CLIPVisionCfg(**(TINY | options))
    model = CLIP(24, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu, cast_dtype=cast_dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.visual.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            if "ln_" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval().requires_grad_(False)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "QuickGELU": {"quick_gelu": True},
    "one block": {"layers": 1},
    "layer scale": {"ls_init_value": 0.1},
    "no first normalisation": {"no_ln_pre": True},
    "last normalisation after pooling": {"final_ln_after_pool": True},
    "normalisation in float32": {"cast_dtype": torch.bfloat16},
    "odd sizes": {"image_size": (21, 35), "patch_size": 7, "width": 60, "head_width": 20, "mlp_ratio": 2.5},
    "patch dropout": {"patch_dropout": 0.5},
    "fixed positions": {"pos_embed_type": "sin_cos_2d"},
}


def image_size(model: CLIP) -> tuple[int, int]:
    height, width = model.visual.image_size
    return int(height), int(width)


def in_float64(model: CLIP) -> CLIP:
    exact = copy.deepcopy(model).double()
    for module in exact.visual.modules():
        if isinstance(module, LayerNormFp32):  # it would round to float32
            module.__class__ = nn.LayerNorm
    return exact


def check_close(model: CLIP, dtype: torch.dtype) -> None:
    """Compare the prepared encoder with the module in float64; the module's own error in the type is the measure."""
    images = torch.randn(5, 3, *image_size(model))
    exact = in_float64(model).encode_image(images.double())
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        usual = model.encode_image(images).double()
    assert reason_not_served(model) is None
    encoders: list[Callable[[Tensor], Tensor]] = [VisionTransformer(model.visual, dtype)]
    if serves_as_small(model.visual, dtype):
        encoders.append(SmallVisionTransformer(model.visual))
    # Sums in another order, and the rounding of the last step, have a band of a few units in the last place.
    band = 8 * float(torch.finfo(dtype).eps) * float(exact.abs().max())
    for encoder in encoders:
        features = encoder(images)
        assert features.dtype == torch.float32
        assert float((features - exact).abs().max()) <= 2 * float((usual - exact).abs().max()) + band


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_it_equals_the_module(options: dict[str, Any], dtype: torch.dtype) -> None:
    check_close(build(**options), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("onednn", [True, False])
def test_it_equals_the_embedded_model(dtype: torch.dtype, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn:
        monkeypatch.setattr(_env, "has_onednn", lambda: False)
    image_encoder._reorders.cache_clear()
    check_close(load_model("embedded").model, dtype)
    image_encoder._reorders.cache_clear()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_features_of_an_image_do_not_depend_on_the_others(precision: Any) -> None:
    """The number of images in a call, their order and their place in it change no bit on a CPU."""
    model = load_model("embedded", precision=precision)
    if not model.encodes_each_by_itself():
        pytest.skip("PyTorch has no products here whose rows are independent")
    images = torch.randn(90, 3, 48, 48)  # of 37 tokens each, which are too many for one chunk
    assert len(images) * 37 > image_encoder.CPU_ROWS
    together = model.image_features(images)
    for number in (1, 2, 3, 8, 33, 64):
        for start in (0, 5):
            chosen = slice(start, start + number)
            assert torch.equal(model.image_features(images[chosen]), together[chosen]), (number, start)
    order = torch.randperm(len(images))
    assert torch.equal(model.image_features(images[order]), together[order])


def test_changed_weights_are_noticed() -> None:
    model = VisionLanguageModel(
        "tiny", None, build(), lambda texts: torch.ones(len(texts), 4, dtype=torch.int64),
        load_model("embedded").preprocess, device=torch.device("cpu"), precision="float32",
    )  # fmt: skip
    images = torch.randn(2, 3, 32, 32)

    def check(change: Callable[[nn.Module], object]) -> None:
        before = model.image_features(images)
        change(model.model.visual)
        after = model.image_features(images)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, model.image_features_with_grad(images).detach(), rtol=0, atol=1e-6)

    check(lambda visual: visual.load_state_dict({k: 1.5 * v for k, v in visual.state_dict().items()}))
    check(lambda visual: setattr(visual.class_embedding, "data", -visual.class_embedding.data))
    model.model.visual.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.model.visual.parameters(), lr=0.1)

    def train(visual: nn.Module) -> None:
        model.image_features_with_grad(images)[:, 0].sum().backward()
        optimizer.step()

    check(train)
    assert not model.image_features(images).requires_grad


class OwnLinear(nn.Linear):
    """A linear layer that does more, as those of LoRA do."""

    def forward(self, rows: Tensor) -> Tensor:
        return 2 * super().forward(rows)


def replace_layer(model: Any) -> None:
    layer = model.visual.transformer.resblocks[1].mlp.c_fc
    own = OwnLinear(layer.in_features, layer.out_features).requires_grad_(False)
    own.load_state_dict(layer.state_dict())
    model.visual.transformer.resblocks[1].mlp.c_fc = own


def override_forward(model: Any) -> None:
    block = model.visual.transformer.resblocks[0]
    usual = block.forward
    block.forward = lambda *arguments, **options: 2 * usual(*arguments, **options)


def override_encode(model: Any) -> None:
    usual = model.encode_image
    model.encode_image = lambda images: -usual(images)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a hook": lambda model: model.visual.ln_post.register_forward_hook(lambda module, inputs, output: 2 * output),
    "a hook before": lambda model: model.visual.conv1.register_forward_pre_hook(lambda module, inputs: (-inputs[0],)),
    "a replaced layer": replace_layer,
    "a replaced forward": override_forward,
    "a replaced encode_image": override_encode,
    "an average": lambda model: setattr(model.visual, "pool_type", "avg"),
    "a parametrization": lambda model: nn.utils.parametrizations.spectral_norm(
        model.visual.transformer.resblocks[0].mlp.c_proj
    ).requires_grad_(False),
    "another activation": lambda model: setattr(
        model.visual.transformer.resblocks[0].mlp, "gelu", nn.GELU(approximate="tanh")
    ),
    "a layer more": lambda model: model.visual.transformer.resblocks[0].mlp.append(nn.GELU()),
    "a zero as a key": lambda model: setattr(model.visual.transformer.resblocks[0].attn, "add_zero_attn", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_encoder_is_called_as_it_is(change: Callable[[Any], object]) -> None:
    model = build()
    images = torch.randn(2, 3, 32, 32)
    encoder = ImageEncoder(model, torch.float32)
    assert encoder.prepared_for(images) is not None
    change(model)
    assert reason_not_served(model) is not None
    assert encoder.prepared_for(images) is None


def test_other_architectures_are_called_as_they_are() -> None:
    for options in (
        {"attentional_pool": True},
        {"pool_type": "avg"},
        {"block_type": "custom", "qk_norm": True},
        {"output_tokens": True},
    ):
        assert reason_not_served(build(**options)) is not None, options
    residual = {"layers": (1, 1, 1, 1), "width": 8, "head_width": 32, "image_size": 64}
    assert reason_not_served(build(**residual)) == "the image encoder is a ModifiedResNet"


def test_other_images_are_encoded_by_the_module() -> None:
    encoder = ImageEncoder(build(), torch.float32)
    images = torch.randn(2, 3, 32, 32)
    assert encoder.prepared_for(images) is not None
    for other in (images.double(), images[:0], images[0], torch.randn(2, 3, 48, 32), nn.Parameter(images)):
        assert encoder.prepared_for(other) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder.prepared_for(images) is None
    assert ImageEncoder(build(), torch.float16).prepared_for(images) is None


def test_a_model_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    look = image_encoder.reason_not_served
    monkeypatch.setattr(image_encoder, "reason_not_served", lambda model: calls.append(model) or look(model))
    model = build()
    encoder, images = ImageEncoder(model, torch.float32), torch.randn(2, 3, 32, 32)
    first = encoder.prepared_for(images)
    assert encoder.prepared_for(images) is first
    assert len(calls) == 1
    model.visual.class_embedding.zero_()
    assert encoder.prepared_for(images) is not first
    assert len(calls) == 2


def test_the_backend_decides_who_encodes_with_a_small_model() -> None:
    encoder, images = ImageEncoder(build(), torch.float32), torch.randn(2, 3, 32, 32)
    usual = encoder.prepared_for(images)
    with use_backend("reference"):
        assert type(encoder.prepared_for(images)) is VisionTransformer
    assert type(encoder.prepared_for(images)) is type(usual)
    assert isinstance(usual, SmallVisionTransformer) == serves_as_small(build().visual, torch.float32)


class NothingReadBack(TorchDispatchMode):
    """Fail where a number leaves its tensor, for which a program would have to wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        assert func is not torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_encoding_reads_nothing_back(precision: Any) -> None:
    model = load_model("embedded", precision=precision)
    images = torch.randn(2, 3, 48, 48)
    model.image_features(images)  # the first call may try oneDNN's products
    with NothingReadBack():
        model.image_features(images)
    with NothingReadBack(), pytest.raises(AssertionError):
        model.encode_images(images)


def test_cudnn_comes_first_on_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[Any] = []
    monkeypatch.setattr(image_encoder, "sdpa_kernel", lambda chosen, **options: kernels.append((chosen[0], options)))
    for capability in ((8, 0), (10, 0), (9, 0)):
        monkeypatch.setattr(_env, "cuda_device_capability", lambda index, found=capability: found)
        image_encoder._attention_kernels(torch.device("cuda", 0))
    image_encoder._attention_kernels(torch.device("cpu"))
    assert kernels == [(SDPBackend.CUDNN_ATTENTION, {"set_priority": True})]
