"""Which device and dtype to compute with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_diffusion.core import launch
from lora_diffusion.core.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState


def process_group() -> PartialState:
    """Returns this process among those that `accelerate launch` started, on the CPU if it was told so.

    Raises:
        ConfigError: it was told to do what is not supported.
    """
    launch.check()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Only Accelerator reads this flag by itself; without it the processes would not know of each other.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def pick_device() -> torch.device:
    """Returns cuda, else mps, else cpu; each process that `accelerate launch` starts gets a GPU of its own."""
    device: torch.device = process_group().device
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Says whether bf16 matrix products are faster than fp32 ones: GPUs since Ampere, CPUs with AMX or AVX512-BF16."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False


def find_dtype(name: str) -> torch.dtype:
    """Returns the dtype that a config calls fp32, bf16 or fp16.

    Raises:
        ConfigError: another name.
    """
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:
        raise ConfigError(f"There is no dtype {name!r}; use one of {', '.join(dtypes)}.")
    return dtypes[name]


def frozen_name(name: str, device: torch.device) -> str:
    """Returns what `model.dtype` means: auto is bf16 on a GPU that is fast at it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and has_fast_bf16(device) else "fp32"


def frozen_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of frozen weights."""
    return find_dtype(frozen_name(name, device))


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of autocast.

    auto is what `accelerate launch` was told, else bf16 where the device is fast at it, else fp32.
    """
    if precision == "auto":
        precision = launch.launcher_precision() or ("bf16" if has_fast_bf16(device) else "fp32")
    return find_dtype(precision)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Within the context `torch.compile` hands functions back as they are, and loads nothing of its compiler.

    That holds on CPUs and CUDA devices; elsewhere the compiler stays, as kernels may have no other form there.
    """
    import torch

    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    if before is None and not torch.backends.mps.is_available() and not torch.xpu.is_available():
        os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
