"""What `convert` writes stays as it is: the files that `conversions.json` has digests of, and what is refused.

After a wanted change `python -m tests.behaviour.test_conversions`, run in an empty folder, writes the digests again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.behaviour.parts import conversions

_DIGESTS = Path(__file__).with_name("conversions.json")


def _digests() -> dict[str, Any]:
    """Returns exit code and written files of each conversion; what a refusal says may be put in other words."""
    return {name: {"code": result["code"], **_files(result["files"])} for name, result in conversions().items()}


def _files(contents: dict[str, Any]) -> dict[str, str]:
    return {
        path: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        for path, content in contents.items()
    }


def test_conversions_write_what_they_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _digests() == json.loads(_DIGESTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    _DIGESTS.write_text(json.dumps(_digests(), indent=1) + "\n", encoding="utf-8")
