"""The names that notebooks and plugins call: what they are, what they take, and that the documented examples run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lora_diffusion as ld
from lora_diffusion.core.files import shipped_path
from lora_diffusion.workflows.evaluate import EvaluationRequest

SIGNATURES = {
    "ask": "paths question base *adapters",
    "compose": "adapters output *method *rank *energy *dtype *base *embeddings *overwrite",
    "convert": "input output to *dtype *family *base *from_pickle *embeddings *overwrite",
    "estimate": "config overrides",
    "export": "run to output *step *apps *card *overwrite",
    "extract": "base tuned output *rank *energy *parts *targets *to *dtype *family *overwrite",
    "generate": "base prompts output *adapters *seeds *negative *num_steps *guidance *size",
    "inspect": "path",
    "load": "base adapters *family",
    "load_config": "config overrides *required *unused",
    "merge": "base adapters output *dtype *family *overwrite",
    "report": "paths output",
    "resize": "input output *rank *energy *dtype *base *embeddings *overwrite",
    "select": "run evaluation overrides",
    "train": "config overrides *resume *overwrite",
    "transcribe": "paths base *adapters",
    "verify": "path apps base",
}
"""Function -> its parameters, a star before those that are given by name; that of `evaluate` are tested below."""


def parameters(function: object) -> str:
    found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return " ".join(f"{'*' if one.kind is one.KEYWORD_ONLY else ''}{one.name}" for one in found)


def test_names_and_signatures() -> None:
    functions = {name: getattr(ld, name) for name in ld.__all__ if name not in ("LoraDiffusionError", "evaluate")}
    assert {name: parameters(function) for name, function in functions.items()} == SIGNATURES
    assert all(inspect.getdoc(function) for function in functions.values())


def test_an_evaluation_takes_what_its_workflow_takes() -> None:
    fields = {field.name for field in dataclasses.fields(EvaluationRequest)} - {"model", "gates"}
    assert set(inspect.signature(ld.evaluate).parameters) - {"base"} == fields


def test_type_checkers_see_every_name() -> None:
    tree = ast.parse(Path(ld.__file__ or "").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = [alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert told == ld.__all__ == sorted(ld.__all__)
    assert set(ld.__all__) <= set(dir(ld))


def test_functions_win_over_packages_of_their_name() -> None:
    from lora_diffusion.compose import plan

    assert callable(ld.compose)
    assert callable(ld.report)
    assert plan.__name__ == "lora_diffusion.compose.plan"


def test_import_loads_nothing() -> None:
    code = "import sys; before = {*sys.modules}; import lora_diffusion; print(*({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert len(done.stdout.split()) < 20
    assert not {"torch", "numpy", "yaml", "lora_diffusion.api"} & {*done.stdout.split()}


def test_configs_come_from_names_files_and_mappings(tmp_path: Path) -> None:
    paths = {"data.path": tmp_path, "output.path": tmp_path / "run"}
    named = ld.load_config("sd1/style", paths)
    as_text = ld.load_config("sd1/style", [f"{key}={value}" for key, value in paths.items()])
    assert named == as_text
    mapping = {"model": {"path": "builtin:emoji"}, "train": {"learning_rate": 1e-5}, "adapter": {"parts": ["unet"]}}
    config = ld.load_config(mapping, paths)
    assert (config.train.learning_rate, config.adapter.parts) == (1e-5, ("unet",))
    assert ld.load_config(config) is config
    with pytest.raises(ld.LoraDiffusionError, match=r"train\.max_step"):
        ld.load_config("sd1/style", {"train.max_step": 3})


def test_documented_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    for image in sorted((shipped_path("datasets") / "blob-style" / "train").glob("*.png"))[:4]:
        for file in (image, image.with_suffix(".txt")):
            shutil.copy(file, photos)
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert (tmp_path / "cat.png").is_file()
    assert (tmp_path / "sum.safetensors").is_file()
    assert isinstance(names["images"], list)
    assert len(names["images"]) == 4
    styled, plain = (np.asarray(names[name]).astype(int) for name in ("image", "plain"))
    assert styled.shape == plain.shape


def test_one_loaded_model_gives_what_the_command_gives(tmp_path: Path) -> None:
    model = ld.load("builtin:emoji")
    first, second = (model.generate("a cat", seed=seed, num_steps=3) for seed in (1, 2))
    written = ld.generate(model, "a cat", tmp_path / "images", seeds=[1, 2], num_steps=3)
    from PIL import Image

    for image, path in zip((first, second), written.files, strict=True):
        difference = np.asarray(image).astype(int) - np.asarray(Image.open(path)).astype(int)
        assert np.abs(difference).max() <= 1  # a batch of another size is summed in another order
    with pytest.raises(ld.LoraDiffusionError, match="no adapter"):
        model.generate("a cat", weights={"style": 1.0})
    with pytest.raises(ld.LoraDiffusionError, match="multiples of"):
        model.generate("a cat", size=(33, 33))
    with pytest.raises(ld.LoraDiffusionError, match="loaded already"):
        ld.generate(model, "a cat", tmp_path / "more", adapters=["style.safetensors"])
