"""What of a text may be published."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_diffusion.core.privacy import public, public_path, public_text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/maria", "a folder"),
        ("/Users/maria/", "a folder"),
        ("/home/maria/bases/x.safetensors", "x.safetensors"),
        ("see /home/maria/a and '/home/maria/b:0.7'", "see a and 'b:0.7'"),
        ("[/home/maria/a, ~/b, ~maria/c]", "[a, b, c]"),
        ("dino=/home/maria/dino", "dino=dino"),
        (r"C:\Users\maria\sd.safetensors", "sd.safetensors"),
        (r"\\server\maria\sd", "sd"),
        ("file:///home/maria/x.html", "x.html"),
        *(
            (text, text)
            for text in ("and/or", "w/o", "8/10", "/s", "owner/base", "runs/a", "https://x.org/a/b", "1e-4/2")
        ),
        ("/" + "a" * 5000, "/" + "a" * 5000),
    ],
)
def test_texts(text: str, left: str) -> None:
    assert public_text(text) == left


def test_home_and_what_lies_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "maria"))
    assert public_path(str(tmp_path / "maria")) == "a folder"
    assert public_path("../../maria/base") == "base"
    assert public_path("/") == "a folder"


def test_values_and_keys() -> None:
    assert public({"/home/maria/a.png": ["/home/maria/b", 5, None]}) == {"a.png": ["b", 5, None]}
