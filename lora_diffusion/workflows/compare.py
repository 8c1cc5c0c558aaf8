"""One adapter against the base alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_diffusion.config.schema import Config
from lora_diffusion.core import registry
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.samples import Request
from lora_diffusion.data import image_folder
from lora_diffusion.data.captions import without_trigger, words_pattern
from lora_diffusion.data.images import open_rgb
from lora_diffusion.evaluation import before_after
from lora_diffusion.evaluation.before_after import Case, Comparison
from lora_diffusion.runtime.autotune import use_threads
from lora_diffusion.runtime.device import pick_device
from lora_diffusion.scoring.clip import load_clip
from lora_diffusion.workflows._steps import attach, read_adapter


def compare(
    config: Config,
    adapter_path: Path,
    references_path: Path,
    template: Request,
    cases: Sequence[Case] = (),
    seeds: Sequence[int] = (0,),
) -> Comparison:
    """Draws and scores with the adapter file and without it.

    Args:
        config: gives the base, and how captions are read.
        adapter_path: adapter file.
        references_path: folder of captioned pictures that were not trained on.
        template: steps, guidance, size and negative prompt of every picture.
        cases: what to draw; without any, the captions of the references.
        seeds: each case is drawn once with each seed.
    """
    family: Family = registry.find("families", config.model.family)
    info = family.check(config.model)
    references = image_folder.read(replace(config.data, path=str(references_path), trigger="", flip=False), info)
    state = read_adapter(adapter_path, family, config.model)
    trigger = state.metadata.get("modelspec.trigger_phrase", "")
    cases = cases or [_case(sample.captions[0], trigger) for sample in references]
    use_threads(config.train.threads)
    loaded = family.load(config.model, pick_device())
    attach(loaded, [state], [1.0])
    images = [open_rgb(sample.path) for sample in references]
    draw = partial(family.generate, loaded)
    return before_after.compare(draw, load_clip(), cases, images, "adapter0", template, seeds)


def _case(caption: str, trigger: str) -> Case:
    plain = without_trigger(caption, words_pattern(trigger)) if trigger else caption
    return Case(caption, plain, plain)
