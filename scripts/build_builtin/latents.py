"""Stage 5: latents of several disturbed copies of every picture, and the encoding of every caption."""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel

from scripts.build_builtin.captions import every
from scripts.build_builtin.networks import make_text_encoder, make_vae, read_tokenizer
from scripts.build_builtin.pictures import Affine, read_pictures, to_unit, training_pictures
from scripts.build_builtin.storage import load_checkpoint, save_checkpoint
from scripts.build_builtin.subjects import GENERATOR
from scripts.build_builtin.tokenizer import CONTEXT_LENGTH

COPIES = 8
PLACEMENT = Affine(4, (0.86, 1.02), 0.03, 0.0)
# a mirrored guitar is still a guitar; faces and hearts lose nothing either, but letters on things would
MIRRORED_GROUPS = frozenset({"animal", "food", "plant", "heart", "character"})


def trained_vae(work: Path) -> AutoencoderKL:
    """Folded autoencoder of stage 4."""
    vae = make_vae()
    vae.load_state_dict(load_checkpoint(work / "vae.pt"))
    return vae.eval()


def trained_text_encoder(work: Path) -> CLIPTextModel:
    """Text encoder out of the generator's CLIP of stage 3."""
    encoder = make_text_encoder(read_tokenizer(work))
    state = (load_checkpoint(work / "clip-generator.pt") or {})["model"]
    encoder.load_state_dict(
        {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    )
    return encoder.eval()


@torch.no_grad()
def encode_pictures(work: Path) -> dict[str, Any]:
    """Latent means and log-variances [copies * n, 4, 16, 16] float16 and the picture index of each."""
    vae = trained_vae(work).to(memory_format=torch.channels_last)
    pictures = training_pictures(read_pictures(work), GENERATOR)
    mirrored = torch.tensor([subject.group in MIRRORED_GROUPS for subject in pictures.subjects])
    means, logvars, rows = [], [], []
    for copy in range(COPIES):
        rng = torch.Generator().manual_seed(77_000 + copy)
        for part in torch.arange(len(pictures)).split(128):
            images = to_unit(pictures.pixels[part])
            if copy > 0:
                images = PLACEMENT.apply(images, rng)
            flip = mirrored[part] & (copy % 2 == 1)
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
            posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
            means.append(posterior.mean.half().contiguous())
            logvars.append(posterior.logvar.half().contiguous())
            rows.append(part)
        print(f"copy {copy + 1} of {COPIES}", flush=True)
    return {"means": torch.cat(means), "logvars": torch.cat(logvars), "rows": torch.cat(rows)}


@torch.no_grad()
def encode_captions(work: Path) -> dict[str, Any]:
    """Hidden states [m, 24, 160] float16 of all distinct captions (0 is the empty one) and their ids per picture."""
    encoder, tokenizer = trained_text_encoder(work), read_tokenizer(work)
    pictures = training_pictures(read_pictures(work), GENERATOR)
    captions = {"": 0}
    table: list[list[int]] = []
    for subject, style in zip(pictures.subjects, pictures.styles, strict=True):
        table.append([captions.setdefault(caption, len(captions)) for caption in every(subject, style)])
    tokens = tokenizer(
        list(captions), padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    hidden: list[Tensor] = [encoder(input_ids=part).last_hidden_state.half() for part in tokens.split(256)]
    return {"captions": list(captions), "hidden": torch.cat(hidden), "caption_ids": torch.tensor(table)}


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--only", choices=("pictures", "captions"), help="one half, to use two cores side by side")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only != "captions":
        save_checkpoint(arguments.work / "latents.pt", encode_pictures(arguments.work))
    if arguments.only != "pictures":
        save_checkpoint(arguments.work / "captions.pt", encode_captions(arguments.work))


if __name__ == "__main__":
    main()
