"""Train, compose, evaluate and convert LoRA adapters for Stable Diffusion, LLaVA and Whisper.

The functions of `__all__` are what notebooks, plugins and other programs call; `lora_diffusion/api.py` holds them. They
are imported when they are first used, so that `import lora_diffusion` takes no time.
"""

import sys

from lora_diffusion.core.version import __version__ as __version__

TYPE_CHECKING = False
if TYPE_CHECKING:  # type checkers take it for true, and nothing is imported for it
    from lora_diffusion.api import LoraDiffusionError as LoraDiffusionError
    from lora_diffusion.api import ask as ask
    from lora_diffusion.api import compose as compose
    from lora_diffusion.api import convert as convert
    from lora_diffusion.api import estimate as estimate
    from lora_diffusion.api import evaluate as evaluate
    from lora_diffusion.api import export as export
    from lora_diffusion.api import extract as extract
    from lora_diffusion.api import generate as generate
    from lora_diffusion.api import inspect as inspect
    from lora_diffusion.api import load as load
    from lora_diffusion.api import load_config as load_config
    from lora_diffusion.api import merge as merge
    from lora_diffusion.api import report as report
    from lora_diffusion.api import resize as resize
    from lora_diffusion.api import select as select
    from lora_diffusion.api import train as train
    from lora_diffusion.api import transcribe as transcribe
    from lora_diffusion.api import verify as verify

__all__ = [
    "LoraDiffusionError",
    "ask",
    "compose",
    "convert",
    "estimate",
    "evaluate",
    "export",
    "extract",
    "generate",
    "inspect",
    "load",
    "load_config",
    "merge",
    "report",
    "resize",
    "select",
    "train",
    "transcribe",
    "verify",
]


class _Public(property):
    """A name of `api.py`. It wins over a package of the same name, such as compose/, whose import sets it, too."""

    def __init__(self, name: str) -> None:
        super().__init__(lambda _: getattr(_api(), name))

    def __set__(self, package: object, value: object) -> None:
        if not isinstance(value, type(sys)):
            super().__set__(package, value)


class _Package(type(sys)):  # type: ignore[misc]  # the class of modules, without an import
    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


def _api() -> object:
    from lora_diffusion import api

    return api


for _name in __all__:
    setattr(_Package, _name, _Public(_name))
sys.modules[__name__].__class__ = _Package
