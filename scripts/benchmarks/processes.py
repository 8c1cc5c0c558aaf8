"""The one process protocol of the benchmarks: functions, repeated steps and commands in processes of their own.

A process starts afresh (spawn), so that nothing that was imported or allocated before counts. Answers come back as
Python objects; a process that dies answers None. Times are wall and CPU seconds, memory the high-water mark.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What something took."""

    wall_s: float
    cpu_s: float
    """User and system."""
    peak_bytes: int
    """High-water mark of memory, of the process or of the GPU."""


class Worker:
    """A process that prepares something once, and answers each question with what that gives."""

    def __init__(self, prepare: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        """Starts the process and waits until all is prepared.

        Args:
            prepare: given the arguments, in the process, returns what answers a question; both can be pickled.
            arguments: of `prepare`.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, prepare, arguments))
        self._process.start()
        theirs.close()
        self.is_alive = self._receive() is not None

    def ask(self, question: Any) -> Any:
        """Returns the answer, or None if the process did not get that far."""
        with suppress(BrokenPipeError):
            self._connection.send((question,))
        return self._receive()

    def close(self) -> None:
        """Ends the process."""
        with suppress(BrokenPipeError):
            self._connection.send(())
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            return None


def _answer(connection: Any, prepare: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    answer = prepare(*arguments)
    connection.send("ready")
    with suppress(EOFError):  # the benchmark has died
        while question := connection.recv():
            connection.send(answer(*question))


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, and returns its answer, or None if it did not get that far."""
    worker = Worker(_prepared, function)
    answer = worker.ask(arguments)
    worker.close()
    return answer


def _prepared(function: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda arguments: function(*arguments)


def call_like_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function as `call` does, with a C library that gives freed memory back at once, as a GPU's does."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**17)
    return call(function, *arguments)


def run_command(command: Sequence[str]) -> Cost:
    """Runs a command; the CPU seconds and the memory are those of it and of all that it started and waited for.

    Raises:
        SystemExit: it failed; what it printed is the message.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile() as printed:
        actions = [(os.POSIX_SPAWN_DUP2, printed.fileno(), stream) for stream in (1, 2)]
        process_id = os.posix_spawnp(command[0], [*command], os.environ, file_actions=actions)
        _, status, usage = os.wait4(process_id, 0)
        wall_s = time.perf_counter() - started
        if code := os.waitstatus_to_exitcode(status):
            printed.seek(0)
            sys.exit(f"{' '.join(command)} ended with {code}:\n{printed.read().decode(errors='replace')}")
    return Cost(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def measured(work: Callable[..., Any], *arguments: Any) -> tuple[Any, Cost]:
    """Returns what a function gives in this process, and its cost; the peak is that of the process so far."""
    started, cpu_started = time.perf_counter(), time.process_time()
    result = work(*arguments)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    return result, Cost(wall_s, cpu_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def resident_bytes() -> int:
    """Returns the memory of this process once all that can be freed is."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Lets the high-water mark start again from what is resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Returns the high-water mark of this process."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
