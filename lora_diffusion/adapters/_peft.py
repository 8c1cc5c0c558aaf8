"""What is used of PEFT: the only file that imports it.

PEFT imports bitsandbytes, which hands its fallback kernels to `torch.compile` as it is imported; that loads torch's
whole compiler, a seventh of the CPU seconds of a short run, for kernels that CPUs and CUDA devices have of their own.
So bitsandbytes is imported first, while the compiler is turned off.
"""

from __future__ import annotations

from lora_diffusion.runtime.device import without_compiler

with without_compiler():
    import bitsandbytes  # noqa: F401

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.functional import inject_adapter_in_model
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type

__all__ = [
    "Linear",
    "LoHaConfig",
    "LoHaLayer",
    "LoKrConfig",
    "LoKrLayer",
    "LoraConfig",
    "LoraLayer",
    "LoraVariant",
    "PeftConfig",
    "dequantize_bnb_weight",
    "get_bnb_param_type",
    "inject_adapter_in_model",
]
