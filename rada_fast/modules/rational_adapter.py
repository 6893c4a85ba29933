"""The rational adapter as a module that owns its parameters under the published names."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from rada_fast.config import AdapterConfig, MaskPenalty
from rada_fast.ops.rational_adapter import parameter_shapes, rational_adapter


class RationalAdapter(nn.Module):
    """Rational adapter (RAda, arXiv:2507.15480): one attention over classes at the end of a vision-language model.

    Parameters are named as in the published code (q_proj1 image, q_proj2 text, q_proj3 rational, k_proj, v_proj,
    out_proj; further layers under ``layers``). Output projections start at zero, so that the first prediction is the
    zero-shot one; the others start as torch.nn.Linear does.

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
            linear = nn.Linear(config.embed_dim, config.embed_dim, bias=config.bias, device=device)
            if last == "out_proj":
                for parameter in linear.parameters():
                    nn.init.zeros_(parameter)
            owner.add_module(last, linear)

    def extra_repr(self) -> str:
        return f"config={self.config}"

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
        """Logits (B, K); with a penalty kind, (logits, penalty ()).

        image_features: (B, D), unit norm; text_features: (K, D), unit norm; logit_scale: the multiplier s.
        See rada_fast.ops.rational_adapter for the equation, dtypes and errors.
        """
        output = rational_adapter(
            image_features, text_features, logit_scale, dict(self.named_parameters()), self.config, penalty=penalty
        )
        return output.logits if output.penalty is None else (output.logits, output.penalty)

    def mask(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
        """The mask M, (B, K, D), for inspection; arguments as forward."""
        output = rational_adapter(
            image_features, text_features, logit_scale, dict(self.named_parameters()), self.config, return_mask=True
        )
        assert output.mask is not None
        return output.mask

    def is_identity(self) -> bool:
        """Whether every output projection is exactly zero, so that the logits are the zero-shot ones.

        It reads the parameters' values: on a GPU, call it once, not in a loop.
        """
        outputs = [p for name, p in self.named_parameters() if "out_proj." in name]
        return not any(bool(parameter.any()) for parameter in outputs)
