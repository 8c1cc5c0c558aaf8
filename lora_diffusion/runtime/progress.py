"""A progress bar for work that turns out to be long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TypeVar

from lora_diffusion.core.logs import console

_Item = TypeVar("_Item")
_PATIENCE_S = 2.0


def watch(items: Iterable[_Item], total: int, label: str) -> Iterator[_Item]:
    """Yields the items; a bar appears once they have taken more than two seconds."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console(), transient=True)
    task = progress.add_task(label, total=total)
    with ExitStack() as stack:
        is_shown = False
        for item in items:
            yield item
            progress.advance(task)
            if not is_shown and time.monotonic() - start > _PATIENCE_S:
                stack.enter_context(progress)
                is_shown = True
