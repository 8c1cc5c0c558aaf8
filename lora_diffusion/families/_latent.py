"""What all latent diffusion families do alike: encode and decode pictures, draw variants, run the sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lora_diffusion.core.types import Request


@torch.no_grad()
def encode_moments(vae: Any, pixels: Tensor) -> Tensor:
    """Returns mean and log variance of the latents, float32 on the CPU.

    The moments are kept and not one draw from them, so that each epoch can draw its own latents.

    Args:
        vae: AutoencoderKL.
        pixels: [batch, 3, height, width] in -1..1.

    Returns:
        [batch, 2 * channels, height / factor, width / factor]
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    # As the cache gives it back: sums over another memory layout differ in their last bits.
    return torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu().contiguous()


def draw_latents(moments: Tensor, scaling_factor: float, rng: torch.Generator) -> Tensor:
    """Draws latents from their moments and scales them for the UNet, [batch, channels, height, width] float32."""
    mean, logvar = moments.chunk(2, dim=1)
    return (mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=rng)) * scaling_factor


def draw_rows(table: Tensor, num_rows: Tensor, rng: torch.Generator) -> Tensor:
    """Picks one of the first `num_rows[i]` rows of `table[i]` for each i.

    Args:
        table: [batch, rows, ...]
        num_rows: [batch] int64, at least 1.
        rng: CPU generator.

    Returns:
        [batch, ...]
    """
    picks = (torch.rand(len(table), generator=rng) * num_rows).long()
    return table[torch.arange(len(table)), torch.minimum(picks, num_rows - 1)]


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Returns the pictures of unscaled latents [batch, channels, height, width]."""
    pixels = vae.decode(latents.to(vae.dtype)).sample
    rows = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(row) for row in rows.permute(0, 2, 3, 1).cpu().numpy()]


def initial_noise(requests: Sequence[Request], shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Draws each request's starting noise from its own seed on the CPU, as diffusers does, [batch, *shape]."""
    return torch.cat(
        [torch.randn((1, *shape), generator=torch.Generator().manual_seed(r.seed), dtype=dtype) for r in requests]
    )


@torch.no_grad()
def sample(denoise: Callable[[Tensor, Tensor], Tensor], scheduler: Any, noise: Tensor, num_steps: int) -> Tensor:
    """Runs a diffusers scheduler from noise to latents.

    Args:
        denoise: (latents, timestep) -> the network's prediction after guidance.
        scheduler: a fresh object; it is changed.
        noise: [batch, channels, height, width], standard normal.
        num_steps: denoising steps.
    """
    scheduler.set_timesteps(num_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = denoise(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def guided(unet: nn.Module, context: Tensor, negative: Tensor, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the UNet with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, equation 6).

    Args:
        unet: UNet2DConditionModel.
        context: [batch, length, dim] of the prompts.
        negative: [batch, length, dim] of what to move away from.
        guidance: 1 or less calls the UNet once, without the negative.
    """
    if guidance <= 1:
        return lambda latents, timestep: unet(latents, timestep, encoder_hidden_states=context).sample
    both = torch.cat([negative, context])

    def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
        prediction = unet(torch.cat([latents, latents]), timestep, encoder_hidden_states=both).sample
        away, towards = prediction.chunk(2)
        return away + guidance * (towards - away)

    return denoise
