"""Runs commands in processes that are killed: `python -m tests.workflows.killed`, driven by JSON lines on stdin.

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
from pathlib import Path

import diffusers
import torch
import transformers

from lora_diffusion import workflows
from lora_diffusion.cli.main import main

__all__ = ["diffusers", "torch", "transformers", "workflows"]


def serve() -> None:
    """Answers each line {"arguments", "seconds", "watch"} with {"code", "seconds"}; code -9 means killed.

    A child is killed after `seconds`, or as soon as a file matches the glob pattern `watch`, if they are not null.
    """
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(_run(order["arguments"], order["seconds"], order["watch"])), flush=True)


def _run(arguments: list[str], seconds: float | None, watch: str | None) -> dict[str, float]:
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 70
        with contextlib.suppress(BaseException):
            os.dup2(2, 1)
            code = main(arguments)
        os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return {"code": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - started}
        is_late = seconds is not None and time.perf_counter() - started > seconds
        if is_late or (watch and any(Path("/").glob(watch.lstrip("/")))):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


if __name__ == "__main__":
    serve()
