"""Runs commands in processes that are killed: `python -m tests.killed`, driven by JSON lines on stdin.

torch and diffusers are imported once and each command runs in a fork, since the imports would take most of the time.
Nothing is computed before the fork, so that a child is what a fresh process would be.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import diffusers
import open_clip
import torch
import transformers

from lora_diffusion.cli.main import main
from lora_diffusion.workflows import train

__all__ = ["diffusers", "open_clip", "torch", "train", "transformers"]


def serve() -> None:
    """Answers each line {"arguments", "kill", "num_processes"} with {"code"}, which is -9 for a killed child.

    "kill" is null, or [pattern, num_lines, delay_s]: the child is killed `delay_s` after a file matches the glob
    pattern and has that many lines.
    """
    for line in sys.stdin:
        order = json.loads(line)
        if order["num_processes"] > 1:
            code = _run_together(order["arguments"], order["num_processes"])
        else:
            code = _run(order["arguments"], order["kill"])
        print(json.dumps({"code": code}), flush=True)


def _start(arguments: list[str], environment: Mapping[str, str]) -> int:
    child = os.fork()
    if child == 0:
        code = 70
        with contextlib.suppress(BaseException):
            os.environ.update(environment)
            os.dup2(2, 1)
            code = main(arguments)
        os._exit(code)
    return child


def _run_together(arguments: list[str], num_processes: int) -> int:
    """Runs a command as `accelerate launch` does on the CPU; returns the largest code."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29523", "WORLD_SIZE": str(num_processes)}
    shared |= {"ACCELERATE_USE_CPU": "true"}
    children = [
        _start(arguments, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(num_processes)
    ]
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def _run(arguments: list[str], kill: tuple[str, int, float] | None) -> int:
    child = _start(arguments, {})
    due = None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if kill and due is None and _is_there(kill[0], kill[1]):
            due = time.perf_counter() + kill[2]
        if due is not None and time.perf_counter() >= due:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005)


def _is_there(pattern: str, num_lines: int) -> bool:
    actual = Path("/").glob(pattern.lstrip("/"))
    return any(not num_lines or path.read_bytes().count(b"\n") >= num_lines for path in actual)


if __name__ == "__main__":
    serve()
