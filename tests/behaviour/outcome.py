"""Runs one command in this process and tells all that it did, without what differs from one run to the next.

Blotted out, since it is no behaviour: paths of this checkout and of temporary folders, dates, durations, rates,
versions, and hashes of whole adapter files, which hold dates and have metadata in any order. Lists of texts are sorted,
as some come from sets. Kept of files: pixels of images, tensors (name, dtype, shape, hash of the bytes) and metadata,
JSON and text; of any other file, and of machine.json, which tells what this machine is, the name alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

from lora_diffusion.cli.main import main

ROOT = Path(__file__).parents[2]
_VOLATILE_KEY = re.compile(
    r"(modelspec\.)?date|(ss_training_)?(started|finished)_at|seconds|ss_session_id|version|libraries|sha256|torch|lora_diffusion(\.evaluated_with)?"
)
_VOLATILE_TEXT = (
    (re.compile(re.escape(str(ROOT))), "ROOT"),
    (re.compile(r"(?<=_at: )\d+\.\d+"), "DATE"),
    (re.compile(r"\b\d+(\.\d+)?(e[+-]\d+)? \w+/s\b"), "RATE"),
    (re.compile(r"(?<=\| )[0-9a-f]{64}(?= \|)"), "HASH"),
    (re.compile(r"(?<=lora-diffusion )\d+\.\d+\.\d+"), "VERSION"),
    (re.compile(r"/tmp/tmp\w+"), "TEMPORARY"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?(Z|[+-]\d\d:\d\d)?"), "DATE"),
    (re.compile(r"\b\d+(\.\d+)? ?(s|ms|seconds?|minutes?|min|h|hours?)\b"), "DURATION"),
)


def outcome(arguments: list[str]) -> dict[str, Any]:
    """Runs `lora-diffusion ARGUMENTS` in the working folder, under which it finds what the command wrote."""
    before = _stamps()
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as exit_:  # argparse
            code = int(exit_.code or 0)
    after = _stamps()
    return {
        "code": code,
        "out": _parsed(out.getvalue()),
        "message": _text(" ".join(err.getvalue().split())),
        "files": {str(path): _content(path) for path in sorted(after) if before.get(path) != after[path]},
        "gone": sorted(str(path) for path in before.keys() - after.keys()),
    }


def _stamps() -> dict[Path, tuple[int, int]]:
    files = (path for path in Path().rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def _content(path: Path) -> Any:
    reader: Callable[[Path], Any] | None = _READERS.get(path.suffix)
    return reader(path) if reader and path.name != "machine.json" else ""


def _image(path: Path) -> Any:
    with Image.open(path) as image:
        return [*image.size, hashlib.sha256(image.convert("RGBA").tobytes()).hexdigest()]


def tensors(path: Path) -> dict[str, Any]:
    """Returns dtype, shape and hash of each tensor of a file, and its normalised metadata."""
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name).contiguous() for name in sorted(file.keys())}
        metadata = normalised(file.metadata() or {})
    entries = {
        name: f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(_bytes(tensor)).hexdigest()}"
        for name, tensor in found.items()
    }
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return {"tensors": len(entries), "sha256": digest, "metadata": metadata}


def _bytes(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def _parsed(text: str) -> Any:
    """Returns normalised JSON, or text."""
    try:
        return normalised(json.loads(text))
    except ValueError:
        return _text(text)


def normalised(value: Any) -> Any:
    """Returns JSON with volatile values blotted out, numbers as repr, so that each bit counts, and texts in order."""
    if isinstance(value, dict):
        return {
            _text(str(key)): "VOLATILE" if _VOLATILE_KEY.fullmatch(str(key)) else normalised(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        entries = [normalised(inner) for inner in value]
        return sorted(entries) if all(isinstance(inner, str) for inner in value) else entries
    if isinstance(value, str):
        return _parsed(value) if value.startswith(("{", "[")) else _text(value)
    return repr(value)


def _text(text: str) -> str:
    text = text.replace(str(Path().resolve()), "WORK")
    for pattern, word in _VOLATILE_TEXT:
        text = pattern.sub(word, text)
    return text


def _json_lines(path: Path) -> Any:
    return [_parsed(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _text_file(path: Path) -> Any:
    return _parsed(path.read_text(encoding="utf-8"))


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": tensors,
    ".png": _image,
    ".jsonl": _json_lines,
    **dict.fromkeys((".json", ".yaml", ".txt", ".tsv", ".srt", ".csv", ".md"), _text_file),
}
