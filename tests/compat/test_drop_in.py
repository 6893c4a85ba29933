"""The drop-in class computes what the published attention module and the adapter do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rada_fast.compat import SimpleMultiheadAttention
from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter
from tests.compat.published import (
    PublishedAttention,
)


def test_the_drop_in_class_computes_as_the_published_module() -> None:
    published = PublishedAttention(16, 4, 0.5).double()
    drop_in = SimpleMultiheadAttention(embed_dim=16, num_heads=4, t=0.5).double()
    assert bool((drop_in.state_dict()["out_proj.weight"] == 0).all())
    drop_in.load_state_dict(published.state_dict())
    rows = [torch.randn(2, 5, 16, dtype=torch.float64) for _ in range(5)]
    mask = torch.randn(5, 5, dtype=torch.float64)
    for expected, actual in zip(published(*rows, attn_mask=mask), drop_in(*rows, attn_mask=mask), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_the_drop_in_class_computes_from_features_as_the_adapter() -> None:
    drop_in = SimpleMultiheadAttention(16, 8, t=1.0).double()
    nn.init.normal_(drop_in.get_parameter("out_proj.weight"))
    adapter = RationalAdapter(AdapterConfig.official(16)).double()
    adapter.load_state_dict(drop_in.state_dict())
    image = nn.functional.normalize(torch.randn(2, 16, dtype=torch.float64), dim=-1)
    text = nn.functional.normalize(torch.randn(5, 16, dtype=torch.float64), dim=-1)
    logits, mask = drop_in.forward_features(image, text, 100.0)
    assert torch.equal(logits, adapter(image, text, 100.0))
    assert torch.equal(mask, adapter.mask(image, text, 100.0))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads must divide embed_dim 16, got 3"):
        SimpleMultiheadAttention(16, 3, t=1.0)


def test_the_drop_in_class_from_features_runs_hooks() -> None:
    drop_in = SimpleMultiheadAttention(16, 8, t=1.0, dropout=0.5).double().eval()
    nn.init.normal_(drop_in.get_parameter("out_proj.weight"))
    image, text = torch.randn(2, 16).double(), torch.randn(5, 16).double()
    plain, _ = drop_in.forward_features(image, text, 4.0)
    handle = drop_in.get_submodule("v_proj").register_forward_hook(lambda *given: 2 * given[-1])
    hooked_logits, _ = drop_in.forward_features(image, text, 4.0)
    rows = (2 * image[:, None].repeat(1, 5, 1), 2 * text.repeat(2, 1, 1), *[4 * image[:, None] * text] * 3)
    mask = torch.relu(1 + drop_in(*rows)[0])
    torch.testing.assert_close(hooked_logits, 4 * (mask * image[:, None] * text).sum(-1), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(hooked_logits, plain)
    handle.remove()
    with pytest.raises(ValueError, match=r"dropout 0.5 is applied by forward alone: call eval\(\) first"):
        drop_in.train().forward_features(image, text, 4.0)
