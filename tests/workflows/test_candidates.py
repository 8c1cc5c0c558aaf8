"""What names a base and its adapters in an evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_diffusion.core.base_model import Loaded
from lora_diffusion.workflows import _candidates
from lora_diffusion.workflows._errors import Errors


def _loaded(weight: float = 1.0, clip_skip: int | None = None, resolution: int = 64) -> Loaded:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, weight)
    nn.init.zeros_(layer.bias)
    info: Any = SimpleNamespace(prediction="epsilon", resolution=resolution)
    return Loaded({"unet": layer}, {}, SimpleNamespace(clip_skip=clip_skip), torch.device("cpu"), info)


@pytest.mark.parametrize("change", [{"weight": 2.0}, {"clip_skip": 2}, {"resolution": 128}])
def test_images_of_bases_that_draw_differently_have_other_names(change: dict[str, Any]) -> None:
    assert _candidates.base_key(_loaded(**change)) != _candidates.base_key(_loaded())
    assert _candidates.base_key(_loaded(**change)) == _candidates.base_key(_loaded(**change))


def test_a_base_without_text_layers_to_skip_has_a_name() -> None:
    assert _candidates.base_key(replace(_loaded(), options=SimpleNamespace()))


def test_a_checkpoint_without_its_adapter_is_a_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    run: Any = SimpleNamespace(path=tmp_path)
    errors = Errors()
    assert _candidates.from_run(run, errors) == []
    assert len(errors) == 1
    assert "step-000002 lacks" in errors[0]
