"""Weighted sums of adapters as one adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_diffusion.algebra import lowrank
from lora_diffusion.algebra.delta import change_shape, delta_norm, delta_weight, without_tucker
from lora_diffusion.algebra.lowrank import Factors, RankRule, Truncated
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.errors import AdapterFileError, ConfigError, UnsupportedError
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.core.rng import derive

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MOST_NAMED = 10


@dataclass(frozen=True)
class Term:
    """An adapter in a sum."""

    name: str
    """What messages call it."""
    state: AdapterState
    weights: Mapping[str, float]
    """Part -> weight, for each part of the adapter."""

    def factors(self, key: ModuleKey) -> Factors | None:
        """Returns the weighted change of one module; None if it is not the product of two factors."""
        adapter = without_tucker(self.state.modules[key])
        if adapter.tensors.keys() - {"bias"} != {"down", "up"}:
            return None
        return Factors(adapter.tensors["down"], adapter.tensors["up"], self.weights[key.part] * adapter.scale)


@dataclass(frozen=True)
class Sum:
    """One adapter that does what several do together."""

    modules: Mapping[ModuleKey, ModuleAdapter]
    """All of variant lora with scale 1, alpha equals the rank, but for vectors, which are full or norm."""
    norms: Mapping[ModuleKey, float]
    """Frobenius norm of each change before anything was cut off."""
    errors: Mapping[ModuleKey, float]
    """Frobenius norm of what each change lost: what was cut off, and by `as_written` what rounding takes; 0 where the
    sum is exact. Changes of biases do not count."""

    @property
    def error(self) -> float:
        """Returns the norm of all that was lost, relative to that of all changes; 0 where nothing changes."""
        whole = math.hypot(*self.norms.values())
        return math.hypot(*self.errors.values()) / whole if whole else 0.0

    def relative(self, key: ModuleKey) -> float:
        """Returns the error of one module, relative to its own change."""
        return self.errors[key] / self.norms[key] if self.norms[key] else 0.0

    def worst(self, num: int = 5) -> list[ModuleKey]:
        """Returns the modules with the largest relative error, those without error left out."""
        ordered = sorted(self.modules, key=self.relative, reverse=True)
        return [key for key in ordered[:num] if self.relative(key)]


def add(
    terms: Sequence[Term], rule: RankRule | None, kernels: Mapping[ModuleKey, tuple[int, ...]] | None = None
) -> Sum:
    """Returns the weighted sum of adapters.

    Args:
        terms: at least one, all of one base.
        rule: the rank of each module; None sums exactly, so that ranks add up.
        kernels: module -> size of its convolution, for adapters whose tensors do not tell it.

    Raises:
        AdapterFileError: two adapters have a module in different shapes.
        UnsupportedError: an adapter whose change depends on the base, or that has no factors and no rule is given.
    """
    _check(terms, rule)
    modules: dict[ModuleKey, ModuleAdapter] = {}
    norms: dict[ModuleKey, float] = {}
    errors: dict[ModuleKey, float] = {}
    for key in keys(terms):
        present = [term for term in terms if key in term.state.modules]
        changing = [term for term in present if term.state.modules[key].changes_weight]
        if all(_is_vector(term.state.modules[key]) for term in changing):
            modules[key] = _add_vectors(changing, key)
            norms[key], errors[key] = delta_norm(modules[key]), 0.0
        else:
            truncated = _add_module(changing, key, rule, (kernels or {}).get(key, ()))
            modules[key], norms[key], errors[key] = as_lora(truncated.factors), truncated.norm, truncated.error
        if bias := [term.weights[key.part] * change for term in present if (change := _bias(term, key)) is not None]:
            modules[key] = replace(modules[key], tensors={**modules[key].tensors, "bias": sum(bias[1:], start=bias[0])})
    return Sum(modules, norms, errors)


def as_written(total: Sum, format_: Format, dtype: torch.dtype) -> Sum:
    """Returns a sum whose errors are those of a file of it, of which the dtype takes its part.

    What was cut off of a change has no direction in common with what is left of it, so that the squares of both losses
    add up, but for the product of the roundings of both factors, a millionth in bf16.

    Args:
        total: the sum, in float32.
        format_: that of the file; it may scale one factor by the other before they are rounded.
        dtype: that of the file. Where it cannot hold a value the error is not finite.
    """
    normalized = format_.normalize(AdapterState(total.modules))
    errors = {key: math.hypot(error, _rounding(normalized.modules[key], dtype)) for key, error in total.errors.items()}
    return replace(total, errors=errors)


def _rounding(adapter: ModuleAdapter, dtype: torch.dtype) -> float:
    """Returns the Frobenius norm of what rounding takes from a change of weight of one module of a sum."""
    if not adapter.changes_weight:
        return 0.0
    if "down" in adapter.tensors:
        return lowrank.rounding_error(Factors(adapter.tensors["down"], adapter.tensors["up"], adapter.scale), dtype)
    change = adapter.tensors["diff"]
    return float((change - change.to(dtype).float()).double().norm())


def share_left(terms: Iterable[Term], total: Sum) -> float:
    """Returns the size of a sum in terms of the size that its adapters have, taken by themselves, at their weights.

    It is 0 where they cancel each other, and where nothing is added.
    """
    before = [abs(term.weights[key.part]) * _size(adapter) for term in terms for key, adapter in term.state]
    whole = math.hypot(*before)
    return math.hypot(*map(_size, total.modules.values())) / whole if whole else 0.0


def _size(adapter: ModuleAdapter) -> float:
    bias = adapter.tensors.get("bias")
    return math.hypot(delta_norm(adapter), 0.0 if bias is None else float(bias.norm()))


def _bias(term: Term, key: ModuleKey) -> Tensor | None:
    return term.state.modules[key].tensors.get("bias")


def _is_vector(adapter: ModuleAdapter) -> bool:
    """Says whether a change is that of a norm, which has no factors and needs none."""
    return adapter.variant in ("full", "norm") and adapter.tensors["diff"].dim() == 1


def _add_vectors(terms: Sequence[Term], key: ModuleKey) -> ModuleAdapter:
    if not terms:
        return ModuleAdapter("full", {}, 0.0)
    changes = [term.weights[key.part] * delta_weight(term.state.modules[key]) for term in terms]
    variants = {term.state.modules[key].variant for term in terms}
    variant = variants.pop() if len(variants) == 1 else "full"
    return ModuleAdapter(variant, {"diff": sum(changes[1:], start=changes[0])}, 0.0)


def keys(terms: Iterable[Term]) -> list[ModuleKey]:
    """Returns every module that some adapter has, in the order of the adapters."""
    return list(dict.fromkeys(key for term in terms for key in term.state.modules))


def as_lora(factors: Factors) -> ModuleAdapter:
    """Returns a change of scale 1 as an adapter, for which alpha is the rank."""
    assert factors.scale == 1.0
    return ModuleAdapter("lora", {"down": factors.down, "up": factors.up}, float(factors.rank))


def part_weights(state: AdapterState, weights: float | Mapping[str, float], name: str) -> dict[str, float]:
    """Returns the weight of each part of an adapter.

    Args:
        state: the adapter.
        weights: one weight for all parts, or the weight of each.
        name: what the message calls the adapter.

    Raises:
        ConfigError: a part without weight, or a weight without part.
    """
    parts = state.parts()
    if not isinstance(weights, Mapping):
        return dict.fromkeys(parts, weights)
    if set(weights) != set(parts):
        raise ConfigError(
            f"{name} has the parts {', '.join(parts)}, but weights are given for {', '.join(weights)}; "
            f"write {name}:{','.join(f'{part}=1' for part in parts)}, with 0 for a part to leave out."
        )
    return dict(weights)


def _add_module(terms: Sequence[Term], key: ModuleKey, rule: RankRule | None, kernel: tuple[int, ...]) -> Truncated:
    factors = [product for term in terms if (product := term.factors(key))]
    if len(factors) == len(terms):
        whole = lowrank.total(factors)
        return lowrank.truncate(whole, rule) if rule else Truncated(whole, lowrank.norm(whole), 0.0)
    assert rule is not None, "checked before"
    changes = [term.weights[key.part] * delta_weight(term.state.modules[key]) for term in terms]
    kernel = next((tuple(change.shape[2:]) for change in changes if change.dim() > 2), kernel)
    flat = [change.flatten(1) for change in changes]
    change = sum(flat[1:], start=flat[0])
    return lowrank.truncate_dense(
        change.reshape(len(change), -1, *kernel), rule, derive(0, "sketch", key.part, key.path)
    )


def _check(terms: Sequence[Term], rule: RankRule | None) -> None:
    for term in terms:
        unsummed = {adapter.variant for _, adapter in term.state if adapter.needs_base}
        if unsummed:
            raise UnsupportedError(
                f"{term.name} is a {', '.join(sorted(unsummed))} adapter: its change depends on its base's weights "
                "and has no sum without it. Merge it into its base with 'lora-diffusion merge', and take the "
                "change out again as a lora with 'lora-diffusion extract'."
            )
        unfactored = {
            adapter.variant
            for key, adapter in term.state
            if adapter.changes_weight and not _is_vector(adapter) and term.factors(key) is None
        }
        if rule is None and unfactored:
            raise UnsupportedError(
                f"{term.name} is a {', '.join(sorted(unfactored))} adapter, which becomes a lora with some error only; "
                "give --rank to say how exact it must be. The error is then reported."
            )
    disagreements = {key: shapes for key in keys(terms) if (shapes := _shapes(terms, key))}
    misfits = [f"{key.part}/{key.path}: {' and '.join(shapes)}" for key, shapes in disagreements.items()]
    if misfits:
        raise AdapterFileError(
            f"The adapters were made for different bases: {len(misfits)} modules have another shape in each.",
            misfits[:_MOST_NAMED],
        )


def _shapes(terms: Sequence[Term], key: ModuleKey) -> list[str]:
    """Returns the sizes of one module's change if the adapters disagree about it."""
    adapters = [term.state.modules[key] for term in terms if key in term.state.modules]
    shapes = {change_shape(adapter) for adapter in adapters if adapter.changes_weight}
    return [f"{out}x{width}" for out, width in sorted(shapes)] if len(shapes) > 1 else []
