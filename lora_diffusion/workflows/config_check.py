"""What can be said of a config before anything is read: no import of torch."""

from __future__ import annotations

from lora_diffusion.adapters import variants
from lora_diffusion.config.schema import Config


def check_config(config: Config) -> None:
    """Checks what the loaded config alone cannot know.

    Raises:
        UnsupportedError: the adapter cannot train on a base that is stored so.
    """
    variants.find(config.adapter.variant, config.model.quantization)
