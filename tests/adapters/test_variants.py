"""Every variant obeys the laws of training, loading and merging, and changes the weight by its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from lora_diffusion.adapters import merge, variants
from lora_diffusion.adapters.inject import inject
from lora_diffusion.adapters.plan import PlannedModule, plan
from lora_diffusion.adapters.state import load_state, read_state
from lora_diffusion.adapters.switch import switch_of
from lora_diffusion.adapters.variants import VARIANTS
from lora_diffusion.algebra.delta import change_shape, delta_norm, delta_weight, kronecker_split, without_tucker
from lora_diffusion.config.schema import AdapterConfig
from lora_diffusion.core import rng
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import AdapterFileError, ConfigError
from tests.tiny_adapters import PARTS, answers, random_state, same, tiny_loaded

_CLOSE = {"rtol": 1e-4, "atol": 1e-5}
Parameters = dict[str, dict[str, nn.Parameter]]


def config_of(variant: str, **values: object) -> AdapterConfig:
    settings = {"rank": 3, "alpha": 2.0, "parts": ("unet", "text_encoder"), "targets": ("attn", "ff", "unet/conv")}
    return AdapterConfig(variant, **{**settings, **values})  # type: ignore[arg-type]


def trained(loaded: Loaded, variant: str, **values: object) -> Parameters:
    config = config_of(variant, **values)
    return inject(loaded, plan(loaded.parts, PARTS, config), variants.find(variant), config.dropout, seed=0)


def moved(parameters: Parameters) -> None:
    """Moves every parameter a little, as training does."""
    generator = torch.Generator().manual_seed(5)
    for each in parameters.values():
        for parameter in each.values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def state_of(variant: str, **values: object) -> AdapterState:
    loaded = tiny_loaded()
    moved(trained(loaded, variant, **values))
    return read_state(loaded)


def near(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.allclose(one, other, **_CLOSE) for one, other in zip(first, second, strict=True))


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def test_new_adapter_changes_nothing_and_only_it_gets_gradients(variant: str) -> None:
    loaded = tiny_loaded()
    before, random = answers(loaded), torch.get_rng_state()
    parameters = trained(loaded, variant)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(*pair) for pair in zip(answers(loaded), before, strict=True))
    text = loaded.parts["text_encoder"](torch.arange(7)[None]).last_hidden_state
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loaded.parts["unet"](latents, torch.tensor([5]), text).sample.square().mean().backward()
    settings = {id(parameter) for group in parameters.values() for parameter in group.values()}
    for network in loaded.parts.values():
        for name, parameter in network.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None) == (id(parameter) in settings), name
    zeros = VARIANTS[variant].zeros
    assert all(
        parameter.grad.any() for name, parameter in parameters["unet"].items() if name.rsplit(".", 1)[1] in zeros
    )


def test_plan_tells_the_tensors(variant: str) -> None:
    loaded = tiny_loaded()
    injection = plan(loaded.parts, PARTS, config_of(variant))
    parameters = trained(loaded, variant)
    for module in injection.modules:
        for tensor, shape in module.tensors.items():
            assert tuple(parameters[module.part].pop(f"{module.path}.{tensor}").shape) == shape
    assert not any(parameters.values())
    assert injection.num_parameters == sum(t.numel() for _, each in read_state(loaded) for t in each.tensors.values())


def test_layer_answers_with_the_changed_weight(variant: str) -> None:
    loaded = tiny_loaded()
    moved(trained(loaded, variant))
    state = read_state(loaded)
    for strength in (1.0, 0.3):
        switch_of(loaded).set_weights({"default": strength})
        for key, adapter in state:
            layer = loaded.parts[key.part].get_submodule(key.path)
            base = layer.get_base_layer()
            change = strength * delta_weight(adapter, base.weight)
            assert change.shape == base.weight.shape
            assert change_shape(adapter) == tuple(change.flatten(1).shape)
            size = (2, base.weight.shape[1], 6, 6) if base.weight.dim() == 4 else (5, base.weight.shape[1])
            x = torch.randn(size, generator=torch.Generator().manual_seed(1))
            changed = base._conv_forward(x, change, None) if base.weight.dim() == 4 else x @ change.T
            with torch.no_grad():
                torch.testing.assert_close(layer(x), base(x) + changed, rtol=1e-4, atol=2e-5)


def test_change_is_that_of_peft(variant: str) -> None:
    loaded = tiny_loaded()
    moved(trained(loaded, variant))
    for (_, adapter), (_, layer) in zip(read_state(loaded), switch_of(loaded).layers(), strict=True):
        if adapter.variant in ("lora", "loha", "lokr"):
            peft = layer.get_delta_weight("default").detach()
            torch.testing.assert_close(delta_weight(adapter, layer.get_base_layer().weight), peft, rtol=1e-6, atol=1e-6)
        assert isinstance(layer, LoHaLayer) == (variant == "loha")
        assert isinstance(layer, LoKrLayer) == (variant == "lokr")


def test_loaded_state_acts_as_the_trained_adapter(variant: str) -> None:
    live, fresh = tiny_loaded(), tiny_loaded()
    moved(trained(live, variant))
    state = read_state(live)
    assert {adapter.variant for _, adapter in state} == {VARIANTS[variant].stored}
    load_state(fresh, state, "file")
    assert same(read_state(fresh, "file"), state)
    assert near(answers(fresh), answers(live))
    assert not near(answers(fresh), answers(tiny_loaded()))


def test_merge_equals_unmerged_and_unmerge_restores(variant: str) -> None:
    loaded = tiny_loaded()
    load_state(loaded, state_of(variant), "mine", 0.7)
    load_state(loaded, random_state(loaded, 2, groups="attn conv"), "other", -0.4)
    unmerged = answers(loaded)
    frozen = [layer.get_base_layer().weight.clone() for _, layer in switch_of(loaded).layers()]
    merge.merge(loaded, {"mine": 0.7, "other": -0.4})
    assert near(answers(loaded), unmerged)
    merge.unmerge(loaded)
    assert all(
        torch.equal(layer.get_base_layer().weight, weight)
        for (_, layer), weight in zip(switch_of(loaded).layers(), frozen, strict=True)
    )
    assert all(torch.equal(*pair) for pair in zip(answers(loaded), unmerged, strict=True))
    names = list(tiny_loaded().parts["unet"].state_dict())
    merge.remove(loaded)
    assert list(loaded.parts["unet"].state_dict()) == names
    assert near(answers(loaded), answers(tiny_loaded()))


def test_adapters_of_different_variants_stand_on_the_same_modules() -> None:
    loaded = tiny_loaded()
    alone = {}
    for variant in ("lokr", "lora", "dora", "loha"):
        load_state(loaded, state_of(variant), variant)
        single = tiny_loaded()
        load_state(single, state_of(variant), variant)
        alone[variant] = answers(single)
    switch = switch_of(loaded)
    for variant, expected in alone.items():
        switch.set_weights({variant: 1.0})
        assert near(answers(loaded), expected)
        assert same(read_state(loaded, variant), state_of(variant))
    switch.set_weights({})
    assert near(answers(loaded), answers(tiny_loaded()))


def test_one_adapter_of_several_variants() -> None:
    states = [state_of(variant) for variant in ("lora", "dora", "dora_out", "loha", "lokr")]
    mixed = AdapterState({key: states[index % 5].modules[key] for index, key in enumerate(states[0].modules)})
    loaded, merged = tiny_loaded(), tiny_loaded()
    load_state(loaded, mixed, "mixed")
    assert same(read_state(loaded, "mixed"), mixed)
    for key, adapter in mixed:
        weight = merged.parts[key.part].get_submodule(key.path).weight
        weight.data += delta_weight(adapter, weight.data)
    assert near(answers(loaded), answers(merged))


@pytest.mark.parametrize(("variant", "inputs_axis"), [("dora", True), ("dora_out", False)])
def test_dora_by_hand(variant: str, inputs_axis: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(size, generator=generator) for size in ((6, 4, 3, 3), (2, 4, 3, 3), (6, 2, 1, 1)))
    magnitude = torch.rand((1, 4, 1, 1) if inputs_axis else (6, 1, 1, 1), generator=generator)
    change = delta_weight(ModuleAdapter(variant, {"down": down, "up": up, "magnitude": magnitude}, 1.0), weight)
    for index in range(4 if inputs_axis else 6):
        whole = weight.double() + 0.5 * torch.einsum("or,rikl->oikl", up[..., 0, 0].double(), down.double())
        part, was = (whole[:, index], weight[:, index]) if inputs_axis else (whole[index], weight[index])
        expected = magnitude.flatten()[index].double() * part / part.square().sum().sqrt() - was.double()
        actual = change[:, index] if inputs_axis else change[index]
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_scale_of_lokr_is_that_of_its_low_rank_factor() -> None:
    w1, w2, a, b = torch.randn(2, 3), torch.randn(4, 5), torch.randn(4, 2), torch.randn(2, 5)
    whole = ModuleAdapter("lokr", {"w1": w1, "w2": w2}, alpha=7.0)
    assert (whole.scale, ModuleAdapter("lokr", {"w1": w1, "w2_a": a, "w2_b": b}, alpha=7.0).scale) == (1.0, 3.5)
    torch.testing.assert_close(delta_weight(whole), torch.kron(w1, w2))
    both = {"w1_a": torch.randn(2, 1), "w1_b": torch.randn(1, 3), "w2": w2}
    assert ModuleAdapter("lokr", both, alpha=7.0).scale == 7.0


@pytest.mark.parametrize("variant", ["lora", "loha", "lokr"])
def test_tucker_cores_are_read(variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "lora": {"down": (2, 64, 1, 1), "mid": (2, 2, 3, 3), "up": (64, 2, 1, 1)},
        "loha": {f"w{n}_{x}": (2, 64) for n in "12" for x in "ab"} | {"t1": (2, 2, 3, 3), "t2": (2, 2, 3, 3)},
        "lokr": {"w1": (4, 4), "w2_a": (2, 16), "w2_b": (2, 16), "t2": (2, 2, 3, 3)},
    }[variant]  # fmt: skip
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    adapter = ModuleAdapter(variant, tensors, alpha=1.0)

    def rebuilt(core: Tensor, out: Tensor, inputs: Tensor) -> Tensor:
        # rebuild_tucker of LyCORIS
        return torch.einsum("ijkl,ip,jr->prkl", core.double(), out.double(), inputs.double())

    double = {name: tensor.double() for name, tensor in tensors.items()}
    expected = {
        "lora": lambda: rebuilt(double["mid"], double["up"].flatten(1).T, double["down"].flatten(1).T.T),
        "loha": lambda: (
            rebuilt(double["t1"], double["w1_a"], double["w1_b"])
            * rebuilt(double["t2"], double["w2_a"], double["w2_b"]).contiguous()
        ),
        "lokr": lambda: torch.kron(
            double["w1"][..., None, None], rebuilt(double["t2"], double["w2_a"], double["w2_b"]).contiguous()
        ),
    }[variant]()
    loaded = tiny_loaded()
    key = ModuleKey("unet", "mid_block.resnets.0.conv1")
    weight = loaded.parts["unet"].get_submodule(key.path).weight.data
    torch.testing.assert_close(delta_weight(adapter, weight).double(), 0.5 * expected, rtol=1e-4, atol=1e-6)
    assert delta_norm(adapter) == pytest.approx(float(delta_weight(adapter, weight).norm()), rel=1e-4)
    assert change_shape(adapter) == (64, 64 * 9)
    load_state(loaded, AdapterState({key: adapter}), "tucker")
    assert same(read_state(loaded, "tucker"), AdapterState({key: without_tucker(adapter)}))
    merged = tiny_loaded()
    merged.parts["unet"].get_submodule(key.path).weight.data += delta_weight(adapter, weight)
    assert near(answers(loaded), answers(merged))


@pytest.mark.parametrize("size", [1, 2, 7, 30, 128, 320, 768, 1280, 2560, 5120])
@pytest.mark.parametrize("factor", [-1, 1, 2, 6, 8, 16, 1000])
def test_kronecker_factors_are_those_of_lycoris(size: int, factor: int) -> None:
    assert kronecker_split(size, factor) == factorization(size, factor)


def test_first_values_of_lora_are_drawn_as_in_the_first_release() -> None:
    parameters = trained(tiny_loaded(), "lora")["unet"]
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down = torch.zeros(3, 64)
    nn.init.kaiming_uniform_(down, a=5**0.5, generator=rng.derive(0, "adapter", "unet", path))
    assert torch.equal(parameters[f"{path}.down"], down)


def _planned(variant: str, **values: object) -> tuple[PlannedModule, ...]:
    return plan(tiny_loaded().parts, PARTS, config_of(variant, **values)).modules


def test_scale_of_rslora() -> None:
    (to_q, *_) = _planned("rslora", rank=4)
    assert (to_q.alpha, to_q.alpha / to_q.rank) == (4.0, 2.0 / 2)
    sizes = {(module.rank, module.alpha / module.rank) for module in _planned("rslora", rank=4, conv_rank=9)}
    assert sizes == {(4, 1.0), (9, 1.0)}
    assert {module.alpha for module in _planned("rslora", rank=4, conv_rank=9, conv_alpha=2.0)} == {4.0, 6.0}


def test_locon_covers_convolutions_with_a_size_of_their_own() -> None:
    networks = tiny_loaded().parts
    injection = plan(networks, PARTS, config_of("locon", targets=("attn",), rank=4, alpha=2.0, conv_rank=2))
    sizes = {(len(module.shape) > 2 and module.shape[2], module.rank, module.alpha) for module in injection.modules}
    assert sizes == {(False, 4, 2.0), (1, 4, 2.0), (3, 2, 1.0)}
    wide = plan(networks, PARTS, config_of("lora", targets=("unet/conv",), parts=("unet",), conv_alpha=1.0)).modules
    assert {module.alpha for module in wide if module.shape[2:] == (3, 3)} == {1.0}


@pytest.mark.parametrize(
    ("variant", "values", "text"),
    [
        ("loha", {"dropout": 0.1}, "does not work with adapter.variant=loha"),
        ("lora", {"conv_rank": 4, "targets": ("attn",)}, "no convolution larger than 1x1"),
        ("lora", {"lokr_factor": 4}, "only used with adapter.variant=lokr"),
        ("dora", {"conv_rank": 100, "rank": 4}, "adapter.conv_rank=100 is larger"),
    ],
)
def test_settings_without_use_are_refused(variant: str, values: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        plan(tiny_loaded().parts, PARTS, config_of(variant, **values))


def test_rank_of_lokr_may_mean_whole_factors() -> None:
    injection = plan(tiny_loaded().parts, PARTS, config_of("lokr", rank=1000))
    assert all(set(module.tensors) == {"w1", "w2"} for module in injection.modules)


def test_tensors_of_another_size_are_refused_with_the_reason() -> None:
    loaded = tiny_loaded()
    state = state_of("loha")
    key = next(iter(state.modules))
    wrong = replace(state.modules[key], tensors={**state.modules[key].tensors, "w1_b": torch.ones(3, 5)})
    with pytest.raises(AdapterFileError, match=r"w1_b \[3, 5\]"):
        load_state(loaded, AdapterState({**state.modules, key: wrong}), "bad")
    dora = state_of("dora")
    short = replace(dora.modules[key], tensors={**dora.modules[key].tensors, "magnitude": torch.ones(1, 5)})
    with pytest.raises(AdapterFileError, match=r"magnitude is \[1, 5\]"):
        load_state(loaded, AdapterState({key: short}), "bad")
    assert loaded.adapters is None
