"""Whether the tensors of a module fit each other and the weight, as each client multiplies or copies them."""

from __future__ import annotations

import math

from lora_diffusion.core.delta import change_shape
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.types import ModuleAdapter
from lora_diffusion.formats._client_file import FileModule
from lora_diffusion.formats._client_rules import Client


def size_fault(client: Client, module: FileModule, weight: tuple[int, ...]) -> str | None:
    """Returns the fault of a whole module that a client takes for its kind but cannot add to the weight; else None."""
    if module.variant in _WHOLE_SIZES:
        return _whole_fault(client, module, weight)
    if module.variant == "lora":
        return _pair_fault(client, module, weight)
    if module.variant in ("oft", "boft"):
        fits = math.prod(module.roles["oft_blocks"].shape[-3:-1]) == weight[0] and len(weight) > 1
        return None if fits else "shape"
    if module.variant == "glora":
        return None if _fits_glora(client, module, weight) else "shape"
    if module.variant == "tucker" and (fault := _middle_fault(client, module, weight)):
        return fault
    if module.variant not in _KINDS_WITH_FACTORS or len(weight) == 1:
        return None if len(weight) > 1 else "shape"
    adapter = ModuleAdapter(module.variant.replace("tucker", "lora"), module.roles, 0.0)
    try:
        return None if change_shape(adapter) == (weight[0], math.prod(weight[1:])) else "shape"
    except AdapterFileError:
        return "shape" if _fits_inside(module) else "inner"


def _fits_glora(client: Client, module: FileModule, weight: tuple[int, ...]) -> bool:
    """Says whether the four matrices of a GLoRA fit, in the old order of LyCORIS, or today's, unknown to A1111."""
    a1, a2, b1, b2 = ((*module.roles[role].shape, 0, 0)[:2] for role in ("a1", "a2", "b1", "b2"))
    out, inner = (*weight, 0)[:2]
    old = (a1[1], a2[0], b1[1], b2[0]) == (inner, inner, inner, out) and (a1[0], b1[0]) == (a2[1], b2[1])
    new = (a1[0], a2[1], b1[0], b2[1]) == (inner, inner, out, inner) and (a1[1], b1[1]) == (a2[0], b2[0])
    return old or (new and client.by_trigger)


def _middle_fault(client: Client, module: FileModule, weight: tuple[int, ...]) -> str | None:
    """Returns the fault of a middle factor that a client reads by its four dimensions, or shapes as the kernel."""
    mid = tuple(module.roles["mid"].shape)
    if client.by_trigger:
        return None if len(mid) == 4 else "inner"
    if len(weight) == 2:
        return "shape"
    return None if math.prod(mid[2:]) == math.prod(weight[2:]) else "kernel"


def _fits_inside(module: FileModule) -> bool:
    """Says whether the products fit that a program multiplies out before it looks at the weight."""
    shapes = {role: tuple(tensor.shape) for role, tensor in module.roles.items()}
    if module.variant == "tucker":
        mid = shapes["mid"]
        return len(mid) == 4 and mid[1] == shapes["down"][0]
    products = [(shapes[f"{name}_a"], shapes[f"{name}_b"]) for name in ("w1", "w2") if f"{name}_a" in shapes]
    return all(len(first) == len(second) == 2 and first[1] == second[0] for first, second in products)


def _pair_fault(client: Client, module: FileModule, weight: tuple[int, ...]) -> str | None:
    down, up = tuple(module.roles["down"].shape), tuple(module.roles["up"].shape)
    kernel = weight[2:]
    if len(weight) == 1 or min(len(down), len(up)) < 2 or not down[0]:
        return "shape"
    other_kernel = plain(down[2:]) != plain(kernel) or plain(up[2:])
    if up[1] != down[0] or (other_kernel and client.copies_kernels):
        return "kernel" if other_kernel and client.copies_kernels else "shape"
    if (up[0], down[1]) != weight[:2] or other_kernel:
        is_filled = up[0] == weight[0] and len(weight) == 2 and not other_kernel
        return "filled" if is_filled and "filled" in client.fates else "shape"
    other = len(down) != len(weight) or len(up) != len(weight)
    return "dimensions" if other and client.flat_convolution else None


def _whole_fault(client: Client, module: FileModule, weight: tuple[int, ...]) -> str | None:
    """Compares what has the size of a weight, by its shape or, where the client reshapes it, by its numbers."""
    role = _WHOLE_SIZES[module.variant]
    if role not in module.roles:
        return "shape"
    shape = tuple(module.roles[role].shape)
    bias = next((module.roles[other] for other in ("diff_b", "b_norm") if other in module.roles), None)
    if (math.prod(shape) != math.prod(weight)) if client.copies_kernels else shape != weight:
        is_filled = len(shape) == len(weight) == 4 and "filled" in client.fates
        return "filled" if is_filled else "not merged"
    return "shape" if bias is not None and tuple(bias.shape) != weight[:1] else None


def plain(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a kernel, () for those of one number and for none."""
    return () if set(kernel) <= {1} else kernel


_WHOLE_SIZES = {"full": "diff", "norm": "w_norm", "set": "set_weight"}
"""Kind -> the tensor of the size of the weight."""
_KINDS_WITH_FACTORS = ("tucker", "loha", "lokr")
