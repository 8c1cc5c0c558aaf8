"""Networks of torch alone against those of diffusers and transformers: same layers, same tensors in a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.core.files import builtin_path
from lora_diffusion.families.stable_diffusion import plain_networks
from lora_diffusion.training.fake_tensor_step import take_step
from lora_diffusion.training.memory import checkpoint_activations


def config(name: str) -> dict[str, Any]:
    return json.loads((builtin_path("emoji-sd") / name / "config.json").read_text("utf-8"))  # type: ignore[no-any-return]


UNET_CONFIGS = {**{name: own.unet_config() for name, own in DIFFUSION.items()}, "built-in": config("unet")}
ENCODER_CONFIGS: dict[str, tuple[str, Mapping[str, Any]]] = {
    f"{name} {encoder.part}": (encoder.model_class, encoder.config())
    for name, own in DIFFUSION.items()
    for encoder in own.text_encoders
} | {"built-in": ("CLIPTextModel", config("text_encoder"))}


def layers(network: nn.Module) -> list[tuple[str, str]]:
    kinds = (nn.Linear, nn.Conv2d)
    return [(path, str(own)) for path, own in network.named_modules() if isinstance(own, kinds)]


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def peak(network: nn.Module, called: Mapping[str, Any], *, recomputes: bool) -> int:
    network.requires_grad_(False).eval()
    for path, own in network.named_modules():
        if path.endswith(("to_q", "to_v", "q_proj", "v_proj")):
            own.get_parameter("weight").requires_grad_()
    set_up = checkpoint_activations if recomputes else None
    return take_step({"x": network}, {"x": called}, torch.device("cpu"), torch.float32, nullcontext, set_up)


@pytest.mark.parametrize("name", UNET_CONFIGS)
def test_unet(name: str) -> None:
    own = UNET_CONFIGS[name]
    with torch.device("meta"):
        theirs, ours = UNet2DConditionModel.from_config(own), plain_networks.unet(own)
    assert ours is not None
    assert layers(ours) == layers(theirs)
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("recomputes", [False, True])
def test_step_of_the_unet(recomputes: bool) -> None:
    own = UNET_CONFIGS["built-in"]
    with torch.device("meta"):
        called = {"sample": torch.empty(2, 4, 16, 16), "timestep": torch.empty(2)}
        called["encoder_hidden_states"] = torch.empty(2, 24, 160)
        theirs, ours = UNet2DConditionModel.from_config(own), plain_networks.unet(own)
    assert ours is not None
    found = [peak(network, called, recomputes=recomputes) for network in (theirs, ours)]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("name", ENCODER_CONFIGS)
def test_text_encoder(name: str) -> None:
    kind, own = ENCODER_CONFIGS[name]
    with torch.device("meta"):
        theirs = getattr(transformers, kind)(transformers.CLIPTextConfig.from_dict(dict(own)))
        ours = plain_networks.text_encoder(own, kind)
        called = {"input_ids": torch.zeros(2, 24, dtype=torch.int64)}
    assert ours is not None
    assert layers(ours) == layers(theirs)
    assert shapes(ours) == shapes(theirs)
    if name == "built-in":
        # Recomputing, transformers keeps a few more of the smallest tensors.
        for recomputes in (False, True):
            found = [peak(network, called, recomputes=recomputes) for network in (theirs, ours)]
            assert found[1] == pytest.approx(found[0], rel=0.03)


@pytest.mark.parametrize("depth", [1, 2])
def test_vae(depth: int) -> None:
    own = {**config("vae"), "layers_per_block": depth, "mid_block_add_attention": depth == 2}
    with torch.device("meta"):
        theirs, ours = AutoencoderKL.from_config(own), plain_networks.vae(own)
    assert ours is not None
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize(
    "change", [{"dual_cross_attention": True}, {"new_setting": 1}, {"class_embed_type": "timestep"}]
)
def test_what_is_not_plain_is_left_to_the_libraries(change: dict[str, Any]) -> None:
    assert plain_networks.unet({**config("unet"), **change}) is None
    assert plain_networks.text_encoder({**config("text_encoder"), "hidden_act": "relu"}, "CLIPTextModel") is None
    assert plain_networks.vae({**config("vae"), "new_setting": 1}) is None
