"""Files of other programs are read right, in every spelling that is found in the wild."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.families.stable_diffusion.module_names import key_map
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.tensorfile.arrays import in_float32
from scripts.benchmarks.published_networks import shared_networks
from tests.formats.wild import Name, dotted, flat, old_processor, spelled
from tests.tiny_adapters import same

_KOHYA = (".lora_down.weight", ".lora_up.weight")
_PEFT = (".lora_A.weight", ".lora_B.weight")
_SDXL = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_SD1 = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_CHOSEN = re.compile(
    r"(.*\.)?(attn[12]\.to_(q|out\.0)|conv1|proj_in|(up|down)samplers\.0\.conv|self_attn\.(q|out)_proj)"
)


def _state(family: str, parts: tuple[str, ...] = ("unet", "text_encoder", "text_encoder_2")) -> AdapterState:
    """Returns an adapter of rank 1 and alpha 0.5 for some modules of every block of a published base."""
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for part, network in shared_networks(family).items():
        for path, module in network.named_modules():
            if part in parts and _CHOSEN.fullmatch(path):
                shape = module.weight.shape
                down = torch.rand((1, *shape[1:]), generator=generator)
                up = torch.rand((shape[0], 1, *(1,) * (len(shape) - 2)), generator=generator)
                modules[ModuleKey(part, path)] = ModuleAdapter("lora", {"down": down, "up": up}, 0.5)
    return AdapterState(modules)


def _read(tensors: dict[str, torch.Tensor], family: str, path: Path) -> AdapterState:
    save_file(tensors, path)
    format_ = registry.find("formats", detect(parse_file(path)))
    return in_float32(format_.read(parse_file(path), key_map(format_.name, None, DIFFUSION[family])))


SPELLINGS: list[tuple[str, str, Name, tuple[str, str]]] = [
    ("sd1", "kohya", flat(_SD1), _KOHYA),
    ("sd1", "kohya", flat(_SD1, "123"), _KOHYA),
    ("sd1", "kohya", flat({**_SD1, "text_encoder": "lora_te1_"}), _KOHYA),
    ("sd1", "kohya", flat(_SD1, text_model=""), _KOHYA),
    ("sd2", "kohya", flat(_SD1, "123"), _KOHYA),
    ("sdxl", "kohya", flat(_SDXL, "01"), _KOHYA),
    ("sdxl", "kohya", flat(_SDXL), _KOHYA),
    ("sdxl", "kohya", flat({**_SDXL, "text_encoder": "lora_te_"}, "01"), _KOHYA),
    ("sdxl", "kohya", flat(_SDXL, "01", text_model=""), _KOHYA),
    ("sdxl", "kohya", flat(_SDXL, "01"), _PEFT),
    ("sd1", "diffusers", dotted(), _PEFT),
    ("sd1", "diffusers", dotted(text_model=""), _PEFT),
    ("sd1", "diffusers", dotted(), (".lora.down.weight", ".lora.up.weight")),
    ("sd1", "diffusers", dotted(), (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
    ("sd1", "diffusers", dotted(unet=""), (".lora_A.default.weight", ".lora_B.default.weight")),
    ("sdxl", "diffusers", dotted(), _PEFT),
    ("sdxl", "diffusers", dotted(), _KOHYA),
]


@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize(("family", "format_name", "name", "ends"), SPELLINGS)
def test_spelling(
    family: str, format_name: str, name: Name, ends: tuple[str, str], with_alpha: bool, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    state = _state(family)
    path = tmp_path / "a.safetensors"
    logging.getLogger("lora_diffusion").propagate = True
    with caplog.at_level(logging.WARNING, logger="lora_diffusion"):
        found = _read(spelled(state, name, *ends, with_alpha=with_alpha), family, path)
    assert detect(parse_file(path)) == format_name
    alpha = 0.5 if with_alpha else 1.0
    assert same(found, AdapterState({key: replace(own, alpha=alpha) for key, own in state}))
    assert ("has no alpha" in caplog.text) == (format_name == "kohya" and not with_alpha)


def test_attention_processors_of_2023(tmp_path: Path) -> None:
    everything = _state("sd1")
    state = AdapterState({key: own for key, own in everything if re.search(r"\.to_|_proj$", key.path)})
    text = {key: own for key, own in state if key.part == "text_encoder"}
    tensors = spelled(
        AdapterState({key: own for key, own in state if key not in text}), old_processor, ".down.weight", ".up.weight",
        with_alpha=False,
    )  # fmt: skip
    layer = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
    tensors |= spelled(AdapterState(text), old_processor, *layer, with_alpha=False)
    found = _read(tensors, "sd1", tmp_path / "a.safetensors")
    assert same(found, AdapterState({key: replace(own, alpha=1.0) for key, own in state}))


def test_file_that_diffusers_mixes_from_two_of_its_spellings(tmp_path: Path) -> None:
    state = _state("sd1", ("unet",))
    attention = AdapterState({key: own for key, own in state if ".attn" in key.path})
    rest = AdapterState({key: own for key, own in state if ".attn" not in key.path})
    tensors = spelled(attention, dotted(), ".lora.down.weight", ".lora.up.weight") | spelled(rest, dotted(), *_PEFT)
    assert same(_read(tensors, "sd1", tmp_path / "a.safetensors"), state)


def test_alpha_missing_in_one_module_is_the_rank_and_diffusers_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = _state("sd1", ("text_encoder",))
    tensors = spelled(state, flat(_SD1), *_KOHYA)
    key = next(iter(state.modules))
    del tensors[flat(_SD1)(key) + ".alpha"]
    logging.getLogger("lora_diffusion").propagate = True
    with caplog.at_level(logging.WARNING, logger="lora_diffusion"):
        found = _read(tensors, "sd1", tmp_path / "a.safetensors")
    assert {own.alpha for other, own in found if other != key} == {0.5}
    assert found.modules[key].alpha == 1.0
    assert f"1 of {len(state.modules)} modules have no alpha" in caplog.text
    assert "diffusers takes the most common alpha" in caplog.text


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_alpha_of_any_dtype(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    name = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 1280, 3, 3),
        f"{name}.lora_up.weight": torch.ones(1280, 2, 1, 1),
    }
    found = _read({**tensors, f"{name}.alpha": torch.full(shape, 3, dtype=dtype)}, "sd1", tmp_path / "a.safetensors")
    assert [own.scale for _, own in found] == [1.5]


@pytest.mark.parametrize(
    ("shape", "variant"),
    [((1, 768), "dora"), ((320, 1), "dora_out"), ((320,), "dora_out")],
)
def test_axis_of_a_magnitude_is_told_by_its_shape(shape: tuple[int, ...], variant: str, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 768),
        f"{name}.lora_up.weight": torch.ones(320, 2),
        f"{name}.dora_scale": torch.ones(shape),
    }
    (found,) = _read(tensors, "sd1", tmp_path / "a.safetensors").modules.values()
    assert found.variant == variant
    assert found.tensors["magnitude"].shape == ((1, 768) if variant == "dora" else (320, 1))
    with pytest.raises(AdapterFileError, match="768 inputs and 320 outputs"):
        _read({**tensors, f"{name}.dora_scale": torch.ones(1, 7)}, "sd1", tmp_path / "a.safetensors")


def test_lycoris_kinds_in_one_file(tmp_path: Path) -> None:
    to_q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{to_q}.hada_w1_a": torch.ones(320, 2),
        f"{to_q}.hada_w1_b": torch.ones(2, 320),
        f"{to_q}.hada_w2_a": torch.ones(320, 2),
        f"{to_q}.hada_w2_b": torch.ones(2, 320),
        f"{to_q}.alpha": torch.tensor(1.0),
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.ones(2, 1280, 1, 1),
        "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": torch.ones(2, 2, 3, 3),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.ones(1280, 2, 1, 1),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w1": torch.ones(4, 4),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w2_a": torch.ones(768, 2),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w2_b": torch.ones(2, 192),
    }
    found = _read(tensors, "sd1", tmp_path / "a.safetensors")
    assert [(own.variant, own.rank, own.scale) for _, own in found] == [
        ("lokr", 2, 1.0),
        ("loha", 2, 0.5),
        ("lora", 2, 1.0),
    ]
    for name in ("diffusers", "peft"):
        with pytest.raises(UnsupportedError):
            registry.find("formats", name).write(
                found, key_map(name, None, DIFFUSION["sd1"]), tmp_path / "x", torch.float32
            )


@pytest.mark.parametrize(
    ("extra", "error", "text"),
    [
        (".dora_scale", AdapterFileError, "has a DoRA magnitude"),
        (".lora_down.weight", UnsupportedError, "several kinds"),
        (".diff", UnsupportedError, "several kinds"),
    ],
)
def test_kinds_that_exclude_each_other(extra: str, error: type[Exception], text: str, tmp_path: Path) -> None:
    name = "lora_unet_conv_in"
    tensors = {f"{name}.lokr_w1": torch.ones(4, 2), f"{name}.lokr_w2": torch.ones(80, 2, 3, 3)}
    with pytest.raises(error, match=text):
        _read({**tensors, f"{name}{extra}": torch.ones(1, 5)}, "sd1", tmp_path / "a.safetensors")


def test_a_module_in_two_spellings_is_refused(tmp_path: Path) -> None:
    state = _state("sd1", ("unet",))
    again = {name: tensor.clone() for name, tensor in spelled(state, flat(_SD1, "123"), *_KOHYA).items()}
    tensors = spelled(state, flat(_SD1), *_KOHYA) | again
    with pytest.raises(AdapterFileError, match=f"names {len(state.modules)} modules twice"):
        _read(tensors, "sd1", tmp_path / "a.safetensors")


def test_peft_record_of_rslora_and_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    blocks = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
    shapes = {f"{blocks}to_q": 4, f"{blocks}to_k": 9}
    tensors = {f"{name}.lora_A.weight": torch.ones(rank, 320) for name, rank in shapes.items()}
    save_file(
        tensors | {f"{n}.lora_B.weight": torch.ones(320, r) for n, r in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "rank_pattern": {"to_k": 9}, "alpha_pattern": {"to_k": 6}}
    for use_rslora, scales in ((True, [2.0, 1.0]), (False, [6 / 9, 0.5])):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": use_rslora}))
        state = in_float32(
            registry.find("formats", "peft").read(parse_file(tmp_path), key_map("peft", None, DIFFUSION["sd1"]))
        )
        assert [own.scale for _, own in state] == pytest.approx(scales)
