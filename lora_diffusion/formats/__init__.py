"""Spellings of adapter files, one object FORMAT in each file; find them with `core.registry`."""

from lora_diffusion.formats._arrays import as_array, in_float32, same_bits
from lora_diffusion.formats._detect import detect, is_adapter, stored_dtypes
from lora_diffusion.formats._holding import READERS, check_output
from lora_diffusion.formats._pickle import as_safetensors
from lora_diffusion.formats._portable import fit_dimensions, with_attention
from lora_diffusion.formats._report import FileReport, describe_file

__all__ = [
    "READERS",
    "FileReport",
    "as_array",
    "as_safetensors",
    "check_output",
    "describe_file",
    "detect",
    "fit_dimensions",
    "in_float32",
    "is_adapter",
    "same_bits",
    "stored_dtypes",
    "with_attention",
]
