"""What a folder of transformers may hold besides a model, and must not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.files import not_a_file, read_json
from lora_diffusion.core.text import shown

_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
_MOST_LAYERS = 1000


def check_model_folder(folder: Path, what: str) -> None:
    """Checks that loading a folder loads this folder alone, and no code.

    transformers never runs code of a folder with `trust_remote_code=False`, but loads a PEFT adapter that lies in it,
    with the base that this one names, and attention kernels of the hub, which are code, where its config names some.

    Args:
        folder: as `save_pretrained` makes it.
        what: names it in messages.

    Raises:
        ModelError: it does.
    """
    check_plain(folder, what)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{what} holds an adapter_config.json, so that an adapter and another base would be loaded with it; give "
            "the plain model, without the files of the adapter."
        )
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return  # whoever reads the config tells of it
    check_sizes(config, what)
    for value in _named(config, lambda key: key in _ATTENTION):
        if "/" in str(value) or ":" in str(value):
            raise ModelError(
                f"{what} names the kernel {shown(str(value))} for its attention, which is code from the hub; take "
                "attn_implementation out of its config.json."
            )


def check_plain(folder: Path, what: str) -> None:
    """Checks that a folder and those in it hold files and folders only: to open a pipe waits for who writes into it.

    Args:
        folder: may be missing.
        what: names it in messages.

    Raises:
        ModelError: something else is there.
    """
    for pattern in ("*", "*/*"):
        for path in folder.glob(pattern):
            if file_type := not_a_file(path):
                raise ModelError(
                    f"{what} holds {path}, which is {file_type} and no file; take it away or fetch it again."
                )


def check_sizes(config: Any, what: str, largest: int | None = None) -> None:
    """Checks the numbers in the config of a model that decide how long it takes to build, and what it takes.

    Args:
        config: as its JSON file holds it.
        what: names it in messages.
        largest: that any number but the size of a vocabulary may be; None where nothing is built before its weights are
            compared.

    Raises:
        ModelError: it has more layers than any model, or a greater number.
    """
    for value in _named(config, lambda key: "layer" in key or "depth" in key):
        if any(isinstance(number, int) and number > _MOST_LAYERS for number in _numbers(value)):
            raise ModelError(f"{what} announces {shown(str(value), 50)} layers; its config is damaged, fetch it again.")
    limit = largest or math.inf
    for value in _named(config, lambda key: key != "vocab_size"):
        if any(number > limit for number in _numbers(value)):
            raise ModelError(f"{what} announces {shown(str(value), 50)}; its config is damaged, fetch it again.")


def _numbers(value: Any) -> list[float]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int | float)]


def _named(config: Any, wanted: Callable[[str], bool], depth: int = 4) -> Iterator[Any]:
    """Yields the values under such keys, at any level."""
    if isinstance(config, dict) and depth:
        yield from (value for key, value in config.items() if wanted(key))
        for inner in config.values():
            yield from _named(inner, wanted, depth - 1)
