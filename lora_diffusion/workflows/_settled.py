"""What a file says gives way to the command line, too, where only the variant or the data show that they differ."""

from __future__ import annotations

from lora_diffusion.adapters import variants
from lora_diffusion.config.schema import AdapterConfig, Config
from lora_diffusion.config.settle import give_way
from lora_diffusion.training.record import PREVIEW

_DECIDE_STEPS = (
    "train.epochs",
    "train.max_steps",
    "data.path",
    "train.batch_size",
    "train.gradient_accumulation",
)


def settle_variant(config: Config) -> Config:
    """Returns the config without settings of a file that the variant on the command line does not have."""
    adapter, variant = config.adapter, variants.find(config.adapter.variant)
    if adapter.dropout and not variant.has_dropout:
        config = give_way(config, "adapter.dropout", 0.0, "adapter.variant")
    if adapter.full and variant.stored != variants.FULL.stored:
        config = give_way(config, "adapter.full", (), "adapter.variant")
    if adapter.lokr_factor != AdapterConfig.lokr_factor and variant.name != "lokr":
        config = give_way(config, "adapter.lokr_factor", AdapterConfig.lokr_factor, "adapter.variant")
    return config


def settle_length(config: Config, num_steps: int) -> Config:
    """Returns the config without settings of a file that are longer than the steps which the command line leads to."""
    train = config.train
    if train.epochs is not None and train.warmup_steps >= num_steps:
        config = give_way(config, "train.warmup_steps", 0, *_DECIDE_STEPS)
    if config.output.thumbnail == PREVIEW and train.preview_every_steps > num_steps:
        config = give_way(config, "output.thumbnail", None, *_DECIDE_STEPS)
    return config
