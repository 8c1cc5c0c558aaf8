"""Laws that every injected adapter obeys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_diffusion.adapters import merge, variants
from lora_diffusion.adapters.inject import inject
from lora_diffusion.adapters.plan import plan
from lora_diffusion.adapters.state import load_state, read_state
from lora_diffusion.adapters.switch import switch_of
from lora_diffusion.config.schema import AdapterConfig
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import AdapterFileError, ConfigError, RunError
from tests.tiny_adapters import PARTS, answers, random_state, same, tiny_loaded

_BOTH = ("unet", "text_encoder")
# Merging adds the change to the weight before the product instead of after it: rounding of float32, a few layers deep.
_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _trained(loaded: Loaded, *, dropout: float = 0.0, seed: int = 0) -> dict[str, dict[str, torch.nn.Parameter]]:
    config = AdapterConfig(rank=4, alpha=2.0, parts=_BOTH, targets=("attn", "ff", "unet/conv"), dropout=dropout)
    return inject(loaded, plan(loaded.parts, PARTS, config), variants.find("lora"), dropout, seed)


def _equal(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def _near(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.allclose(one, other, **_CLOSE) for one, other in zip(first, second, strict=True))


def test_new_adapter_changes_nothing_and_draws_no_global_random_number() -> None:
    loaded = tiny_loaded()
    before, random_state_before = answers(loaded), torch.get_rng_state()
    _trained(loaded)
    assert torch.equal(torch.get_rng_state(), random_state_before)
    assert _equal(answers(loaded), before)


def test_first_values_depend_on_seed_and_module_only() -> None:
    whole, part = tiny_loaded(), tiny_loaded()
    first = _trained(whole, seed=3)["unet"]
    small = plan(part.parts, PARTS, AdapterConfig(rank=4, targets=("ff",)))
    second = inject(part, small, variants.find("lora"), 0.0, 3)["unet"]
    assert all(torch.equal(first[name], parameter) for name, parameter in second.items())
    third = _trained(tiny_loaded(), seed=4)["unet"]
    name = next(iter(second))
    assert not torch.equal(first[name], third[name])


def test_only_adapter_parameters_get_gradients() -> None:
    loaded = tiny_loaded()
    parameters = _trained(loaded)
    assert all(p.dtype == torch.float32 for settings in parameters.values() for p in settings.values())
    ids, latents = torch.randint(0, 200, (1, 7)), torch.randn(1, 4, 8, 8)
    text = loaded.parts["text_encoder"](ids).last_hidden_state
    loaded.parts["unet"](latents, torch.tensor([5]), text).sample.square().mean().backward()
    settings = {id(parameter) for group in parameters.values() for parameter in group.values()}
    for network in loaded.parts.values():
        for name, parameter in network.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None) == (id(parameter) in settings), name


def test_state_round_trip_is_identity_with_own_ranks_and_alphas() -> None:
    loaded = tiny_loaded()
    state = random_state(loaded)
    modules = dict(state.modules)
    key = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    # conv_out is the end of no other path, but to_q ends many: the ranks must not spread to them.
    modules[key] = ModuleAdapter("lora", {"down": torch.ones(1, 64), "up": torch.ones(64, 1)}, 0.3)
    state = AdapterState(modules)
    load_state(loaded, state, "mine")
    again = read_state(loaded, "mine")
    assert same(again, state)
    assert again.modules[key].rank == 1


def test_loaded_state_acts_as_the_trained_adapter() -> None:
    trained, fresh = tiny_loaded(), tiny_loaded()
    for number, parameter in enumerate(p for each in _trained(trained).values() for p in each.values()):
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    load_state(fresh, read_state(trained), "file")
    assert _equal(answers(fresh), answers(trained))
    assert not any(parameter.requires_grad for parameter in fresh.parts["unet"].parameters())


def test_weights_and_disabled() -> None:
    loaded = tiny_loaded()
    base = answers(loaded)
    first, second = random_state(loaded, 1), random_state(loaded, 2, rank=2, groups="attn")
    load_state(loaded, first, "first")
    alone = answers(loaded)
    load_state(loaded, second, "second", 0.5)
    both = answers(loaded)
    switch = switch_of(loaded)
    assert switch.weights == {"first": 1.0, "second": 0.5}
    with switch.disabled():
        assert _equal(answers(loaded), base)
    assert _equal(answers(loaded), both)
    switch.set_weights({"first": 1.0, "second": 0.0})
    assert _equal(answers(loaded), alone)
    switch.set_weights({})
    assert _equal(answers(loaded), base)
    with pytest.raises(ConfigError, match=r'"frist".*did you mean "first"'):
        switch.set_weights({"frist": 1.0})
    with pytest.raises(ConfigError, match="give each its own name"):
        load_state(loaded, first, "first")


def test_switching_keeps_what_is_trained() -> None:
    loaded = tiny_loaded()
    _trained(loaded)
    load_state(loaded, random_state(loaded, groups="attn"), "other")
    before = [parameter.requires_grad for parameter in loaded.parts["unet"].parameters()]
    switch = switch_of(loaded)
    switch.set_weights({"other": 1.0})
    with switch.disabled():
        pass
    assert [parameter.requires_grad for parameter in loaded.parts["unet"].parameters()] == before


def test_merge_equals_unmerged_and_unmerge_restores() -> None:
    loaded = tiny_loaded()
    load_state(loaded, random_state(loaded, 1), "first")
    load_state(loaded, random_state(loaded, 2, groups="attn conv"), "second", 0.0)
    weights = {"first": 0.7, "second": -0.4}
    switch_of(loaded).set_weights(weights)
    unmerged = answers(loaded)
    frozen = [parameter.clone() for parameter in loaded.parts["unet"].parameters()]
    merge.merge(loaded, weights)
    assert _near(answers(loaded), unmerged)
    with pytest.raises(RunError, match="merged already"):
        merge.merge(loaded, weights)
    with pytest.raises(RunError, match="unmerge first"):
        switch_of(loaded).set_weights(weights)
    merge.unmerge(loaded)
    assert all(torch.equal(*pair) for pair in zip(loaded.parts["unet"].parameters(), frozen, strict=True))
    assert _equal(answers(loaded), unmerged)


def test_removing_after_a_merge_leaves_the_base_with_its_own_names() -> None:
    loaded = tiny_loaded()
    names = list(loaded.parts["unet"].state_dict())
    load_state(loaded, random_state(loaded), "first")
    unmerged = answers(loaded)
    merge.merge(loaded, {"first": 1.0})
    merge.remove(loaded)
    assert list(loaded.parts["unet"].state_dict()) == names
    assert _near(answers(loaded), unmerged)


def test_norm_without_the_dense_matrix() -> None:
    for _, adapter in random_state(tiny_loaded(), alpha=3.0):
        assert merge.delta_norm(adapter) == pytest.approx(float(merge.delta_weight(adapter).norm()), rel=1e-5)


def test_dropout_acts_only_where_a_gradient_is_recorded() -> None:
    loaded = tiny_loaded()
    for parameter in _trained(loaded, dropout=0.5)["unet"].values():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    assert _equal(answers(loaded), answers(loaded))
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 5, 32))
    assert not torch.equal(loaded.parts["unet"](*inputs).sample, loaded.parts["unet"](*inputs).sample)


def test_state_that_does_not_fit_is_refused_with_the_modules() -> None:
    loaded = tiny_loaded()
    state = random_state(loaded, groups="attn")
    key = next(iter(state.modules))
    wrong = {key: replace(state.modules[key], tensors={"down": torch.ones(4, 7), "up": torch.ones(32, 4)})}
    wrong[ModuleKey("unet", "no.such")] = state.modules[key]
    wrong[ModuleKey("text_encoder_2", "to_q")] = state.modules[key]
    with pytest.raises(AdapterFileError) as caught:
        load_state(loaded, AdapterState({**state.modules, **wrong}), "bad")
    assert len(caught.value.errors) == 3
    assert "down is [4, 7], the base needs [4, 32]" in str(caught.value)
    assert loaded.adapters is None


def test_factors_of_1x1_convolutions_may_have_two_dimensions() -> None:
    loaded, other = tiny_loaded(), tiny_loaded()
    key = ModuleKey("unet", "mid_block.attentions.0.proj_in")
    flat = {"down": torch.ones(2, 64), "up": torch.ones(64, 2)}
    load_state(loaded, AdapterState({key: ModuleAdapter("lora", flat, 1.0)}), "flat")
    deep = {name: tensor[..., None, None] for name, tensor in flat.items()}
    load_state(other, AdapterState({key: ModuleAdapter("lora", deep, 1.0)}), "deep")
    assert _equal(answers(loaded), answers(other))
