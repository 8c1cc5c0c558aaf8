"""A file is opened once for all that look at it, and what is known of its names stands in one table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.formats.tensor_names import IA3_FACTOR, SUFFIXES, group, parse_names
from lora_diffusion.workflows.convert import convert
from lora_diffusion.workflows.inspect import inspect
from lora_diffusion.workflows.verify import verify

_PATH = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
_ENDS = {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora_A", "lora_B"), "peft": ("lora_A", "lora_B")}


def _write(folder: Path, format_name: str) -> Path:
    """Writes an adapter of one module of Stable Diffusion 1 and returns the file or folder."""
    stems = {
        "kohya": f"lora_unet_{_PATH.replace('.', '_')}",
        "diffusers": f"unet.{_PATH}",
        "peft": f"base_model.model.{_PATH}",
    }
    factors = zip(_ENDS[format_name], (torch.ones(2, 768), torch.ones(1280, 2)), strict=True)
    tensors = {f"{stems[format_name]}.{end}.weight": tensor for end, tensor in factors}
    if format_name != "peft":
        save_file(tensors, folder / "a.safetensors")
        return folder / "a.safetensors"
    part = folder / "a" / "unet"
    part.mkdir(parents=True)
    save_file(tensors, part / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [_PATH]}
    (part / "adapter_config.json").write_text(json.dumps(config))
    return folder / "a"


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each file is opened for reading."""
    counts: Counter[Path] = Counter()
    plain = Path.open

    def count(path: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if "r" in mode:
            counts[path] += 1
        return plain(path, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", count)
    return counts


_COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "inspect": lambda source, _: inspect(source),
    "verify": lambda source, _: verify(source),
    **{
        f"convert to {name}": lambda source, output, name=name: convert(source, output, name)
        for name in ("kohya", "diffusers", "peft")
    },
}


@pytest.mark.parametrize("command", _COMMANDS)
@pytest.mark.parametrize("format_name", _ENDS)
def test_a_command_reads_header_and_tensors_once(
    format_name: str, command: str, tmp_path: Path, openings: Counter[Path]
) -> None:
    source = _write(tmp_path, format_name)
    openings.clear()
    output = tmp_path / ("b" if command.endswith("peft") else "b.safetensors")
    _COMMANDS[command](source, output)
    of_source = {path: count for path, count in openings.items() if path.is_relative_to(source)}
    once = {"adapter_config.json": 1}
    # The header, and what is behind it.
    assert of_source == {path: once.get(path.name, 2) for path in of_source}
    assert len(of_source) == (2 if format_name == "peft" else 1)


def test_header_is_all_that_is_read_of_a_file_that_is_only_named(tmp_path: Path, openings: Counter[Path]) -> None:
    source = _write(tmp_path, "kohya")
    openings.clear()
    file = parse_file(source)
    assert len(file.tensors) == len(file.shapes) == 2
    assert openings == {source: 1}
    assert file.parts[0].arrays().keys() == {*file.names}
    assert openings == {source: 2}


def test_every_suffix_stands_in_the_table_once() -> None:
    assert len({row.end for row in SUFFIXES}) == len(SUFFIXES)


def test_factor_of_ia3_is_told_by_its_neighbour() -> None:
    names = ["unet.a.weight", "unet.a.on_input", "unet.b.weight", "flat.weight"]
    rows = {tensor.name: tensor.suffix for tensor in parse_names(names)}
    assert rows["unet.a.weight"] == rows["flat.weight"] == IA3_FACTOR
    assert rows["unet.b.weight"] is None
    modules, strange = group(parse_names(names))
    assert list(modules) == ["unet.a"]
    assert strange == ["unet.b.weight", "flat.weight"]
