"""`merge` and `extract` as commands: images of the merged model, and the adapter out of it again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_diffusion.algebra.delta import delta_weight
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.workflows._adapter_files import read_alone
from tests.workflows.conftest import Commands

PROMPT = ("--prompt", "a red cat, sks style", "--seed", 3, "--steps", 3)


def drawn(command: Commands, output: Path, *arguments: object) -> np.ndarray:
    result = json.loads(command.good("generate", *arguments, *PROMPT, "--output", output, "--json").out)
    return np.asarray(Image.open(result["pictures"][0])).astype(int)


@pytest.fixture(scope="module")
def merged(trained: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lora_diffusion.cli.main import main

    path = tmp_path_factory.mktemp("merged") / "base"
    adapter = trained / "run.safetensors"
    assert main(["merge", "--model", str(tiny_base), "--adapter", f"{adapter}:0.7", "--output", str(path)]) == 0
    return path


def test_merged_model_draws_what_live_adapters_draw(
    command: Commands, merged: Path, trained: Path, tiny_base: Path, tmp_path: Path
) -> None:
    base = drawn(command, tmp_path / "base", "--model", tiny_base)
    actual = drawn(command, tmp_path / "merged", "--model", merged)
    live = drawn(command, tmp_path / "live", "--model", tiny_base, "--adapter", f"{trained / 'run.safetensors'}:0.7")
    assert np.abs(live - base).max() > 5
    # The files hold 255 levels: a difference of 1e-3 moves a value by one of them at most.
    assert np.abs(actual - live).max() <= 1


def test_composed_file_draws_the_same_too(command: Commands, trained: Path, tiny_base: Path, tmp_path: Path) -> None:
    first, second = trained / "run.safetensors", trained / "run.peft"
    output = tmp_path / "sum.safetensors"
    command.good("compose", f"{first}:0.9", f"{second}:-0.3", "--output", output)
    actual = drawn(command, tmp_path / "a", "--model", tiny_base, "--adapter", output)
    live = drawn(
        command, tmp_path / "b", "--model", tiny_base, "--adapter", f"{first}:0.9", "--adapter", f"{second}:-0.3"
    )
    assert np.abs(actual - live).max() <= 1


def test_merge_tells_what_it_did(command: Commands, trained: Path, tiny_base: Path, tmp_path: Path) -> None:
    adapter, output = trained / "run.safetensors", tmp_path / "out"
    options = ("--adapter", f"{adapter}:unet=0.5,text_encoder=0", "--adapter", trained / "run.peft", "--dtype", "fp16")
    result = json.loads(command.good("merge", "--model", tiny_base, *options, "--output", output, "--json").out)
    assert result["modules"] == result["changed_tensors"] == len(read_alone(parse_file(adapter))[1].modules)
    assert [entry["file"] for entry in result["adapters"]] == ["run.safetensors", "run.peft"]
    assert result["adapters"][0]["weights"] == {"text_encoder": 0.0, "unet": 0.5}
    with safe_open(next((output / "unet").glob("*.safetensors")), "pt") as file:
        assert json.loads(file.metadata()["lora_diffusion.merged"])["adapters"] == result["adapters"]
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert (
        "tensors hold the sum"
        in command.good("merge", "--model", tiny_base, *options, "--output", output, "--overwrite").out
    )


def test_extract_gives_the_adapter_back(
    command: Commands, merged: Path, trained: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "back.safetensors"
    result = json.loads(
        command.good("extract", tiny_base, merged, output, "--rank", 4, "--dtype", "fp32", "--json").out
    )
    _, wanted = read_alone(parse_file(trained / "run.safetensors"))
    _, actual = read_alone(parse_file(output))
    assert result["modules"] == len(wanted.modules) == len(actual.modules)
    assert result["equal_modules"] > 0
    assert result["not_held"] == []
    assert result["relative_error"] < 1e-5
    for key, adapter in wanted:
        change = 0.7 * delta_weight(adapter)
        error = (delta_weight(actual.modules[key]).reshape(change.shape) - change).norm() / change.norm()
        # The merged weights were rounded to float32, and a trained change is a hundred times smaller than they are.
        assert float(error) < 1e-4, key


@pytest.mark.parametrize(("format_name", "rule"), [("kohya", ("--rank", 1)), ("peft", ("--energy", 0.999999))])
def test_errors_of_extract_are_those_of_the_file(
    command: Commands, merged: Path, trained: Path, tiny_base: Path, tmp_path: Path, format_name: str, rule: tuple[str]
) -> None:
    output = tmp_path / "back"
    arguments = ("extract", tiny_base, merged, output, *rule, "--to", format_name, "--dtype", "bf16", "--json")
    result = json.loads(command.good(*arguments).out)
    assert result["dtype"] == "bf16"
    actual, lost, size = read_alone(parse_file(output))[1].modules, 0.0, 0.0
    for key, adapter in read_alone(parse_file(trained / "run.safetensors"))[1]:
        exact = 0.7 * delta_weight(adapter).double()
        error = float((exact - delta_weight(actual[key]).double().reshape(exact.shape)).norm())
        # The merged weights were rounded to float32 too.
        assert result["errors"][f"{key.part}/{key.path}"] == pytest.approx(error / float(exact.norm()), rel=5e-3)
        lost, size = lost + error**2, size + float(exact.norm()) ** 2
    assert result["relative_error"] == pytest.approx((lost / size) ** 0.5, rel=1e-3)
    assert result["relative_error"] > 1e-3
    (file,) = output.parent.rglob("back*") if format_name == "kohya" else (output / "unet").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["lora_diffusion.extracted"])
    assert about["relative_error"] == result["relative_error"]


def test_extract_of_one_part_takes_its_own_groups(
    command: Commands, merged: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "text.safetensors"
    command.good("extract", tiny_base, merged, output, "--rank", 2, "--to", "kohya", "--parts", "text_encoder")
    assert read_alone(parse_file(output))[1].parts() == ("text_encoder",)


@pytest.mark.parametrize("format_name", ["diffusers", "peft"])
def test_extract_of_some_modules_warns_of_the_others(
    command: Commands, merged: Path, tiny_base: Path, tmp_path: Path, format_name: str
) -> None:
    output = tmp_path / "attn"
    outcome = command.good(
        *("extract", tiny_base, merged, output, "--energy", 0.9, "--to", format_name),
        *("--parts", "unet", "--targets", "attn", "re:.*conv1"),
    )
    assert "other tensor(s) differ too, which this adapter does not hold" in outcome.message
    _, state = read_alone(parse_file(output))
    assert state.parts() == ("unet",)
    assert all(".attn" in key.path or key.path.endswith("conv1") for key in state.modules)
    assert "relative error" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "--model", "/none", "--adapter", "{run}", "--output", "{out}"], "there is no such folder or file"),
        (["merge", "--model", "{base}", "--adapter", "{run}:x", "--output", "{out}"], "'x' is not a weight"),
        (
            ["merge", "--model", "{base}", "--adapter", "{run}", "--output", "{base}/new"],
            "lies in the base that is read",
        ),
        (["merge", "--model", "{base}", "--adapter", "{run}", "--output", "{run}"], "exists; give another name"),
        (["merge", "--model", "{base}", "--adapter", "{run}", "--output", "{out}", "--family", "sdxl"], "sd1"),
        (["extract", "{base}", "{base}", "{out}", "--rank", "4"], "modules differs between"),
        (["extract", "{base}", "{base}", "{out}", "--rank", "4", "--targets", "atn"], 'did you mean "attn"'),
        (["extract", "{base}", "{base}", "{out}", "--energy", "2"], "--energy 2: must be greater than 0"),
    ],
)
def test_bad_input(
    command: Commands, trained: Path, tiny_base: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"run": trained / "run.safetensors", "base": tiny_base, "out": tmp_path / "out"}
    outcome = command(*(argument.format(**places) for argument in arguments))
    assert outcome.code == 2, outcome.err
    assert message in outcome.message
    assert not places["out"].exists()


def test_overwrite_destroys_a_base_only(command: Commands, trained: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    outcome = command(
        *("merge", "--model", tiny_base, "--adapter", trained / "run.safetensors"),
        *("--output", tmp_path, "--overwrite"),
    )
    assert outcome.code == 2
    assert "holds something else" in outcome.message
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_adapter_of_another_base_is_refused(command: Commands, trained: Path, tiny_base: Path, tmp_path: Path) -> None:
    tensors = load_file(trained / "run.safetensors")
    name = next(name for name in tensors if name.endswith("lora_down.weight"))
    save_file({**tensors, name: tensors[name][:, :-1].clone()}, tmp_path / "odd.safetensors")
    outcome = command(
        "merge", "--model", tiny_base, "--adapter", tmp_path / "odd.safetensors", "--output", tmp_path / "o"
    )
    assert outcome.code == 2
    assert "does not fit this base" in outcome.message
