"""`lora-diffusion convert`: any spelling into any other, without a base model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.families.stable_diffusion.module_names import key_map
from lora_diffusion.formats.verified import write_exactly
from tests.workflows.conftest import Commands

FAMILIES = {"sd1": (320, 768, 768), "sd2": (320, 1024, 1024), "sdxl": (640, 2048, 768)}
"""Family -> width of the block, of its text, and of the first text encoder."""

BASES = {
    family: {"ss_base_model_version": version, "ss_v2": v2, "modelspec.architecture": f"stable-diffusion-{name}/lora"}
    for family, version, v2, name in (
        ("sd1", "sd_v1", "False", "v1"),
        ("sd2", "sd_v2_v", "True", "v2-768-v"),
        ("sdxl", "sdxl_base_v1-0", "False", "xl-v1-base"),
    )
}
"""Family -> the metadata by which A1111 and Forge list files."""


def published(family: str, variant: str = "lora", has_attention: bool = True) -> AdapterState:
    """Returns an adapter of a few modules in the sizes of a published base, also without attention in SDXL's second."""
    width, text, hidden = FAMILIES[family]
    block = (
        "down_blocks.1.attentions.0.transformer_blocks.0"
        if family == "sdxl"
        else "down_blocks.0.attentions.0.transformer_blocks.0"
    )
    sizes = {
        ModuleKey("unet", f"{block}.attn1.to_q"): (width, width),
        ModuleKey("unet", f"{block}.attn2.to_k"): (width, text),
        ModuleKey("text_encoder", "encoder.layers.0.self_attn.q_proj"): (hidden, hidden),
    }
    if family == "sdxl":
        sizes[ModuleKey("text_encoder_2", "text_model.encoder.layers.31.mlp.fc1")] = (5120, 1280)
        if has_attention:
            sizes[ModuleKey("text_encoder_2", "text_model.encoder.layers.31.self_attn.v_proj")] = (1280, 1280)
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for index, (key, (outputs, inputs)) in enumerate(sizes.items()):
        tensors = {
            "down": torch.randn(2, inputs, generator=generator),
            "up": torch.randn(outputs, 2, generator=generator),
        }
        if variant.startswith("dora"):
            tensors["magnitude"] = torch.rand((1, inputs) if variant == "dora" else (outputs, 1), generator=generator)
        half = {name: tensor.half().float() for name, tensor in tensors.items()}
        modules[key] = ModuleAdapter(variant, half, 1.3 + index)
    return AdapterState(modules, {**BASES[family], "ss_output_name": "mine", "ss_sd_model_name": "none"})


def same_file(first: Path, second: Path) -> bool:
    """Says whether two files hold the same tensors, bit for bit, and the same texts, whose order is left to chance."""
    tensors, others = load_file(first), load_file(second)
    with safe_open(first, "pt") as one, safe_open(second, "pt") as other:
        return (
            tensors.keys() == others.keys()
            and all(tensor.dtype == others[name].dtype for name, tensor in tensors.items())
            and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
            and one.metadata() == other.metadata()
        )


def write(state: AdapterState, family: str, format_name: str, path: Path) -> Path:
    names, format_ = key_map(format_name, None, DIFFUSION[family]), registry.find("formats", format_name)
    return write_exactly(state, names, format_, path, torch.float16).path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("start", "other"), [("kohya", "diffusers"), ("kohya", "peft"), ("diffusers", "peft")])
def test_there_and_back_gives_the_same_file(
    command: Commands, family: str, start: str, other: str, tmp_path: Path
) -> None:
    first = write(published(family), family, start, tmp_path / "first")
    result = json.loads(command.good("convert", first, tmp_path / "second", "--to", other, "--json").out)
    assert result["family"] == family
    assert (result["from"], result["to"], result["dtype"], result["rounding"]) == (start, other, "fp16", 0.0)
    assert result["variants"] == {"lora": len(published(family).modules)}
    command.good("convert", tmp_path / "second", tmp_path / "third", "--to", start)
    assert same_file(tmp_path / "third", first)


def test_programs_are_names_of_what_they_read(command: Commands, tmp_path: Path) -> None:
    first = write(published("sdxl", "dora"), "sdxl", "kohya", tmp_path / "first")
    for program in ("comfyui", "a1111", "forge"):
        result = json.loads(command.good("convert", first, tmp_path / program, "--to", program, "--json").out)
        assert result["to"] == "kohya"
        assert same_file(tmp_path / program, first)


def test_wild_spelling_becomes_the_one_that_all_programs_read(command: Commands, tmp_path: Path) -> None:
    first = write(published("sd1"), "sd1", "kohya", tmp_path / "first")
    wild = {
        name.replace("lora_te_text_model_", "lora_te1_").replace(
            "down_blocks_0_attentions_0", "input_blocks_1_1"
        ): tensor
        for name, tensor in load_file(first).items()
    }
    assert not any("down_blocks" in name or "text_model" in name for name in wild)
    save_file(wild, tmp_path / "wild.safetensors")
    command.good("convert", tmp_path / "wild.safetensors", tmp_path / "tame.safetensors", "--to", "kohya")
    tame = load_file(tmp_path / "tame.safetensors")
    assert all(torch.equal(tame[name], tensor) for name, tensor in load_file(first).items())


def test_text_encoder_without_attention_becomes_one_that_diffusers_loads(command: Commands, tmp_path: Path) -> None:
    state = published("sdxl", has_attention=False)
    first = write(state, "sdxl", "kohya", tmp_path / "first")
    command.good("convert", first, tmp_path / "second.safetensors", "--to", "diffusers")
    added = {
        name: tensor
        for name, tensor in load_file(tmp_path / "second.safetensors").items()
        if name.startswith("text_encoder_2.") and "mlp" not in name
    }
    assert {tensor.abs().max().item() for tensor in added.values()} == {0.0}
    assert sum("layers.31.self_attn." in name for name in added) == 8


def test_another_number_type_tells_the_rounding(command: Commands, tmp_path: Path) -> None:
    first = write(published("sd1"), "sd1", "kohya", tmp_path / "first")
    outcome = command.good("convert", first, tmp_path / "second", "--to", "kohya", "--dtype", "bf16", "--json")
    assert 1e-4 < json.loads(outcome.out)["rounding"] < 4e-3
    text = command.good("convert", first, tmp_path / "second", "--to", "kohya", "--dtype", "bf16", "--overwrite").out
    assert "rounded by 0.00" in text
    assert load_file(tmp_path / "second").popitem()[1].dtype in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("variant", "to", "reason"),
    [("dora", "peft", "one for each input"), ("dora", "diffusers", "one for each input")],
)
def test_what_a_format_cannot_hold_is_refused(
    command: Commands, variant: str, to: str, reason: str, tmp_path: Path
) -> None:
    first = write(published("sdxl", variant), "sdxl", "kohya", tmp_path / "first")
    outcome = command("convert", first, tmp_path / "second", "--to", to)
    assert outcome.code == 2
    assert reason in outcome.message
    assert "Formats that can: kohya" in outcome.message
    assert not (tmp_path / "second").exists()


def test_magnitudes_along_the_outputs_go_to_peft_but_to_no_program_of_kohya_files(
    command: Commands, tmp_path: Path
) -> None:
    first = write(published("sd1", "dora_out"), "sd1", "peft", tmp_path / "first")
    command.good("convert", first, tmp_path / "second.safetensors", "--to", "diffusers")
    lycoris = {
        f"{name}.{end}": tensor
        for (key, each) in published("sd1", "dora_out")
        for name in [key_map("kohya", None, DIFFUSION["sd1"]).name(key)]
        for end, tensor in (
            ("lora_down.weight", each.tensors["down"]), ("lora_up.weight", each.tensors["up"]),
            ("dora_scale", each.tensors["magnitude"]), ("alpha", torch.tensor(each.alpha)),
        )
    }  # fmt: skip
    save_file({name: tensor.half() if tensor.dim() else tensor for name, tensor in lycoris.items()}, tmp_path / "third")
    command.good("convert", tmp_path / "third", tmp_path / "fourth.safetensors", "--to", "diffusers")
    second, fourth = (load_file(tmp_path / f"{name}.safetensors") for name in ("second", "fourth"))
    assert all(torch.equal(second[name], tensor) for name, tensor in fourth.items())
    outcome = command("convert", tmp_path / "third", tmp_path / "fifth", "--to", "comfyui")
    assert outcome.code == 2
    assert "misread a magnitude along the outputs" in outcome.message


def test_base_of_another_build_gives_the_names(command: Commands, tiny_base: Path, tmp_path: Path) -> None:
    modules = {ModuleKey("unet", "mid_block.attentions.0.proj_in"): ModuleAdapter("lora", {"down": torch.ones(2, 64, 1, 1), "up": torch.ones(64, 2, 1, 1)}, 1.0)}  # fmt: skip # noqa: E501
    first = write(AdapterState(modules), "sd1", "diffusers", tmp_path / "first.safetensors")
    command.good("convert", first, tmp_path / "second", "--to", "kohya", "--model", tiny_base)
    command.good("convert", first, tmp_path / "third", "--to", "kohya", "--family", "sd1")
    assert same_file(tmp_path / "second", tmp_path / "third")
    dora = {
        key: replace(each, variant="dora", tensors={**each.tensors, "magnitude": torch.ones(1, 64, 1, 1)})
        for key, each in modules.items()
    }
    turned = write(AdapterState(dora, BASES["sd1"]), "sd1", "kohya", tmp_path / "dora.safetensors")
    command.good("convert", turned, tmp_path / "dora again", "--to", "kohya", "--model", tiny_base)
    assert same_file(tmp_path / "dora again", turned)
    wrong = replace(
        next(iter(modules.values())), tensors={"down": torch.ones(2, 5, 1, 1), "up": torch.ones(64, 2, 1, 1)}
    )
    second = write(AdapterState(dict.fromkeys(modules, wrong)), "sd1", "kohya", tmp_path / "wrong.safetensors")
    outcome = command("convert", second, tmp_path / "fourth", "--to", "peft", "--model", tiny_base)
    assert outcome.code == 2
    assert "down is [2, 5, 1, 1]" in outcome.message


def test_pickle_is_taken_apart_if_asked(command: Commands, tmp_path: Path) -> None:
    first = write(published("sd1"), "sd1", "kohya", tmp_path / "first")
    torch.save(load_file(first), tmp_path / "old.pt")
    outcome = command("convert", tmp_path / "old.pt", tmp_path / "new.safetensors", "--to", "kohya")
    assert outcome.code == 2
    assert "--from-pickle" in outcome.message
    command.good("convert", tmp_path / "old.pt", tmp_path / "new.safetensors", "--to", "kohya", "--from-pickle")
    new = load_file(tmp_path / "new.safetensors")
    assert all(torch.equal(new[name], tensor) for name, tensor in load_file(first).items())


def test_messages_name_the_pickle_and_not_what_was_made_of_it(command: Commands, tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2, 2)}, tmp_path / "old.pt")
    outcome = command("convert", tmp_path / "old.pt", tmp_path / "new.safetensors", "--to", "kohya", "--from-pickle")
    assert outcome.code == 2
    assert f"{tmp_path / 'old.pt'} is not an adapter" in outcome.message


def test_nothing_is_replaced_unasked(command: Commands, tmp_path: Path) -> None:
    first = write(published("sd1"), "sd1", "kohya", tmp_path / "first")
    outcome = command("convert", first, first, "--to", "diffusers")
    assert outcome.code == 2
    assert "exists" in outcome.message


@pytest.mark.parametrize("arguments", [["--to", "peft"], ["--to", "kohya"]])
def test_no_library_that_takes_seconds_is_imported(arguments: list[str], tmp_path: Path) -> None:
    first = write(published("sdxl"), "sdxl", "kohya", tmp_path / "first")
    code = (
        "import sys; from lora_diffusion.cli.main import main; code = main(sys.argv[1:]);"
        "heavy = [name for name in ('diffusers', 'transformers', 'peft', 'accelerate') if name in sys.modules];"
        "print(code, heavy, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "convert", str(first), str(tmp_path / "second"), *arguments]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr.strip().endswith("0 []")


def test_factors_get_the_dimensions_of_the_weight(command: Commands, tiny_base: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for width, model in ((1280, []), (64, ["--model", tiny_base])):
        down, up = (torch.randn(shape, generator=generator).half() for shape in ((2, width), (width, 2)))
        flat = {ModuleKey("unet", f"mid_block.attentions.0.{name}"): {"down": down, "up": up} for name in ("proj_in",)}
        deep = {ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"): {
            "down": down[..., None, None], "up": up[..., None, None]}}  # fmt: skip
        modules = {key: ModuleAdapter("lora", each, 2.0) for key, each in {**flat, **deep}.items()}
        first = write(AdapterState(modules, BASES["sd1"]), "sd1", "kohya", tmp_path / f"{width}.safetensors")
        commands = [["convert", first, "{}", "--to", "kohya"]]
        commands += [["resize", first, "{}", "--rank", 2], ["compose", first, "--output", "{}"]]
        for number, words in enumerate(commands):
            output = tmp_path / f"{width}-{number}.safetensors"
            command.good(*(output if word == "{}" else word for word in words), *model)
            shapes = {name: tuple(tensor.shape) for name, tensor in load_file(output).items()}
            stem = "lora_unet_mid_block_attentions_0_"
            assert shapes[f"{stem}proj_in.lora_down.weight"] == (2, width, 1, 1)
            assert shapes[f"{stem}proj_in.lora_up.weight"] == (width, 2, 1, 1)
            assert shapes[f"{stem}transformer_blocks_0_attn2_to_q.lora_down.weight"] == (2, width)
            if words[0] == "convert":
                assert torch.equal(load_file(output)[f"{stem}proj_in.lora_down.weight"].flatten(1), down)


@pytest.mark.parametrize("family", FAMILIES)
def test_base_is_told_where_it_was_not(command: Commands, family: str, tmp_path: Path) -> None:
    bare = replace(published(family), metadata={})
    silent = write(bare, family, "diffusers", tmp_path / "first.safetensors")
    outputs = [tmp_path / f"{name}.safetensors" for name in ("converted", "resized", "composed")]
    messages = [
        command.good("convert", silent, outputs[0], "--to", "kohya").message,
        command.good("resize", silent, outputs[1], "--rank", 2).message,
        command.good("compose", silent, "--output", outputs[2]).message,
    ]
    for output, message in zip(outputs, messages, strict=True):
        with safe_open(output, "pt") as file:
            result = BASES[family].items() <= file.metadata().items()
        # Only the prediction tells what a base of Stable Diffusion 2 is called.
        assert (result, "metadata edit FILE" in message) == (family != "sd2", family == "sd2")


def _root_folder(family: str, part: str, path: Path, metadata: dict[str, str]) -> Path:
    """Writes the folder of one part as PEFT itself saves it: not in a folder named after the part."""
    write(replace(published(family), metadata=metadata), family, "peft", path.with_name("parts"))
    return path.with_name("parts").joinpath(part).rename(path)


@pytest.mark.parametrize(
    ("family", "part", "metadata", "start"),
    [
        ("sd1", "text_encoder", {}, "lora_te_"),
        ("sd1", "unet", {}, "lora_unet_"),
        ("sd2", "text_encoder", {}, "lora_te_"),
        ("sdxl", "text_encoder", {"ss_base_model_version": "sdxl_base_v1-0"}, "lora_te1_"),
        ("sdxl", "text_encoder_2", {}, "lora_te2_"),
        ("sdxl", "unet", {}, "lora_unet_"),
    ],
)
def test_root_folder_is_for_the_base_that_its_sizes_tell(
    command: Commands, family: str, part: str, metadata: dict[str, str], start: str, tmp_path: Path
) -> None:
    folder = _root_folder(family, part, tmp_path / "root", metadata)
    result = json.loads(command.good("convert", folder, tmp_path / "a.safetensors", "--to", "kohya", "--json").out)
    assert (result["family"], list(result["modules"])) == (family, [part])
    assert all(name.startswith(start) for name in load_file(tmp_path / "a.safetensors"))


def test_root_folder_that_tells_no_part_is_asked_for_one(command: Commands, tmp_path: Path) -> None:
    folder = _root_folder("sdxl", "text_encoder", tmp_path / "root", {"ss_base_model_version": "sdxl_base_v1-0"})
    tensors = {name: tensor[..., :24] for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors", BASES["sdxl"]
    )
    outcome = command("convert", folder, tmp_path / "a.safetensors", "--to", "kohya")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "put it into a folder named text_encoder or text_encoder_2" in outcome.message


@pytest.mark.parametrize("module", ["model.encoder.conv1", "proj_out", "model.decoder.embed_tokens"])
def test_modules_that_no_adapter_has_here_are_named(command: Commands, module: str, tmp_path: Path) -> None:
    ends = ("lora_embedding_A", "lora_embedding_B", "base_layer.weight") if "embed" in module else ("lora_A.weight", "lora_B.weight")  # fmt: skip # noqa: E501
    names = [f"model.decoder.layers.0.encoder_attn.q_proj.lora_{name}.weight" for name in "AB"]
    tensors = {f"base_model.model.{name}": torch.ones(1, 1) for name in (*names, *(f"{module}.{end}" for end in ends))}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    outcome = command("convert", tmp_path, tmp_path / "out", "--to", "peft")
    assert outcome.code == 2
    assert "1 of its 2 modules are none that an adapter for this base" in outcome.message
    assert outcome.message.endswith(f" - {module}")


@pytest.mark.parametrize("part", ["", "unet"])
def test_folder_of_peft_with_a_pickle(command: Commands, part: str, tmp_path: Path) -> None:
    state = published("sd1")
    unet = AdapterState({key: each for key, each in state if key.part == "unet"}, {})
    folder = write(unet, "sd1", "peft", tmp_path / "old one")
    inner = folder / "unet"
    torch.save(load_file(inner / "adapter_model.safetensors"), inner / "adapter_model.bin")
    (inner / "adapter_model.safetensors").rename(tmp_path / "kept.safetensors")
    given = folder if part else inner
    for arguments in (("inspect", given), ("convert", given, tmp_path / "new", "--to", "peft")):
        outcome = command(*arguments)
        assert outcome.code == 2
        assert f"lora-diffusion convert '{given}' NEW --to peft --from-pickle" in outcome.message
    command.good("convert", given, tmp_path / "new", "--to", "peft", "--from-pickle")
    new = load_file(tmp_path / "new" / "unet" / "adapter_model.safetensors")
    assert all(torch.equal(new[name], tensor) for name, tensor in load_file(tmp_path / "kept.safetensors").items())
    outcome = command("convert", tmp_path / "new", tmp_path / "newer", "--to", "peft", "--from-pickle")
    assert (outcome.code, "leave --from-pickle out" in outcome.message) == (2, True)


def test_tensors_of_peft_without_their_folder(command: Commands, tmp_path: Path) -> None:
    file = write(published("sd1"), "sd1", "peft", tmp_path / "a") / "unet" / "adapter_model.safetensors"
    for arguments in (
        ("inspect", file),
        ("verify", file, "--base", "sd1"),
        ("convert", file, tmp_path / "b", "--to", "peft"),
    ):
        outcome = command(*arguments)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert f"give the folder {file.parent} with both" in outcome.message


@pytest.mark.parametrize(("to", "name"), [("kohya", "a.pt"), ("diffusers", "a.bin"), ("peft", "a.safetensors")])
def test_endings_that_would_deceive_are_refused(command: Commands, to: str, name: str, tmp_path: Path) -> None:
    first = write(published("sd1"), "sd1", "kohya", tmp_path / "first")
    outcome = command("convert", first, tmp_path / name, "--to", to)
    assert (outcome.code, "--output" in outcome.message, (tmp_path / name).exists()) == (2, True, False)


def test_numbers_that_a_type_cannot_hold_are_a_error_of_the_option(command: Commands, tmp_path: Path) -> None:
    state = published("sd1")
    huge = {key: replace(each, tensors={name: 1e5 * t for name, t in each.tensors.items()}) for key, each in state}
    names, kohya = key_map("kohya", None, DIFFUSION["sd1"]), registry.find("formats", "kohya")
    first = write_exactly(AdapterState(huge), names, kohya, tmp_path / "a.safetensors", torch.float32).path
    for arguments in (
        ("convert", first, tmp_path / "b.safetensors", "--to", "kohya"),
        ("resize", first, tmp_path / "b.safetensors", "--rank", 1),
        ("compose", first, "--output", tmp_path / "b.safetensors"),
    ):
        outcome = command(*arguments, "--dtype", "fp16")
        assert outcome.code == 2
        assert "torch.float16 cannot hold; give --dtype bf16 or fp32." in outcome.message
        assert "output.dtype" not in outcome.message
