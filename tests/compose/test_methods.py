"""The laws of every merge method: weights (1, 0) give the first adapter alone, and each names itself."""

from __future__ import annotations

import pytest
import torch

from lora_diffusion.cli.main import main
from lora_diffusion.compose.linear import Term
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from tests.compose.adapters import dense, lora

METHODS = registry.available("methods")


@pytest.mark.parametrize("name", METHODS)
def test_weights_of_one_and_zero_give_the_first_adapter(name: str) -> None:
    method, first, second = registry.find("methods", name), lora(0), lora(1)
    weighted = [(first, 1.0), (second, 0.0)]
    terms = [Term(str(weight), state, {"unet": weight, "text_encoder": weight}) for state, weight in weighted]
    total = method.combine(terms, None, {})
    changes, expected = dense(AdapterState(total.modules)), dense(first)
    assert all(torch.allclose(changes[key], expected[key], rtol=0, atol=1e-6) for key in expected)
    assert (method.name, bool(method.summary)) == (name, True)


def test_sum_is_the_default_and_others_are_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert "sum" in METHODS
    with pytest.raises(SystemExit):
        main(["compose", "a.safetensors:1", "--output", "b.safetensors", "--method", "som"])
    assert "sum" in capsys.readouterr().err
