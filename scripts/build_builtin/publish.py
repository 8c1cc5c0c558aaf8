"""Stage 7: the folders that ship with the package, from whatever the training has reached."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from scripts.build_builtin.cards import clip_card, pipeline_card
from scripts.build_builtin.latents import trained_text_encoder, trained_vae
from scripts.build_builtin.networks import (
    TEXT_WIDTH,
    clip_config,
    make_scheduler,
    make_unet,
    read_tokenizer,
    write_open_clip_config,
)
from scripts.build_builtin.storage import load_checkpoint, replace_folder
from scripts.build_builtin.subjects import SCORER
from scripts.build_builtin.train_clip import ROLES
from scripts.build_builtin.unknown_words import CHECKPOINT as UNKNOWN_WORDS

DEFAULT_OUTPUT = Path(__file__).parents[2] / "lora_diffusion" / "builtin"
MEBIBYTES_ALLOWED = {"emoji-sd": 26, "emoji-clip": 10}


def read_measures(work: Path) -> dict[str, Any]:
    """Numbers of stage measure so far; empty before it ran."""
    path = work / "measures.json"
    measures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return measures


def write_classic_tokenizer(folder: Path) -> None:
    """Add vocab.json and merges.txt, which older readers of CLIP tokenizers ask for."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")


def use_classic_text_names(path: Path) -> None:
    """Give a text encoder's tensors the `text_model.` prefix that Stable Diffusion files have."""
    tensors = load_file(path)
    renamed = {
        name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in tensors.items()
    }
    save_file(renamed, path, metadata={"format": "pt"})


def check_size(folder: Path, limit: int) -> None:
    """Raise ValueError if the folder outgrows what the package may carry."""
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if total > limit * 2**20:
        raise ValueError(f"{folder.name} holds {total} bytes, more than {limit} MiB.")


def make_pipeline(work: Path, checkpoint: str) -> tuple[StableDiffusionPipeline, int]:
    """Pipeline in half precision with averaged weights, those of stage 6b if it ran, and the samples of stage 6."""
    state = load_checkpoint(work / checkpoint)
    if state is None:
        raise FileNotFoundError(f"{work / checkpoint}: train the denoiser first.")
    text_encoder, unet = trained_text_encoder(work), make_unet(tuple(state["channels"]))
    unet.load_state_dict(state["average"]["values"])
    words = load_checkpoint(work / UNKNOWN_WORDS)
    if words is not None:
        for network, average in zip((text_encoder, unet), words["averages"], strict=True):
            network.load_state_dict(average["values"])
    pipeline = StableDiffusionPipeline(
        vae=trained_vae(work),
        text_encoder=text_encoder,
        tokenizer=read_tokenizer(work),
        unet=unet.eval(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(dtype=torch.float16), state["samples"]


def publish_pipeline(work: Path, output: Path, checkpoint: str) -> None:
    """Replace output/emoji-sd."""
    pipeline, samples = make_pipeline(work, checkpoint)

    def fill(folder: Path) -> None:
        pipeline.save_pretrained(folder, safe_serialization=True)
        write_classic_tokenizer(folder / "tokenizer")
        use_classic_text_names(folder / "text_encoder" / "model.safetensors")
        grid = work / "grid.png"
        if grid.exists():
            (folder / "grid.png").write_bytes(grid.read_bytes())
        (folder / "README.md").write_text(pipeline_card(read_measures(work), samples), encoding="utf-8")
        check_size(folder, MEBIBYTES_ALLOWED["emoji-sd"])

    replace_folder(output / "emoji-sd", fill)
    print(f"{output / 'emoji-sd'}: {samples} samples")


def publish_clip(work: Path, output: Path) -> None:
    """Replace output/emoji-clip."""
    state = load_checkpoint(work / f"clip-{SCORER}.pt")
    if state is None:
        raise FileNotFoundError(f"{work}: train the scorer first.")
    tokenizer = read_tokenizer(work)
    padded = CLIPTokenizer.from_pretrained(work / "tokenizer", pad_token="!")

    def fill(folder: Path) -> None:
        padded.save_pretrained(folder)
        write_classic_tokenizer(folder)
        config = clip_config(ROLES[SCORER].image_width, TEXT_WIDTH, len(tokenizer))
        write_open_clip_config(folder / "open_clip_config.json", config)
        tensors = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state["model"].items()}
        save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
        (folder / "README.md").write_text(clip_card(read_measures(work)), encoding="utf-8")
        check_size(folder, MEBIBYTES_ALLOWED["emoji-clip"])

    replace_folder(output / "emoji-clip", fill)
    print(output / "emoji-clip")


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("pipeline", "clip"))
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--checkpoint", default="unet.pt", help="file in the work folder to publish the denoiser from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "clip":
        publish_clip(arguments.work, arguments.output)
    else:
        publish_pipeline(arguments.work, arguments.output, arguments.checkpoint)


if __name__ == "__main__":
    main()
