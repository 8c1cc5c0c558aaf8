"""What diffusers does with a file: its pipelines with networks whose weights take no memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
                pair = [own["x"] for own in (module.lora_A, module.lora_B)] if _has_layer(module) else []
                if pair and not any(own.weight.is_meta for own in pair):
                    change: Any = module.get_delta_weight("x")
                    yield Place(ModuleKey(part, name), "weight"), change.detach().float()


def _has_layer(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer) and "x" in module.lora_A


def full_size(family: str) -> Any:
    """Returns a pipeline of Stable Diffusion 1 or XL with the published shapes and four layers in each text encoder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(width: int, inner: int) -> Any:
        sizes = {"hidden_size": width, "intermediate_size": inner, "projection_dim": width}
        return CLIPTextConfig(**sizes, num_hidden_layers=4, num_attention_heads=width // 64)

    with torch.device("meta"):
        small = CLIPTextModel(config(768, 3072))
        if family == "sd1":
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
            large = None
        else:
            large = CLIPTextModelWithProjection(config(1280, 5120))
            unet = UNet2DConditionModel(
                sample_size=128,
                cross_attention_dim=2048,
                attention_head_dim=[5, 10, 20],
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=[1, 2, 2],
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            )
    for network in (unet, small, large):
        if network is not None:
            without_memory(network)
    scheduler = DDIMScheduler()
    common = {"vae": None, "tokenizer": None, "unet": unet, "scheduler": scheduler, "text_encoder": small}
    if large is None:
        return StableDiffusionPipeline(
            **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return StableDiffusionXLPipeline(**common, text_encoder_2=large, tokenizer_2=None, add_watermarker=False)
