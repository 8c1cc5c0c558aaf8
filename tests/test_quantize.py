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


@pytest.mark.parametrize("quantization", ["8bit", "nf4"])
def test_nothing_holds_the_file_that_weights_were_mapped_from(quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    network = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).requires_grad_(False)
    file = torch.randn(2**16)
    weight, norm = network[0].weight, network[1].weight
    weight.data, norm.data = file[: 64 * 64].view(64, 64), file[64 * 64 :][:64]
    quantize.quantize(network, quantization, torch.device("cpu"))
    held = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    assert file.untyped_storage().data_ptr() not in held
