"""From images to latents and back, what is drawn of them, and the sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from math import ceil
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.core.base_model import BaseInfo, Loaded
from lora_diffusion.core.samples import Output, Request
from lora_diffusion.families.stable_diffusion.options import StableDiffusionOptions
from lora_diffusion.families.stable_diffusion.text_encoding import Condition

_MAX_BATCH = 16
"""Images generated at once; more do not get faster on any device and need memory."""

Embed = Callable[[Sequence[Request], tuple[int, int]], tuple[Condition, Condition]]
"""(requests, width and height) -> conditions of the prompts and of the negative prompts."""


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
    """Draws latents from their moments [batch, 2 * channels, height, width] and scales them for the UNet.

    Returns:
        [batch, channels, height, width] float32
    """
    mean, logvar = moments.chunk(2, dim=1)
    return (mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=rng)) * scaling_factor


def draw_indices(num_rows: Tensor, rng: torch.Generator) -> Tensor:
    """Draws a uniform number below `num_rows[i]` for each i, [batch] int64.

    Args:
        num_rows: [batch] int64, at least 1.
        rng: CPU generator.
    """
    picks = (torch.rand(len(num_rows), generator=rng) * num_rows).long()
    return torch.minimum(picks, num_rows - 1)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Returns the images of unscaled latents [batch, channels, height, width]."""
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
    latents: Tensor = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = denoise(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def call_unet(unet: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """Returns a UNet2DConditionModel's prediction, [batch, channels, height, width] in its dtype."""
    added = {name: values for name, values in condition.items() if name != "context"}
    context = condition["context"]
    predicted: Tensor = unet(
        latents.to(context.dtype), timesteps, encoder_hidden_states=context, added_cond_kwargs=added or None
    ).sample
    return predicted


def guided(unet: Any, positive: Condition, negative: Condition, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the UNet with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, equation 6).

    Args:
        unet: UNet2DConditionModel.
        positive: of the prompts.
        negative: of the negative prompts.
        guidance: 1 or less calls the UNet once, without `negative`.

    Returns:
        (latents [batch, channels, height, width], timestep []) -> prediction of the same shape.
    """
    if guidance <= 1:
        return lambda latents, timestep: call_unet(unet, latents, timestep, positive)
    both = {name: torch.cat([negative[name], values]) for name, values in positive.items()}

    def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
        low, high = call_unet(unet, torch.cat([latents, latents]), timestep, both).chunk(2)
        return low + guidance * (high - low)

    return denoise


def generate(loaded: Loaded, requests: Sequence[Request], embed: Embed) -> list[Output]:
    """Generates images in batches of requests that differ in prompt and seed only."""
    outputs: dict[int, Output] = {}
    guidance = loaded.info.guidance
    requests = [replace(r, guidance=guidance) if r.guidance is None else r for r in requests]
    order = sorted(range(len(requests)), key=lambda i: repr(_settings(requests[i])))
    for _, group in groupby(order, key=lambda i: repr(_settings(requests[i]))):
        indices = list(group)
        for start in range(0, len(indices), _MAX_BATCH):
            chunk = indices[start : start + _MAX_BATCH]
            images = _generate_alike(loaded, [requests[i] for i in chunk], embed)
            outputs.update({i: Output(requests[i], image) for i, image in zip(chunk, images, strict=True)})
    return [outputs[i] for i in range(len(requests))]


def _settings(request: Request) -> tuple[Any, ...]:
    weights = None if request.weights is None else sorted(request.weights.items())
    return request.num_steps, request.guidance, request.size, weights


@torch.no_grad()
def _generate_alike(loaded: Loaded, requests: Sequence[Request], embed: Embed) -> list[Image.Image]:
    """Generates one batch of requests that share steps, guidance, size and adapter weights."""
    first, unet, vae = requests[0], loaded.parts["unet"], loaded.modules["vae"]
    if first.weights is not None:
        assert loaded.adapters is not None, "a request gives adapter weights, but no adapter was loaded"
        loaded.adapters.set_weights(first.weights)
    size = first.size or (loaded.info.resolution, loaded.info.resolution)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    config: Any = unet.config
    shape = (config.in_channels, size[1] // factor, size[0] // factor)
    positive, negative = embed(requests, size)
    noise = initial_noise(requests, shape, positive["context"].dtype).to(loaded.device)
    scheduler = type(loaded.modules["scheduler"]).from_config(loaded.modules["scheduler"].config)
    assert first.guidance is not None, "generate fills it in"
    latents = sample(guided(unet, positive, negative, first.guidance), scheduler, noise, first.num_steps)
    return decode(vae, latents / loaded.modules["scaling_factor"])


def example(
    parts: Mapping[str, Any],
    info: BaseInfo,
    options: StableDiffusionOptions,
    trained: frozenset[str],
    batch_size: int,
    size: tuple[int, int],
) -> dict[str, dict[str, Any]]:
    """Gives, on the meta device, what a training step calls the UNet and the trained text encoders with.

    What is shown a second time for `prior_weight` and `anchor_weight` comes on top of the batch.
    """
    num_rows = batch_size + sum(ceil(batch_size * share) for share in (options.priors_again, options.anchors_again))
    unet = parts["unet"].config
    encoders = {name: part.config for name, part in parts.items() if name != "unet"}
    factor = info.size_step // 2 ** (len(unet.block_out_channels) - 1)
    length = max(encoder.max_position_embeddings for encoder in encoders.values())
    with torch.device("meta"):
        called: dict[str, Any] = {
            "sample": torch.empty(num_rows, unet.in_channels, size[1] // factor, size[0] // factor),
            "timestep": torch.empty(num_rows),
            "encoder_hidden_states": torch.empty(num_rows, length, unet.cross_attention_dim),
        }
        if unet.addition_embed_type:
            width = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
            sizes = torch.empty(num_rows, 6)
            called["added_cond_kwargs"] = {"text_embeds": torch.empty(num_rows, width), "time_ids": sizes}
        ids = {"input_ids": torch.zeros(num_rows, length, dtype=torch.int64)}
    return {**{name: ids for name in encoders if name in trained}, "unet": called}
