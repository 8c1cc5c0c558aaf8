"""What is left of metrics.jsonl after power losses, and what of it is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_diffusion.training import image_losses
from lora_diffusion.training.tracking import METRICS_NAME, open_trackers, read_metrics

GOOD = [{"step": step, "loss": 1 / step, "lr": 1e-4, "samples": 1, "seconds": 0.1} for step in range(1, 5)]
DAMAGED = {
    "NULs": b"\x00" * 60,
    "no UTF-8": b'{"step": 2, "loss": 0.5, "note": "\xff\xfe"}',
    "half a line": b'{"step": 2, "lo',
    "two halves": b'{"step": 2, "lo{"step": 3, "loss": 0.3}',
    "no object": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "empty": b"",
    "no step": b'{"loss": 0.5}',
    "no loss": b'{"step": 2}',
    "text": b'{"step": "2", "loss": 0.5}',
    "true": b'{"step": 2, "loss": true}',
    "NaN": b'{"step": 2, "loss": NaN}',
    "NaN as step": b'{"step": NaN, "loss": 0.5}',
    "infinity": b'{"step": 2, "loss": -Infinity}',
    "large": b'{"step": 2, "loss": 1' + b"0" * 400 + b"}",
    "digits": b'{"step": ' + b"9" * 5000 + b', "loss": 0.5}',
    "deep": b"[" * 100_000,
    "line separator": b'{"step": 2, "loss": 0.5\xe2\x80\xa8, "',
    "carriage return": b"\r",
}


def write(folder: Path, line: bytes) -> Path:
    lines = [json.dumps(values).encode() for values in GOOD]
    path = folder / METRICS_NAME
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:], b'{"step": 5, "lo']))
    return path


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_damaged_lines_are_left_out_with_one_warning(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, line)
    assert read_metrics(tmp_path) == GOOD
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 of 5 lines are damaged and left out (line 2)" in caplog.text
    with open_trackers("none", tmp_path, 4, 3) as trackers:
        trackers[0].log({"loss": 0.25}, 4)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == [*GOOD[:3], {"step": 4, "loss": 0.25}]


def test_infinite_norm_of_a_step_that_fp16_left_out_is_no_damage(tmp_path: Path) -> None:
    write(tmp_path, b'{"step": 2, "loss": 0.5, "grad_norm": Infinity}')
    assert len(read_metrics(tmp_path)) == 5


@pytest.mark.parametrize("content", [b"\x00", b'[{"key": "a"}]', b"[1]", b"3", b"null", b'{"a": 1}'])
def test_damaged_losses_of_images_are_left_out(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / image_losses.LOSSES_NAME).write_bytes(content)
    assert image_losses.read_losses(tmp_path) == []
    assert "damaged" in caplog.text
