"""What `inspect` says of a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.adapters.merge import delta_weight
from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.compat.inspect import describe_file
from lora_diffusion.compat.matched_file import Base, match_file
from lora_diffusion.compat.verify import verify
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.families.stable_diffusion.module_names import key_map as published_names
from lora_diffusion.formats.parsed_file import parse_file
from tests.tiny_adapters import key_map, random_state, tiny_loaded


@pytest.mark.parametrize("name", ["kohya", "diffusers", "peft"])
def test_sound_file(name: str, tmp_path: Path) -> None:
    loaded = tiny_loaded()
    state = AdapterState(random_state(loaded).modules, {"ss_seed": "1"})
    path = tmp_path / "a.safetensors"
    registry.find("formats", name).write(state, key_map(name, loaded), path, torch.float32)
    report = describe_file(parse_file(path))
    assert (report.format, report.variant, report.problems) == (name, "lora", ())
    assert report.num_modules == {part: sum(key.part == part for key in state.modules) for part in state.parts()}
    assert report.ranks == {"4": len(state.modules)}
    assert report.dtypes["F32"] >= 2 * len(state.modules)
    assert report.metadata["ss_seed"] == "1"
    assert report.alphas == {"2": len(state.modules)}
    squares = [float(delta_weight(a).square().sum()) for k, a in state if k.path.startswith("mid_block")]
    assert report.block_norms["unet mid_block"] == pytest.approx(sum(squares) ** 0.5, rel=1e-4)
    assert {"unet down_blocks_0", "unet up_blocks_1", "text_encoder layers_0"} <= report.block_norms.keys()
    json.dumps(report.to_json())


def test_problems_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        {
            "lora_unet_a.lora_down.weight": torch.ones(2, 3),
            "lora_unet_a.lora_up.weight": torch.zeros(3, 2),
            "lora_unet_b.lora_up.weight": torch.ones(3, 2),
            "lora_unet_c.lora_down.weight": torch.full((2, 3), torch.nan),
            "unet.d.lora_A.weight": torch.ones(2, 3),
            "unet.d.lora_B.weight": torch.ones(3, 4),
            "unet.e.lora_A.weight": torch.ones(2, 0),
            "unet.e.lora_B.weight": torch.ones(3, 2, dtype=torch.int8),
            "unet.f.lora_A.weight": torch.full((2, 3), 10.0),
            "unet.f.lora_B.weight": torch.ones(3, 2),
            "strange": torch.ones(1),
        },
        path,
        {"title": "\x1b[31mred\nroses"},
    )
    report = describe_file(parse_file(path))
    text = "\n".join(report.problems)
    assert r"title: \x1b[31mred\nroses" in report.text()
    for part in (
        "diffusers and kohya are mixed",
        "1 tensor(s) with unknown names: strange",
        "1 module(s) with up but no down: lora_unet_b",
        "1 module(s) with down but no up: lora_unet_c",
        "1 tensor(s) with NaN, infinity or more than float32 can hold: lora_unet_c.lora_down.weight",
        "1 module(s) that change nothing, since a factor is zero: lora_unet_a",
        "2 module(s) whose tensors do not fit each other: unet.d, unet.e",
        "2 tensor(s) that are empty or hold whole numbers: unet.e.lora_A.weight, unet.e.lora_B.weight",
        "1 module(s) whose change is larger than any weight, so that images fall to pieces: unet.f",
    ):
        assert part in text


def test_missing_alpha_and_other_variants(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    loaded = tiny_loaded()
    registry.find("formats", "kohya").write(
        random_state(loaded, groups="attn"), key_map("kohya", loaded), path, torch.float32
    )
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.endswith("alpha")}, path)
    assert "40 module(s) without alpha" in describe_file(parse_file(path)).problems[0]
    save_file({"lora_unet_a.hada_w1_a": torch.ones(2, 2)}, path)
    report = describe_file(parse_file(path))
    assert (report.format, report.variant) == ("kohya", "loha")


@pytest.mark.parametrize(
    ("stem", "family", "block"),
    [
        ("model.decoder.layers.1.encoder_attn.q_proj", "whisper", "decoder layers_1"),
        ("model.encoder.layers.1.fc1", "whisper", "encoder layers_1"),
        ("model.language_model.layers.1.self_attn.q_proj", "llava", "language_model layers_1"),
        ("model.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj", "llava", "vision_tower layers_1"),
        ("model.multi_modal_projector.linear_1", "llava", "projector other"),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "sdxl", "unet up_blocks_1"),
        ("encoder.layers.1.mlp.fc1", "sd1", "text_encoder layers_1"),
        ("text_model.encoder.layers.1.self_attn.v_proj", "sdxl", "text_encoder_2 layers_1"),
    ],
)
def test_root_folder_of_peft_is_read_as_its_record_says(stem: str, family: str, block: str, tmp_path: Path) -> None:
    width = {"unet up_blocks_1": 2048, "text_encoder layers_1": 768}.get(block, 1280)
    generator = torch.Generator().manual_seed(0)
    names = [f"base_model.model.{stem.replace('1', number)}" for number in "12"]
    tensors = {f"{name}.lora_{role}.weight": torch.randn((2, width) if role == "A" else (width, 2), generator=generator) for name in names for role in "AB"}  # fmt: skip # noqa: E501
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "alpha_pattern": {names[1].removeprefix("base_model.model."): 5}}  # fmt: skip # noqa: E501
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    report = describe_file(parse_file(tmp_path))
    assert (report.family, report.alphas, report.problems[1:]) == (family, {"3": 1, "5": 1}, ())
    norms = [
        alpha
        / 2
        * torch.linalg.norm(tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double())
        for name, alpha in zip(names, (3, 5), strict=True)
    ]
    both = torch.stack(norms).norm()
    assert report.block_norms[block] == pytest.approx(float(both if len(report.block_norms) == 1 else norms[0]), 1e-9)
    assert report.num_modules == {block.split()[0]: 2}


@pytest.mark.parametrize(
    ("width", "metadata", "family"),
    [
        (768, {}, "sd1"),
        (2048, {"ss_base_model_version": "sd_v1"}, "sdxl"),
        (160, {"ss_base_model_version": "sd_v2_v"}, "sd2"),
        (160, {"modelspec.architecture": "whisper/lora"}, "whisper"),
        (160, {}, None),
    ],
)
def test_family_of_the_base_is_told_with_the_problems(
    width: int, metadata: dict[str, str], family: str | None, tmp_path: Path
) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    path = tmp_path / "a.safetensors"
    save_file({f"{name}.lora_down.weight": torch.ones(2, width)}, path, metadata)
    report = describe_file(parse_file(path))
    assert report.family == family
    lines = report.text().splitlines()
    assert lines[1] == f"kohya format, lora for {family or 'an unknown base'}"
    assert f"problems of this adapter for {family or 'an unknown base'}:" in lines


_STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
_UP = torch.full((1280, 2), 0.1)
_FACTORS = {"lora_down.weight": torch.full((2, 768), 0.1), "lora_up.weight": _UP}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"alpha": torch.ones(2)}, "1 module(s) whose alpha is not one number", "must be one number, not [2]"),
        ({"alpha": torch.ones(0)}, "1 tensor(s) that are empty", "are empty or hold whole numbers"),
        ({"lora_up.weight": _UP.double() * 1e300}, "1 tensor(s) with NaN, inf", "more than float32"),
        ({"lora_up.weight": _UP * torch.inf}, "1 tensor(s) with NaN, infinity", "NaN, infinity"),
        ({"alpha": torch.tensor(torch.nan)}, "1 tensor(s) with NaN, infinity", "NaN, infinity"),
        ({"lora_up.weight": torch.ones(1280, 2).int()}, "1 tensor(s) that are empty or", "hold whole numbers"),
        ({"lora_down.weight": torch.ones(0, 768), "lora_up.weight": _UP[:, :0]}, "2 tensor(s) that are", "are empty"),
        ({"dora_scale": torch.ones(7, 1)}, "1 module(s) whose DoRA magnitude is not", "has a DoRA magnitude"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_what_the_tools_refuse_is_an_error(
    changed: dict[str, torch.Tensor], error: str, told: str, spelling: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    stem = _STEM if spelling == "kohya" else "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file({f"{stem}.{end}": tensor for end, tensor in {**_FACTORS, "alpha": torch.tensor(2.0), **changed}.items()}, path)  # fmt: skip # noqa: E501
    report = describe_file(parse_file(path))
    assert report.errors[0].startswith(error)
    assert set(report.errors) <= set(report.problems)
    assert not any("change nothing" in problem for problem in report.problems)
    json.dumps(report.to_json(), allow_nan=False)
    with pytest.raises(AdapterFileError, match=re.escape(told)):
        registry.find("formats", spelling).read(parse_file(path), published_names(spelling, None, DIFFUSION["sd1"]))
    (result,) = verify(match_file(parse_file(path), _published(spelling)), ["a1111"])
    assert not result.is_sound


def _published(format_name: str) -> Base:
    architecture = DIFFUSION["sd1"]
    return Base(architecture, published_shapes(architecture), [published_names(format_name, None, architecture)])


def test_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({}, path)
    assert describe_file(parse_file(path)).errors == ("no tensors at all; get the file again",)
    with pytest.raises(AdapterFileError, match="holds no tensors"):
        match_file(parse_file(path), _published("kohya"))


def test_rank_other_than_that_of_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 768), f"{name}.lora_B.weight": torch.ones(1280, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 8}))
    assert "1 module(s) of another rank than the record" in describe_file(parse_file(tmp_path)).errors[0]
    registry.find("formats", "peft").read(parse_file(tmp_path), published_names("peft", None, DIFFUSION["sd1"]))
    assert "1 modules are of another rank than the record" in caplog.text


def test_loha_with_dora_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    factors = {"hada_w1_a": (1280, 2), "hada_w1_b": (2, 768), "hada_w2_a": (1280, 2), "hada_w2_b": (2, 768)}
    shapes = {**factors, "dora_scale": (1, 768), "alpha": ()}
    save_file({f"{_STEM}.{end}": torch.full(shape, 0.1) for end, shape in shapes.items()}, path)
    report = describe_file(parse_file(path))
    assert (len(report.problems), report.errors) == (1, ())
    assert "1 module(s) of loha or lokr with DoRA" in report.problems[0]
    (adapter,) = (
        registry.find("formats", "kohya")
        .read(parse_file(path), published_names("kohya", None, DIFFUSION["sd1"]))
        .modules.values()
    )
    assert adapter.variant == "loha+dora"


def test_other_kinds_are_told_without_false_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    shapes = {
        f"{_STEM}.diff_b": (1280,),
        f"{_STEM}.diff": (1280, 768),
        "lora_unet_mid_block_resnets_0_norm1.w_norm": (1280,),
        "lora_unet_mid_block_resnets_0_conv1.oft_blocks": (160, 8, 8),
        "lora_unet_mid_block_resnets_0_conv2.oft_blocks": (2, 160, 8, 8),
        "lora_unet_mid_block_resnets_1_conv1.weight": (1, 1280, 1, 1),
        "lora_unet_mid_block_resnets_1_conv1.on_input": (),
        "bundle_emb.me.clip_l": (2, 768),
    }
    save_file({name: torch.full(shape, 0.01) for name, shape in shapes.items()}, path)
    report = describe_file(parse_file(path))
    assert report.problems == ()
    assert set(report.variant.split(" and ")) == {"norm", "oft", "boft", "full", "ia3", "embedding"}
