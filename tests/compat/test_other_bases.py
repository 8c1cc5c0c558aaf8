"""Files for other bases are named as such, and those for Stable Diffusion as what they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.compat.identify import guess_family, refuse_other
from lora_diffusion.compat.inspect import describe_file
from lora_diffusion.core import registry
from lora_diffusion.core.errors import LoraDiffusionError, UnsupportedError
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.tensorfile.safetensors_file import read_header

_PAIR = (".lora_down.weight", ".lora_up.weight")
_PEFT = (".lora_A.weight", ".lora_B.weight")
_SPELLINGS = (
    ("transformer.", False, _PEFT),
    ("lora_unet_", True, _PAIR),
    ("lora_transformer_", True, _PAIR),
    ("diffusion_model.", False, _PEFT),
    ("lycoris_", True, _PAIR),
    ("base_model.model.", False, _PEFT),
    ("", False, (".lora_A.default.weight", ".lora_B.default.weight")),
)
"""Prefix, whether dots are "_", and factors: diffusers, kohya, OneTrainer, ComfyUI, SimpleTuner, PEFT, a live model."""
_SMALL = {"num_layers": 1}
_TWO = {"num_layers": 1, "num_single_layers": 1}
_CLASSES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "FluxTransformer2DModel": (_TWO, "FLUX.1"),
    "Flux2Transformer2DModel": (_TWO, "FLUX.2"),
    "ChromaTransformer2DModel": (_TWO, "Chroma"),
    "SD3Transformer2DModel": ({"num_layers": 2, "num_attention_heads": 24, "attention_head_dim": 64}, "Diffusion 3"),
    "QwenImageTransformer2DModel": (_SMALL, "Qwen-Image"),
    "WanTransformer3DModel": (_SMALL, "Wan"),
    "ZImageTransformer2DModel": ({"n_layers": 1, "n_refiner_layers": 1}, "Z-Image"),
    "HunyuanVideoTransformer3DModel": ({**_TWO, "num_refiner_layers": 1}, "Hunyuan Video"),
    "Lumina2Transformer2DModel": ({**_SMALL, "num_refiner_layers": 1}, "Lumina 2"),
    "PixArtTransformer2DModel": (_SMALL, "PixArt"),
    "AuraFlowTransformer2DModel": ({"num_mmdit_layers": 1, "num_single_dit_layers": 1}, "AuraFlow"),
    "SanaTransformer2DModel": (_SMALL, "Sana"),
    "LTXVideoTransformer3DModel": (_SMALL, "LTX-Video"),
    "CosmosTransformer3DModel": (_SMALL, "Cosmos 1"),
    "MochiTransformer3DModel": ({"num_layers": 2}, "Mochi"),
    "CogVideoXTransformer3DModel": (_SMALL, "CogVideoX"),
    "MotionAdapter": ({}, "AnimateDiff"),
}
"""Class of diffusers -> its arguments, and what the base is called."""
_BY_AUTHORS: Mapping[str, tuple[Mapping[str, tuple[int, int]], str]] = {
    "flux": ({"double_blocks.0.img_attn.qkv": (9216, 3072), "single_blocks.1.linear1": (21504, 3072)}, "FLUX.1"),
    "flux2 klein": ({"double_blocks.0.img_attn.qkv": (9216, 3072), "single_blocks.1.linear1": (27648, 3072)}, "FLUX.2"),
    "flux2": ({"double_blocks.0.img_attn.proj": (6144, 6144)}, "FLUX.2"),
    "chroma": (
        {"distilled_guidance_layer.layers.1.in_layer": (5120, 5120), "double_blocks.0.img_attn.qkv": (9216, 3072)},
        "Chroma",
    ),
    "sd3": ({"joint_blocks.0.x_block.attn.qkv": (4608, 1536)}, "Stable Diffusion 3"),
    "wan": ({"blocks.0.self_attn.q": (1536, 1536), "blocks.1.ffn.0": (8960, 1536)}, "Wan"),
    "zimage": ({"layers.1.attention.qkv": (11520, 3840)}, "Z-Image"),
    "lumina": ({"layers.1.attention.qkv": (3840, 2304)}, "Lumina 2"),
    "hunyuan dit": ({"blocks.0.attn1.Wqkv": (4224, 1408)}, "Hunyuan-DiT"),
    "hunyuan video": (
        {"double_blocks.0.img_mlp.fc1": (12288, 3072), "single_blocks.1.linear1": (21504, 3072)},
        "Hunyuan Video",
    ),
    "hidream": ({"double_stream_blocks.0.block.attn1.to_q_t": (2560, 2560)}, "HiDream"),
    "pixart": ({"blocks.1.cross_attn.q_linear": (1152, 1152), "blocks.1.attn.qkv": (3456, 1152)}, "PixArt"),
    "auraflow": ({"double_layers.1.attn.w1q": (3072, 3072), "single_layers.0.mlp.c_fc1": (8192, 3072)}, "AuraFlow"),
    "cosmos": ({"blocks.0.cross_attn.k_proj": (2048, 1024), "blocks.1.mlp.layer1": (8192, 2048)}, "Cosmos-Predict2"),
    "anima": ({"blocks.0.self_attn.q_proj": (2048, 2048), "llm_adapter.blocks.0.mlp.0": (4096, 1024)}, "Anima"),
    "cascade": ({"down_blocks.1.3.attention.attn.to_q": (2048, 2048)}, "Stable Cascade"),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.q": (4096, 4096)}, "T5"),
    "llm": (
        {"model.layers.1.self_attn.q_proj": (4096, 4096), "model.layers.1.mlp.gate_proj": (11008, 4096)},
        "language model",
    ),
}
"""Names of the authors' own code, which ComfyUI and kohya's trainers use."""


def _file(path: Path, modules: Mapping[str, tuple[int, ...]], spelling: tuple[str, bool, tuple[str, str]]) -> Path:
    prefix, is_flat, (down, up) = spelling
    tensors = {}
    for name, shape in modules.items():
        full = prefix + (name.replace(".", "_") if is_flat else name)
        tensors |= {full + down: torch.ones(1, shape[1]), full + up: torch.ones(shape[0], 1)}
    save_file(tensors, path)
    return path


def _of_class(name: str, arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = getattr(diffusers, name)(**arguments)
    return {
        path: tuple(module.weight.shape)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"block|layers|refiner", path)
    }


def _assert_named(path: Path, title: str) -> None:
    for read in (guess_family, refuse_other):
        with pytest.raises(UnsupportedError, match=rf"was made for .*{title}.*, a kind of base that is not known here"):
            read(parse_file(path))
    if any(name.startswith("base_model.model.") for name in read_header(path).tensors):
        return
    report = describe_file(parse_file(path))
    assert title in str(report.family)
    assert any(title in problem for problem in report.problems)


@pytest.mark.parametrize("name", _CLASSES)
def test_other_networks_of_diffusers_are_named(name: str, tmp_path: Path) -> None:
    arguments, title = _CLASSES[name]
    modules = _of_class(name, arguments)
    attention = {path: shape for path, shape in modules.items() if re.search(r"to_q$", path)}
    for spelling in _SPELLINGS:
        _assert_named(_file(tmp_path / "a.safetensors", modules, spelling), title)
        _assert_named(_file(tmp_path / "a.safetensors", attention or modules, spelling), title)


@pytest.mark.parametrize("name", _BY_AUTHORS)
def test_other_networks_of_their_authors_are_named(name: str, tmp_path: Path) -> None:
    modules, title = _BY_AUTHORS[name]
    for spelling in _SPELLINGS:
        _assert_named(_file(tmp_path / "a.safetensors", modules, spelling), title)


@pytest.mark.parametrize(
    ("architecture", "title"), [("chroma", "Chroma"), ("flux-1-dev/lora", "FLUX.1"), ("flux2-klein", "FLUX.2 klein")]
)
def test_metadata_choose_between_networks_of_the_same_blocks(architecture: str, title: str, tmp_path: Path) -> None:
    name, path = "lora_unet_double_blocks_0_img_attn_qkv", tmp_path / "a.safetensors"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 3072), f"{name}.lora_up.weight": torch.ones(9216, 1)}
    save_file(tensors, path, {"modelspec.architecture": architecture})
    with pytest.raises(UnsupportedError, match=f"made for {title},"):
        guess_family(parse_file(path))


def test_other_kinds_of_adapter_tell_their_network(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    loha = {"w1_a": (1536, 2), "w1_b": (2, 1536), "w2_a": (1536, 2), "w2_b": (2, 1536)}
    save_file({f"lycoris_transformer_blocks_0_attn_to_q.hada_{role}": torch.ones(s) for role, s in loha.items()}, path)
    _assert_named(path, "Stable Diffusion 3")
    save_file(
        {
            "lycoris_layers_0_attention_to_q.lokr_w1": torch.ones(4, 4),
            "lycoris_layers_0_attention_to_q.lokr_w2": torch.ones(960, 960),
        },
        path,
    )
    _assert_named(path, "Z-Image")


def _of_published(family: str, pattern: str) -> dict[str, tuple[int, ...]]:
    names: Any = registry.find("families", family).key_map("kohya", None)
    return {
        names.name(key): shape
        for key, shape in published_shapes(DIFFUSION[family]).items()
        if len(shape) > 1 and re.search(pattern, f"{key.part}.{key.path}") and "projection" not in key.path
    }


_TELLING: Iterable[tuple[str, str]] = [
    *((family, r"attn2\.to_k$") for family in ("sd1", "sd2", "sdxl")),
    *((family, r"text_encoder\.") for family in ("sd1", "sd2", "sdxl")),
    ("sdxl", r"text_encoder_2\..*layers\.3\.mlp\.fc1"),
    ("sd1", r"proj_in$"),
    ("sd2", r"mlp\.fc2$"),
    ("sdxl", r"mid_block\..*transformer_blocks\.9\.attn1\.to_q"),
    ("sd1", r"up_blocks\.3\.attentions\.2\..*attn1\.to_q"),
    ("sdxl", r"up_blocks\.0\.attentions\.1\..*\.0\.attn1\.to_q"),
]


@pytest.mark.parametrize("rank", [1, 7, 768, 2048])
@pytest.mark.parametrize(("family", "pattern"), _TELLING)
def test_published_bases_stay_what_they_are(family: str, pattern: str, rank: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    modules = dict(list(_of_published(family, pattern).items())[:2])
    tensors = {}
    for name, shape in modules.items():
        tensors[f"{name}.lora_down.weight"] = torch.ones(1, 1, *shape[2:]).expand(rank, shape[1], *shape[2:]).clone().half()  # fmt: skip # noqa: E501
        tensors[f"{name}.lora_up.weight"] = torch.ones(shape[0], rank, *(1,) * len(shape[2:])).half()
    save_file(tensors, path)
    assert guess_family(parse_file(path)) == family
    assert describe_file(parse_file(path)).family == family


def test_a_file_that_fits_nothing_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for name in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_1_attn1_to_q",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_unet_something_else",
    ):
        save_file({f"{name}.lora_down.weight": torch.ones(1, 999), f"{name}.lora_up.weight": torch.ones(999, 1)}, path)
        assert describe_file(parse_file(path)).family is None
        assert " for an unknown base" in describe_file(parse_file(path)).text()
        with pytest.raises(LoraDiffusionError, match="does not tell which base"):
            guess_family(parse_file(path))
