"""The rational adapter as a module that owns its parameters under the published names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import torch
from torch import Tensor, nn

from rada_fast.config.method import AdapterConfig, MaskPenalty
from rada_fast.errors import UserError
from rada_fast.modules.projections import (
    GIVE_VALUES,
    WRAPPED,
    ZeroLinear,
    has_bias,
    has_hooks,
    has_parametrisations,
    is_sharded,
    reason_to_call,
    stored_value,
    tensors_or_calls,
)
from rada_fast.ops.rational_adapter import AdapterOutput, parameter_shapes, rational_adapter


class RationalAdapter(nn.Module):
    """Rational adapter (RAda, arXiv:2507.15480): one attention over classes at the end of a vision-language model.

    Parameters are named as in the published code (q_proj1 image, q_proj2 text, q_proj3 rational, k_proj, v_proj,
    out_proj; further layers under ``layers``). Output projections start at zero, so the first prediction is the
    zero-shot one; the other projections start like torch.nn.Linear.

    The projections are torch.nn.Linear layers. You may tie, freeze, parametrise (torch.nn.utils.parametrize) or hook
    them, or replace them by modules of your own (LoRA). Where one is more than its weight and bias (it has hooks, a
    forward of its own, or a sharded or quantised weight), all are called as modules and plain PyTorch computes the
    rest, the "reference" backend. A compiled backend that is asked for by name then raises BackendUnavailableError.

    config: the arithmetic; see AdapterConfig.
    """

    def __init__(self, config: AdapterConfig, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        for name in parameter_shapes(config):
            path, leaf = name.rsplit(".", 1)
            if leaf != "weight":
                continue
            *parents, last = path.split(".")
            owner: nn.Module = self
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            kind = ZeroLinear if last == "out_proj" else nn.Linear
            owner.add_module(last, kind(config.embed_dim, config.embed_dim, bias=config.bias, device=device))

    def extra_repr(self) -> str:
        return f"config={self.config}"

    def reset_parameters(self) -> None:
        """Initialise all projections again, the output projections to zero.

        An adapter that was created on the meta device needs this after ``to_empty``.
        """
        for _, layer in self._projections():
            layer.reset_parameters()  # type: ignore[operator]

    def _projections(self) -> Iterator[tuple[str, nn.Module]]:
        for name in parameter_shapes(self.config):
            if name.endswith(".weight"):
                path = name.removesuffix(".weight")
                layer = self._modules.get(path) if "." not in path else self._inner(path)
                if layer is None:
                    raise ValueError(f"adapter must hold a projection {path!r}, which was removed or set to None")
                yield path, layer

    def _inner(self, path: str) -> nn.Module | None:
        try:
            return self.get_submodule(path)
        except AttributeError:
            return None

    def is_plain(self) -> bool:
        """Return whether the adapter computes just ops.rational_adapter with its named parameters.

        It then has no hooks, no parametrised, tied or replaced projections, and no forward of a subclass.
        """
        if type(self).forward is not RationalAdapter.forward or "forward" in self.__dict__ or has_hooks(self):
            return False
        if any(reason_to_call(layer) for _, layer in self._projections()):
            return False
        return {name for name, _ in self.named_parameters()} == set(parameter_shapes(self.config))

    def stored_parameters(self) -> dict[str, Tensor]:
        """Return the contents of a file: every projection's current weight and bias, by their published names.

        Raises UserError naming a projection that is more than its weight and bias, or has no values.
        """
        layers = dict(self._projections())
        for name, layer in layers.items():
            if not self.config.bias and isinstance(layer, nn.Linear) and has_bias(layer):
                raise UserError(f"adapter's {name} has a bias, which its configuration (bias=False) has not")
        stored: dict[str, Tensor] = {}
        for name, shape in parameter_shapes(self.config).items():
            path, leaf = name.rsplit(".", 1)
            value = stored_value(path, layers[path], leaf)
            if tuple(value.shape) != shape:
                raise UserError(f"adapter's {name} must be {shape} as its configuration says, got {tuple(value.shape)}")
            stored[name] = value
        return stored

    def _run(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        penalty: MaskPenalty | None = None,
        return_mask: bool = False,
    ) -> AdapterOutput:
        return rational_adapter(
            image_features,
            text_features,
            logit_scale,
            tensors_or_calls(dict(self._projections()), bias=self.config.bias),
            self.config,
            penalty=penalty,
            return_mask=return_mask,
        )

    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, penalty: None = None
    ) -> Tensor: ...
    @overload
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, penalty: MaskPenalty
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        penalty: MaskPenalty | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits (B, K), or with a penalty kind (logits, penalty ()).

        image_features: (B, D), unit norm.
        text_features: (K, D), unit norm.
        logit_scale: the multiplier s.
        penalty: "l2", "l1", "linf" or None.

        See rada_fast.ops.rational_adapter for the equation, dtypes and errors.
        """
        output = self._run(image_features, text_features, logit_scale, penalty=penalty)
        return output.logits if output.penalty is None else (output.logits, output.penalty)

    def mask(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
        """Return the mask M, (B, K, D), for inspection; the arguments are those of forward.

        Raises ValueError where fully_shard keeps the weights in shards, because it gathers them for forward alone.
        """
        for name, layer in self._projections():
            if isinstance(layer, nn.Linear) and not has_hooks(layer) and is_sharded(layer.weight):
                raise ValueError(
                    f"adapter's {name} is sharded by fully_shard, which gathers it for forward alone: call mask inside "
                    "of forward, between adapter.unshard() and adapter.reshard(), or on a gathered adapter"
                )
        output = self._run(image_features, text_features, logit_scale, return_mask=True)
        assert output.mask is not None
        return output.mask

    def is_zero_shot(self) -> bool:
        """Return whether every output projection is exactly zero, which makes the logits the zero-shot ones.

        This reads the parameters' values: on a GPU, call it once, not in a loop. It returns False without reading them
        where an output projection is parametrised or more than its weight and bias (see the class).
        """
        for name, layer in self._projections():
            if name.rsplit(".", 1)[-1] != "out_proj":
                continue
            if reason_to_call(layer) or has_parametrisations(layer):
                return False
            for value in (layer.weight, layer.bias):
                if isinstance(value, Tensor):
                    if value.is_meta:
                        raise ValueError(f"adapter's {name} is on the meta device: {GIVE_VALUES}")
                    if bool(value.any()):
                        return False
        return True


def new_adapter(config: AdapterConfig, seed: int) -> RationalAdapter:
    """Make an adapter whose random weights depend on the seed alone, and leave all random states as they are."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every CUDA device too, and nothing would restore their states.
        torch.default_generator.manual_seed(seed)
        return RationalAdapter(config)


def unwrapped(adapter: nn.Module) -> RationalAdapter:
    """Return the adapter inside wrappers of torch.compile, data parallelism, averaging and activation checkpoints.

    Raises TypeError where there is no adapter, UserError where FullyShardedDataParallel keeps its weights in shards.
    """
    inner: object = adapter
    while isinstance(inner, nn.Module) and not isinstance(inner, RationalAdapter):
        if "_fsdp_wrapped_module" in inner._modules:
            raise UserError(
                "adapter is in FullyShardedDataParallel, which keeps its weights in shards: inside of "
                "FullyShardedDataParallel.summon_full_params(adapter) give adapter.module"
            )
        inner = next((inner._modules[name] for name in WRAPPED if inner._modules.get(name) is not None), None)
    if not isinstance(inner, RationalAdapter):
        raise TypeError(f"adapter must be a RationalAdapter, or one in a wrapper, got {type(adapter).__name__}")
    return inner
