"""The table of shapes is that of the real networks."""

from __future__ import annotations

import re

import pytest
from torch import nn

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.core.adapter_state import ModuleKey
from scripts.benchmarks.published_networks import shared_networks


@pytest.mark.parametrize("family", DIFFUSION)
def test_shapes_are_those_of_the_published_base(family: str) -> None:
    real = {
        ModuleKey(part, path): tuple(module.weight.shape)
        for part, network in shared_networks(family).items()
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) or (part == "unet" and re.search(r"\.norm\d?$", path))
    }
    assert published_shapes(DIFFUSION[family]) == real
