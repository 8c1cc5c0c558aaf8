"""The fused layer gives PEFT's own numbers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lora_diffusion.adapters._engines import FusedLinear


def _run(layer_class: type[Linear], dtype: torch.dtype, *, needs_x: bool, bias: bool) -> list[Tensor]:
    torch.manual_seed(0)
    base = nn.Linear(12, 10, bias=bias).requires_grad_(False).to(dtype)
    config = LoraConfig(r=3, lora_alpha=1, target_modules=["x"])
    layer = layer_class(base, "default", config=config, r=3, lora_alpha=1)
    for name, shape in (("lora_A", (3, 12)), ("lora_B", (10, 3))):
        getattr(layer, name)["default"].weight = nn.Parameter(torch.randn(shape))
    x = torch.randn(2, 5, 12).to(dtype).requires_grad_(needs_x)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        y = layer(x)
    y.backward(torch.randn(2, 5, 10).to(y.dtype))
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [t for t in (y.detach(), x.grad, *(p.grad for p in parameters)) if t is not None]


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_numbers_as_peft(dtype: torch.dtype, needs_x: bool, bias: bool) -> None:
    # bf16 keeps 8 bits, and the two add in another order.
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    ours = _run(FusedLinear, dtype, needs_x=needs_x, bias=bias)
    theirs = _run(Linear, dtype, needs_x=needs_x, bias=bias)
    assert len(ours) == len(theirs) == 3 + needs_x
    for each, other in zip(ours, theirs, strict=True):
        assert each.dtype == other.dtype
        assert torch.allclose(each, other, **close)
