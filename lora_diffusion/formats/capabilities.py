"""Which format can hold which variant of adapter."""

from __future__ import annotations

from collections.abc import Iterable

from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.protocols.format import Format

READERS = {"comfyui": "kohya", "a1111": "kohya", "forge": "kohya"}
"""Program -> the format that it reads."""


BIAS, EMBEDDINGS = "bias", "embeddings"
"""What a format's `refused` may name besides variants: changes of biases, and text embeddings packed in the file."""


def check_holds_state(format_: Format, state: AdapterState) -> None:
    """Checks that a format can hold all of an adapter.

    Raises:
        UnsupportedError: it cannot; the message gives the reason and the formats that can.
    """
    check_holds(format_, (adapter.variant for _, adapter in state))
    if any(BIAS in adapter.tensors for _, adapter in state):
        check_holds(format_, [BIAS])
    if state.embeddings:
        check_holds(format_, [EMBEDDINGS])


def check_holds(format_: Format, variants: Iterable[str]) -> None:
    """Checks that a format can hold adapters of these variants, as ModuleAdapter names them.

    Raises:
        UnsupportedError: it cannot; the message gives the reason and the formats that can.
    """
    for variant in dict.fromkeys(variants):
        if variant in format_.refused:
            others = [name for name in registry.available("formats") if variant not in _find(name).refused]
            able = f"Formats that can: {', '.join(others)}." if others else "No format can; merge it into its base."
            raise UnsupportedError(
                f"The {format_.name} format cannot hold {_TITLES.get(variant, f'{variant} adapters')}: "
                f"{format_.refused[variant]}. {able}"
            )


def check_output(format_names: Iterable[str], variant: str) -> None:
    """Checks that all formats that a run is to write can hold what it trains.

    Raises:
        UnsupportedError: see `check_holds`.
    """
    for name in format_names:
        check_holds(_find(name), [variant])


_TITLES = {BIAS: "changes of biases", EMBEDDINGS: "text embeddings"}


def _find(name: str) -> Format:
    format_: Format = registry.find("formats", name)
    return format_
