from __future__ import annotations

from pathlib import Path

import pytest

from lora_diffusion.compose.plan import weighted_file, weighted_files
from lora_diffusion.core.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.safetensors", "b+c.safetensors", "d:2"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", [("a.safetensors", 1.0)]),
        ("a.safetensors:.5", [("a.safetensors", 0.5)]),
        ("d:2", [("d:2", 1.0)]),
        ("d:2:-0.5", [("d:2", -0.5)]),
        ("a.safetensors:0.8+d:2:0.6", [("a.safetensors", 0.8), ("d:2", 0.6)]),
        ("a.safetensors+d:2", [("a.safetensors", 1.0), ("d:2", 1.0)]),
        ("b+c.safetensors", [("b+c.safetensors", 1.0)]),
        ("a.safetensors:+0.5", [("a.safetensors", 0.5)]),
    ],
)
def test_files_and_weights(folder: Path, text: str, expected: list[tuple[str, float]]) -> None:
    assert weighted_files(text) == tuple((Path(name), weight) for name, weight in expected)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("none", "there is no file none"), ("a.safetensors:x", "'x' is not a weight"), ("a.safetensors:1+e", "no file e")],
)
def test_errors(folder: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        weighted_files(text, "--adapter")


def test_run_folder_is_no_adapter(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").touch()
    with pytest.raises(ConfigError, match="is a run folder"):
        weighted_file("run:0.5")


def test_a_drive_letter_is_no_weight(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file C:"):
        weighted_file("C:\\loras\\typo.safetensors")
    (tmp_path / "a+b.safetensors").touch()
    assert weighted_files(f"{tmp_path}/a+b.safetensors:0.5") == ((tmp_path / "a+b.safetensors", 0.5),)
    with pytest.raises(ConfigError, match="'half' is not a weight"):
        weighted_file(f"{tmp_path}/a+b.safetensors:half")
