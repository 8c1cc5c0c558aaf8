"""What damages files as strangers, disks and attackers do; the same random generator makes the same damage."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

_LENGTH = 8
_DEEP: Any = json.loads('[{"a":' * 30 + "1" + "}]" * 30)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, 1e-320, 1e308, -0.0),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "\0", "a\nb\r\n", "\x1b[2J\x1b]0;x\x07\x9b1m", "\ud83d", "\u202e\u2028", "x" * 50_000, "{" * 60),
    *("../../../etc/passwd", "/dev/zero", "/proc/self/mem", "~nobody/x", "file:///etc/passwd", "con\\aux", "a" * 300),
    *(
        "${oc.env:HOME}",
        "{trigger}",
        "nan",
        "1e999",
        "0x10",
        "-1",
        "null",
        "\u0661",
        "%s%n",
        "<|endoftext|>",
        "<image>",
    ),
    *([], {}, [[]], [None], [1, "a"], ["x"] * 2000, {"": None}, {"a": 1}, {"type": "x"}, _DEEP),
)
"""Values that stand where others should."""
_TEXTS = (
    *(b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"9" * 5000, b"-", b"1e400", b"NaN", b"\\ud83d", b"\\u0000", b'"'),
    *(b"\0", b"\x1b[2J", "\u2028".encode(), "\ufeff".encode(), b"\r", b"\n\n", b"\t", b",", b":", b"]", b"}", b"'"),
    *(b"&a [*a]", b"!!python/name:os.x ", b"- " * 200, b"<<: *a", b"---\n", b"%", b"|", b">", b"#", b"\\"),
    *(b"\xff\xfe", b"\xed\xa0\x80", b"\x80", b"\xc3", bytes(64), b"\xff" * 8, b"\xff\xff\xff\x7f"),
)
"""Bytes that stand between others; some are none of any text."""


def mutate(path: Path, rng: random.Random) -> None:
    """Damages a file in its place, or puts something else there."""
    if rng.random() < 0.07:
        _replace(path, rng)
        return
    content = path.read_bytes()
    structured = _STRUCTURED.get(path.suffix.lower())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = structured if structured and rng.random() < 0.6 else _damaged
        try:
            content = change(content, rng)
        except (ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError, csv.Error):
            content = _damaged(content, rng)  # what was changed before left no structure
    path.write_bytes(content)


def remove(path: Path) -> None:
    """Takes away whatever stands there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(path: Path, rng: random.Random) -> None:
    remove(path)
    kind = rng.choice(("gone", "empty", "folder", "pipe", "loop", "device", "broken"))
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "gone":
        path.symlink_to({"loop": path.name, "device": "/dev/zero", "broken": "nothing"}[kind])


def _damaged(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice((1, 2, 4, 8, 40, 400)))
    kind = rng.randrange(7)
    if kind == 0:  # bits
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 2, 8)) if content else 0):
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(damaged)
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + rng.choice(_TEXTS) + content[at:]
    if kind == 3:
        return content[:at] + rng.choice(_TEXTS) + content[end:]
    if kind == 4:
        return content[:at] + content[at:end] * rng.choice((2, 30)) + content[end:]
    if kind == 5:
        return content[:at] + content[end:]
    # Lengths and counts in headers, which stand at the start.
    at, width = rng.randrange(min(len(content), 64) + 1), rng.choice((1, 2, 4, 8))
    number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**40, rng.getrandbits(64))) % 2 ** (8 * width)
    return content[:at] + number.to_bytes(width, rng.choice(("little", "big"))) + content[at + width :]


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Returns (holder, key) of everything in a value, to any depth."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in items:
        found.append((value, key))
        if isinstance(item, dict | list):
            _places(item, found)
    return found


def changed(value: Any, rng: random.Random) -> Any:
    """Returns JSON values of which one is another, of another type, gone, twice or in another place; changes them."""
    places = _places(value, []) if isinstance(value, dict | list) else []
    if not places or rng.random() < 0.02:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    item = holder[key]
    kind = rng.randrange(9)
    if kind <= 2:
        holder[key] = rng.choice(VALUES)
    elif kind == 3:
        del holder[key]
    elif kind == 4:
        holder[key] = rng.choice(([item], {"a": item}, str(item), [item, item], [item] * 300))
    elif kind == 5:
        other, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
    elif kind == 6 and isinstance(holder, dict):
        holder[str(rng.choice((f"{key}x", key[:-1], key.upper(), *VALUES[17:30])))] = holder.pop(key)
    elif isinstance(item, bool) or not isinstance(item, int | float):
        text = str(item)
        at = rng.randrange(len(text) + 1)
        holder[key] = text[:at] + str(rng.choice(VALUES)) + text[at:]
    else:
        holder[key] = rng.choice((-item, item + 1, item * 1000, item + 0.5, 10**9, str(item), item // 3))
    return value


def _json(content: bytes, rng: random.Random) -> bytes:
    text = json.dumps(changed(json.loads(content), rng), indent=rng.choice((None, 2)))
    if rng.random() < 0.1:  # a key twice
        text = text.replace("{", '{"model_type": 1, ', 1) + rng.choice(("", "{}", "\n[1"))
    return text.encode()


def _json_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], rng).replace(b"\n", b" ")
    return b"\n".join(lines)


def _yaml(content: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(changed(yaml.safe_load(content), rng), allow_unicode=rng.random() < 0.5).encode()


def _table(content: bytes, rng: random.Random) -> bytes:
    delimiter = "\t" if b"\t" in content else ","
    rows = list(csv.reader(io.StringIO(content.decode()), delimiter=delimiter))
    changed(rows, rng)
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, lineterminator="\n").writerows(
        row if isinstance(row, list) else [row] for row in rows
    )
    return stream.getvalue().encode(errors="surrogatepass")


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    end = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    text = json.dumps(changed(json.loads(content[_LENGTH:end]), rng)).encode()
    return len(text).to_bytes(_LENGTH, "little") + text + content[end:]


_STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".csv": _table,
    ".tsv": _table,
    ".safetensors": _safetensors,
}
