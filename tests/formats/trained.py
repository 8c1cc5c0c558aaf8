"""Adapters of every kind, trained for two steps on tiny networks of the real classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lora_diffusion.adapters import variants
from lora_diffusion.adapters.inject import inject
from lora_diffusion.adapters.plan import plan
from lora_diffusion.adapters.state import read_state
from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.config.schema import AdapterConfig
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.families.stable_diffusion.module_names import key_map
from tests.tiny import tiny_pipeline, tiny_sd2_pipeline, tiny_sdxl_pipeline


def _sdxl() -> Any:
    """Returns the tiny base with the blocks of the published one, which names in files depend on."""
    pipeline = tiny_sdxl_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipeline.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 1],
            attention_head_dim=[2, 2, 4],
            norm_num_groups=8,
            cross_attention_dim=32 + 48,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 40,
        ).eval()
    return pipeline


PIPELINES: Mapping[str, Callable[[], Any]] = {
    "sd1": tiny_pipeline,
    "sd2": tiny_sd2_pipeline,
    "sdxl": _sdxl,
}
FAMILIES = tuple(PIPELINES)


def parts_of(pipeline: Any) -> dict[str, nn.Module]:
    """Returns the networks of a pipeline that can hold adapters, frozen."""
    names = ("unet", "text_encoder", "text_encoder_2")
    parts = {name: own for name in names if (own := getattr(pipeline, name, None)) is not None}
    for network in parts.values():
        network.requires_grad_(False)
    return parts


def bare(parts: dict[str, nn.Module]) -> Loaded:
    """Returns networks as a base that knows nothing else."""
    return Loaded(parts, {}, None, torch.device("cpu"), info=SimpleNamespace())  # type: ignore[arg-type]


def names_of(format_name: str, family: str) -> KeyMap:
    """Returns the names of the modules of the tiny networks."""
    return key_map(format_name, _parts(family), DIFFUSION[family])


@cache
def _parts(family: str) -> dict[str, nn.Module]:
    return parts_of(PIPELINES[family]())


def answers(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Returns what each network makes of fixed inputs, with gradient."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 200, (2, 7), generator=generator)
    found = {name: own(ids).last_hidden_state for name, own in parts.items() if name != "unet"}
    unet: Any = parts["unet"]
    width, more = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim
    text = torch.randn(2, 5, width, generator=generator)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    added = None
    if more:
        sizes = torch.ones(2, 6)
        added = {"time_ids": sizes, "text_embeds": torch.randn(2, more - 6 * 8, generator=generator)}
    found["unet"] = unet(latents, torch.tensor([3, 600]), text, added_cond_kwargs=added).sample
    return found


MIXED: Mapping[str, tuple[str, ...]] = {
    "module_ranks": ("unet/attn=5", "re:.*to_k=2", "text_encoder/ff=4"),
    "module_alphas": ("unet/ff=1", "re:.*q_proj=6"),
}
"""Settings of `trained` that make modules differ in rank, in alpha, and in both."""


@cache
def trained(family: str, variant: str, **settings: Any) -> AdapterState:
    """Returns an adapter of all parts after two steps, with metadata."""
    loaded = bare(parts_of(PIPELINES[family]()))
    values = {
        "rank": 3,
        "alpha": 2.0,
        "parts": tuple(loaded.parts),
        "targets": ("attn", "ff", "unet/proj", "unet/conv"),
    }
    config = AdapterConfig(variant=variant, **{**values, **settings})
    planned = plan(loaded.parts, registry.find("families", family).parts, config)
    parameters = inject(loaded, planned, variants.find(variant), 0.0, seed=0)
    tensors = [parameter for own in parameters.values() for parameter in own.values()]
    optimizer = torch.optim.AdamW(tensors, lr=0.03)
    for _ in range(2):
        sum(answer.square().mean() for answer in answers(loaded.parts).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return AdapterState(read_state(loaded).modules, {"ss_output_name": "mine", "modelspec.title": "Mine"})
