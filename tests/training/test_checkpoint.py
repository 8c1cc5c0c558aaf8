import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from lora_diffusion.core.errors import CheckpointError
from lora_diffusion.training import checkpoint
from tests.training.toy import Toy, ToyBatches


def train(run_path: Path, num_steps: int, **settings: int) -> Toy:
    toy = Toy()
    trainer = toy.trainer(run_path, max_steps=num_steps, **{"save_every_steps": 1, **settings})
    trainer.resume(checkpoint.find_latest(run_path))
    trainer.fit(ToyBatches())
    return toy


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_skipped_with_one_warning(
    tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, 3)
    damage(checkpoint.folder(tmp_path) / "step-000003" / name)
    if name == "state.json" and damage is flip_a_bit:
        (checkpoint.folder(tmp_path) / "step-000003" / name).write_text('{"step": 3}')
    with caplog.at_level(logging.WARNING):
        actual = checkpoint.find_latest(tmp_path)
    assert actual is not None
    assert actual.name == "step-000002"
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert "step-000003" in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"step": 3', b'"step": 1'),
        (b'"num_steps": 3', b'"num_steps": 7'),
        (b'"hooks"', b'"hookz"'),
        (b'"state_sha256"', b'"state_sha257"'),
        (b'"fingerprint": {', b'"fingerprint": [{"a": 1}], "scaler": {'),
        (b"{", b"\x00" * 40),
        (b'"torch"', b'"t\xffrch"'),
        (b'"step": 3', b'"step": ' + 5000 * b"9"),
        (b"{", b"[" * 100_000),
    ],
)
def test_a_changed_state_is_noticed(tmp_path: Path, old: bytes, new: bytes, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, 3)
    path = checkpoint.folder(tmp_path) / "step-000003" / "state.json"
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    actual = checkpoint.find_latest(tmp_path)
    assert actual is not None
    assert actual.name == "step-000002"
    assert "state.json" in caplog.text


def test_state_of_an_older_version_has_no_checksum(tmp_path: Path) -> None:
    train(tmp_path, 3)
    path = checkpoint.folder(tmp_path) / "step-000003" / "state.json"
    values = json.loads(path.read_text())
    del values["state_sha256"]
    path.write_text(json.dumps(values, indent=2))
    assert checkpoint.find_latest(tmp_path) == path.parent
    path.write_text(json.dumps({**values, "scaler": 5}))
    assert checkpoint.find_latest(tmp_path) != path.parent


def test_damage_everywhere_starts_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, 2)
    for path in checkpoint.saved_steps(tmp_path).values():
        truncate(path / "adapter.safetensors")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.find_latest(tmp_path) is None
    assert "2 damaged checkpoints" in caplog.text
    assert "starts over" in caplog.text


_KILLED_WHILE_WRITING = """
import os, sys
from pathlib import Path
from lora_diffusion.training import checkpoint
from tests.training.test_checkpoint import train
checkpoint.write_json = lambda *_: os._exit(9)
train(Path(sys.argv[1]), 3)
"""


def test_a_kill_while_writing_leaves_the_older_one(tmp_path: Path) -> None:
    train(tmp_path, 2)
    command = [sys.executable, "-c", _KILLED_WHILE_WRITING, str(tmp_path)]
    assert subprocess.run(command, check=False, cwd=Path(__file__).parents[2]).returncode == 9
    leftovers = [path for path in checkpoint.folder(tmp_path).iterdir() if path.name.startswith(".part-")]
    assert len(leftovers) == 1
    actual = checkpoint.find_latest(tmp_path)
    assert actual is not None
    assert actual.name == "step-000002"
    assert not leftovers[0].exists()


def test_the_limit_keeps_the_newest(tmp_path: Path) -> None:
    train(tmp_path, 5, keep_checkpoints=2)
    assert list(checkpoint.saved_steps(tmp_path)) == [4, 5]
    train(tmp_path / "all", 5, keep_checkpoints=0)
    assert list(checkpoint.saved_steps(tmp_path / "all")) == [1, 2, 3, 4, 5]


def test_the_last_good_one_outlives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, 1, keep_checkpoints=1)

    def fail(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"step-000002 cannot be written: .*No space.*--resume"):
        train(tmp_path, 2, keep_checkpoints=1)
    assert list(checkpoint.saved_steps(tmp_path)) == [1]
    assert checkpoint.find_latest(tmp_path) is not None


def test_a_damaged_later_one_does_not_push_out_the_good_one(tmp_path: Path) -> None:
    train(tmp_path, 3, keep_checkpoints=1)
    truncate(checkpoint.saved_steps(tmp_path)[3] / "optimizer.safetensors")
    train(tmp_path, 2, keep_checkpoints=1)
    latest = checkpoint.find_latest(tmp_path)
    assert latest is not None
    assert latest.name == "step-000002"


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    train(tmp_path, 1)
    path = checkpoint.saved_steps(tmp_path)[1]
    assert sorted(file.name for file in path.iterdir()) == [
        "adapter.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    state = json.loads((path / "state.json").read_text())
    assert state["step"] == 1
    assert state["versions"]["torch"] == torch.__version__
    assert len(state["sha256"]["adapter.safetensors"]) == 64


def test_params_of_any_step_can_be_loaded(tmp_path: Path) -> None:
    trained = train(tmp_path, 2)
    fresh = Toy()
    checkpoint.load_params(checkpoint.saved_steps(tmp_path)[2], fresh.params)
    assert all(map(torch.equal, trained.weights().values(), fresh.weights().values()))


def test_another_adapter_is_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path, 1)
    other = Toy()
    other.params["unet"]["0.bias"] = torch.nn.Parameter(torch.zeros(9))
    del other.params["text_encoder"]["2.bias"]
    with pytest.raises(CheckpointError, match=r"(?s)another adapter: 2 parameters.*text_encoder/2.bias.*unet/0.bias"):
        checkpoint.load_params(checkpoint.saved_steps(tmp_path)[1], other.params)
