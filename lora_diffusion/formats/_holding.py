"""Which spelling can hold which kind of adapter."""

from __future__ import annotations

from collections.abc import Iterable

from lora_diffusion.core import registry
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.protocols import Format

READERS = {"comfyui": "kohya", "a1111": "kohya", "forge": "kohya"}
"""Program -> the format that it reads."""


def check_holds(format_: Format, variants: Iterable[str]) -> None:
    """Checks that a format can hold adapters of these variants, as ModuleAdapter names them.

    Raises:
        UnsupportedError: it cannot; the message gives the reason and the formats that can.
    """
    for variant in dict.fromkeys(variants):
        if variant in format_.refused:
            others = [name for name in registry.available("formats") if variant not in _find(name).refused]
            raise UnsupportedError(
                f"The {format_.name} spelling cannot hold {variant} adapters: {format_.refused[variant]}. "
                f"Formats that can: {', '.join(others)}."
            )


def check_output(format_names: Iterable[str], variant: str) -> None:
    """Checks that all formats that a run is to write can hold what it trains.

    Raises:
        UnsupportedError: see `check_holds`.
    """
    for name in format_names:
        check_holds(_find(name), [variant])


def _find(name: str) -> Format:
    format_: Format = registry.find("formats", name)
    return format_
