"""YAML of strangers: what it means, and what it may cost."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from lora_diffusion.config import plain_yaml
from lora_diffusion.config.plain_yaml import Plain, YamlError, parse, read_text

BILLION_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{index}: &a{index} [{', '.join([f'*a{index - 1}'] * 10)}]\n" for index in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        *(("1", 1), ("-7", -7), ("010", 10), ("007", 7), ("1_000", 1000), ("0x1F", 31), ("0o17", 15), ("0b11", 3)),
        *(("1e-3", 0.001), ("1.", 1.0), (".5", 0.5), ("+1.5E2", 150.0), (".inf", float("inf")), ("1_0.5", 10.5)),
        *(("", None), ("~", None), ("null", None), ("yes", True), ("Off", False), ("true", True)),
        *(("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("9" * 5000, "9" * 5000), ("1e", "1e"), ("0x", "0x")),
        *(("${oc.env:HOME}", "${oc.env:HOME}"), ("nan", "nan"), ("_", "_"), ("1_", 1)),
    ],
)
def test_what_bare_texts_mean(text: str, meaning: object) -> None:
    value = Plain(text).meaning
    assert value == meaning
    assert type(value) is type(meaning)


def test_scalars_stay_as_they_are_written() -> None:
    value = parse("a: 007\nb: '007'\nc: [no, 1e3, ~]\nd:\n")
    assert value == {"a": "007", "b": "007", "c": ["no", "1e3", "~"], "d": ""}
    assert isinstance(value["a"], Plain)
    assert not isinstance(value["b"], Plain)


def test_aliases_and_merges() -> None:
    value = parse("x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}\nz: *x\n")
    assert value == {"x": {"a": "1", "b": "2"}, "y": {"a": "3", "b": "2"}, "z": {"a": "1", "b": "2"}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\na: 2\n", "line 2: a stands there twice"),
        ("a:\n\tb: 1\n", "line 2: found character that cannot start any token; indent with spaces, not tabs"),
        ("a: [1\nb: 2", "line"),
        ("a: *x\n", "line 1: found undefined alias"),
        ("a: &a [*a]\n", "line 1: *a stands for itself"),
        ("a: !env HOME\n", "line 1: the tag !env is not read"),
        ("a: !!python/object/apply:os.system [id]\n", "is not read"),
        ("a: !!binary aGk=\n", "is not read"),
        ("? [a, b]\n: c\n", "a key must be a text"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("a: 1\x07\n", "control characters"),
        ("a: \ud83d\n", "half a character"),
        ("a: " + "[" * 5000 + "]" * 5000, "nest"),
        ("a: " + "{b: " * 5000, "nest"),
        ("- " * 5000, "nested more than 20 deep"),
        ("- a\n" * 60_000, "more than 50000 values"),
        (BILLION_LAUGHS, "more than 50000 values"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(YamlError) as caught:
        parse(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (codecs.BOM_UTF16_LE + "a: 1".encode("utf-16-le"), "UTF-16; save it as UTF-8"),
        (codecs.BOM_UTF16_BE + "a: 1".encode("utf-16-be"), "UTF-16; save it as UTF-8"),
        (b"a: 1\nb: caf\xe9\n", "line 2 is not UTF-8"),
        (b"a: 1\x00\n", "holds zero bytes"),
        (b"#" * (plain_yaml.MAX_BYTES + 1), "larger than 1 MB"),
    ],
)
def test_what_is_no_text(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(YamlError, match=reason):
        read_text(tmp_path / "c.yaml")


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(codecs.BOM_UTF8 + b"a: 1\r\nb: 2\r\n")
    assert parse(read_text(tmp_path / "c.yaml")) == {"a": "1", "b": "2"}
