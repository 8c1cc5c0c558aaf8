"""What is fastest on this machine: measured briefly, remembered, so that equal runs decide alike."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import default_cache_path, read_json, write_json
from lora_diffusion.core.logs import logger

if TYPE_CHECKING:
    import torch
    from torch import nn

_VALID_S = 24 * 3600
_VALID_IF_BUSY_S = 3600
_COLLAPSE = 3.0
"""How many times slower than the best a remembered answer may have become before it is given up."""
_ROUNDS = 3
_ENOUGH_S = 1.0


def measured_choice(
    question: str,
    candidates: Mapping[str, Callable[[], object]],
    record_path: Path | None = None,
    cache_path: Path | None = None,
) -> str:
    """Returns the name of the candidate that runs fastest on this machine.

    The answer is taken from the run's own record if it has one, else from what this machine measured within the last
    day (hour, if other programs kept it busy then), else it is measured: one call of each to warm up, then up to three
    in turns, of which the best counts. An answer from quiet times is given up only where other programs make it several
    times slower than another, since equal runs should compute alike.

    Args:
        question: what is asked, with everything the answer depends on besides the machine, say "attention 4096x40".
        candidates: name -> call that does the work once.
        record_path: JSON file of the run that keeps its answers, so that a resumed run computes the same.
        cache_path: JSON file of the machine's answers; None takes machine.json in the user's cache.
    """
    recorded = _read(record_path).get(question) if record_path else None
    if recorded in candidates:
        return str(recorded)
    choice = _choice_of_machine(f"{_machine()}, {question}", candidates, cache_path)
    if record_path:
        _remember(record_path, question, choice)
    return choice


def _choice_of_machine(key: str, candidates: Mapping[str, Callable[[], object]], cache_path: Path | None) -> str:
    cache_path = cache_path or _machine_file()
    known, busy = _read(cache_path).get(key, {}) if cache_path else {}, _is_busy()
    is_valid = known.get("choice") in candidates and time.time() < known.get("valid_until", 0)
    if is_valid and (known.get("busy") or not busy):
        return str(known["choice"])
    seconds = _measure(candidates)
    best = min(seconds, key=lambda name: seconds[name])
    logger.debug("%s: %s of %s", key, best, seconds)
    if is_valid and seconds[known["choice"]] <= _COLLAPSE * seconds[best]:
        return str(known["choice"])
    valid_until = time.time() + (_VALID_IF_BUSY_S if busy else _VALID_S)
    if cache_path:
        _remember(cache_path, key, {"choice": best, "valid_until": valid_until, "busy": busy, "seconds": seconds})
    return best


def _machine_file() -> Path | None:
    """Returns where this machine's answers are; None where there is no home folder, so that they are measured again."""
    try:
        return default_cache_path() / "machine.json"
    except ConfigError:
        return None


def use_threads(setting: str, record_path: Path | None = None) -> int:
    """Sets the number of CPU threads that torch computes with, and returns it.

    Args:
        setting: value of `train.threads`, a number or auto. More threads are not always faster: beside other work on
            the same cores they wait for each other. So auto measures 1, half and all cores, unless a GPU computes.
        record_path: as in `measured_choice`.
    """
    import torch

    if setting != "auto":
        torch.set_num_threads(int(setting))
    elif not torch.cuda.is_available():
        cores = _num_cores()
        counts = sorted({1, max(1, cores // 2), cores})
        probe = _layers()
        candidates = {str(count): partial(_run_layers, count, *probe) for count in counts}
        torch.set_num_threads(int(measured_choice("threads", candidates, record_path)))
    return torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the context torch computes on one thread: thousands of small tensors only wait for a second one."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def use_channels_last(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Lays convolution weights out as [out, height, width, in], in place, where that is the faster layout.

    On the CPU a training step of Stable Diffusion 1.5 takes 3 to 5 % less time so, and one of a small UNet 12 % less to
    4 % more, by the processor; on GPUs tensor cores want it. Files must be written from contiguous copies.
    """
    import torch

    if device.type in ("cpu", "cuda"):
        for network in networks:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _layers() -> tuple[torch.nn.Module, torch.Tensor]:
    """A convolution and a matrix product of the size that a small UNet has: 25 ms on one core."""
    import torch
    from torch import nn

    layers = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.Flatten(2), nn.Linear(1024, 256)).requires_grad_(False)
    return layers, torch.ones(4, 128, 32, 32, requires_grad=True)


def _run_layers(num_threads: int, layers: torch.nn.Module, pixels: torch.Tensor) -> None:
    import torch

    torch.set_num_threads(num_threads)
    for _ in range(2):
        layers(pixels).sum().backward()


def _measure(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    seconds = dict.fromkeys(candidates, float("inf"))
    first = time.perf_counter()
    for turn in range(_ROUNDS + 1):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            if turn > 0:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
        if turn > 0 and time.perf_counter() - first > _ENOUGH_S:
            break
    return seconds


def _is_busy() -> bool:
    """Says whether other programs took more than half of the cores in the last minute; ours is taken for one core."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] - 1 > _num_cores() / 2


def _machine() -> str:
    import torch

    return f"{_cpu_model()}, {_num_cores()} cores, torch {torch.__version__}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file, or nothing where it is missing or damaged: answers can be measured again."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(path: Path, key: str, value: Any) -> None:
    try:
        write_json(path, {**_read(path), key: value})
    except OSError as error:
        logger.debug("%s cannot be written (%s); it will be measured again.", path, error)
