from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_diffusion.algebra.lowrank import AtRank, ByEnergy
from lora_diffusion.compose.linear import Sum, Term, add, as_written, part_weights
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter
from lora_diffusion.core.errors import AdapterFileError, ConfigError, UnsupportedError
from tests.compose.adapters import CONV, QUERY, TEXT, dense, loha, lora


def term(state: AdapterState, unet: float = 1.0, text: float | None = None, name: str = "a") -> Term:
    weights = {"unet": unet, "text_encoder": unet if text is None else text}
    return Term(name, state, weights)


def changes(composed: Sum) -> dict[object, torch.Tensor]:
    return dense(AdapterState(composed.modules))


def test_sum_is_that_of_the_weighted_changes() -> None:
    first, second = lora(0, rank=4), lora(1, rank=3, alpha=-1.0)
    composed = add([term(first, 0.8, 0.5), term(second, -0.6)], None)
    for key, change in changes(composed).items():
        weights = (0.5, -0.6) if key == TEXT else (0.8, -0.6)
        expected = weights[0] * dense(first)[key] + weights[1] * dense(second)[key]
        assert torch.allclose(change, expected, rtol=0, atol=1e-6 * float(expected.norm()))
        assert composed.modules[key].rank == 7
        assert composed.modules[key].alpha == 7
    assert composed.error == 0
    assert composed.worst() == []


@pytest.mark.parametrize("format_name", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", [None, AtRank(3), ByEnergy(0.999)])
def test_errors_of_a_file_hold_its_rounding(format_name: str, dtype: torch.dtype, rule: AtRank | None) -> None:
    terms = [term(lora(0, rank=4), 0.8, 0.5), term(lora(1, rank=3, keys=(QUERY, TEXT)), -0.6)]
    format_ = registry.find("formats", format_name)
    composed = as_written(add(terms, rule), format_, dtype)
    state = format_.normalize(AdapterState(composed.modules))
    rounded = {
        key: replace(adapter, tensors={name: tensor.to(dtype) for name, tensor in adapter.tensors.items()})
        for key, adapter in state
    }
    rounded_changes, lost, size = dense(AdapterState(rounded)), 0.0, 0.0
    for key in composed.modules:
        exact = sum(
            summand.weights[key.part] * dense(summand.state)[key].reshape(rounded_changes[key].shape)
            for summand in terms
            if key in summand.state.modules
        )
        error = float((rounded_changes[key] - exact).norm())
        # Both roundings of one component together, and those of the sum to float32, are not counted.
        assert composed.relative(key) == pytest.approx(error / float(exact.norm()), rel=1e-3, abs=3e-7)
        lost, size = lost + error**2, size + float(exact.norm()) ** 2
    assert composed.error == pytest.approx((lost / size) ** 0.5, rel=1e-3, abs=3e-7)
    if rule is None:
        assert (composed.error == 0) == (dtype == torch.float32)


def test_rounding_of_vectors_counts_and_that_of_biases_does_not() -> None:
    diff, bias = torch.tensor([1.0, 1 + 2**-10, 3.0]), torch.tensor([0.1, 0.2, 0.3])
    modules = {QUERY: ModuleAdapter("norm", {"diff": diff, "bias": bias}, 0.0)}
    modules[CONV] = ModuleAdapter("full", {"bias": bias}, 0.0)
    composed = add([Term("a", AdapterState(modules), {"unet": 1.0})], None)
    composed = as_written(composed, registry.find("formats", "kohya"), torch.bfloat16)
    assert composed.errors == {QUERY: 2**-10, CONV: 0.0}


def test_weights_one_and_zero_give_the_first() -> None:
    first, second = lora(0), lora(1)
    for rule in (None, AtRank(4)):
        composed = add([term(first), term(second, 0.0)], rule)
        for key, change in changes(composed).items():
            assert torch.allclose(change, dense(first)[key], rtol=0, atol=1e-5)


def test_what_only_one_has_is_kept() -> None:
    first, second = lora(0, keys=(QUERY,)), lora(1, keys=(TEXT, QUERY))
    composed = add([term(first), term(second, 0.5)], None)
    assert list(composed.modules) == [QUERY, TEXT]
    assert torch.allclose(changes(composed)[TEXT], 0.5 * dense(second)[TEXT])


def test_rank_is_bounded_by_the_module_and_the_error_is_told() -> None:
    terms = [term(lora(seed, rank=6), name=str(seed)) for seed in range(3)]
    composed = add(terms, AtRank(11))
    assert {key: adapter.rank for key, adapter in composed.modules.items()} == {QUERY: 11, CONV: 11, TEXT: 10}
    whole = {key: sum(dense(summand.state)[key] for summand in terms) for key in composed.modules}
    for key, change in changes(composed).items():
        assert composed.errors[key] == pytest.approx(float((change - whole[key]).norm()), abs=1e-4)
        assert composed.norms[key] == pytest.approx(float(whole[key].norm()), rel=1e-5)
    left, all_of_it = (
        sum(value**2 for value in values.values()) ** 0.5 for values in (composed.errors, composed.norms)
    )
    assert composed.error == pytest.approx(left / all_of_it)
    assert composed.worst()[0] == max(composed.modules, key=composed.relative)
    assert composed.worst(1) == composed.worst()[:1]


def test_linear_written_as_1x1_convolution_adds_to_a_linear_layer() -> None:
    plain = lora(0, keys=(QUERY,))
    tensors = {name: tensor[:, :, None, None] for name, tensor in plain.modules[QUERY].tensors.items()}
    other = AdapterState({QUERY: replace(plain.modules[QUERY], tensors=tensors)})
    composed = add([term(plain), term(other)], AtRank(4))
    assert torch.allclose(changes(composed)[QUERY].flatten(1), 2 * dense(plain)[QUERY], atol=1e-5)


def test_other_variants_need_a_rank() -> None:
    terms = [term(lora(0, keys=(QUERY, TEXT)), 0.5), term(loha(1), 2.0, name="h")]
    with pytest.raises(UnsupportedError, match=r"h is a loha adapter.*give --rank"):
        add(terms, None)
    composed = add(terms, AtRank(8))
    for key, change in changes(composed).items():
        # Ranks 4 and 2 * 2 add up to 8: nothing is lost.
        expected = 0.5 * dense(terms[0].state)[key] + 2 * dense(terms[1].state)[key]
        assert torch.allclose(change, expected, rtol=0, atol=1e-5 * float(expected.norm()))
    assert composed.error < 1e-5
    assert 0 < add(terms, ByEnergy(0.9)).error <= 0.1**0.5 + 1e-6


def test_kernel_that_a_loha_does_not_tell_is_that_of_the_base() -> None:
    alone = [term(loha(1, keys=(CONV,)))]
    composed = add(alone, AtRank(4), {CONV: (3, 3)})
    assert composed.modules[CONV].tensors["down"].shape == (4, 8, 3, 3)
    beside = add([*alone, term(lora(0, keys=(CONV,)))], AtRank(8))
    assert beside.modules[CONV].tensors["down"].shape == (8, 8, 3, 3)
    expected = dense(alone[0].state)[CONV] + dense(lora(0, keys=(CONV,)))[CONV].flatten(1)
    assert torch.allclose(changes(beside)[CONV].flatten(1), expected, atol=1e-4)


def test_dora_has_no_sum_without_its_base() -> None:
    state = lora(0, keys=(QUERY,))
    tensors = {**state.modules[QUERY].tensors, "magnitude": torch.ones(1, 16)}
    dora = AdapterState({QUERY: ModuleAdapter("dora", tensors, 1.0)})
    with pytest.raises(UnsupportedError, match=r"a is a dora adapter.*lora-diffusion merge.*lora-diffusion extract"):
        add([term(dora)], AtRank(2))


def test_other_shapes_are_refused_by_name() -> None:
    first, second = lora(0), lora(1, keys=(CONV,))
    wide = replace(second.modules[CONV], tensors={"down": torch.ones(4, 9, 3, 3), "up": torch.ones(12, 4, 1, 1)})
    for other in (first, loha(2, keys=(CONV,))):
        with pytest.raises(AdapterFileError, match=r"unet/mid_block.resnets.0.conv1: 12x72 and 12x81"):
            add([term(other), term(AdapterState({CONV: wide}))], AtRank(2))


def test_weights_of_parts() -> None:
    state = lora(0)
    assert part_weights(state, 0.5, "a") == {"unet": 0.5, "text_encoder": 0.5}
    assert part_weights(state, {"text_encoder": 0.0, "unet": 1.0}, "a") == {"text_encoder": 0.0, "unet": 1.0}
    with pytest.raises(ConfigError, match=r"a has the parts unet, text_encoder, .* write a:unet=1,text_encoder=1"):
        part_weights(state, {"unet": 1.0}, "a")
