"""Stage 4: the autoencoder, then its latents folded to mean 0 and deviation 1."""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from scripts.build_builtin.networks import make_vae
from scripts.build_builtin.pictures import (
    Affine,
    disturb_colours,
    read_pictures,
    to_unit,
    training_pictures,
    unseen_style_pictures,
)
from scripts.build_builtin.storage import MovingAverage, load_checkpoint, save_checkpoint
from scripts.build_builtin.subjects import GENERATOR

PEAK_LEARNING_RATE = 1.5e-3
KL_WEIGHT = 3e-4
CROP_SHARE = 0.65  # of the time on crops: four times as many steps per second
CROP_PIXELS, CROP_BATCH, FULL_BATCH = 32, 32, 16
CHECKPOINT_SECONDS = 120
AUGMENTATION = Affine(8, (0.75, 1.1), 0.08, 0.5)


def gradient_loss(got: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical edges."""
    across = (got.diff(dim=-1) - wanted.diff(dim=-1)).abs().mean()
    down = (got.diff(dim=-2) - wanted.diff(dim=-2)).abs().mean()
    return across + down


def reconstruction_loss(got: Tensor, wanted: Tensor) -> Tensor:
    """L1 + MSE + half the edge loss at two scales."""
    half_got, half_wanted = F.avg_pool2d(got, 2), F.avg_pool2d(wanted, 2)
    edges = gradient_loss(got, wanted) + gradient_loss(half_got, half_wanted)
    return F.l1_loss(got, wanted) + F.mse_loss(got, wanted) + 0.5 * edges


def draw_batch(pixels: Tensor, progress: float, rng: torch.Generator) -> Tensor:
    """Disturbed pictures in -1..1, crops during the first part of the time."""
    cropping = progress < CROP_SHARE
    chosen = torch.randint(len(pixels), (CROP_BATCH if cropping else FULL_BATCH,), generator=rng)
    images = disturb_colours(AUGMENTATION.apply(to_unit(pixels[chosen]), rng), 0.15, rng)
    if not cropping:
        return images.contiguous(memory_format=torch.channels_last)
    top, left = torch.randint(images.shape[-1] - CROP_PIXELS + 1, (2,), generator=rng).tolist()
    crop = images[..., top : top + CROP_PIXELS, left : left + CROP_PIXELS]
    return crop.contiguous(memory_format=torch.channels_last)


def train_step(vae: AutoencoderKL, images: Tensor, rng: torch.Generator) -> Tensor:
    """Loss of one batch."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(rng)).sample
    kl = 0.5 * (posterior.mean.pow(2) + posterior.var - 1 - posterior.logvar).mean()
    return reconstruction_loss(decoded, images) + KL_WEIGHT * kl


def learning_rate(progress: float, step: int) -> float:
    """Cosine over the time allowed after a short warm-up."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(progress, 1.0))))


def train(work: Path, minutes: float) -> AutoencoderKL:
    """Averaged autoencoder after `minutes` of training time, spent over any number of starts."""
    torch.manual_seed(5)
    pixels = training_pictures(read_pictures(work), GENERATOR).pixels
    vae = make_vae().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = MovingAverage(vae, 0.998)
    path = work / "vae-training.pt"
    state: dict[str, Any] = load_checkpoint(path) or {"step": 0, "seconds": 0.0}
    if "model" in state:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
    vae.train()

    def store(seconds: float) -> None:
        parts = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state_dict()}
        save_checkpoint(path, {**parts, "step": step, "seconds": seconds})

    step, before, started = state["step"], state["seconds"], time.monotonic()
    saved = started
    while (seconds := before + time.monotonic() - started) < minutes * 60:
        rng = torch.Generator().manual_seed(9_000_011 + step)
        progress = seconds / (minutes * 60)
        loss = train_step(vae, draw_batch(pixels, progress, rng), rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae)
        step += 1
        if step % 25 == 0:
            print(f"vae step {step} seconds {seconds:.0f} loss {loss.item():.4f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            store(seconds)
            saved = time.monotonic()
    store(minutes * 60)
    vae.load_state_dict(average.values)
    return vae.eval()


@torch.no_grad()
def latent_moments(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Mean latents [n, 4, 16, 16] of uint8 pictures."""
    return torch.cat([vae.encode(to_unit(part)).latent_dist.mean for part in pixels.split(64)])


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Write (z - mean) / deviation into quant_conv and its inverse into post_quant_conv, in place.

    Pictures decoded from encoded pictures stay the same; log-variances shift by -2 log(deviation).
    """
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= deviation[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.bias[channels:] -= 2 * torch.log(deviation)
    post.bias += (post.weight[:, :, 0, 0] * mean[None]).sum(1)
    post.weight *= deviation[None, :, None, None]


@torch.no_grad()
def measure(vae: AutoencoderKL, pixels: Tensor) -> dict[str, float]:
    """PSNR in dB and mean absolute error (values 0..1) of reconstructed uint8 pictures."""
    wanted = to_unit(pixels)
    got = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in wanted.split(64)])
    error = (got.clamp(-1, 1) - wanted) / 2
    by_picture = -10 * torch.log10(error.pow(2).mean((1, 2, 3)).clamp_min(1e-10))
    return {"psnr": by_picture.mean().item(), "l1": error.abs().mean().item()}


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--minutes", type=float, default=14.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vae = train(arguments.work, arguments.minutes)
    pictures = read_pictures(arguments.work)
    latents = latent_moments(vae, training_pictures(pictures, GENERATOR).pixels)
    before = measure(vae, unseen_style_pictures(pictures).pixels)
    fold_statistics(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    print("unseen style before and after folding", before, measure(vae, unseen_style_pictures(pictures).pixels))
    save_checkpoint(arguments.work / "vae.pt", vae.state_dict())


if __name__ == "__main__":
    main()
