"""write -> read gives the adapter back, in every format."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import AdapterFileError, NonFiniteError, UnsupportedError
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.tensorfile.arrays import in_float32
from tests.tiny_adapters import key_map, random_state, same, tiny_loaded

_FORMATS = ["kohya", "diffusers", "peft"]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return tiny_loaded()


def test_formats_are_found() -> None:
    assert set(_FORMATS) <= set(registry.available("formats"))


@pytest.mark.parametrize("name", _FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_write_read_is_identity(name: str, dtype: torch.dtype, loaded: Loaded, tmp_path: Path) -> None:
    format_, names = registry.find("formats", name), key_map(name, loaded)
    rounded = {
        key: ModuleAdapter("lora", {n: t.to(dtype).float() for n, t in adapter.tensors.items()}, 1.3)
        for key, adapter in random_state(loaded)
    }
    state = AdapterState(rounded, {"ss_output_name": "mine"})
    path = tmp_path / "adapter.safetensors"
    format_.write(state, names, path, dtype)
    again = in_float32(format_.read(parse_file(path), names))
    assert path.is_dir() == format_.is_folder
    assert detect(parse_file(path)) == name
    assert same(again, state)
    assert again.metadata["ss_output_name"] == "mine"
    write_verified(random_state(loaded), names, format_, path, dtype)


@pytest.mark.parametrize("start", _FORMATS)
@pytest.mark.parametrize("other", _FORMATS)
def test_conversion_there_and_back_is_identity(start: str, other: str, loaded: Loaded, tmp_path: Path) -> None:
    state = random_state(loaded, groups="attn")
    for number, name in enumerate((start, other, start)):
        format_ = registry.find("formats", name)
        format_.write(state, key_map(name, loaded), tmp_path / f"{number}", torch.float32)
        state = in_float32(format_.read(parse_file(tmp_path / f"{number}"), key_map(name, loaded)))
    assert same(state, random_state(loaded, groups="attn"))


def test_kohya_spelling(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    registry.find("formats", "kohya").write(random_state(loaded), key_map("kohya", loaded), path, torch.float16)
    tensors = load_file(path)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{name}.lora_down.weight"].shape == (4, 64)
    assert tensors[f"{name}.lora_up.weight"].dtype == torch.float16
    assert tensors[f"{name}.alpha"].shape == ()
    assert tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"].shape == (64, 4, 1, 1)
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors


def test_kohya_files_have_one_alpha_for_each_part_and_the_same_change(loaded: Loaded, tmp_path: Path) -> None:
    modules = dict(random_state(loaded).modules)
    key = next(iter(modules))
    modules[key] = replace(modules[key], alpha=5.0)
    format_, names = registry.find("formats", "kohya"), key_map("kohya", loaded)
    path = write_verified(AdapterState(modules), names, format_, tmp_path / "a.safetensors", torch.float16)
    again = in_float32(format_.read(parse_file(path), names))
    assert {adapter.alpha for _, adapter in again} == {2.0}
    assert torch.allclose(again.modules[key].tensors["up"], 2.5 * modules[key].tensors["up"], rtol=1e-3, atol=1e-6)


def test_missing_alpha_is_the_rank_and_is_told(
    loaded: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3)}
    save_file({**tensors, "lora_unet_conv_in.lora_up.weight": torch.ones(32, 2, 1, 1)}, path)
    logger = logging.getLogger("lora_diffusion")
    logger.propagate = True
    with caplog.at_level(logging.WARNING, logger="lora_diffusion"):
        state = in_float32(registry.find("formats", "kohya").read(parse_file(path), key_map("kohya", loaded)))
    assert state.modules[ModuleKey("unet", "conv_in")].alpha == 2.0
    assert "has no alpha; alpha = rank is assumed" in caplog.text


def test_peft_folder_of_one_part_is_told_by_its_names(loaded: Loaded, tmp_path: Path) -> None:
    format_, names = registry.find("formats", "peft"), key_map("peft", loaded)
    state = random_state(loaded, groups="attn")
    format_.write(state, names, tmp_path / "p", torch.float32)
    alone = in_float32(format_.read(parse_file(tmp_path / "p" / "text_encoder"), names))
    assert alone.parts() == ("text_encoder",)
    config = json.loads((tmp_path / "p" / "unet" / "adapter_config.json").read_text())
    (tmp_path / "p" / "unet" / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    with pytest.raises(UnsupportedError, match="lora with lora_bias"):
        in_float32(format_.read(parse_file(tmp_path / "p"), names))


@pytest.mark.parametrize("name", _FORMATS)
def test_overflow_is_refused_with_the_module(name: str, loaded: Loaded, tmp_path: Path) -> None:
    key, adapter = next(iter(random_state(loaded)))
    names = key_map(name, loaded)
    for value, text in ((1e5, "cannot hold"), (float("nan"), "NaN")):
        huge = {**adapter.tensors, "up": torch.full_like(adapter.tensors["up"], value)}
        state = AdapterState({key: replace(adapter, tensors=huge)})
        with pytest.raises(NonFiniteError, match=text) as caught:
            registry.find("formats", name).write(state, names, tmp_path / "x", torch.float16)
        assert names.name(key).removeprefix("unet.") in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_unknown_modules_are_listed(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    kohya = registry.find("formats", "kohya")
    kohya.write(random_state(loaded, groups="attn"), key_map("kohya", loaded), path, torch.float32)
    loaded_without = tiny_loaded()
    del loaded_without.parts["text_encoder"]
    with pytest.raises(AdapterFileError, match="8 of its modules do not exist") as caught:
        in_float32(kohya.read(parse_file(path), key_map("kohya", loaded_without)))
    assert "lora_te_text_model_encoder_layers_0_self_attn_k_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "error", "text"),
    [
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, AdapterFileError, "lacks w1_b and w2_a and w2_b"),
        ({"lora_unet_conv_in.dora_scale": torch.ones(2, 2)}, AdapterFileError, "has only magnitude"),
        ({"lora_unet_conv_in.oft_blocks": torch.ones(2, 2)}, AdapterFileError, "do not fit"),
        ({"lora_unet_conv_in.rescale": torch.ones(2, 1)}, AdapterFileError, "lacks blocks"),
        ({"lora_unet_conv_in.on_input": torch.ones(1)}, AdapterFileError, "lacks factor"),
        ({"lora_unet_conv_in.oft_R.weight": torch.ones(2, 1)}, UnsupportedError, "of the kind oft as PEFT"),
        (
            {
                "lora_unet_conv_in.lora_up.weight": torch.ones(2, 2),
                "lora_unet_x.bm.weight": torch.ones(2, 2),
                "a": torch.ones(1),
            },
            UnsupportedError,
            "of the kind glora with a Tucker core",
        ),
        (
            {"lora_unet_conv_in.lokr_w1": torch.ones(4, 2), "lora_unet_conv_in.lokr_w2": torch.ones(8)},
            AdapterFileError,
            "do not fit",
        ),
        (
            {"lora_unet_conv_in.diff": torch.ones(2, 2), "lora_unet_conv_in.dora_scale": torch.ones(1, 2)},
            UnsupportedError,
            "full with dora",
        ),
        ({"noise": torch.ones(2)}, AdapterFileError, "names that this format does not use"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(32, 2)}, AdapterFileError, "lacks down"),
        (
            {
                "lora_unet_conv_in.lora_up.weight": torch.ones(32, 2),
                "lora_unet_conv_in.lora_down.weight": torch.ones(3, 4),
            },
            AdapterFileError,
            "do not fit",
        ),
    ],
)
def test_wrong_tensors_are_refused(
    extra: dict[str, torch.Tensor], error: type[Exception], text: str, loaded: Loaded, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(extra, path)
    with pytest.raises(error, match=text):
        in_float32(registry.find("formats", "kohya").read(parse_file(path), key_map("kohya", loaded)))
