import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.runtime import bf16_emulation
from lora_diffusion.runtime.bf16_emulation import upcast_dtype, without_bf16_emulation

CPU = torch.device("cpu")


class Net(nn.Module):
    """A convolution with stride, attention and linear layers, all frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.wide = nn.Linear(8, 24)
        self.out = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x).flatten(2).transpose(1, 2)
        query, key, value = self.wide(rows).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mask = torch.zeros(query.shape[-2], query.shape[-2], dtype=query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.fixture(autouse=True)
def slow_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_emulation, "has_fast_bf16", lambda device: False)


def run(net: Net, x: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return y, x.grad


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_are_nearer_to_fp32_than_bf16_arithmetic(weights: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    net = Net().bfloat16().requires_grad_(False)
    x = torch.randn(2, 4, 8, 8).bfloat16()
    exact = run(net.float(), x.float(), autocast=False)
    net = net.to(weights, memory_format=layout)
    emulated = run(net, x.to(weights), autocast=weights == torch.float32)
    with without_bf16_emulation(CPU):
        ours = run(net, x.to(weights), autocast=weights == torch.float32)
    for mine, theirs, true in zip(ours, emulated, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.float() - true).norm() <= 1.05 * (theirs.float() - true).norm()


def test_fp32_is_left_alone() -> None:
    net = Net().requires_grad_(False)
    x = torch.randn(2, 4, 8, 8)
    plain = run(net, x, autocast=False)
    with without_bf16_emulation(CPU):
        assert all(map(torch.equal, run(net, x, autocast=False), plain))


def test_trained_layers_keep_their_gradients() -> None:
    net = Net().bfloat16()
    with without_bf16_emulation(CPU):
        run(net, torch.randn(2, 4, 8, 8).bfloat16(), autocast=False)
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_frozen_convolutions_keep_no_input() -> None:
    net = Net().bfloat16().requires_grad_(False)
    kept: list[torch.Size] = []
    with (
        without_bf16_emulation(CPU),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t),
    ):
        net.conv(torch.randn(2, 4, 8, 8).bfloat16().requires_grad_())
    assert kept == [net.conv.weight.shape]


def test_products_are_widened_only_where_bf16_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert upcast_dtype(torch.bfloat16, CPU) == torch.float32
    assert upcast_dtype(torch.float32, CPU) == torch.float32
    assert upcast_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(bf16_emulation, "has_fast_bf16", lambda device: True)
    assert upcast_dtype(torch.bfloat16, CPU) == torch.bfloat16
    with without_bf16_emulation(CPU) as mode:
        assert mode is None
