"""What adapters of other programs do to a weight, against the formulas of those programs written out.

Sources: `comfy/weight_adapter/{oft,boft,glora,loha,lokr,base}.py` and `comfy/lora.py` of ComfyUI a125cd84 at strength
1; `lycoris/modules/{ia3,diag_oft,boft,glora}.py` of LyCORIS, and `network_ia3.py` of A1111 1.10 for ia3, which ComfyUI
does not read.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_diffusion.algebra.delta import change_shape, delta_norm, delta_weight, fits
from lora_diffusion.core.adapter_state import ModuleAdapter
from lora_diffusion.core.errors import AdapterFileError

SHAPES = ((48, 32), (32, 32), (48, 32, 1, 1), (48, 32, 3, 3))


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rotations(blocks: Tensor, constraint: float = 0.0) -> np.ndarray:
    """(I + Q) (I - Q)^-1 with Q = B - B^T, of a norm of at most the constraint."""
    matrices = blocks.double().numpy()
    skew = matrices - matrices.swapaxes(-1, -2)
    norm = np.sqrt((skew**2).sum()) + 1e-8
    if 0 < constraint < norm:
        skew = skew * constraint / norm
    one = np.eye(matrices.shape[-1])
    return (one + skew) @ np.linalg.inv(one - skew)


def check(adapter: ModuleAdapter, weight: Tensor, wanted: np.ndarray) -> None:
    assert fits(adapter, tuple(weight.shape))
    change = delta_weight(adapter, weight)
    assert change.shape == weight.shape
    assert np.allclose(change.double().numpy(), wanted, atol=2e-5 * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("constraint", [0.0, 0.3])
@pytest.mark.parametrize("is_rescaled", [False, True])
def test_oft_turns_blocks_of_outputs(shape: tuple[int, ...], constraint: float, is_rescaled: bool) -> None:
    weight, blocks, rescale = random(*shape), random(shape[0] // 8, 8, 8, size=0.1), random(shape[0], seed=1)
    tensors = {"blocks": blocks, **({"rescale": rescale.reshape(-1, *[1] * (len(shape) - 1))} if is_rescaled else {})}
    flat = weight.flatten(1).double().numpy()
    turned = [r.T @ rows for r, rows in zip(rotations(blocks, constraint), np.split(flat, shape[0] // 8), strict=True)]
    turned = np.concatenate(turned) * (rescale.double().numpy()[:, None] if is_rescaled else 1)
    check(ModuleAdapter("oft", tensors, constraint), weight, (turned - flat).reshape(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_rescaled", [False, True])
def test_boft_turns_other_outputs_in_each_step(shape: tuple[int, ...], is_rescaled: bool) -> None:
    weight, blocks, rescale = random(*shape), random(3, shape[0] // 4, 4, 4, size=0.1), random(shape[0], seed=1)
    tensors = {"blocks": blocks, **({"rescale": rescale.reshape(-1, *[1] * (len(shape) - 1))} if is_rescaled else {})}
    rows = weight.flatten(1).double().numpy()
    before = rows
    for step, matrices in enumerate(rotations(blocks)):
        # Output c * 2k + g * k + j goes to c * 2k + j * 2 + g, is turned in blocks of four, and comes back.
        k = 2**step * 2
        order = [c * 2 * k + g * k + j for c in range(shape[0] // (2 * k)) for j in range(k) for g in range(2)]
        turned = np.concatenate(
            [r @ part for r, part in zip(matrices, np.split(rows[order], shape[0] // 4), strict=True)]
        )
        rows = np.empty_like(turned)
        rows[order] = turned
    rows = rows * (rescale.double().numpy()[:, None] if is_rescaled else 1)
    check(ModuleAdapter("boft", tensors, 0.0), weight, (rows - before).reshape(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("on_input", [0, 1])
def test_ia3_scales_inputs_or_outputs(shape: tuple[int, ...], on_input: int) -> None:
    weight, factor = random(*shape), random(shape[on_input], seed=2)
    tensors = {"factor": factor if len(shape) == 2 else factor[None, :, None, None], "on_input": torch.tensor(on_input)}
    sizes = [1] * len(shape)
    sizes[on_input] = -1
    wanted = weight.double().numpy() * factor.double().numpy().reshape(sizes)
    check(ModuleAdapter("ia3", tensors, 0.0), weight, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_glora_changes_the_inputs_of_the_weight(shape: tuple[int, ...]) -> None:
    out, width, *kernel = shape
    ones = [1] * len(kernel)
    weight, a1, a2 = random(*shape), random(width, 4, *ones), random(4, width, *ones, seed=1)
    b1, b2 = random(out, 4, *ones, seed=2), random(4, width, *kernel, seed=3)
    first = np.einsum("oi...,ir,rj->oj...", *(t.double().numpy() for t in (weight, a1.flatten(1), a2.flatten(1))))
    second = (b1.flatten(1).double() @ b2.flatten(1).double()).numpy().reshape(shape)
    new = ModuleAdapter("glora", {"a1": a1, "a2": a2, "b1": b1, "b2": b2}, 2.0)
    check(new, weight, 2.0 / 4 * (first + second))
    assert (new.rank, change_shape(new)) == (4, (out, math.prod(shape[1:])))
    # Before 2024 the factors next to the inputs came first.
    old = ModuleAdapter("glora", {"a1": a2, "a2": a1, "b1": b2, "b2": b1}, 2.0)
    check(old, weight, 2.0 / 4 * (first + second))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inner", ["loha", "lokr"])
@pytest.mark.parametrize("axis", [1, 0])
def test_dora_on_loha_and_lokr(shape: tuple[int, ...], inner: str, axis: int) -> None:
    out, width = shape[0], math.prod(shape[1:])
    weight, sizes = random(*shape), [1] * len(shape)
    sizes[axis] = shape[axis]
    magnitude = random(*sizes, seed=4).abs()
    if inner == "loha":
        tensors = {f"w{n}_a": random(out, 2, seed=n) for n in (1, 2)} | {
            f"w{n}_b": random(2, width, seed=n) for n in (1, 2)
        }
        factors = {name: tensor.double() for name, tensor in tensors.items()}
        change = 1.5 / 2 * (factors["w1_a"] @ factors["w1_b"]) * (factors["w2_a"] @ factors["w2_b"])
    else:
        tensors = {"w1": random(4, 4), "w2_a": random(out // 4, 2), "w2_b": random(2, width // 4)}
        second = (tensors["w2_a"].double() @ tensors["w2_b"].double()).reshape(-1, shape[1] // 4, *shape[2:])
        first = tensors["w1"].double().reshape(4, 4, *[1] * (len(shape) - 2))
        change = 1.5 / 2 * torch.kron(first, second)
    changed = (weight.double() + change.reshape(shape)).numpy()
    others = tuple(dimension for dimension in range(len(shape)) if dimension != axis)
    norm = np.sqrt((changed**2).sum(axis=others, keepdims=True))
    wanted = magnitude.double().numpy() * changed / norm - weight.double().numpy()
    variant = f"{inner}+{'dora' if axis else 'dora_out'}"
    check(ModuleAdapter(variant, {**tensors, "magnitude": magnitude}, 1.5), weight, wanted)


@pytest.mark.parametrize("shape", [*SHAPES, (48,)])
def test_whole_changes(shape: tuple[int, ...]) -> None:
    weight, change = random(*shape), random(*shape, seed=1)
    for variant, tensor, wanted in (
        ("full", "diff", change),
        ("norm", "diff", change),
        ("set", "value", change - weight),
    ):
        adapter = ModuleAdapter(variant, {tensor: change, "bias": random(shape[0])}, 0.0)
        check(adapter, weight, wanted.double().numpy())
        assert adapter.needs_base == (variant == "set")
    assert delta_norm(ModuleAdapter("full", {"diff": change}, 0.0)) == pytest.approx(float(change.norm()))
    assert not ModuleAdapter("full", {"bias": random(3)}, 0.0).changes_weight


def test_what_does_not_fit() -> None:
    assert not fits(ModuleAdapter("oft", {"blocks": torch.ones(3, 4, 4)}, 0.0), (8, 4))
    assert not fits(ModuleAdapter("oft", {"blocks": torch.ones(2, 4, 4), "rescale": torch.ones(4)}, 0.0), (8, 4))
    assert not fits(ModuleAdapter("ia3", {"factor": torch.ones(8), "on_input": torch.tensor(1)}, 0.0), (8, 4))
    assert not fits(ModuleAdapter("full", {"bias": torch.ones(4)}, 0.0), (8, 4))
    with pytest.raises(AdapterFileError, match="do not fit"):
        change_shape(ModuleAdapter("glora", {name: torch.ones(2, 3) for name in ("a1", "a2", "b1", "b2")}, 1.0))
