"""Stage 4b: more training of the decoder alone; latents, and with them the denoiser, stay valid."""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scripts.build_builtin.latents import PLACEMENT, trained_vae
from scripts.build_builtin.pictures import read_pictures, to_unit, training_pictures, unseen_style_pictures
from scripts.build_builtin.storage import MovingAverage, load_checkpoint, save_checkpoint
from scripts.build_builtin.subjects import GENERATOR
from scripts.build_builtin.train_vae import measure, reconstruction_loss

PEAK_LEARNING_RATE = 8e-4
WARM_UP_STEPS = 30
BATCH = 16
LATENT_NOISE = 0.05  # of a deviation of 1: generated latents are not exactly encoded ones
CHECKPOINT_SECONDS = 120


def decoder_parameters(vae: AutoencoderKL) -> list[torch.nn.Parameter]:
    """Parameters of decoder and post_quant_conv, the only ones left trainable."""
    vae.requires_grad_(False)
    chosen = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def train_step(vae: AutoencoderKL, pixels: Tensor, step: int) -> Tensor:
    """Loss of one batch of whole pictures."""
    rng = torch.Generator().manual_seed(5_000_011 + step)
    chosen = torch.randint(len(pixels), (BATCH,), generator=rng)
    images = PLACEMENT.apply(to_unit(pixels[chosen]), rng).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        latents = latents + LATENT_NOISE * torch.randn(latents.shape, generator=rng)
    return reconstruction_loss(vae.decode(latents).sample, images)


def refine(work: Path, minutes: float) -> AutoencoderKL:
    """Autoencoder with an averaged better decoder after `minutes`, spent over any number of starts."""
    pixels = training_pictures(read_pictures(work), GENERATOR).pixels
    vae = trained_vae(work).to(memory_format=torch.channels_last).train()
    chosen = decoder_parameters(vae)
    optimizer = torch.optim.AdamW(chosen, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = MovingAverage(vae, 0.995)
    path = work / "vae-refining.pt"
    state: dict[str, Any] = load_checkpoint(path) or {"step": 0, "seconds": 0.0}
    if "model" in state:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
    step, before, started = state["step"], state["seconds"], time.monotonic()
    saved, seconds = started, before

    def store() -> None:
        parts = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state_dict()}
        save_checkpoint(path, {**parts, "step": step, "seconds": seconds})

    while (seconds := before + time.monotonic() - started) < minutes * 60:
        loss = train_step(vae, pixels, step)
        rate = 0.5 + 0.5 * math.cos(math.pi * min(1.0, seconds / (minutes * 60)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * rate * min(1.0, (step + 1) / WARM_UP_STEPS)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        average.update(vae)
        step += 1
        if step % 25 == 0:
            print(f"decoder step {step} seconds {seconds:.0f} loss {loss.item():.4f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            store()
            saved = time.monotonic()
    store()
    vae.load_state_dict(average.values)
    return vae.eval()


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--minutes", type=float, default=12.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pixels = unseen_style_pictures(read_pictures(arguments.work)).pixels
    before = measure(trained_vae(arguments.work), pixels)
    vae = refine(arguments.work, arguments.minutes)
    print("unseen style before and after", before, measure(vae, pixels))
    save_checkpoint(arguments.work / "vae.pt", vae.state_dict())


if __name__ == "__main__":
    main()
