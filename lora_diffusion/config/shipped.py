"""The config files that come along, for training. Prompt suites, in `configs/evaluate`, are no configs."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import shipped_path
from lora_diffusion.core.keymap import suggestion


def shipped() -> dict[str, tuple[Path, str]]:
    """Returns name -> (file, first comment line) of the configs that come along, say "sd1/style"."""
    root = shipped_path("configs")
    found = {}
    for path in sorted(set(root.rglob("*.yaml")) - set(root.glob("evaluate/*"))):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        found[path.relative_to(root).with_suffix("").as_posix()] = (path, first.lstrip("# "))
    return found


def find_shipped(name: str) -> Path:
    """Returns the file of a shipped config.

    Raises:
        ConfigError: no such config; offers close names.
    """
    configs = shipped()
    if name not in configs:
        raise ConfigError(f"No config is called {name!r}{suggestion(name, configs)}. Known: {', '.join(configs)}.")
    return configs[name][0]
