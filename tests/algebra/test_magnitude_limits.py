"""Adapters that would turn images into noise are refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_diffusion.algebra.magnitude_limits import check_magnitudes
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.errors import AdapterFileError


@pytest.mark.parametrize("value", [1e4, 1e30])
def test_harmful_changes_are_refused(value: float) -> None:
    good = ModuleAdapter("lora", {"down": torch.ones(2, 8), "up": torch.ones(8, 2)}, 2.0)
    bad = replace(good, tensors={**good.tensors, "up": torch.full((8, 2), value)})
    state = AdapterState({ModuleKey("unet", "a"): good, ModuleKey("unet", "b"): bad})
    check_magnitudes(AdapterState({ModuleKey("unet", "a"): good}), "file")
    check_magnitudes(AdapterState({ModuleKey("unet", "a"): replace(good, alpha=99.0)}), "file")
    with pytest.raises(AdapterFileError, match="changes 1 modules by more than 100") as caught:
        check_magnitudes(state, "file")
    assert caught.value.errors[0].startswith("unet/b: ")
