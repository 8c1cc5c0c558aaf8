"""What `accelerate launch` told this process through the environment; importing this file loads nothing heavy."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from lora_diffusion.core.errors import ConfigError

_FLAGS: Mapping[str, str] = {
    "ACCELERATE_USE_FSDP": "FSDP (sharded weights)",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
"""Flag -> what it asks for, none of which is done."""
_PRECISIONS = ("fp16", "bf16")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
"""Names by which torch, MPI and others tell the same."""


def num_processes() -> int:
    """Returns how many processes were started together; 1 where no launcher did so."""
    size = _number(_SIZES) or 1
    return size if _number(_LOCAL_RANKS) is not None else 1


def process_index() -> int:
    """Returns the place of this process among them, from 0 on; that of the main process is 0."""
    return (_number(_RANKS) or 0) if num_processes() > 1 else 0


def check() -> None:
    """Checks that the launcher asks for nothing but processes of which each holds the whole base.

    Raises:
        ConfigError: it asks for something that would not be done.
    """
    unsupported = [f"{what} ({flag})" for flag, what in _FLAGS.items() if _is_set(flag)]
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        unsupported.append(f"compilation by dynamo (ACCELERATE_DYNAMO_BACKEND={backend})")
    if unsupported:
        raise ConfigError(
            f"accelerate was told to use {' and '.join(unsupported)}, which is not supported: each process holds the "
            "whole base, and gradients are averaged. Turn it off with 'accelerate config', or give 'accelerate launch' "
            "--multi_gpu or --cpu instead."
        )


def check_training(precision: str, gradient_accumulation: int) -> None:
    """Checks that the launcher and the config do not ask for different things.

    Args:
        precision: value of `train.precision`; auto takes what the launcher asks for.
        gradient_accumulation: value of `train.gradient_accumulation`.

    Raises:
        ConfigError: they do.
    """
    requested = _mixed_precision()
    if requested not in ("", "no", *_PRECISIONS) or (requested in _PRECISIONS and precision not in ("auto", requested)):
        raise ConfigError(
            f"accelerate was told to use {requested} (ACCELERATE_MIXED_PRECISION) and train.precision={precision}; "
            "give --mixed_precision no to 'accelerate launch', or set train.precision to auto or the same. It can "
            "be fp32, bf16 or fp16."
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if steps not in ("", "1", "auto", str(gradient_accumulation)):
        raise ConfigError(
            f"accelerate was told to accumulate {steps} gradients (ACCELERATE_GRADIENT_ACCUMULATION_STEPS) and "
            f"train.gradient_accumulation={gradient_accumulation}; set train.gradient_accumulation={steps}, or give "
            "'accelerate launch' --gradient_accumulation_steps 1."
        )


def launcher_precision() -> str | None:
    """Returns fp16 or bf16 if the launcher asks for it, else None."""
    requested = _mixed_precision()
    return requested if requested in _PRECISIONS else None


def is_lost_process(error: BaseException) -> bool:
    """Says whether an error is that another process of the group ended or does not answer."""
    distributed = sys.modules.get("torch.distributed")
    error_types: Sequence[type[BaseException]] = [distributed.DistError] if distributed else []
    # gloo, which connects CPUs, raises nothing more exact.
    return num_processes() > 1 and (isinstance(error, tuple(error_types)) or "gloo" in str(error))


def _mixed_precision() -> str:
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()


def _is_set(flag: str) -> bool:
    return os.environ.get(flag, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _number(names: Sequence[str]) -> int | None:
    return next((int(text) for name in names if (text := os.environ.get(name, "")).isdecimal()), None)
