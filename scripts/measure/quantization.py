"""The loss that an adapter ends with on images that were not trained on, for each way to store the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.adapters.state import load_state
from lora_diffusion.config.load import find_shipped, load
from lora_diffusion.config.schema import Config
from lora_diffusion.core import registry
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.files import shipped_path
from lora_diffusion.core.protocols.family import step_loss
from lora_diffusion.core.rng import derive
from lora_diffusion.data import sample_types
from lora_diffusion.runtime.device import pick_device
from lora_diffusion.workflows._base_and_adapters import read_adapter
from lora_diffusion.workflows.train import train

QUANTIZATIONS = ("none", "8bit", "nf4")
"""Values of `model.quantization`; what is not quantized is in bf16."""
_DRAWS = 8
"""Noises and timesteps for each image; the same for every adapter."""


def measure(output: Path, seeds: Sequence[int], changes: Sequence[str]) -> None:
    """Trains configs/sd1/style.yaml on each such base and prints the validation losses as a Markdown table."""
    print("| base | seed | before | after | difference to bf16 |\n|---|---|---|---|---|")
    for seed in seeds:
        reference = None
        for name in QUANTIZATIONS:
            run = output / f"quantization-{name}-seed{seed}"
            data = shipped_path("datasets") / "blob-style" / "train"
            overrides = [f"data.path={data}", f"output.path={run}", f"train.seed={seed}"]
            stored = [f"model.quantization={name}", "model.dtype=bf16"]
            config = load(find_shipped("sd1/style"), [*overrides, *stored, *changes])
            result = train(config, overwrite=True)
            before, after = (validation_loss(config, path) for path in (None, result.files[0]))
            reference = after if reference is None else reference
            print(
                f"| {name} | {seed} | {before:.4f} | {after:.4f} | {100 * (after / reference - 1):+.2f} % |", flush=True
            )


def validation_loss(config: Config, adapter: Path | None) -> float:
    """Returns the mean loss over the references of the blob style, with noise and timesteps that never change.

    Args:
        config: gives the base, stored as it was trained on.
        adapter: file of a run; None measures the base alone.
    """
    family: Any = registry.find("families", config.model.family)
    plain = {"caption_dropout": 0.0, "prior_weight": 0.0, "min_snr_gamma": None, "noise_offset": 0.0}
    known = {key: value for key, value in plain.items() if hasattr(config.model, key)}
    model = replace(config.model, **known)
    data = replace(config.data, path=str(shipped_path("datasets") / "blob-style" / "references"), trigger="")
    sample_type, loaded = sample_types.find(family.sample_type), family.load(model, pick_device())
    samples = [sample_type.open(sample, data) for sample in sample_type.read(data, loaded.info)]
    batch = family.collate(family.prepare(loaded, samples, frozenset()))
    if adapter is not None:
        load_state(loaded, read_adapter(adapter, family, model), "trained")
    return _mean_loss(family, loaded, batch)


@torch.no_grad()
def _mean_loss(family: Any, loaded: Loaded, batch: Any) -> float:
    losses = [step_loss(family, loaded)(batch, derive(0, "validation", draw)).per_sample for draw in range(_DRAWS)]
    return float(torch.cat(losses).mean())
