"""The module has the published names and initial values, and returns logits, penalty and mask."""

from __future__ import annotations

import copy
import pickle

import torch
from torch.func import functional_call
from torch.nn.functional import normalize

from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter

PUBLISHED = ("q_proj1", "q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj")


def test_parameters_have_the_published_names_count_and_start() -> None:
    adapter = RationalAdapter(AdapterConfig.official(512))
    assert list(adapter.state_dict()) == [f"{name}.{leaf}" for name in PUBLISHED for leaf in ("weight", "bias")]
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 1_575_936
    assert adapter.is_zero_shot()
    # torch.nn.Linear draws initial values uniformly within 1 / sqrt(D).
    assert 0.9 / 512**0.5 < adapter.k_proj.weight.abs().max().item() <= 1 / 512**0.5


def test_layers_and_mlp_have_parameters_of_their_own() -> None:
    layered = RationalAdapter(AdapterConfig.official(16, num_layers=3)).state_dict()
    assert "layers.1.out_proj.weight" in layered
    assert "layers.0.q_proj.bias" in layered
    mlp = RationalAdapter(AdapterConfig.paper(16, mask_function="mlp")).state_dict()
    assert list(mlp) == ["fc.weight", "out_proj.weight"]
    rational = RationalAdapter(AdapterConfig.official(16, queries=("rational",))).state_dict()
    assert "q_proj1.weight" not in rational


def test_forward_mask_and_functional_call_agree() -> None:
    adapter = RationalAdapter(AdapterConfig.official(16))
    with torch.no_grad():
        adapter.get_parameter("out_proj.weight").normal_()
    assert not adapter.is_zero_shot()
    image, text = normalize(torch.randn(2, 16), dim=-1), normalize(torch.randn(5, 16), dim=-1)
    logits, penalty = adapter(image, text, 100.0, penalty="l2")
    mask = adapter.mask(image, text, 100.0)
    assert mask.shape == (2, 5, 16)
    torch.testing.assert_close(penalty, (mask - 1).square().mean())
    assert torch.equal(adapter(image, text, torch.tensor(100.0)), logits)
    doubled = {name: 2 * parameter for name, parameter in adapter.named_parameters()}
    assert not torch.allclose(functional_call(adapter, doubled, (image, text, 100.0)), logits)


def test_copies_and_pickles_compute_the_same() -> None:
    adapter = RationalAdapter(AdapterConfig.paper(16))
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert twin.config == adapter.config
        assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in adapter.state_dict().items())
    assert "AdapterConfig" in repr(adapter)
