"""Whether weight files hold every tensor of a network: what they lack, libraries fill with random numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""How published VAEs name the layers of their attention -> how diffusers does now; it reads both."""
_OLD_LAYER = re.compile(rf"(?<=\.attentions\.)(\d+)\.({'|'.join(_OLD_ATTENTION)})(?=\.)")


def missing(network: nn.Module, files: Sequence[Path]) -> list[str]:
    """Returns the names of those tensors of a network that none of its safetensors files holds, by their headers."""
    return _missing(network.state_dict(), files)


def missing_of_vae(config: Mapping[str, Any], files: Sequence[Path]) -> list[str]:
    """Returns the same for the VAE of this config, which no skeleton has."""
    return _missing(_names_of_vae(json.dumps(dict(config), sort_keys=True)), files)


def _missing(expected: Iterable[str], files: Sequence[Path]) -> list[str]:
    held = {name for file in files for name in _names(file, file.stat().st_mtime_ns, file.stat().st_size)}
    return sorted({_today(name) for name in expected} - held)


def _today(name: str) -> str:
    """Spells a tensor's name without what versions of diffusers and transformers disagree on."""
    name = _OLD_LAYER.sub(lambda match: f"{match[1]}.{_OLD_ATTENTION[match[2]]}", name)
    return name.removeprefix("text_model.")  # transformers 5.6 dropped this level


@cache
def _names(file: Path, changed_ns: int, num_bytes: int) -> frozenset[str]:
    from safetensors import safe_open

    del changed_ns, num_bytes
    with safe_open(file, framework="np") as weights:
        return frozenset(map(_today, weights.keys()))


@cache
def _names_of_vae(config: str) -> frozenset[str]:
    import torch

    from lora_diffusion.families.stable_diffusion import plain_networks

    told = json.loads(config)
    with torch.device("meta"):
        return frozenset((plain_networks.vae(told) or _vae_of_library(told)).state_dict())


def _vae_of_library(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    made: nn.Module = AutoencoderKL.from_config(dict(config))
    return made
