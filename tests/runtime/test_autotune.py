import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_diffusion.runtime import autotune
from lora_diffusion.runtime.autotune import measured_choice, use_channels_last, use_threads


class Candidates:
    """Calls that take a given time and count how often they ran."""

    def __init__(self, **seconds: float) -> None:
        self.runs = dict.fromkeys(seconds, 0)
        self.calls: dict[str, Callable[[], None]] = {name: self._call(name, s) for name, s in seconds.items()}

    def _call(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.runs[name] += 1
            time.sleep(seconds)

        return call


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_fastest_is_chosen_and_remembered() -> None:
    first = Candidates(slow=0.02, fast=0.001)
    assert measured_choice("way", first.calls) == "fast"
    assert first.runs == {"slow": 4, "fast": 4}
    turned = Candidates(slow=0.0, fast=0.01)
    assert measured_choice("way", turned.calls) == "fast"
    assert sum(turned.runs.values()) == 0
    assert measured_choice("another way", turned.calls) == "slow"


def test_without_a_home_folder_it_is_measured_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORA_DIFFUSION_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", str)
    for _ in range(2):
        candidates = Candidates(slow=0.02, fast=0.001)
        assert measured_choice("way", candidates.calls) == "fast"
        assert candidates.runs == {"slow": 4, "fast": 4}


@pytest.mark.parametrize(("load", "valid_s"), [(0.5, 24 * 3600), (20.0, 3600)])
def test_an_answer_is_measured_again_after_a_day_or_an_hour(
    load: float, valid_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "_num_cores", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load), raising=False)
    measured_choice("way", Candidates(a=0.01, b=0.0).calls)
    now, turned = time.time(), Candidates(a=0.0, b=0.01)
    monkeypatch.setattr(time, "time", lambda: now + valid_s - 60)
    assert measured_choice("way", turned.calls) == "b"
    monkeypatch.setattr(time, "time", lambda: now + valid_s + 60)
    assert measured_choice("way", turned.calls) == "a"


@pytest.mark.parametrize(("now", "choice"), [(0.001, "many"), (0.05, "one")])
def test_a_busy_machine_gives_up_only_an_answer_that_collapsed(
    now: float, choice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(autotune, "_is_busy", lambda: False)
    quiet = Candidates(one=0.01, many=0.0)
    assert measured_choice("threads", quiet.calls, tmp_path / "run.json") == "many"
    monkeypatch.setattr(autotune, "_is_busy", lambda: True)
    busy = Candidates(one=0.002, many=now)
    assert measured_choice("threads", busy.calls) == choice
    assert measured_choice("threads", busy.calls, tmp_path / "run.json") == "many"
    monkeypatch.setattr(autotune, "_is_busy", lambda: False)
    assert measured_choice("threads", quiet.calls) == choice


def test_a_run_keeps_its_own_answer(tmp_path: Path) -> None:
    record = tmp_path / "run/machine.json"
    assert measured_choice("way", Candidates(a=0.0, b=0.01).calls, record) == "a"
    assert json.loads(record.read_text()) == {"way": "a"}
    (tmp_path / "cache/machine.json").unlink()
    assert measured_choice("way", Candidates(a=0.01, b=0.0).calls, record) == "a"


@pytest.mark.parametrize("content", ["", "[1]", '{"way": "gone"}'])
def test_a_damaged_or_foreign_record_is_measured_again(tmp_path: Path, content: str) -> None:
    record = tmp_path / "machine.json"
    record.write_text(content)
    assert measured_choice("way", Candidates(a=0.0, b=0.01).calls, record) == "a"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert measured_choice("way", Candidates(a=0.0, b=0.01).calls) == "a"


def test_threads_take_the_given_number() -> None:
    assert use_threads("1") == torch.get_num_threads() == 1
    assert use_threads("2") == torch.get_num_threads() == 2


def test_auto_threads_are_measured_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(autotune, "_num_cores", lambda: 2)
    chosen = use_threads("auto", tmp_path / "machine.json")
    assert chosen in (1, 2)
    assert json.loads((tmp_path / "machine.json").read_text()) == {"threads": str(chosen)}
    torch.set_num_threads(3 - chosen)
    assert use_threads("auto", tmp_path / "machine.json") == chosen


def test_a_gpu_leaves_the_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_num_threads()
    assert use_threads("auto") == before


def test_channels_last_changes_the_layout_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(1, 3, 4, 4)
    before = net(x)
    use_channels_last([net], torch.device("cpu"))
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x), before)


def test_channels_last_is_left_out_on_mps() -> None:
    net = nn.Conv2d(3, 4, 3)
    use_channels_last([net], torch.device("mps"))
    assert net.weight.is_contiguous()
