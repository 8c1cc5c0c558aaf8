from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_diffusion.runtime import bf16_emulation
from lora_diffusion.runtime.bf16_emulation import without_bf16_emulation
from lora_diffusion.training.memory import checkpoint_activations


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_recomputed_activations_give_the_same_gradients(
    tiny_base: Path, weights: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 the products of the repetition must be those of the first pass."""
    monkeypatch.setattr(bf16_emulation, "has_fast_bf16", lambda device: False)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    parts = {name: network.to(weights).requires_grad_(False) for name, network in networks.items()}
    trained = parts["text_encoder"].get_input_embeddings().weight.requires_grad_()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(weights)
    gradients = []
    for repetition in (False, True):
        if repetition:
            checkpoint_activations(parts)
        with without_bf16_emulation(torch.device("cpu")):
            text = parts["text_encoder"](torch.arange(16)[None])[0]
            predicted = parts["unet"](latents, 500, text).sample
        predicted.float().square().mean().backward()
        gradients.append(trained.grad)
        trained.grad = None
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
