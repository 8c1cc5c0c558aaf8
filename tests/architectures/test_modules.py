"""Names without a base: those of every published base, and the names that files have but that are never written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.families.stable_diffusion.module_names import key_map
from scripts.benchmarks.published_networks import shared_networks

TO_Q = ModuleKey("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
TEXT = ModuleKey("text_encoder", "encoder.layers.3.self_attn.q_proj")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("format_name", ["kohya", "diffusers", "peft", "ldm"])
def test_names_are_those_of_the_published_base(family: str, format_name: str) -> None:
    names_of_base, without_base = (
        key_map(format_name, shared_networks(family), DIFFUSION[family]),
        key_map(format_name, None, DIFFUSION[family]),
    )
    assert [name for key, name in names_of_base if without_base.key(name) != key] == []
    assert [name for key, name in names_of_base if without_base.name(key) != name] == []


FC1 = ModuleKey("text_encoder_2", "text_model.encoder.layers.3.mlp.fc1")
UP = "up_blocks.{}.upsamplers.0.conv"
OTHERS: list[tuple[str, str, str, ModuleKey]] = [
    ("sd1", "kohya", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", TO_Q),
    ("sd1", "kohya", f"lycoris_{TO_Q.path.replace('.', '_')}", TO_Q),
    ("sd1", "kohya", "lora_unet_output_blocks_2_1_conv", ModuleKey("unet", UP.format(0))),
    ("sd2", "kohya", "lora_unet_output_blocks_5_2_conv", ModuleKey("unet", UP.format(1))),
    ("sdxl", "kohya", f"lora_unet_{TO_Q.path.replace('.', '_')}", TO_Q),
    ("sdxl", "kohya", "lora_unet_up_blocks_0_upsamplers_0_conv", ModuleKey("unet", UP.format(0))),
    ("sd1", "kohya", "lora_te1_text_model_encoder_layers_3_self_attn_q_proj", TEXT),
    ("sd2", "kohya", "lora_te1_encoder_layers_3_self_attn_q_proj", TEXT),
    ("sdxl", "kohya", "lora_te_text_model_encoder_layers_3_self_attn_q_proj", TEXT),
    ("sdxl", "kohya", "lora_te1_encoder_layers_3_self_attn_q_proj", TEXT),
    ("sdxl", "kohya", "lora_te2_encoder_layers_3_mlp_fc1", FC1),
    ("sd1", "diffusers", f"text_encoder.{TEXT.path}", TEXT),
    ("sd1", "diffusers", "text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora", TEXT),
    ("sdxl", "diffusers", "text_encoder_2.encoder.layers.3.mlp.fc1", FC1),
    ("sd1", "diffusers", TO_Q.path, TO_Q),
    ("sd1", "diffusers", f"unet.{TO_Q.path.replace('to_q', 'processor.to_q_lora')}", TO_Q),
    ("sdxl", "diffusers", "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", TO_Q),
    ("sd1", "peft", f"text_encoder.text_model.{TEXT.path}", TEXT),
]


@pytest.mark.parametrize(("family", "format_name", "name", "key"), OTHERS, ids=lambda value: str(value)[:60])
def test_other_forms_are_read(family: str, format_name: str, name: str, key: ModuleKey) -> None:
    for names in (
        key_map(format_name, None, DIFFUSION[family]),
        key_map(format_name, shared_networks(family), DIFFUSION[family]),
    ):
        assert name in names
        assert names.key(name) == key
        assert names.name(key) != name


def test_an_alias_names_one_module_only() -> None:
    first, second = ModuleKey("unet", "a"), ModuleKey("unet", "b")
    with pytest.raises(ValueError, match="would name both"):
        KeyMap([(first, "a"), (second, "b")], [(second, "a")])


def test_names_without_a_base_need_no_torch() -> None:
    work = "from lora_diffusion.families.sd1 import FAMILY; FAMILY.key_map('kohya', None)"
    code = f"import sys; {work}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
