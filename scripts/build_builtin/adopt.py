"""Fills a work folder from the published emoji-sd, so that its denoiser can be trained on where no checkpoint is left.

The optimizer starts anew with its warm-up; weights, tokenizer, text encoder and autoencoder are the published ones, in
half precision. Run `render` before and `latents` after it, then `train_unet`.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from scripts.build_builtin.networks import UNET_CHANNELS
from scripts.build_builtin.publish import DEFAULT_OUTPUT
from scripts.build_builtin.storage import MovingAverage, save_checkpoint
from scripts.build_builtin.train_unet import AVERAGE_DECAY, PEAK_LEARNING_RATE


def adopt(published: Path, work: Path, samples: int, hours: float) -> None:
    """Write tokenizer, clip-generator.pt, vae.pt and unet.pt; FileExistsError rather than replace a denoiser."""
    if (work / "unet.pt").exists():
        raise FileExistsError(f"{work / 'unet.pt'} exists; train on from it, or move it away.")
    pipeline = StableDiffusionPipeline.from_pretrained(published, dtype=torch.float32)
    shutil.copytree(published / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    text = {f"text.{name}": value for name, value in pipeline.text_encoder.state_dict().items()}
    save_checkpoint(work / "clip-generator.pt", {"model": text})
    save_checkpoint(work / "vae.pt", pipeline.vae.state_dict())
    unet = pipeline.unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    state = {
        "model": unet.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": MovingAverage(unet, AVERAGE_DECAY).state_dict(),
        "step": 0,
        "samples": samples,
        "seconds": hours * 3600,
        "channels": list(UNET_CHANNELS),
    }
    save_checkpoint(work / "unet.pt", state)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--published", type=Path, default=DEFAULT_OUTPUT / "emoji-sd")
    parser.add_argument("--samples", type=int, required=True, help="what the model card says the denoiser has seen")
    parser.add_argument("--hours", type=float, required=True, help="what it says the training of the denoiser took")
    arguments = parser.parse_args()
    adopt(arguments.published, arguments.work, arguments.samples, arguments.hours)


if __name__ == "__main__":
    main()
