"""The adapter works with what PyTorch code does to modules: hooks, LoRA, parametrisations, tied weights, wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.functional import linear, normalize
from torch.nn.utils import parametrizations, prune

import rada_fast
from rada_fast import BackendUnavailableError, UserError, load_adapter, save_adapter
from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter
from rada_fast.modules.projections import tensors_or_calls
from rada_fast.ops import rational_adapter

CONFIG = AdapterConfig.official(16)
PROJECTIONS = ("q_proj1", "q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj")


class LoRA(nn.Module):
    """LoRA replaces a projection by the layer and a low-rank term, as peft does."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.base_layer(rows) + self.up(self.down(rows))
        return result


class LoRALinear(nn.Linear):
    """LoRALinear is a subclass of nn.Linear that adds the term in its forward."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.down, self.up = nn.Parameter(torch.randn(2, self.in_features)), nn.Parameter(torch.randn(16, 2))

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) + linear(linear(rows, self.down), self.up)


def adapter_of(config: AdapterConfig = CONFIG) -> RationalAdapter:
    adapter = RationalAdapter(config)
    nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.1)
    return adapter.double()


def inputs() -> tuple[Tensor, Tensor, float]:
    image, text = torch.randn(2, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    return normalize(image, dim=-1), normalize(text, dim=-1), 30.0


def replaced(kind: Callable[[Any], nn.Module]) -> Callable[[RationalAdapter], object]:
    return lambda adapter: setattr(adapter, "k_proj", kind(adapter.k_proj).double())


def tied(adapter: RationalAdapter) -> None:
    adapter.get_submodule("v_proj").weight = adapter.get_parameter("k_proj.weight")


def own_forward(adapter: RationalAdapter) -> None:
    layer: Any = adapter.v_proj
    layer.forward = lambda rows: linear(rows, layer.weight, layer.bias).tanh()


WAYS: dict[str, Callable[[Any], object]] = {
    "lora": replaced(LoRA),
    "lora-subclass": replaced(LoRALinear),
    "sequential": replaced(lambda layer: nn.Sequential(layer, nn.Tanh())),
    "weight-norm": lambda adapter: parametrizations.weight_norm(adapter.k_proj),
    "weight-norm-by-hooks": lambda adapter: torch.nn.utils.weight_norm(adapter.k_proj),
    "spectral-norm": lambda adapter: parametrizations.spectral_norm(adapter.eval().v_proj),
    "pruned": lambda adapter: prune.random_unstructured(adapter.v_proj, "weight", 0.5),
    "tied": tied,
    "hook": lambda adapter: adapter.k_proj.register_forward_hook(lambda *args: 2 * args[-1]),
    "pre-hook": lambda adapter: adapter.q_proj1.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "own-forward": own_forward,
}


def by_calls(adapter: RationalAdapter, image: Tensor, text: Tensor, scale: float) -> Tensor:
    """Compute the official preset with every projection called as a module on (B, K, D)."""
    rational = scale * image[:, None] * text
    rows = {
        "q_proj1": scale**0.5 * image[:, None].expand_as(rational),
        "q_proj2": scale**0.5 * text.expand_as(rational),
        "q_proj3": rational, "k_proj": rational, "v_proj": rational,
    }  # fmt: skip
    batch, classes, width = rational.shape
    heads = {
        name: adapter.get_submodule(name)(value).view(batch, classes, 8, width // 8).transpose(1, 2)
        for name, value in rows.items()
    }
    attended = torch.zeros_like(heads["v_proj"])
    for name in ("q_proj1", "q_proj2", "q_proj3"):
        scores = heads[name] @ heads["k_proj"].mT / (width // 8) ** 0.5
        attended = attended + classes / 3 * scores.flatten(2).softmax(-1).view_as(scores) @ heads["v_proj"]
    offset = adapter.get_submodule("out_proj")(attended.transpose(1, 2).flatten(2))
    return ((1 + offset).relu() * rational).sum(-1)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("change", WAYS)
def test_a_changed_projection_is_computed_by_its_own_forward(change: str) -> None:
    adapter = adapter_of()
    plain = adapter(*inputs())
    WAYS[change](adapter)
    arguments = inputs()
    logits = adapter(*arguments)
    torch.testing.assert_close(logits, by_calls(adapter, *arguments), rtol=1e-9, atol=1e-9)
    assert logits.shape == plain.shape
    # Gradients reach every parameter that the projections are made of.
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_hooks_of_every_kind_are_called() -> None:
    adapter, arguments, called = adapter_of(), inputs(), []
    arguments[0].requires_grad_()  # PyTorch warns of backward hooks on layers whose inputs require no gradient
    for kind in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        getattr(adapter.k_proj, f"register_{kind}_hook")(lambda *_, kind=kind: called.append(kind))
    adapter(*arguments).sum().backward()
    assert sorted(called) == ["forward", "forward_pre", "full_backward", "full_backward_pre"]

    adapter = adapter_of()
    called_modules: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called_modules.append(module))
    try:
        adapter(*arguments)
    finally:
        handle.remove()
    assert {adapter.get_submodule(name) for name in PROJECTIONS} <= set(called_modules)


def test_a_named_backend_refuses_changed_projections() -> None:
    adapter = adapter_of()
    WAYS["lora"](adapter)
    if rada_fast.backends()["cpu"] != "usable":
        pytest.skip("no compiled extension")
    with (
        rada_fast.use_backend("cpu"),
        pytest.raises(
            BackendUnavailableError, match=r"k_proj is a LoRA, not a torch\.nn\.Linear; 'reference' serves it"
        ),
    ):
        adapter(*inputs())
    with rada_fast.use_backend("literal"):
        torch.testing.assert_close(adapter(*inputs()).shape, torch.Size([2, 5]))


def test_replicas_with_plain_attributes_compute_the_same() -> None:
    """torch.nn.parallel.replicate makes the parameters of a replica plain attributes."""
    adapter, arguments = adapter_of(), inputs()
    replica = adapter._replicate_for_data_parallel()
    for name in PROJECTIONS:
        layer = adapter.get_submodule(name)._replicate_for_data_parallel()
        for leaf, value in adapter.get_submodule(name).named_parameters():
            setattr(layer, leaf, value.clone())
        replica._modules[name] = layer
    assert not list(replica.parameters())
    torch.testing.assert_close(replica(*arguments), adapter(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("config", [CONFIG, AdapterConfig.paper(16, num_layers=3)], ids=["official", "layers"])
def test_an_adapter_moves_from_the_meta_device_and_is_initialised_again(config: AdapterConfig) -> None:
    adapter = RationalAdapter(config, device="meta")
    image, text = torch.ones(2, 16, device="meta"), torch.ones(5, 16, device="meta")
    assert adapter(image, text, 100.0).shape == (2, 5)
    with pytest.raises(ValueError, match="must be on cpu as image_features are, got meta"):
        adapter(torch.ones(2, 16), torch.ones(5, 16), 100.0)
    with pytest.raises(ValueError, match="on the meta device: give it values first, by to_empty and reset_parameters"):
        adapter.is_zero_shot()
    with pytest.raises(UserError, match="on the meta device: give it values first"):
        save_adapter(adapter, "nowhere")
    adapter.to_empty(device="cpu")
    torch.manual_seed(7)
    adapter.reset_parameters()
    torch.manual_seed(7)
    fresh = RationalAdapter(config)
    assert adapter.is_zero_shot()
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in adapter.state_dict().items())
    # FSDP's deferred initialisation starts each layer by itself in this way.
    for layer in adapter.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    assert adapter.is_zero_shot()


@pytest.mark.parametrize("change", ["lora", "hook", "weight-norm"])
def test_a_changed_output_projection_is_not_skipped(change: str) -> None:
    adapter = RationalAdapter(CONFIG)
    assert adapter.is_zero_shot()
    match change:
        case "lora":
            adapter.out_proj = LoRA(adapter.get_submodule("out_proj"))  # type: ignore[arg-type]
        case "hook":
            adapter.get_submodule("out_proj").register_forward_hook(lambda *args: args[-1] + 1)
        case _:
            nn.init.normal_(adapter.get_parameter("out_proj.weight"))
            parametrizations.weight_norm(adapter.get_submodule("out_proj"))
    assert not adapter.is_zero_shot()


def wrapped(kind: str, adapter: RationalAdapter) -> nn.Module:
    match kind:
        case "checkpointed":
            return checkpoint_wrapper(adapter)
        case "data-parallel":
            return nn.DataParallel(adapter)
        case "average":
            return torch.optim.swa_utils.AveragedModel(adapter)
        case "compiled":
            return torch.compile(adapter, backend="eager")  # type: ignore[return-value]
        case _:
            return torch.compile(nn.DataParallel(adapter), backend="eager")  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["data-parallel", "average", "compiled", "both", "checkpointed"])
def test_wrapped_adapters_are_saved_and_loaded(tmp_path: Path, kind: str) -> None:
    adapter = RationalAdapter(CONFIG)
    nn.init.normal_(adapter.get_parameter("out_proj.weight"))
    wrapper = wrapped(kind, adapter)
    save_adapter(wrapper, tmp_path / "a.safetensors")
    torch.save(wrapper.state_dict(), tmp_path / "dictionary.pt")
    for name in ("a.safetensors", "dictionary.pt"):
        loaded = load_adapter(tmp_path / name)
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in adapter.state_dict().items())
    if kind == "average":
        wrapper.update_parameters(adapter)  # type: ignore[operator]
        assert wrapper(*(value.float() for value in inputs()[:2]), 30.0).shape == (2, 5)


@pytest.mark.parametrize("change", ["weight-norm", "tied", "hook", "compiled", "checkpointed"])
def test_a_file_holds_what_the_adapter_computes_with(tmp_path: Path, change: str) -> None:
    adapter = adapter_of()
    if change == "compiled":
        adapter.k_proj = torch.compile(adapter.k_proj, backend="eager")  # type: ignore[assignment]
    elif change == "checkpointed":
        adapter.k_proj = checkpoint_wrapper(adapter.k_proj)
    else:
        WAYS[change](adapter)
    save_adapter(adapter, tmp_path / "a.safetensors")
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert torch.equal(loaded.get_parameter("v_proj.weight"), adapter.v_proj.weight)  # type: ignore[arg-type]
    if change != "hook":  # a module's state does not contain its hooks
        arguments = inputs()
        torch.testing.assert_close(loaded(*arguments), adapter(*arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora", "k_proj is a LoRA, not a torch.nn.Linear: merge it .*merge_and_unload"),
        ("lora-subclass", "k_proj is a LoRALinear with a forward of its own: merge it"),
        ("weight-norm-by-hooks", "k_proj has a weight that is made anew at every call .*remove_weight_norm"),
        ("pruned", "v_proj has a weight that is made anew at every call .*prune.remove"),
    ],
)
def test_adapters_that_a_file_cannot_hold_are_refused_with_advice(tmp_path: Path, change: str, message: str) -> None:
    adapter = adapter_of()
    WAYS[change](adapter)
    with pytest.raises(UserError, match=message):
        save_adapter(adapter, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_module_is_refused_as_an_adapter() -> None:
    with pytest.raises(TypeError, match="adapter must be a RationalAdapter, or one in a wrapper, got Linear"):
        save_adapter(nn.Linear(2, 2), "nowhere")


def test_copies_of_a_changed_adapter_are_independent() -> None:
    adapter, arguments = adapter_of(), inputs()
    WAYS["lora"](adapter)
    twin = copy.deepcopy(adapter)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    assert not torch.allclose(twin(*arguments), adapter(*arguments))


def test_projections_as_functions_need_one_adapter_for_all_episodes() -> None:
    adapter = adapter_of()
    WAYS["lora"](adapter)
    image, text, scale = inputs()
    with pytest.raises(ValueError, match="episodes need parameters that are tensors, but k_proj is a LoRA"):
        rational_adapter(
            image, text, scale, tensors_or_calls(dict(adapter.named_children()), bias=True), CONFIG, episodes=2
        )


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """Make a process group of only this process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="no gloo")
def test_sharded_adapters_compute_or_say_what_they_cannot(tmp_path: Path, mesh: Any) -> None:
    arguments = inputs()

    def sharded(*names: str) -> Any:
        torch.manual_seed(0)
        adapter = adapter_of()
        for name in names:
            fully_shard(adapter.get_submodule(name), mesh=mesh)
        return adapter

    expected = sharded()(*arguments)
    for names in (PROJECTIONS, ("",), (*PROJECTIONS, "")):
        adapter = sharded(*names)
        logits = adapter(*arguments)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        logits.sum().backward()
        assert adapter.k_proj.weight.grad is not None
        assert not adapter.is_zero_shot()
    assert sharded(*PROJECTIONS).mask(*arguments).shape == (2, 5, 16)
    with pytest.raises(ValueError, match="q_proj1 is sharded by fully_shard, which gathers it for forward alone"):
        sharded("").mask(*arguments)
    with pytest.raises(UserError, match="weight of the type DTensor: gather it before saving"):
        save_adapter(sharded(""), tmp_path / "a")
    with pytest.raises(ValueError, match=r"q_proj1\.weight must be an ordinary tensor, got DTensor: gather it first"):
        rada_fast.adapt_episodes(sharded(""), arguments[0][None], *arguments[1:])

    older = sharded()
    for name in PROJECTIONS:
        setattr(older, name, FullyShardedDataParallel(getattr(older, name), device_id=torch.device("cpu")))
    torch.testing.assert_close(older(*arguments), expected, rtol=1e-9, atol=1e-9)
    wrapped_adapter = FullyShardedDataParallel(sharded(), device_id=torch.device("cpu"))
    torch.testing.assert_close(wrapped_adapter(*arguments), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match=r"adapter is in FullyShardedDataParallel, .*summon_full_params"):
        save_adapter(wrapped_adapter, tmp_path / "a")
    with FullyShardedDataParallel.summon_full_params(wrapped_adapter):
        save_adapter(wrapped_adapter.module, tmp_path / "a")
    torch.testing.assert_close(load_adapter(tmp_path / "a")(*arguments), expected, rtol=1e-9, atol=1e-9)


def test_a_bias_that_the_configuration_does_not_have_is_added_and_the_other_way_round() -> None:
    arguments = inputs()
    without = RationalAdapter(AdapterConfig.official(16, bias=False)).double()
    nn.init.normal_(without.get_parameter("out_proj.weight"))
    without.k_proj = nn.Linear(16, 16).double()
    torch.testing.assert_close(without(*arguments), by_calls(without, *arguments))
    one_less = adapter_of()
    one_less.get_submodule("k_proj").bias = None  # type: ignore[assignment]
    torch.testing.assert_close(one_less(*arguments), by_calls(one_less, *arguments))
    with pytest.raises(UserError, match=r"adapter's k_proj has a bias, which its configuration \(bias=False\) has not"):
        without.stored_parameters()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda adapter: delattr(adapter, "k_proj"), "adapter must hold a projection 'k_proj', which was removed"),
        (
            lambda adapter: setattr(adapter, "k_proj", None),
            "adapter must hold a projection 'k_proj', which was removed",
        ),
        (lambda adapter: adapter.k_proj.weight.data.fill_(torch.nan), r"adapter's k_proj.weight holds NaN or infinity"),
        (lambda adapter: adapter.v_proj.to(torch.complex128), r"adapter's v_proj.weight must be float16, .*complex128"),
        (
            lambda adapter: setattr(adapter, "v_proj", nn.Linear(16, 8)),
            r"adapter's v_proj.weight must be \(16, 16\) as its configuration says, got \(8, 16\)",
        ),
    ],
    ids=["removed", "none", "nan", "complex", "narrow"],
)
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_adapters_that_load_adapter_would_refuse_are_not_saved(tmp_path: Path, change: Any, message: str) -> None:
    adapter = adapter_of()
    change(adapter)
    with pytest.raises(ValueError, match=message):
        save_adapter(adapter, tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())
    for path in ("", "a\0b"):
        with pytest.raises(UserError, match="path must name a file to write the adapter to"):
            save_adapter(adapter, path)


def test_mixed_types_are_named() -> None:
    adapter = adapter_of()
    image, text, scale = inputs()
    with pytest.raises(TypeError, match=r"parameter 'q_proj1.weight' must have image_features' dtype torch.float32"):
        adapter(image.float(), text.float(), scale)
    adapter.k_proj.float()
    with pytest.raises(TypeError, match=r"parameter 'k_proj.weight' must have .* torch.float64, got torch.float32"):
        adapter(image, text, scale)
    for wrong in ("20", None, [20.0], torch.tensor(2j)):
        with pytest.raises(TypeError, match="logit_scale must be a"):
            adapter(image, text, wrong)


class Doubled(Tensor):
    """Doubled is a tensor subclass that changes the results of PyTorch's functions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result.as_subclass(Tensor) if func is linear else result


def test_weights_with_arithmetic_of_their_own_keep_it() -> None:
    adapter = adapter_of().requires_grad_(False)
    plain = adapter(*inputs())
    layer: Any = adapter.k_proj
    layer._parameters["weight"] = layer.weight.data.as_subclass(Doubled)
    arguments = inputs()
    torch.testing.assert_close(adapter(*arguments), by_calls(adapter, *arguments))
    assert not torch.allclose(adapter(*arguments), plain)
