"""Layers in 4 bits, on processors for which bitsandbytes has a kernel of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_diffusion import quantize


@pytest.mark.parametrize("sizes", [(64, 32), (32, 24)], ids=["that its kernel takes", "that it does not take"])
def test_a_pass_without_gradient_leaves_nf4_weights_as_they_are(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]
) -> None:
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(*sizes, bias=False)).requires_grad_(False).eval()
    quantize.quantize(network, "nf4", torch.device("cpu"))
    x = torch.randn(3, sizes[0], requires_grad=True)
    before = network(x)
    with torch.no_grad():
        torch.testing.assert_close(network(x.detach()), before)
    after = network(x)
    assert torch.equal(after, before)
    after.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
