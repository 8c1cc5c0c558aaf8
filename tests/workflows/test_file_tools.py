"""What all commands on adapter files have in common: what they refuse, in one line, and what they never destroy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.workflows._adapter_files import read_alone
from tests.families.ldm import save_single_file, sd1_shaped_pipeline
from tests.workflows.conftest import Commands

XL = ("lora_unet_input_blocks_7_1_transformer_blocks_9_attn2_to_k", 2048, 1280)
SD1 = ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, 320)


def write_adapter(path: Path, module: tuple[str, int, int] = XL) -> Path:
    stem, inner, outer = module
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, inner) / 50, f"{stem}.lora_up.weight": torch.ones(outer, 2)}
    save_file({**tensors, f"{stem}.alpha": torch.tensor(0.5)}, path)
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "xl.safetensors")


WRITING = {
    "convert": ("convert", "IN", "OUT", "--to", "diffusers"),
    "resize": ("resize", "IN", "OUT", "--rank", "1"),
    "compose": ("compose", "IN:0.5", "--output", "OUT"),
    "metadata strip": ("metadata", "strip", "IN", "--output", "OUT"),
    "metadata edit": ("metadata", "edit", "IN", "--set", "a=b", "--output", "OUT"),
}
READING = {
    "inspect": ("inspect", "IN"),
    "verify": ("verify", "IN"),
    "metadata show": ("metadata", "show", "IN"),
    "merge": ("merge", "--model", "builtin:emoji", "--adapter", "IN", "--output", "OUT"),
}


def filled(arguments: tuple[str, ...], source: Path, target: Path) -> list[str]:
    return [argument.replace("IN", str(source)).replace("OUT", str(target)) for argument in arguments]


@pytest.mark.parametrize("name", WRITING)
def test_only_an_adapter_is_replaced_and_only_if_asked(command: Commands, adapter: Path, name: str) -> None:
    folder = adapter.parent
    (folder / "mine.txt").write_text("precious")
    (folder / "mine.safetensors").write_text("precious")
    save_file({"model.diffusion_model.out.2.weight": torch.ones(2)}, folder / "base.safetensors")
    for target in ("mine.txt", "mine.safetensors", "base.safetensors"):
        content = (folder / target).read_bytes()
        for more, reason in (([], "exists; give another name or --overwrite"), (["--overwrite"], "is no adapter")):
            outcome = command(*filled(WRITING[name], adapter, folder / target), *more)
            assert (outcome.code, reason in outcome.message) == (2, True)
            assert outcome.err.count("\n") == 1
        assert (folder / target).read_bytes() == content
    other = write_adapter(folder / "other.safetensors", SD1)
    assert command(*filled(WRITING[name], adapter, other)).code == 2
    assert read_alone(parse_file(other))[0].architecture.name == "sd1"
    command.good(*filled(WRITING[name], adapter, other), "--overwrite")
    assert read_alone(parse_file(other))[0].architecture.name == "sdxl"


def test_a_folder_does_not_take_the_place_of_a_file(command: Commands, adapter: Path) -> None:
    outcome = command("convert", adapter, adapter, "--to", "peft", "--overwrite")
    assert (outcome.code, "is a file, and peft writes a folder" in outcome.message) == (2, True)
    command.good("convert", adapter, adapter.with_name("peft"), "--to", "peft")
    outcome = command("convert", adapter, adapter.with_name("peft"), "--to", "kohya", "--overwrite")
    assert (outcome.code, "is a folder, and kohya writes a file" in outcome.message) == (2, True)


@pytest.mark.parametrize("name", WRITING)
def test_an_adapter_may_become_itself(command: Commands, adapter: Path, name: str) -> None:
    command.good(*filled(WRITING[name], adapter, adapter), "--overwrite")
    (actual,) = read_alone(parse_file(adapter))[1].modules.values()
    assert actual.rank == (1 if name == "resize" else 2)
    assert float(actual.tensors["up"].abs().sum()) > 0
    assert [path.name for path in adapter.parent.iterdir()] == [adapter.name]


@pytest.mark.parametrize("name", WRITING)
def test_folder_of_the_output_is_made(command: Commands, adapter: Path, name: str) -> None:
    target = adapter.parent / "new" / "deep" / "a.safetensors"
    out = command.good(*filled(WRITING[name], adapter, target), "--json").out
    assert json.loads(out)["file"] == str(target)
    assert detect(parse_file(target)) in ("kohya", "diffusers")
    outcome = command(*filled(WRITING[name], adapter, adapter / "a.safetensors"))
    assert (outcome.code, "is a file" in outcome.message) == (2, True)


@pytest.mark.parametrize("name", [*READING, *WRITING])
def test_what_is_no_adapter_is_refused_in_a_line(command: Commands, adapter: Path, name: str) -> None:
    folder = adapter.parent
    (folder / "empty").mkdir()
    (folder / "cut.safetensors").write_bytes(adapter.read_bytes()[:-9])
    (folder / "text.safetensors").write_text("precious")
    (folder / "zero.safetensors").touch()
    target = folder / "out.safetensors"
    for source, reason in {
        "none.safetensors": "here is no",
        "empty": "empty is ",
        "cut.safetensors": "is damaged",
        "text.safetensors": "is not a safetensors file",
        "zero.safetensors": "is empty",
    }.items():
        arguments = {**READING, **WRITING}[name]
        outcome = command(*filled(arguments, folder / source, target), "--json")
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome.err
        assert str(folder / source) in outcome.err
        assert reason in outcome.err
        assert not target.exists()


@pytest.mark.parametrize("name", ["verify", "merge", "convert", "resize", "compose"])
def test_file_with_other_tensors_is_named_so(command: Commands, tmp_path: Path, name: str) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    arguments = {**READING, **WRITING}[name]
    outcome = command(*filled(arguments, tmp_path / "a.safetensors", tmp_path / "b"))
    assert outcome.code == 2
    assert "is not an adapter in a known" in outcome.message
    assert "model.diffusion_model.out.2.weight" in outcome.message


_OTHERS = {
    "ia3 of PEFT": (("unet.x.ia3_l",), "of the kind ia3"),
    "oft of kohya": (("oft_unet_x.oft_blocks",), "of the kind oft"),
    "flux": (
        tuple(f"transformer.double_blocks.0.x.lora_{side}.weight" for side in "AB"),
        "was made for FLUX.1",
    ),
    "nothing": ((), "holds no tensors"),
}


@pytest.mark.parametrize("name", ["convert", "resize", "compose"])
@pytest.mark.parametrize("case", _OTHERS)
def test_other_variants_are_named(command: Commands, tmp_path: Path, name: str, case: str) -> None:
    tensors, reason = _OTHERS[case]
    save_file({tensor: torch.ones(2, 2) for tensor in tensors}, tmp_path / "a.safetensors")
    outcome = command(*filled(WRITING[name], tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert (outcome.code, reason in outcome.message) == (2, True), outcome.message


def test_kind_of_a_folder_is_told_before_its_names(command: Commands, tmp_path: Path) -> None:
    save_file({"base_model.model.x.oft_R.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OFT", "r": 2, "lora_alpha": 2}')
    for words in (("inspect", tmp_path), ("convert", tmp_path, tmp_path / "b.safetensors", "--to", "kohya")):
        outcome = command(*words)
        assert (outcome.code, "adapter of the kind oft" in outcome.message) == (2, True)


def test_another_family_is_refused(command: Commands, adapter: Path, tmp_path: Path) -> None:
    for family, reason in (("sd9", "invalid choice: 'sd9'"), ("sd1", "has the sizes of sdxl, not of sd1")):
        outcome = command("convert", adapter, tmp_path / "out", "--to", "peft", "--family", family)
        assert (outcome.code, reason in outcome.message) == (2, True)
    outcome = command("verify", adapter, "--base", "sd1", "--json")
    assert (outcome.code, json.loads(outcome.out)["sound"]) == (1, False)
    outcome = command("compose", adapter, write_adapter(tmp_path / "sd1", SD1), "--output", tmp_path / "out")
    assert (outcome.code, "different bases" in outcome.message) == (2, True)
    outcome = command("merge", "--model", "builtin:emoji", "--adapter", adapter, "--output", tmp_path / "out")
    assert (outcome.code, "made for another architecture" in outcome.message) == (2, True)
    assert not (tmp_path / "out").exists()


def test_missing_base_is_told_once(command: Commands, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    for arguments in (
        ("merge", "--model", tmp_path / "tned", "--adapter", adapter, "--output", tmp_path / "out"),
        ("extract", tmp_path / "tned", "builtin:emoji", tmp_path / "out", "--rank", "2"),
        ("verify", adapter, "--base", tmp_path / "tned"),
    ):
        outcome = command(*arguments)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert 'there is no such folder or file (did you mean "tuned"?)' in outcome.message


def test_merge_replaces_a_base_only(command: Commands, tmp_path: Path) -> None:
    base = save_single_file(sd1_shaped_pipeline(), tmp_path / "base.safetensors")
    width, inner = load_file(base)["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    adapter = write_adapter(tmp_path / "a.safetensors", (stem, inner, width))
    (tmp_path / "text.safetensors").write_text("precious")
    options = ("merge", "--model", base, "--adapter", adapter, "--overwrite", "--output")
    for target in (adapter, tmp_path / "text.safetensors"):
        content = target.read_bytes()
        outcome = command(*options, target)
        assert (outcome.code, "is no base, and nothing else is replaced" in outcome.message) == (2, True)
        assert target.read_bytes() == content
    assert command(*options, base).code == 2
    merged = tmp_path / "merged.safetensors"
    for _ in range(2):
        command.good(*options, merged)
    assert merged.stat().st_size > adapter.stat().st_size
