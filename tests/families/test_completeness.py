"""Which tensors weight files lack, whatever version of the libraries wrote them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from lora_diffusion.families.model_files import missing
from lora_diffusion.families.sd1 import FAMILY, SD1Options
from lora_diffusion.families.stable_diffusion import loading
from lora_diffusion.families.stable_diffusion.components import missing_of_vae
from tests.tiny import tiny_pipeline

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_old_names_are_read_as_the_libraries_read_them(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    encoder = {f"text_model.{name}": tensor for name, tensor in pipeline.text_encoder.state_dict().items()}
    encoder["text_model.embeddings.position_ids"] = torch.arange(4)
    save_file(encoder, tmp_path / "encoder.safetensors")
    assert missing(pipeline.text_encoder.state_dict(), [tmp_path / "encoder.safetensors"]) == []
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    tensors = vae.state_dict()
    for new, old in OLD.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, tmp_path / "vae.safetensors")
    assert missing_of_vae(vae.config, [tmp_path / "vae.safetensors"]) == []


def test_shards_are_read_together(tmp_path: Path) -> None:
    encoder = tiny_pipeline().text_encoder
    names = sorted(encoder.state_dict())
    files = []
    for index, own in enumerate((names[::2], names[1::2][1:])):
        files.append(tmp_path / f"model-{index}.safetensors")
        save_file({name: encoder.state_dict()[name] for name in own}, files[-1])
    assert missing(encoder.state_dict(), files) == [names[1]]


def test_networks_to_look_at_are_built_once_and_those_to_change_each_time(tiny_base: Path) -> None:
    source = loading.find(FAMILY.architecture, SD1Options(path=str(tiny_base)))
    again = loading.find(FAMILY.architecture, SD1Options(path=str(tiny_base)))
    assert source.shared_meta_modules()["unet"] is again.shared_meta_modules()["unet"]
    fresh = source.meta_modules()["unet"]
    assert fresh is not source.shared_meta_modules()["unet"] and fresh is not source.meta_modules()["unet"]
    assert fresh.state_dict().keys() == source.shared_meta_modules()["unet"].state_dict().keys()
