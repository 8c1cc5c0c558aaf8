from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lora_diffusion.config.shipped import find_shipped
from lora_diffusion.quickstart import style
from tests.workflows.conftest import Commands


def test_quickstart_leaves_adapter_grid_and_report(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.yaml"
    text = find_shipped("sd1/style").read_text(encoding="utf-8")
    short.write_text(re.sub(r"max_steps: \d+", "max_steps: 12", text), encoding="utf-8")
    assert "max_steps: 12" in short.read_text(encoding="utf-8")
    monkeypatch.setattr(style, "find_shipped", lambda name: short)
    result = json.loads(command.good("quickstart", "--output", tmp_path / "run", "--json").out)
    assert all(Path(result[name]).is_file() for name in ("adapter", "grid", "report"))
    assert len(result["next"]) == 3
    scores = {label: row["clip_image"]["mean"] for label, row in result["scores"].items()}
    assert scores["real pictures"] > scores["base, with trigger"]
