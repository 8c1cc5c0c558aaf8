"""Names of modules in files, against the conversion of diffusers itself at full size on the meta device."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint
from torch import nn

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.families.stable_diffusion.module_names import key_map
from scripts.benchmarks.published_networks import shared_networks

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def parts(family: str) -> dict[str, nn.Module]:
    return shared_networks(family)


def weights(parts: dict[str, nn.Module], family: str) -> dict[str, torch.Tensor]:
    """Returns a checkpoint of one number for each layer, by LDM name; the parts of a fused tensor are joined."""
    found: dict[str, torch.Tensor] = {}
    thirds: dict[str, dict[str, float]] = {}
    for index, (_, name) in enumerate(key_map("ldm", parts, DIFFUSION[family])):
        whole, _, mark = name.partition("#")
        if mark in ("q", "k", "v"):
            thirds.setdefault(whole, {})[mark] = float(index)
        else:
            value = torch.full((1, 1), float(index))
            found |= {whole: value} if mark else {f"{name}.weight": value, f"{name}.bias": value}
    return found | {name: torch.tensor([[rows[mark]] for mark in "qkv"]) for name, rows in thirds.items()}


def test_diffusers_converts_each_unet_name_to_its_module(family: str, parts: dict[str, nn.Module]) -> None:
    unet = parts["unet"]
    assert isinstance(unet, UNet2DConditionModel)
    converted = convert_ldm_unet_checkpoint(weights(parts, family), unet.config)
    own = [
        (key, index) for index, (key, _) in enumerate(key_map("ldm", parts, DIFFUSION[family])) if key.part == "unet"
    ]
    assert 2 * len(own) == len(converted) > 500
    for key, index in own:
        assert converted[f"{key.path}.weight"].item() == index


@pytest.mark.parametrize(
    ("family", "part", "prefix"),
    [("sd2", "text_encoder", "cond_stage_model.model."), ("sdxl", "text_encoder_2", "conditioner.embedders.1.model.")],
)
def test_diffusers_converts_each_open_clip_name_to_its_module(
    family: str, part: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = shared_networks(family)
    monkeypatch.setattr(parts[part].config, "hidden_size", 1)  # where the converter cuts the fused tensors
    converted = convert_open_clip_checkpoint(parts[part], weights(parts, family), prefix=prefix)
    own = [(key, index) for index, (key, _) in enumerate(key_map("ldm", parts, DIFFUSION[family])) if key.part == part]
    assert len(own) == sum(name.endswith(".weight") for name in converted) > 130
    bare = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    for key, index in own:
        assert bare[f"{key.path.removeprefix('text_model.')}.weight"].item() == index


@pytest.mark.parametrize("format_name", ["kohya", "diffusers", "peft", "ldm"])
def test_every_layer_has_a_name_of_its_own(family: str, parts: dict[str, nn.Module], format_name: str) -> None:
    names = key_map(format_name, parts, DIFFUSION[family])
    kinds = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm | nn.Embedding
    layers = sum(isinstance(module, kinds) for part in parts.values() for module in part.modules())
    assert len(names) == len({name for _, name in names}) == layers
    assert all(names.key(names.name(key)) == key for key, _ in names)


@pytest.mark.parametrize(
    ("family", "counts"),
    # How many modules networks/lora.py of sd-scripts 48d368fa trains without conv layers.
    [
        ("sd1", {"lora_unet_": 192, "lora_te_": 72}),
        ("sd2", {"lora_unet_": 192, "lora_te_": 138}),
        ("sdxl", {"lora_unet_": 722, "lora_te1_": 72, "lora_te2_": 192}),
    ],
)
def test_kohya_knows_as_many_modules(family: str, counts: dict[str, int]) -> None:
    trained = re.compile(
        r".*(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2)|proj_(in|out)|attn_[qkv]_proj|out_proj|fc[12])"
    )
    keys = key_map("kohya", shared_networks(family), DIFFUSION[family])
    names = [name for _, name in keys if trained.fullmatch(name)]
    for prefix, count in counts.items():
        assert sum(name.startswith(prefix) for name in names) == count
    assert len(names) == sum(counts.values())


def test_known_names() -> None:
    names = {name for _, name in key_map("kohya", shared_networks("sdxl"), DIFFUSION["sdxl"])}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in names
    assert "lora_unet_output_blocks_2_2_conv" in names
    assert "lora_te1_text_model_encoder_layers_11_mlp_fc2" in names
    assert "lora_te2_text_model_encoder_layers_31_self_attn_q_proj" in names
