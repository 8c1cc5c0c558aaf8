"""What diffusers does with a file: its pipelines with networks whose weights take no memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.core.adapter_state import ModuleKey
from scripts.apps.weights import Outcome, Place, refused, without_memory

_PARTS = ("unet", "text_encoder", "text_encoder_2")


class Diffusers:
    """diffusers with a pipeline."""

    name = "diffusers"

    def __init__(self, make: Callable[[], Any]) -> None:
        """Takes what makes a pipeline, which is used for all files until one of them breaks it."""
        self._make = make
        self._pipeline = make()
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        warnings.filterwarnings("ignore", category=UserWarning)

    def load(self, path: Path) -> Outcome:
        """Returns what `load_lora_weights` makes of a file."""
        try:
            self._pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="x")
        except Exception as error:  # noqa: BLE001 - any error of the program counts
            self._pipeline = self._make()
            return refused(error)
        changes = dict(self._changes())
        try:
            self._pipeline.unload_lora_weights()
        except Exception:  # noqa: BLE001 - any error of the program counts
            self._pipeline = self._make()
        return Outcome(changes, 0)

    def _changes(self) -> Any:
        for part in _PARTS:
            for name, module in getattr(self._pipeline, part, torch.nn.Identity()).named_modules():
                # A layer on the meta device was made for the name, but got no numbers.
                pair = [factor["x"] for factor in (module.lora_A, module.lora_B)] if _has_layer(module) else []
                if pair and not any(factor.weight.is_meta for factor in pair):
                    change: Any = module.get_delta_weight("x")
                    yield Place(ModuleKey(part, name), "weight"), change.detach().float()


def _has_layer(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer) and "x" in module.lora_A


def full_size(name: str) -> Any:
    """Returns the pipeline of a published base with its shapes, and with four layers in each text encoder.

    Args:
        name: sd1 or sdxl, whose UNet gets two transformer blocks where the published one has ten.
    """
    import diffusers
    import transformers

    architecture = DIFFUSION[name]
    unet = replace(architecture.unet, depths=tuple(min(depth, 2) for depth in architecture.unet.depths))
    config = unet.config(architecture.sample_size(architecture.usual_prediction))
    parts: dict[str, Any] = {}
    with torch.device("meta"):
        parts["unet"] = diffusers.UNet2DConditionModel.from_config(config)
        for encoder in architecture.text_encoders:
            sizes = transformers.CLIPTextConfig(**encoder.config() | {"num_hidden_layers": 4})
            parts[encoder.part] = getattr(transformers, encoder.model_class)(sizes)
    for network in parts.values():
        without_memory(network)
    unused = dict.fromkeys(
        ["vae", *architecture.unused_components, *(encoder.tokenizer for encoder in architecture.text_encoders)]
    )
    quiet = {"requires_safety_checker": False} if "safety_checker" in unused else {"add_watermarker": False}
    pipeline: Any = getattr(diffusers, architecture.pipeline)
    return pipeline(**parts, **unused, **quiet, scheduler=diffusers.DDIMScheduler())
