"""Functions, repeated questions and commands in processes of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

from scripts.benchmarks.processes import Worker, call, call_like_gpu, measured, run_command


def _counting(start: int) -> Callable[[int], tuple[int, int]]:
    seen = [start]

    def add(number: int) -> tuple[int, int]:
        seen.append(number)
        return os.getpid(), sum(seen)

    return add


def _dies(number: int) -> None:
    os._exit(number)


def test_a_worker_prepares_once_and_answers_each_question() -> None:
    worker = Worker(_counting, 10)
    answers = [worker.ask(number) for number in (1, 2)]
    worker.close()
    assert [total for _, total in answers] == [11, 13]
    assert answers[0][0] == answers[1][0] != os.getpid()


@pytest.mark.parametrize("caller", [call, call_like_gpu])
def test_a_process_that_dies_answers_none(caller: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "131072")
    assert caller(divmod, 7, 2) == (3, 1)
    assert caller(_dies, 3) is None


def test_a_command_costs_what_its_process_does_and_says_why_it_failed() -> None:
    cost = run_command([sys.executable, "-c", "sum(range(3_000_000)); bytes(80_000_000)"])
    assert cost.wall_s > 0
    assert cost.cpu_s > 0.02
    assert cost.peak_bytes > 80_000_000
    with pytest.raises(SystemExit, match="ended with 3:\nwhy"):
        run_command([sys.executable, "-c", "print('why'); exit(3)"])


def test_work_in_this_process_is_measured() -> None:
    result, cost = measured(sum, range(1_000_000))
    assert result == sum(range(1_000_000))
    assert 0 < cost.cpu_s < 5
