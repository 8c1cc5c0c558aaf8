from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_diffusion.config.load import find_shipped
from lora_diffusion.config.schema import Config
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import shipped_path
from lora_diffusion.quickstart import NAMES, _text_output, llava, style, whisper
from tests.workflows.conftest import Commands


def shortened(config: str, num_steps: int, folder: Path) -> Path:
    """Writes a shipped config with fewer steps."""
    text = find_shipped(config).read_text(encoding="utf-8")
    for key, value in (("max_steps", num_steps), ("warmup_steps", num_steps - 1)):
        text, count = re.subn(rf"{key}: \d+", f"{key}: {value}", text)
        assert count == 1
    (folder / "short.yaml").write_text(text, encoding="utf-8")
    return folder / "short.yaml"


def few_chats(source: Path, folder: Path) -> None:
    """Copies the first three conversations of a file, and their images."""
    folder.mkdir(parents=True)
    entries = json.loads((source / "chats.json").read_text(encoding="utf-8"))[:3]
    (folder / "chats.json").write_text(json.dumps(entries), encoding="utf-8")
    for name in {entry["image"] for entry in entries}:
        shutil.copy(source / name, folder)


def few_recordings(source: Path, folder: Path) -> None:
    """Copies the first three recordings, and their transcripts."""
    folder.mkdir(parents=True)
    header, *rows = (source / "metadata.csv").read_text(encoding="utf-8").splitlines()
    (folder / "metadata.csv").write_text("\n".join([header, *rows[:3]]), encoding="utf-8")
    for row in rows[:3]:
        shutil.copy(source / row.split(",")[0], folder)


def test_quickstart_leaves_adapter_grid_and_report(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = shortened("sd1/style", 12, tmp_path)
    monkeypatch.setattr(style, "find_shipped", lambda name: short)
    result = json.loads(command.good("quickstart", "--output", tmp_path / "run", "--json").out)
    assert all(Path(result[name]).is_file() for name in ("adapter", "grid", "report"))
    assert len(result["next"]) == 3
    scores = {label: row["clip_image"]["mean"] for label, row in result["scores"].items()}
    assert scores["real pictures"] > scores["base, with trigger"]


@pytest.mark.parametrize(("task", "copy"), [(llava.TASK, few_chats), (whisper.TASK, few_recordings)])
def test_quickstart_of_models_that_write_scores_before_and_after(
    task: _text_output.TextQuickstart,
    copy: Callable[[Path, Path], None],
    command: Commands,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shipped, short = shipped_path("datasets") / task.data, shortened(task.config, 2, tmp_path)
    for folder in ("train", *task.tests.values()):
        copy(shipped / folder, tmp_path / "datasets" / task.data / folder)
    monkeypatch.setattr(_text_output, "find_shipped", lambda name: short)
    monkeypatch.setattr(_text_output, "shipped_path", lambda name: tmp_path / name)
    name = task.config.split("/")[0]
    result = json.loads(command.good("quickstart", name, "--output", tmp_path / "run", "--json").out)
    assert Path(result["adapter"]).is_dir()
    assert len(result["next"]) == 3
    assert set(result["scores"]) == set(task.tests)
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == result["scores"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for title, moments in result["scores"].items():
        assert title in page
        assert moments["before"][task.metric] >= 0
        assert moments["after"][task.metric] >= 0
    assert page.count("data:image/webp;base64,") == 2 * 3 * (task is llava.TASK)
    assert all(f'data-label="{name}"' in page for name in ("number", "exact after", "WER after") if name in page)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_an_earlier_quickstart_is_continued_or_replaced_as_a_run_is(
    name: str, option: str, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Config, **options: bool) -> None:
        raise ConfigError(str(sorted(key for key, value in options.items() if value)))

    for module in (style, _text_output):
        monkeypatch.setattr(module, "train", train)
    outcome = command("quickstart", name, "--output", tmp_path / "run", f"--{option}")
    assert outcome.code == 2
    assert str([option]) in outcome.err
