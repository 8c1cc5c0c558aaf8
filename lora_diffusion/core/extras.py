"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from lora_diffusion.core.errors import UnsupportedError


def require(package: str, purpose: str) -> ModuleType:
    """Imports an optional package.

    Raises:
        UnsupportedError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UnsupportedError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}); pip install {package}"
        ) from error
