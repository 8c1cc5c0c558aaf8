"""`resize` and `compose` on files of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_diffusion.algebra.delta import delta_weight
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.workflows._adapter_files import read_alone
from tests.workflows.conftest import Commands


def changes(path: Path) -> dict[object, torch.Tensor]:
    _, state = read_alone(parse_file(path))
    return {key: delta_weight(adapter).double() for key, adapter in state}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def other(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second adapter of the same base, of fewer modules and another rank, in diffusers' spelling."""
    tensors = load_file(trained / "run.diffusers.safetensors")
    rng = torch.Generator().manual_seed(0)
    changed = {
        name: torch.randn((3 if ".lora_A" in name else t.shape[0], *t.shape[1:]), generator=rng)
        if ".lora_A" in name
        else torch.randn((t.shape[0], 3, *t.shape[2:]), generator=rng)
        for name, t in tensors.items()
        if not name.startswith("text_encoder")
    }
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    save_file(changed, path, {"modelspec.trigger_phrase": "zwx"})
    return path


def test_exact_sum_of_two_spellings(command: Commands, trained: Path, other: Path, tmp_path: Path) -> None:
    output = tmp_path / "sum.safetensors"
    first = trained / "run.safetensors"
    result = json.loads(
        command.good("compose", f"{first}:unet=0.8,text_encoder=-0.5", f"{other}:0.3", "--output", output, "--json").out
    )
    assert result["relative_error"] == 0
    assert result["dtype"] == "fp32"
    whole, each, added = changes(output), changes(first), changes(other)
    assert result["missing_modules"] == {"run.safetensors": 0, "other.safetensors": len(each) - len(added)}
    for key, change in whole.items():
        expected = (0.8 if key.part == "unet" else -0.5) * each[key]  # type: ignore[attr-defined]
        if key in added:
            expected = expected + 0.3 * added[key].reshape(each[key].shape)
        assert torch.allclose(change, expected, rtol=0, atol=1e-6 * max(1.0, float(expected.norm())))
    assert {overlap["part"] for overlap in result["overlaps"]} == {"unet"}
    about = metadata(output)
    assert about["modelspec.trigger_phrase"].endswith(", zwx")
    assert [entry["weights"] for entry in json.loads(about["lora_diffusion.made_from"])] == [
        {"unet": 0.8, "text_encoder": -0.5},
        {"unet": 0.3},
    ]


def test_one_alpha_is_left_in_each_part(command: Commands, trained: Path, other: Path, tmp_path: Path) -> None:
    output = tmp_path / "sum.safetensors"
    command.good("compose", trained / "run.safetensors", other, "--output", output, "--energy", "0.9")
    tensors = load_file(output)
    for part in ("lora_unet", "lora_te"):
        alphas = {float(t) for name, t in tensors.items() if name.startswith(part) and name.endswith(".alpha")}
        assert len(alphas) == 1
    assert len({t.shape[0] for name, t in tensors.items() if name.endswith("lora_down.weight")}) > 1


def test_base_of_another_build_gives_the_names(command: Commands, tiny_base: Path, tmp_path: Path) -> None:
    base, first = tmp_path / "base", tmp_path / "first.safetensors"
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tiny_base / "unet"), layers_per_block=3)
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("unet"))
    unet.save_pretrained(base / "unet")
    flat, rng = "lora_unet_down_blocks_0_resnets_2_conv1", torch.Generator().manual_seed(0)
    shapes = {"lora_down": (2, 32, 3, 3), "lora_up": (32, 2, 1, 1)}
    tensors = {f"{flat}.{name}.weight": torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    save_file({**tensors, f"{flat}.alpha": torch.tensor(2.0)}, first)
    for name, *arguments in (
        ["resize", first, tmp_path / "resize.safetensors", "--rank", 1],
        ["compose", first, f"{first}:-0.5", "--output", tmp_path / "compose.safetensors"],
    ):
        outcome = command(name, *arguments)
        assert outcome.code == 2
        assert "do not exist in this base" in outcome.message
        command.good(name, *arguments, "--model", base)
        assert flat + ".lora_down.weight" in load_file(tmp_path / f"{name}.safetensors")
    assert command("resize", first, tmp_path / "x.safetensors", "--rank", 1, "--model", tmp_path / "none").code == 2


@pytest.mark.parametrize("name", ["run.safetensors", "run.diffusers.safetensors", "run.peft"])
def test_resize_keeps_spelling_and_tells_errors(command: Commands, trained: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    result = json.loads(command.good("resize", trained / name, output, "--rank", 2, "--json").out)
    before, after = changes(trained / name), changes(output)
    left = sum(float((after[key] - before[key]).norm()) ** 2 for key in before) ** 0.5
    size = sum(float(change.norm()) ** 2 for change in before.values()) ** 0.5
    assert result["relative_error"] == pytest.approx(left / size, rel=1e-4)
    assert result["largest_rank"] == 2
    for key, change in before.items():
        singular = torch.linalg.svdvals(change.flatten(1))
        best = float(singular[2:].norm() / singular.norm())
        assert result["errors"][f"{key.part}/{key.path}"] == pytest.approx(best, abs=1e-5)  # type: ignore[attr-defined]


ROUNDED = [
    ("compose", "bf16"),
    ("compose --rank 2", "bf16"),
    ("compose --energy 0.9", "fp16"),
    ("resize --rank 2", "bf16"),
    ("resize --rank 64", "fp16"),
    ("resize --energy 0.999999", "bf16"),
]


@pytest.mark.parametrize(("asked", "dtype"), ROUNDED)
def test_errors_are_those_of_the_file(
    command: Commands, trained: Path, other: Path, tmp_path: Path, asked: str, dtype: str
) -> None:
    first, output = trained / "run.safetensors", tmp_path / "out.safetensors"
    name, *rule = asked.split()
    paths = (f"{first}:0.8", f"{other}:0.3", "--output", output) if name == "compose" else (first, output)
    result = json.loads(command.good(name, *paths, *rule, "--dtype", dtype, "--json").out)
    each, added, written = changes(first), changes(other), changes(output)
    lost = size = 0.0
    for key, change in each.items():
        exact = change
        if name == "compose":
            exact = 0.8 * change + (0.3 * added[key].reshape(change.shape) if key in added else 0)
        error = float((exact - written[key]).norm())
        about = f"{key.part}/{key.path}"  # type: ignore[attr-defined]
        assert result["errors"][about] == pytest.approx(error / float(exact.norm()), rel=2e-3)
        lost, size = lost + error**2, size + float(exact.norm()) ** 2
    assert result["relative_error"] == pytest.approx((lost / size) ** 0.5, rel=1e-3)
    assert result["relative_error"] > {"fp16": 1e-4, "bf16": 1e-3}[dtype]
    assert float(metadata(output)["lora_diffusion.relative_error"]) == pytest.approx(result["relative_error"], rel=1e-5)


def test_resize_to_more_keeps_all_and_its_dtype_may_change(command: Commands, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "same.safetensors"
    result = json.loads(
        command.good("resize", trained / "run.safetensors", output, "--rank", 64, "--dtype", "fp16", "--json").out
    )
    # Rounding of two factors, each by up to half a step of 2**-10.
    assert 1e-4 < result["relative_error"] < 2**-10
    assert result["largest_rank"] == 4
    assert {t.dtype for name, t in load_file(output).items() if "alpha" not in name} == {torch.float16}
    assert "ss_steps" in metadata(output)
    assert (
        json.loads(command.good("resize", output, output, "--rank", 1, "--overwrite", "--json").out)["dtype"] == "fp16"
    )


def test_text_names_the_worst(command: Commands, trained: Path, other: Path, tmp_path: Path) -> None:
    outcome = command.good(
        "compose", trained / "run.safetensors", other, "--output", tmp_path / "s.safetensors", "--rank", 2
    )
    assert "relative error" in outcome.out
    assert "other.safetensors does nothing in" in outcome.out
    assert "run.safetensors and other.safetensors in unet: cosine" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compose", "{run}", "--output", "{out}", "--rank", "0"], "--rank 0: must be 1 or greater"),
        (["compose", "{run}", "--output", "{out}", "--energy", "nan"], "--energy nan: must be greater than 0"),
        (["compose", "{run}:unet=0.8", "--output", "{out}"], "write run.safetensors:text_encoder=1,unet=1"),
        (["compose", "{run}:unet=x,text_encoder=1", "--output", "{out}"], "unet=x does not give each part one weight"),
        (["compose", "{run}:much", "--output", "{out}"], "'much' is not a weight"),
        (["compose", "/none:1", "--output", "{out}"], "there is no file /none"),
        (["compose", "{run}", "--output", "{run}"], "exists; give another name or --overwrite"),
        (["resize", "/none.safetensors", "{out}", "--rank", "2"], "There is no adapter file /none.safetensors"),
        (["resize", "{run}", "{out}"], "one of the arguments --rank --energy is required"),
    ],
)
def test_bad_input(command: Commands, trained: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"run": trained / "run.safetensors", "out": tmp_path / "out.safetensors"}
    outcome = command(*(argument.format(**places) for argument in arguments))
    assert outcome.code == 2
    assert message in outcome.message
    assert not places["out"].exists()


def test_another_architecture_is_refused(command: Commands, trained: Path, other: Path, tmp_path: Path) -> None:
    strange = tmp_path / "xl.safetensors"
    save_file(load_file(other), strange, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    outcome = command("compose", trained / "run.safetensors", strange, "--output", tmp_path / "out.safetensors")
    assert outcome.code == 2
    assert "different bases" in outcome.message
