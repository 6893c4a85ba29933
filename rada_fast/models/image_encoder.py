"""Compute image features with open_clip's vision transformer in fewer steps than its modules take, without gradients.

The numbers are the module's within rounding. What differs:

- The last block computes one token, the one that is pooled. Its keys and values are those of all tokens.
- The weights are converted to the precision, and on a CPU reordered for oneDNN's products, once and not in each call.
- A product adds its bias, applies the activation and adds the residual while its result is in the cache. QuickGELU,
  x sigmoid(1.702 x), is SiLU of 1.702 x divided by 1.702, and both factors become part of the weights around it.
- A CPU encodes few images at a time, so that what one step writes is still in the cache when the next one reads it.
  Where the weights of a block fit into a core's cache too, as those of the shipped model do, each thread takes its own
  images through all blocks; see ops/small_transformer.py.
- The last normalisation and the projection, which are of one token, are computed in float32 in every precision.

An image encoder of another kind, or one that has been changed (a hook, a replaced layer), is called as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from rada_fast import _env
from rada_fast.models.module_state import ModuleState
from rada_fast.ops import encoder_attention, small_transformer
from rada_fast.ops.small_transformer import SmallTransformer, serves_small_transformer

CPU_ROWS = 3200
"""About the most tokens that a CPU encodes at a time: 16 images of a ViT-B/16. See docs/measurements.md."""

_QUICK_GELU_FACTOR = 1.702

Product = Callable[[Tensor], Tensor]
Sum = Callable[[Tensor, Tensor], Tensor]


class Norm(NamedTuple):
    """A layer normalisation: its parameters, and whether it computes in float32 whatever the type of its input."""

    weight: Tensor
    bias: Tensor
    eps: float
    in_float32: bool

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalise rows (..., W)."""
        given = rows.float() if self.in_float32 else rows
        return functional.layer_norm(given, self.weight.shape, self.weight, self.bias, self.eps).to(rows.dtype)


class Block(NamedTuple):
    """A residual block.

    norm_1, norm_2: the normalisations before the attention and before the MLP.
    queries: the projection to the queries; None in all blocks but the last, where keys_values projects to them too.
    keys_values: the projection to queries, keys and values, or in the last block to keys and values.
    output: the projection of the attention's result, plus the residual.
    hidden: the first layer of the MLP with its activation.
    mlp_output: the second layer of the MLP, plus the residual.
    """

    norm_1: Norm
    queries: Product | None
    keys_values: Product
    output: Sum
    norm_2: Norm
    hidden: Product
    mlp_output: Sum


class VisionTransformer:
    """The prepared weights of an open_clip VisionTransformer that reason_not_served lets pass, and its arithmetic.

    They take as much memory as the module's own weights in that type.

    visual: the module.
    dtype: the type in which it computes.
    """

    def __init__(self, visual: Any, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._device = visual.proj.device if visual.proj is not None else visual.class_embedding.device
        self._patch_size = tuple(visual.patch_size)
        self.image_size = tuple(visual.image_size)
        blocks = visual.transformer.resblocks
        self._heads = int(blocks[0].attn.num_heads)
        # The patches are rows of a product. The class token and the positions are added in the module's type.
        self._patches = self._product(visual.conv1.weight.flatten(1), None)
        self._positions = self._converted(visual.positional_embedding)
        self._class_token = self._converted(visual.class_embedding)
        self._norm_pre = self._norm(visual.ln_pre, dtype)
        self._blocks = [self._block(block, last=False) for block in blocks[:-1]]
        self._last_block = self._block(blocks[-1], last=True)
        self._norm_post = self._norm(visual.ln_post, torch.float32)
        self._projection = None if visual.proj is None else self._product(visual.proj.T, None, dtype=torch.float32)

    @property
    def encodes_each_by_itself(self) -> bool:
        """Whether the features of an image are the same, to the bit, whatever is encoded in the same call.

        A row of oneDNN's products with reordered weights does not depend on the number of rows. Other libraries choose
        how to compute a product by its shape.
        """
        return all(_reorders(self._device.type, dtype) for dtype in (self._dtype, torch.float32))

    def _converted(self, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return parameter.detach().to(dtype or self._dtype)

    def _norm(self, norm: nn.Module, dtype: torch.dtype) -> Norm | None:
        if isinstance(norm, nn.Identity):
            return None
        norm = cast(nn.LayerNorm, norm)
        in_float32 = type(norm).__name__ == "LayerNormFp32"
        # A CPU normalises rows of a low precision with float32 parameters. A GPU wants both in one type.
        if in_float32 or self._device.type == "cpu":
            dtype = torch.float32
        return Norm(self._converted(norm.weight, dtype), self._converted(norm.bias, dtype), norm.eps, in_float32)

    def _product(
        self, weight: Tensor, bias: Tensor | None, activation: str = "none", *, dtype: torch.dtype | None = None
    ) -> Product:
        make = _reordered_product if _reorders(self._device.type, dtype or self._dtype) else _plain_product
        return make(self._converted(weight, dtype), None if bias is None else self._converted(bias), activation)

    def _sum(self, weight: Tensor, bias: Tensor) -> Sum:
        make = _reordered_sum if _reorders(self._device.type, self._dtype) else _plain_sum
        return make(self._converted(weight), self._converted(bias))

    def _block(self, block: Any, *, last: bool) -> Block:
        weights = block_weights(block)
        weight, bias = weights.projection
        width = weight.shape[1]
        return Block(
            cast(Norm, self._norm(block.ln_1, self._dtype)),
            self._product(weight[:width], bias[:width]) if last else None,
            self._product(weight[width:], bias[width:]) if last else self._product(weight, bias),
            self._sum(*weights.output),
            cast(Norm, self._norm(block.ln_2, self._dtype)),
            self._product(*weights.hidden, activation_of(block)),
            self._sum(*weights.mlp_output),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, S, S) float32 on the device to features (N, D) float32 that are not normalised."""
        if images.device.type == "cpu":
            chunks = math.ceil(len(images) * len(self._positions) / CPU_ROWS)
            return torch.cat([self._encode(chunk) for chunk in images.chunk(chunks)])
        with _attention_kernels(images.device):
            return self._encode(images)

    def _encode(self, images: Tensor) -> Tensor:
        rows = self._embed(images)  # (N, L, W)
        for block in self._blocks:
            rows = self._through(block, rows)
        pooled = self._pooled_through(self._last_block, rows).float()  # (N, W)
        if self._norm_post is not None:
            pooled = self._norm_post(pooled)
        return pooled if self._projection is None else self._projection(pooled)

    def _embed(self, images: Tensor) -> Tensor:
        number, channels, height, width = images.shape
        patch_height, patch_width = self._patch_size
        patches = images.to(self._dtype).reshape(
            number, channels, height // patch_height, patch_height, width // patch_width, patch_width
        )
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (N, L - 1, 3 * P * P)
        embedded = self._patches(patches)
        rows = embedded.new_empty(number, embedded.shape[1] + 1, embedded.shape[2])
        rows[:, 0] = self._class_token + self._positions[0]
        torch.add(embedded, self._positions[1:], out=rows[:, 1:])
        return rows if self._norm_pre is None else self._norm_pre(rows)

    def _through(self, block: Block, rows: Tensor) -> Tensor:
        queries, keys, values = block.keys_values(block.norm_1(rows)).chunk(3, dim=-1)
        rows = block.output(encoder_attention(queries, keys, values, self._heads), rows)
        return block.mlp_output(block.hidden(block.norm_2(rows)), rows)

    def _pooled_through(self, block: Block, rows: Tensor) -> Tensor:
        """Return the class token (N, W) after the last block."""
        normalised = block.norm_1(rows)
        keys, values = block.keys_values(normalised).chunk(2, dim=-1)
        assert block.queries is not None
        queries = block.queries(normalised[:, :1].contiguous())
        pooled = block.output(encoder_attention(queries, keys, values, self._heads)[:, 0], rows[:, 0].contiguous())
        return block.mlp_output(block.hidden(block.norm_2(pooled)), pooled)


class SmallVisionTransformer:
    """A VisionTransformer in float32 on a CPU that is so small that the compiled operator encodes faster.

    visual: the module, which reason_not_served lets pass.
    """

    encodes_each_by_itself = True

    def __init__(self, visual: Any) -> None:
        self.image_size = tuple(visual.image_size)
        positions = visual.positional_embedding.detach().clone()
        positions[0] += visual.class_embedding
        blocks = visual.transformer.resblocks
        self._encode = SmallTransformer(
            small_transformer.Transformer(
                patch_size=tuple(visual.patch_size),
                patches=visual.conv1.weight.flatten(1),
                positions=positions,
                norm_pre=_small_norm(visual.ln_pre),
                blocks=[block_weights(block) for block in blocks],
                norm_post=_small_norm(visual.ln_post),
                heads=int(blocks[0].attn.num_heads),
                activation=activation_of(blocks[0]),
                projection=visual.proj,
            )
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, S, S) float32 to features (N, D) float32 that are not normalised."""
        return self._encode(images)


def serves_as_small(visual: Any, dtype: torch.dtype) -> bool:
    """Return whether SmallVisionTransformer computes an image encoder that reason_not_served lets pass."""
    hidden, width = visual.transformer.resblocks[0].mlp.c_fc.weight.shape
    on_cpu = visual.class_embedding.device.type == "cpu"
    return on_cpu and dtype == torch.float32 and serves_small_transformer(width, hidden)


def _small_norm(norm: nn.Module) -> small_transformer.Norm | None:
    if isinstance(norm, nn.Identity):
        return None
    norm = cast(nn.LayerNorm, norm)
    return small_transformer.Norm(norm.weight, norm.bias, norm.eps)


def block_weights(block: Any) -> small_transformer.Block:
    """Return the weights of a block of open_clip's, which include its layer scales and the factors of QuickGELU."""
    hidden, mlp_output = block.mlp.c_fc, block.mlp.c_proj
    factor = _QUICK_GELU_FACTOR if activation_of(block) == "silu" else 1.0
    scale_1, scale_2 = (getattr(scale, "gamma", 1.0) for scale in (block.ls_1, block.ls_2))
    return small_transformer.Block(
        cast(small_transformer.Norm, _small_norm(block.ln_1)),
        (block.attn.in_proj_weight, block.attn.in_proj_bias),
        _scaled(block.attn.out_proj, scale_1),
        cast(small_transformer.Norm, _small_norm(block.ln_2)),
        (factor * hidden.weight, factor * hidden.bias),
        _scaled(mlp_output, scale_2, 1 / factor),
    )


def activation_of(block: Any) -> Literal["gelu", "silu"]:
    """Return the activation that remains in a block when the factors of QuickGELU are in the weights around it."""
    return "silu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu"


def _scaled(layer: nn.Linear, scale: Tensor | float, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a layer whose input is multiplied by a factor, and whose output by a scale."""
    weight = layer.weight * (scale[:, None] if isinstance(scale, Tensor) else scale) * factor
    return weight, layer.bias * scale


def _attention_kernels(device: torch.device) -> AbstractContextManager[Any]:
    """Choose PyTorch's attention kernel: cuDNN's on Hopper, where it is the fastest; elsewhere PyTorch decides."""
    if device.type != "cuda" or _env.cuda_device_capability(device.index)[0] != 9:
        return nullcontext()
    kernels = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return cast(AbstractContextManager[Any], sdpa_kernel(kernels, set_priority=True))


def _plain_product(weight: Tensor, bias: Tensor | None, activation: str) -> Product:
    def product(rows: Tensor) -> Tensor:
        result = functional.linear(rows, weight, bias)
        match activation:
            case "gelu":
                return functional.gelu(result)
            case "silu":
                return functional.silu(result, inplace=True)
        return result

    return product


def _plain_sum(weight: Tensor, bias: Tensor) -> Sum:
    def plus_product(rows: Tensor, residual: Tensor) -> Tensor:
        return functional.linear(rows, weight, bias).add_(residual)

    return plus_product


_POINTWISE = {"none": ("none", ""), "gelu": ("gelu", "none"), "silu": ("swish", "")}
"""The names that oneDNN's operators of PyTorch have for the activations."""


def _reordered_product(weight: Tensor, bias: Tensor | None, activation: str) -> Product:
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight)
    name, algorithm = _POINTWISE[activation]

    def product(rows: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, reordered, bias, name, [], algorithm)
        return result

    return product


def _reordered_sum(weight: Tensor, bias: Tensor) -> Sum:
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight)

    def plus_product(rows: Tensor, residual: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, residual, reordered, bias, "add")
        return result

    return plus_product


@cache
def _reorders(device: str, dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies this type with reordered weights here.

    Compiled models of PyTorch call the same operators. On an AMD processor oneDNN multiplies float32 more than twice as
    fast as PyTorch's own products, whose library does not use AVX-512 there.
    """
    if device != "cpu" or not _env.has_onednn():
        return False
    try:
        weight, bias, rows = (
            torch.ones(16, 16, dtype=dtype),
            torch.ones(16, dtype=dtype),
            torch.ones(2, 16, dtype=dtype),
        )
        products = [_reordered_product(weight, bias, activation)(rows) for activation in _POINTWISE]
        total = _reordered_sum(weight, bias)(rows, rows)
    except (AttributeError, RuntimeError):  # this PyTorch has other operators, or this processor lacks instructions
        return False
    return bool((products[0] == 17).all() and (total == 18).all())


def reason_not_served(model: Any) -> str | None:
    """Return why the image encoder of a model is called as a module, or None where VisionTransformer computes it."""
    from open_clip import model as models
    from open_clip import transformer

    visual = model.visual
    served = (models.CLIP.encode_image, models.CustomTextCLIP.encode_image)
    if getattr(type(model), "encode_image", None) not in served or "encode_image" in vars(model):
        return "encode_image is not open_clip's"
    if type(visual) is not transformer.VisionTransformer:
        return f"the image encoder is a {type(visual).__name__}"
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.output_tokens:
        return "it does not pool the class token alone"
    if not visual.transformer.batch_first or not len(visual.transformer.resblocks):
        return "its blocks are arranged in another way"
    norms = (transformer.LayerNorm, transformer.LayerNormFp32, nn.LayerNorm)
    plain = (transformer.VisionTransformer, transformer.Transformer, nn.ModuleList, nn.Sequential, nn.Conv2d)
    known = {
        transformer.ResidualAttentionBlock: _is_known_block,
        nn.MultiheadAttention: _is_known_attention,
        transformer.PatchDropout: lambda module: not module.training,
        nn.GELU: lambda module: module.approximate == "none",
    }
    always = {*norms, *plain, nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Identity}
    always |= {transformer.QuickGELU, transformer.LayerScale}
    if has_global_hooks():
        return "hooks of all modules are called"
    for name, module in visual.named_modules():
        if type(module) not in always and not known.get(type(module), lambda _: False)(module):
            return f"its {name} is a {type(module).__name__} with other options, or one that is not open_clip's"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"its {name or 'module'} has a hook"
    if not all(isinstance(norm, nn.Identity | nn.LayerNorm) for norm in (visual.ln_pre, visual.ln_post)):
        return "its normalisations are of another kind"
    for name, parameter in visual.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype != torch.float32 or parameter.is_inference():
            return f"its {name} is no ordinary parameter in float32"
    return None


def _is_known_block(block: Any) -> bool:
    norms = isinstance(block.ln_1, nn.LayerNorm) and isinstance(block.ln_2, nn.LayerNorm)
    layers = list(block.mlp.named_children()) if type(block.mlp) is nn.Sequential else []
    kinds = [(name, isinstance(layer, nn.Linear)) for name, layer in layers]
    return (
        norms
        and kinds == [("c_fc", True), ("gelu", False), ("c_proj", True)]
        and block.mlp.c_fc.bias is not None
        and block.mlp.c_proj.bias is not None
        and not hasattr(block, "ln_1_kv")
    )


def _is_known_attention(attention: Any) -> bool:
    return (
        attention._qkv_same_embed_dim
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention.out_proj.bias is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not (attention.training and attention.dropout)
    )


class ImageEncoder:
    """The image encoder of a model: it prepares the weights, and prepares them anew when they have changed.

    Whether the module can be served is found out once for each preparation, and again after any change of the module.
    ModuleState says what counts as a change: a write into the memory of parameter.data is not noticed.

    model: the module of open_clip, which may be trained or changed between two calls.
    dtype: the type in which the encoder computes.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._prepared: VisionTransformer | SmallVisionTransformer | None = None
        self._state: ModuleState | None = None

    def prepared_for(self, images: Tensor) -> VisionTransformer | SmallVisionTransformer | None:
        """Return the function that encodes these images, or None where the module has to do it."""
        device = images.device.type
        if (
            type(images) is not Tensor
            or images.dtype != torch.float32
            or images.dim() != 4
            or not len(images)
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(device)
            or (device == "cpu" and self._dtype == torch.float16)
            or has_global_hooks()
        ):
            return None
        if self._state is None or not self._state.is_current():
            self._prepared = self._state = None  # the memory of the old weights serves the new ones
            if reason_not_served(self._model) is not None:
                return None
            self._state = ModuleState(self._model.visual, [self._model])
        visual = self._model.visual
        kind = SmallVisionTransformer if serves_as_small(visual, self._dtype) else VisionTransformer
        if type(self._prepared) is not kind:
            self._prepared = None
            small = kind is SmallVisionTransformer
            self._prepared = SmallVisionTransformer(visual) if small else VisionTransformer(visual, self._dtype)
        return self._prepared if tuple(images.shape[1:]) == (3, *self._prepared.image_size) else None


def has_global_hooks() -> bool:
    """Return whether PyTorch calls hooks in every module."""
    hooks = nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
