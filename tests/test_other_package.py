"""What another package brings works from config to evaluation, and nothing in this one knows of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from lora_diffusion.core import registry

SOURCE = Path(__file__).parent / "other_package" / "moon.py"
BROUGHT = {
    "families": "moon = moon:FAMILY",
    "formats": "plain = moon:FORMAT",
    "metrics": "brightness = moon:METRIC",
    "variants": "crater = moon:VARIANT",
}
DRIVER = """
import contextlib, io, json, sys
from lora_diffusion.cli.main import main
for arguments in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = main(arguments)
        except SystemExit as exit_:
            code = exit_.code
    print(json.dumps({"code": code, "out": out.getvalue()}))
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the package, as `pip install --target` leaves it."""
    site = tmp_path / "site"
    info = site / "moon-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(SOURCE, site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moon\nVersion: 1.0\n")
    points = [f"[lora_diffusion.{group}]\n{line}\n" for group, line in BROUGHT.items()]
    (info / "entry_points.txt").write_text("\n".join(points))
    return site


def run(site: Path, *commands: str) -> list[dict[str, Any]]:
    """Runs commands in one process of its own, in the folder above the package; all must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([command.split() for command in commands]),
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["code"] for one in outcomes] == [0] * len(commands), done.stderr
    return outcomes


def test_it_trains_exports_converts_evaluates_and_is_listed(installed: Path, tiny_base: Path) -> None:
    folder = installed.parent
    (folder / "images").mkdir()
    for index, color in enumerate(("red", "blue", "green", "white")):
        Image.new("RGB", (16, 16), color).save(folder / "images" / f"{index}.png")
        (folder / "images" / f"{index}.txt").write_text(f"a {color} sks cat")
    (folder / "prompts.yaml").write_text("subject:\n  - a red {trigger}\n  - a blue {trigger}\n")
    base = f"model.family=moon model.path={tiny_base} data.path=images output.path=run"
    evaluated = "--steps 2 --seed 0 --metrics brightness --output scores --config run/config.yaml"
    shown, _, _, _, evaluation, *helps = run(
        installed,
        f"config show {base} adapter.variant=crater",
        f"train {base} adapter.variant=crater adapter.rank=2 train.max_steps=2 output.formats=[plain,kohya]",
        "export run --to plain --output exported.plain.safetensors",
        "convert exported.plain.safetensors converted.safetensors --to kohya --family moon",
        f"evaluate --json --prompts prompts.yaml --trigger sks --adapter run/run.plain.safetensors {evaluated}",
        *(f"{command} --help" for command in ("convert", "export", "evaluate")),
    )
    listed = " ".join(shown["out"].replace("#", "").split())
    for name, group in (("moon", "families"), ("crater", "variants"), ("plain", "formats")):
        assert f"Known: {', '.join(sorted({*registry.available(group), name}))}." in listed
    assert "craters: 3" in shown["out"]
    for file in ("run/run.plain.safetensors", "run/run.safetensors", "converted.safetensors"):
        with safe_open(folder / file, framework="np") as opened:
            assert opened.metadata()["modelspec.architecture"] == "moon-v1/lora"
    values = json.loads(evaluation["out"])
    assert [metric["name"] for metric in values["metrics"]] == ["brightness"]
    written = {
        name: "".join(one["out"].split()) for name, one in zip(("convert", "export", "evaluate"), helps, strict=True)
    }
    assert "plain" in written["convert"] and "moon" in written["convert"]
    assert "plain" in written["export"]
    assert "brightness" in written["evaluate"]
