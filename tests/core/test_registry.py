from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError


def test_every_file_of_a_package_is_found_and_fits_its_name() -> None:
    assert "sd1" in registry.available("families")
    assert {"kohya", "diffusers", "peft"} == set(registry.available("formats"))
    assert {"clip_text", "clip_image"} <= set(registry.available("metrics"))
    assert {"lora", "dora", "lokr"} <= set(registry.available("variants"))
    for group in ("families", "formats", "metrics", "variants"):
        for name in registry.available(group):
            entry = registry.find(group, name)
            assert (entry.architecture if group == "families" else entry).name == name


def test_unknown_name_offers_close_ones() -> None:
    with pytest.raises(ConfigError, match='did you mean "kohya"'):
        registry.find("formats", "khoya")


def test_another_package_can_bring_one(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("json_module", "json", "lora_diffusion.formats")
    monkeypatch.setattr(registry, "_points", lambda group: (point,) if group == "formats" else ())
    assert "json_module" in registry.available("formats")
    assert registry.find("formats", "json_module").__name__ == "json"


def test_families_are_imported_without_torch() -> None:
    code = "import sys; from lora_diffusion.core import registry; registry.find('families', 'sd1'); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
