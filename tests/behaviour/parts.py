"""The parts of a recording: `python -m tests.behaviour.parts PART` prints one, made in an empty working folder."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.behaviour import inputs
from tests.behaviour.outcome import ROOT, outcome

FORMATS = ("kohya", "diffusers", "peft")
_IMAGES = "data.path=images data.caption_lines=each adapter.rank=4"
_TEXT = "adapter.rank=2 adapter.dropout=0.1 train.schedule=constant"
_RUNS = {
    "sd1": f"{_IMAGES} adapter.parts=[unet,text_encoder] adapter.targets=[attn,ff,unet/conv] model.caption_dropout=0.2"
    " data.flip=true model.prior_weight=1",
    "sd1-min-snr": f"{_IMAGES} model.min_snr_gamma=5 model.noise_offset=0.1 adapter.variant=dora model.clip_skip=2"
    " model.prior_weight=0 train.gradient_accumulation=2 train.gradient_checkpointing=true",
    "sd1-nf4": f"{_IMAGES} model.quantization=nf4 adapter.parts=[unet,text_encoder]",
    "sd1-lokr": f"{_IMAGES} adapter.variant=lokr adapter.targets=[attn,conv] train.preview_every_steps=10"
    " preview.num_steps=2",
    "sd1-loha": f"{_IMAGES} adapter.variant=loha train.precision=bf16 evaluate.picture_draws=2",
    "sd2": f"{_IMAGES} model.zero_terminal_snr=always model.min_snr_gamma=5 adapter.variant=rslora",
    "sdxl": f"{_IMAGES} adapter.parts=[unet,text_encoder,text_encoder_2] adapter.module_ranks=[unet/attn=3]",
    "whisper": f"data.path=recordings {_TEXT} model.mask_time_prob=0.2 data.speeds=[1.0,1.1] data.noise_db=[20]"
    " data.validation=held_out evaluate.every_steps=10",
    "llava": f"data.path=chats {_TEXT} data.zooms=[1.0,0.9] adapter.parts=[language_model,projector]"
    " adapter.full=[projector] train.part_learning_rates=[projector=1e-3]",
}
_TRAIN = "train.max_steps=20 train.save_every_steps=10 train.batch_size=2 train.learning_rate=1e-2 train.threads=1"


def losses() -> dict[str, Any]:
    """Trains each family for 20 steps; the losses are in the run's metrics.jsonl."""
    inputs.write_bases()
    inputs.write_samples()
    results = {}
    for name, settings in _RUNS.items():
        family = name.partition("-")[0]
        own = "" if "train.precision" in settings else " train.precision=fp32"
        given = f"model.family={family} model.path=base-{family} {settings} {_TRAIN}{own} output.path=runs/{name}"
        results[name] = outcome(["train", *given.split(), "output.dtype=fp32", "--json"])
    return results


def conversions() -> dict[str, Any]:
    """Converts each golden file, and files of variants that no golden one has yet, to every format."""
    results = {}
    for name, path in inputs.write_adapters().items():
        for format_name in FORMATS:
            target = f"{name.replace('/', '-')}.to.{format_name}" + (".safetensors" if format_name != "peft" else "")
            results[f"{name} to {format_name}"] = outcome(["convert", str(path), target, "--to", format_name, "--json"])
    return results


def commands() -> dict[str, Any]:
    """Runs the commands of commands.txt."""
    inputs.write_bases()
    inputs.write_samples()
    inputs.write_checkpoint()
    adapters = inputs.write_adapters()
    torch.save({"a": torch.zeros(2)}, "pickled.pt")
    Path("truncated.safetensors").write_bytes(adapters["lora"].read_bytes()[:-100])
    results = {}
    for line in Path(__file__).with_name("commands.txt").read_text().splitlines():
        if not line.startswith("#"):
            arguments = shlex.split(line.removeprefix("text: ").replace("ROOT", str(ROOT)))
            results[line] = outcome(arguments if line.startswith("text: ") else [*arguments, "--json"])
    return results


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "losses": losses,
    "conversions": conversions,
    "commands": commands,
}

if __name__ == "__main__":
    json.dump(PARTS[sys.argv[1]](), sys.stdout, indent=1)
