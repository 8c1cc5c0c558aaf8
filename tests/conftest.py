from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_diffusion.core.logs import logger

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors gain nothing from threads, and lose much where another program computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what takes minutes or hours unless it is asked for."""
    for name, duration in (("slow", "minutes"), ("hostile", "an hour")):
        if name in config.getoption("-m"):
            continue
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"takes {duration}; run it with -m {name}"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the tests out of the user's cache."""
    os.environ["LORA_DIFFUSION_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_logs() -> Iterator[None]:
    """Undoes what a command does to the logger, for tests that listen to it."""
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Stable Diffusion; shared, never changed."""
    from tests.tiny import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny-sd")
