"""The change of weight that an adapter stands for, with the formula and the paper of every variant.

The formulas are those that ComfyUI, Forge and A1111 apply to a file at strength 1, and LyCORIS trains with:
`comfy/weight_adapter/*` and `comfy/lora.py` (commit a125cd84), `lycoris/modules/{locon,loha,lokr,ia3}.py`.
Variants of the first table (`_CHANGES`) give a change by themselves; those of the second (`_RELATIVE`) are made of the
weight that they change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.errors import AdapterFileError

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from lora_diffusion.core.adapter_state import ModuleAdapter

    NDArray = numpy.ndarray[Any, Any]

_EPSILON = 2.0**-23
"""Added to a norm before division, as LyCORIS does with the step of float32 at 1."""
_NORM_STEP = 1e-8
"""Added to the norm of a rotation's matrix before the two are compared."""
AXES: Mapping[str, int] = {
    "dora": 1,
    "dora_out": 0,
    **{f"{variant}+{end}": axis for variant in ("loha", "lokr") for end, axis in (("dora", 1), ("dora_out", 0))},
}
"""Variant -> the axis of the weight along which its magnitude runs: inputs or outputs."""


def delta_weight(adapter: ModuleAdapter, base_weight: Tensor | None = None) -> Tensor:
    """Returns the change of weight of one module.

    lora    alpha / rank * up @ down (Hu et al. 2021, arXiv 2106.09685, section 4.1)
    dora    magnitude * (weight + lora) / |weight + lora| - weight, with the norm of each input column; dora_out with
            that of each output row (Liu et al. 2024, arXiv 2402.09353, equation 5)
    loha    alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b) (Hyeon-Woo et al. 2021, arXiv 2108.06098, section 2)
    lokr    alpha / rank * kron(w1, w2), and the scale is 1 where neither is low-rank (Yeh et al. 2023,
            arXiv 2309.14859, section 4.2); loha+dora, lokr+dora and so on: with a magnitude as dora has it
    full    the change itself; norm the same. No change where only the bias is changed
    set     another weight in its place
    ia3     weight * factor of each input or output (Liu et al. 2022, arXiv 2205.05638, section 3.3)
    oft     rescale * R^T @ weight, R rotating blocks of outputs (Qiu et al. 2023, arXiv 2306.07280, section 3)
    boft    rescale * R_m ... R_1 @ weight (Liu et al. 2023, arXiv 2311.06243, section 5)
    glora   alpha / rank * (b1 @ b2 + weight @ a1 @ a2) (Chavan et al. 2023, arXiv 2306.07967, equation 8)

    Args:
        adapter: its tensors, on one device. The change of a bias is not looked at.
        base_weight: the frozen weight, [out, in], [out, in, k, k] or of a norm [width]; adapters that `needs_base` need
            it, the others only take its shape.

    Returns:
        Always float32, so that several changes can be summed before one cast. In the shape of the base weight; without
        one, [out, in * k * k] where the tensors do not tell the size of the kernel.

    Raises:
        AdapterFileError: the tensors do not fit each other or the base weight.

    >>> import torch
    >>> from lora_diffusion.core.adapter_state import ModuleAdapter
    >>> delta_weight(ModuleAdapter("lora", {"down": torch.ones(2, 3), "up": torch.ones(1, 2)}, alpha=1.0))
    tensor([[1., 1., 1.]])
    """
    try:
        return _delta_weight(without_tucker(adapter), base_weight)
    except (RuntimeError, IndexError, TypeError) as error:
        raise _misfit(adapter, base_weight) from error


def _delta_weight(adapter: ModuleAdapter, base_weight: Tensor | None) -> Tensor:
    tensors = {name: tensor.float() for name, tensor in adapter.tensors.items()}
    if adapter.variant in _RELATIVE:
        assert base_weight is not None, "the change depends on the base weight"
        return _RELATIVE[adapter.variant](tensors, adapter.alpha, base_weight.float())
    change = _CHANGES[adapter.variant.partition("+")[0]](tensors).mul_(adapter.scale)
    if base_weight is not None:
        change = change.reshape(base_weight.shape)
    if adapter.variant not in AXES:
        return change
    assert base_weight is not None, "the change of a dora adapter depends on the base weight"
    weight = base_weight.float()
    changed = weight + change
    length = norms(changed, AXES[adapter.variant])
    turned: Tensor = tensors["magnitude"].reshape(length.shape) / length * changed
    return turned - weight


def change_shape(adapter: ModuleAdapter) -> tuple[int, int]:
    """Returns outputs, and inputs times the size of the kernel, of the weight that an adapter changes.

    Those of ia3, oft and boft, and of one that changes a bias alone, tell less: see `fits`.

    Raises:
        AdapterFileError: the tensors do not fit each other.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    try:
        if "down" in shapes:
            return _lora_shape(shapes)
        if "a1" in shapes:
            return glora_shape(shapes)
        if whole := shapes.get("diff", shapes.get("value")):
            return whole[0], math.prod(whole[1:])
        (rows, columns), (more_rows, more_columns) = (_factor_shape(shapes, factor) for factor in ("w1", "w2"))
    except (ValueError, LookupError) as error:
        raise _misfit(adapter, None) from error
    if "lokr" in adapter.variant:
        return rows * more_rows, columns * more_columns
    if (rows, columns) != (more_rows, more_columns):
        raise _misfit(adapter, None)
    return rows, columns


def fits(adapter: ModuleAdapter, weight: tuple[int, ...]) -> bool:
    """Says whether an adapter can change a weight of this shape, and its bias."""
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if any(sizes.get(name, weight[0]) != weight[0] for name in ("bias", "rescale")):
        return False
    if "factor" in shapes:
        is_input = bool(adapter.tensors["on_input"].reshape(-1)[0])
        return len(weight) > 1 and sizes["factor"] == weight[1 if is_input else 0]
    if "blocks" in shapes:
        *_, number, size, side = shapes["blocks"]
        return len(weight) > 1 and size == side and number * size == weight[0]
    if not adapter.changes_weight:
        return True
    shape = change_shape(adapter)
    if "magnitude" in shapes and sizes["magnitude"] != weight[AXES[adapter.variant]]:
        return False
    return shape == (weight[0], math.prod(weight[1:]))


def _lora_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    (outputs, rank, *_), (rows, columns, *inputs) = shapes["up"], shapes["down"]
    outer, inner, *kernel = shapes.get("mid", (rows, rows))
    if (rank, rows) != (outer, inner) or math.prod(shapes["up"][2:]) != 1:
        raise ValueError("up and down are of different ranks")
    return outputs, math.prod([columns, *inputs, *kernel])


def _factor_shape(shapes: Mapping[str, tuple[int, ...]], factor: str) -> tuple[int, int]:
    if factor in shapes:
        outputs, inputs, *kernel = shapes[factor]
        return outputs, math.prod([inputs, *kernel])
    (rows, rank), (rank_too, columns) = shapes[f"{factor}_a"], shapes[f"{factor}_b"]
    core = shapes.get(f"t{factor[1]}")
    if core:
        # With a core, the first factor has the rank first.
        rank, rows = rows, rank
        if core[:2] != (rank, rank_too):
            raise ValueError("the core is of another rank")
        columns *= math.prod(core[2:])
    elif rank != rank_too:
        raise ValueError("the factors are of different ranks")
    return rows, columns


def _misfit(adapter: ModuleAdapter, base_weight: Tensor | None) -> AdapterFileError:
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in adapter.tensors.items())
    wanted = "" if base_weight is None else f" for a weight of {list(base_weight.shape)}"
    return AdapterFileError(
        f"The tensors of a {adapter.variant} adapter do not fit{wanted}: {shapes}; the file is damaged."
    )


def norms(weight: Tensor, axis: int) -> Tensor:
    """Returns the norm of each output (axis 0) or input (axis 1) of a weight, [out, 1, ...] or [1, in, ...]."""
    import torch

    others = [dimension for dimension in range(weight.dim()) if dimension != axis]
    length: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return length + _EPSILON


def delta_norm(adapter: ModuleAdapter) -> float:
    """Returns the Frobenius norm of `delta_weight`, and of dora that of its change before the magnitude acts.

    0 of variants that are made of the weight itself, whose norm depends on the base.

    The dense change is not made where the Gram matrices of the factors tell it, and torch is not needed: tensors may be
    numpy arrays. Infinity where float64 cannot hold the norm, or the tensors are not finite.
    """
    import numpy

    with numpy.errstate(all="ignore"):
        size = _norm(adapter)
    return math.inf if math.isnan(size) else size


def _norm(adapter: ModuleAdapter) -> float:
    import numpy

    arrays = {name: _as_float64(tensor) for name, tensor in adapter.tensors.items()}
    if adapter.variant in _RELATIVE:
        return 0.0 if all(numpy.isfinite(array).all() for array in arrays.values()) else math.nan
    if adapter.variant in ("full", "norm"):
        return float(numpy.linalg.norm(arrays["diff"])) if "diff" in arrays else 0.0
    if "down" in arrays:
        size = _product_norm(arrays["up"], _wide(arrays["down"], arrays.get("mid")))
    elif "lokr" in adapter.variant:
        size = math.prod(_factor_norm(arrays, factor) for factor in ("1", "2"))
    else:
        size = _hadamard_norm(*(_pair(arrays, factor) for factor in ("1", "2")))
    return abs(adapter.scale) * size


def _as_float64(tensor: Any) -> NDArray:
    import numpy

    return numpy.asarray(tensor if isinstance(tensor, numpy.ndarray) else tensor.detach().cpu().double(), numpy.float64)


def _product_norm(up: NDArray, down: NDArray) -> float:
    """Returns the Frobenius norm of up @ down, from two matrices of the size of their rank."""
    up, down = up.reshape(len(up), -1), down.reshape(len(down), -1)
    square = float(((down @ down.T) * (up.T @ up)).sum())
    return math.nan if math.isnan(square) else math.sqrt(max(0.0, square))


def _wide(factor: NDArray, core: NDArray | None) -> NDArray:
    """Returns the factor that a Tucker core makes of one of [rank, in], its columns in another order."""
    import numpy

    factor = factor.reshape(len(factor), -1)
    return factor if core is None else numpy.tensordot(core, factor, (1, 0)).reshape(len(core), -1)


def _pair(arrays: Mapping[str, NDArray], factor: str) -> tuple[NDArray, NDArray]:
    first, core = arrays[f"w{factor}_a"], arrays.get(f"t{factor}")
    # With a core, the first factor has the rank first.
    return (first if core is None else first.T), _wide(arrays[f"w{factor}_b"], core)


def _factor_norm(arrays: Mapping[str, NDArray], factor: str) -> float:
    import numpy

    whole = arrays.get(f"w{factor}")
    return _product_norm(*_pair(arrays, factor)) if whole is None else float(numpy.linalg.norm(whole))


def _hadamard_norm(first: tuple[NDArray, NDArray], second: tuple[NDArray, NDArray]) -> float:
    """Returns the Frobenius norm of the element-wise product of two products."""
    import numpy

    (up, down), (other_up, other_down) = first, second
    rank = len(down) * len(other_down)
    if rank >= min(len(up), down.shape[1]):
        return float(numpy.linalg.norm((up @ down) * (other_up @ other_down)))
    # It is a matrix of rank r^2 with these factors.
    ups = up[:, :, None] * other_up[:, None, :]
    downs = down[:, None, :] * other_down[None, :, :]
    return _product_norm(ups, downs.reshape(rank, -1))


def without_tucker(adapter: ModuleAdapter) -> ModuleAdapter:
    """Returns the same change without a core tensor between the factors, which gives the wide factor the kernel.

    The core [rank, rank, k, k] acts on the input channels first, so its product with the factor [rank, in] is
    the factor [rank, in, k, k] of an adapter of the same rank.
    """
    import torch

    tensors = dict(adapter.tensors)
    if "mid" in tensors:
        down = tensors["down"].float().flatten(1)
        tensors["down"] = torch.einsum("abkl,bi->aikl", tensors.pop("mid").float(), down)
    for core, first, second in (("t1", "w1_a", "w1_b"), ("t2", "w2_a", "w2_b")):
        if core in tensors:
            wide = torch.einsum("abkl,bi->aikl", tensors.pop(core).float(), tensors[second].float())
            tensors |= {first: tensors[first].T, second: wide.flatten(1)}
    return replace(adapter, tensors=tensors)


def kronecker_split(size: int, factor: int) -> tuple[int, int]:
    """Returns two numbers whose product is a size, for the two factors of lokr.

    Args:
        size: inputs or outputs of a layer.
        factor: the first number if it divides the size; -1 splits as evenly as can be. Else the first is the largest
            divisor that is neither above the factor nor above the second.

    Source: factorization in lycoris/functional/general.py of LyCORIS.

    >>> kronecker_split(128, -1), kronecker_split(128, 4), kronecker_split(320, 6)
    ((8, 16), (4, 32), (5, 64))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 1 else min(factor, math.isqrt(size))
    first = next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)
    return first, size // first


def _lora(tensors: Mapping[str, Tensor]) -> Tensor:
    down, up = tensors["down"], tensors["up"]
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _loha(tensors: Mapping[str, Tensor]) -> Tensor:
    return (tensors["w1_a"] @ tensors["w1_b"]) * (tensors["w2_a"] @ tensors["w2_b"])


def _lokr(tensors: Mapping[str, Tensor]) -> Tensor:
    import torch

    first, second = (
        tensors[factor] if factor in tensors else tensors[f"{factor}_a"] @ tensors[f"{factor}_b"]
        for factor in ("w1", "w2")
    )
    return torch.kron(first.reshape(*first.shape, *(1,) * (second.dim() - 2)), second.contiguous())


def _full(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["diff"].clone()


_CHANGES = {
    **dict.fromkeys(("lora", "dora", "dora_out"), _lora),
    **dict.fromkeys(("full", "norm"), _full),
    "loha": _loha,
    "lokr": _lokr,
}
"""Variant without its magnitude -> the change without its scale."""


def _set(tensors: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    del alpha
    return tensors["value"].reshape(weight.shape) - weight


def _ia3(tensors: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    """Returns weight * factor of each input or output (Liu et al. 2022, arXiv 2205.05638, section 3.3)."""
    del alpha
    axis = 1 if bool(tensors["on_input"].flatten()[0]) else 0
    sizes = [1] * weight.dim()
    sizes[axis] = -1
    return weight * tensors["factor"].reshape(sizes)


def _rotations(blocks: Tensor, alpha: float) -> Tensor:
    """Returns (I + Q) (I - Q)^-1 of Q = blocks - blocks^T, whose norm over all is at most alpha unless that is 0.

    Source: the Cayley transform of Qiu et al. 2023, arXiv 2306.07280, section 4.
    """
    import torch

    skew = blocks - blocks.transpose(-1, -2)
    norm = torch.linalg.vector_norm(skew) + _NORM_STEP
    if alpha > 0 and norm > alpha:
        skew = skew * (alpha / norm)
    one = torch.eye(blocks.shape[-1], device=blocks.device)
    rotations: Tensor = (one + skew) @ torch.linalg.inv(one - skew)
    return rotations


def _oft(tensors: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    """Returns rescale * R^T @ weight - weight, R acting on blocks of outputs (arXiv 2306.07280, section 3)."""
    import torch

    blocks = tensors["blocks"]
    rows = weight.reshape(*blocks.shape[:2], *weight.shape[1:])
    turned = torch.einsum("knm,kn...->km...", _rotations(blocks, alpha), rows).reshape(weight.shape)
    return _rescaled(turned, tensors) - weight


def _boft(tensors: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    """Returns rescale * R_m ... R_1 @ weight - weight, each R on other groups of outputs.

    Source: Liu et al. 2023, arXiv 2311.06243, section 5.
    """
    import torch

    turned, rest = weight, weight.shape[1:]
    half = tensors["blocks"].shape[-1] // 2
    for step, rotations in enumerate(_rotations(tensors["blocks"], alpha)):
        width = 2**step * half
        rows = turned.reshape(-1, 2, width, *rest).transpose(1, 2).reshape(*rotations.shape[:2], *rest)
        rows = torch.einsum("bij,bj...->bi...", rotations, rows)
        turned = rows.reshape(-1, width, 2, *rest).transpose(1, 2).reshape(weight.shape)
    return _rescaled(turned, tensors) - weight


def _rescaled(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    if "rescale" not in tensors:
        return weight
    return weight * tensors["rescale"].reshape(-1, *[1] * (weight.dim() - 1))


def _glora(tensors: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    """Returns alpha / rank * (b1 @ b2 + weight @ a1 @ a2), a1 and a2 acting on the inputs.

    Source: Chavan et al. 2023, arXiv 2306.07967, equation 8, as LyCORIS trains it.
    """
    import torch

    a1, a2, b1, b2 = _turned_round(tensors)
    scale = alpha / len(a2)
    if len(a1) == weight.shape[1]:
        own = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
    else:
        own = (weight.flatten(1) @ a1 @ a2).reshape(weight.shape)
    return scale * (own + (b1 @ b2).reshape(weight.shape))


def _turned_round(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Returns a1, a2, b1 and b2 as they are since 2024, when LyCORIS exchanged the numbers."""
    a1, a2, b1, b2 = (tensors[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    return (
        (a2, a1, b2, b1)
        if is_old_glora({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        else (a1, a2, b1, b2)
    )


def is_old_glora(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Says whether the first factors are those next to the inputs, as they were before 2024."""
    rank, width = shapes["a1"][:2]
    return rank <= width and shapes["a2"][:2] == (width, rank) and shapes["b2"][1] == shapes["b1"][0] == rank


def glora_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Returns outputs, and inputs times the size of the kernel, of the weight that a glora changes.

    Raises:
        ValueError: the factors are of different ranks.
    """
    old = is_old_glora(shapes)
    up, down = (shapes["b2"], shapes["b1"]) if old else (shapes["b1"], shapes["b2"])
    inner, outer = (shapes["a1"], shapes["a2"]) if old else (shapes["a2"], shapes["a1"])
    if not up[1] == down[0] == inner[0] == outer[1] or inner[1] != outer[0]:
        raise ValueError("the factors are of different ranks")
    return up[0], math.prod(down[1:])


_RELATIVE: Mapping[str, Callable[[Mapping[str, Tensor], float, Tensor], Tensor]] = {
    "set": _set,
    "ia3": _ia3,
    "oft": _oft,
    "boft": _boft,
    "glora": _glora,
}
"""Variant that is made of the weight itself -> (tensors, alpha, weight of the base) to the change of the weight."""
