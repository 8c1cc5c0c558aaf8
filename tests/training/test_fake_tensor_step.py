"""A step without numbers against one with them: torch itself counts what autograd keeps."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_diffusion.families.language.examples import Head
from lora_diffusion.training.fake_tensor_step import take_step, use_placeholders

CPU = torch.device("cpu")


def network(width: int = 64, depth: int = 4) -> nn.Module:
    with torch.device("meta"):
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
        return nn.Sequential(*layers).requires_grad_(False)


class Call(nn.Module):
    """A network that answers as those of diffusers and transformers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.inner(x),)


def peak(inner: nn.Module, batch: int = 1024, width: int = 64) -> int:
    example = {"unet": {"x": torch.empty(batch, width, device="meta")}}
    return take_step({"unet": Call(inner)}, example, CPU, torch.float32, nullcontext)


def test_what_autograd_keeps_is_counted() -> None:
    inner = network()
    inner[0].weight.requires_grad_()
    size = 4 * 1024 * 64
    # Kept until their backward pass are the answers of the four Tanh; with them live the gradient and one temporary.
    assert 4 * size < peak(inner) < 9 * size


def test_more_samples_need_in_proportion_more() -> None:
    sizes = []
    for batch in (512, 1024):
        inner = network()
        inner[0].weight.requires_grad_()
        sizes.append(peak(inner, batch))
    assert 1.8 < sizes[1] / sizes[0] < 2.1


@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_are_counted(is_tied: bool) -> None:
    tokens, width, vocabulary = 256, 64, 2**14
    inner = network()
    inner[0].weight.requires_grad_()
    parts = {"decoder": Call(inner), "head": Head(vocabulary, width, is_tied=is_tied)}
    result = torch.empty(tokens, width, device="meta")
    examples = {"decoder": {"x": result}, "head": {"hidden": result}}
    # The probabilities are kept until the backward pass makes their gradient.
    assert 2 <= take_step(parts, examples, CPU, torch.float32, nullcontext) / (4 * tokens * vocabulary) < 3.5


def test_nothing_is_kept_before_the_first_trained_layer() -> None:
    early, late = network(depth=8), network(depth=8)
    early[0].weight.requires_grad_()
    late[14].weight.requires_grad_()
    assert peak(late) < 0.6 * peak(early)


def test_a_quantized_weight_is_wide_only_while_it_is_used() -> None:
    plain, quantized = network(1024, 3), network(1024, 3)
    for inner in (plain, quantized):
        inner[0].bias.requires_grad_()
    use_placeholders(quantized, ["2", "4"], "nf4")
    more = peak(quantized, 8, 1024) - peak(plain, 8, 1024)
    assert 4 * 1024**2 * 0.9 < more < 4 * 1024**2 * 1.5


def test_layers_in_8_bits_keep_their_inputs() -> None:
    peaks = {}
    for quantization in ("nf4", "8bit"):
        with torch.device("meta"):
            inner = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).requires_grad_(False)
        inner[0].bias.requires_grad_()
        use_placeholders(inner, [str(index) for index in range(1, 6)], quantization)
        peaks[quantization] = peak(inner)
    assert peaks["8bit"] - peaks["nf4"] >= 4 * (4 * 1024 * 64)


def test_layers_in_8_bits_scale_their_products_one_after_the_other() -> None:
    """Without a fused kernel, whole numbers, their scales and what is scaled lie in memory at once."""
    sizes = {}
    for quantization in ("nf4", "8bit"):
        with torch.device("meta"):
            inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4096), nn.Linear(4096, 8)).requires_grad_(False)
        inner[0].bias.requires_grad_()
        use_placeholders(inner, ["1"], quantization)
        sizes[quantization] = peak(inner, 256, 8)
    assert 1 <= (sizes["8bit"] - sizes["nf4"]) / (4 * 256 * 4096) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_memory_is_taken(dtype: torch.dtype) -> None:
    inner = network(2**15, 1)
    inner[0].weight.requires_grad_()
    example = {"unet": {"x": torch.empty(2**20, 2**15, device="meta")}}
    assert take_step({"unet": Call(inner)}, example, CPU, dtype, nullcontext) > 2**35
