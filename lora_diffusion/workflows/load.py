"""A base in memory that generates many times, with adapters whose weights each call may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.config.rules import check_generation, check_negative
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.base_model import BaseInfo, Loaded
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.samples import Output, Request
from lora_diffusion.core.text import suggestion
from lora_diffusion.data.sample_types import IMAGES, SampleType
from lora_diffusion.runtime.autotune import use_threads
from lora_diffusion.runtime.device import pick_device
from lora_diffusion.workflows._base_and_adapters import check_family, find_family, read_adapter

if TYPE_CHECKING:
    from PIL.Image import Image

Adapters = Mapping[str, tuple[Path, float]]
"""Name -> file, folder saved by PEFT, or checkpoint of a run, and its weight."""


class Model:
    """A base in memory with its adapters."""

    def __init__(self, family: Family, loaded: Loaded, weights: Mapping[str, float]) -> None:
        """Takes what `CheckedModel.load` loaded; the weights are those of calls that give no others."""
        self.family, self.loaded, self.weights = family, loaded, dict(weights)

    @property
    def info(self) -> BaseInfo:
        """What is known of the base."""
        return self.loaded.info

    def check(self, sample_type: SampleType) -> Model:
        """Returns the model itself.

        Raises:
            UnsupportedError: it works on another type of samples.
        """
        check_family(self.family, self.loaded.options, sample_type)
        return self

    def load(self) -> Model:
        """Returns the model itself, which is loaded."""
        return self

    def generate(
        self,
        prompt: str,
        *,
        seed: int = 0,
        negative: str = "",
        num_steps: int = 25,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> Image:
        """Returns one image.

        Args:
            prompt: what it shows.
            seed: gives the same starting noise as in diffusers.
            negative: what it should not show.
            num_steps: denoising steps.
            guidance: classifier-free guidance scale; 1 turns it off, None takes what suits the base.
            size: width and height in pixels; None takes what the base was trained on.
            weights: adapter -> weight in this image; the others keep theirs.

        Raises:
            InputError: the base gives no images, there is no adapter of that name, or a value is out of range.
        """
        return self.generate_many([prompt], [seed], negative, num_steps, guidance, size, weights)[0]

    def generate_many(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] = (0,),
        negative: str = "",
        num_steps: int = 25,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> list[Image]:
        """Returns an image of each prompt with each seed, the seeds of the first prompt first; see `generate`."""
        self.check(IMAGES)
        check_generation(prompts, seeds, negative, num_steps, guidance)
        check_size(size, self.info)
        check_negative(negative, self.info.guidance if guidance is None else guidance)
        requests = [Request(text, seed, negative, num_steps, guidance, size) for text in prompts for seed in seeds]
        return [output.image for output in self.answer(requests, weights)]

    def answer(self, requests: Sequence[Request], weights: Mapping[str, float] | None = None) -> list[Output]:
        """Returns what the base gives for requests; `weights` as in `generate`."""
        for name in weights or ():
            if name not in self.weights:
                raise ConfigError(
                    f'There is no adapter "{name}" on this base{suggestion(name, self.weights)}. '
                    f"Loaded: {', '.join(self.weights) or 'none'}."
                )
        chosen = {**self.weights, **(weights or {})} or None
        return self.family.generate(self.loaded, [replace(request, weights=chosen) for request in requests])


@dataclass(frozen=True)
class CheckedModel:
    """A base, and adapters that fit it; nothing is loaded yet."""

    family: Family
    options: ModelOptions
    info: BaseInfo
    states: Mapping[str, AdapterState]
    """Adapter -> what it holds."""
    weights: Mapping[str, float]

    def load(self) -> Model:
        """Loads the base and attaches the adapters."""
        from lora_diffusion.adapters.state import load_state

        use_threads("auto")
        loaded = self.family.load(self.options, pick_device())
        for name, state in self.states.items():
            load_state(loaded, state, name, self.weights[name])
        return Model(self.family, loaded, self.weights)


def check_model(
    model: ModelOptions | Model,
    adapters: Sequence[tuple[Path, float]] | Adapters = (),
    sample_type: SampleType | None = None,
) -> CheckedModel | Model:
    """Checks a base and adapters, and loads nothing; a model that is loaded is taken as it is.

    Args:
        model: the base.
        adapters: with their names, or without.
        sample_type: what the base must work on; None takes any.

    Raises:
        InputError: the base or an adapter cannot be used, or the base works on another type of samples.
    """
    if isinstance(model, Model):
        if adapters:
            raise ConfigError("The model is loaded already; give its adapters to load().")
        return model.check(sample_type) if sample_type else model
    family = find_family(model, sample_type)
    info = family.check(model)
    named = adapters if isinstance(adapters, Mapping) else {f"adapter{i}": one for i, one in enumerate(adapters)}
    states = {name: read_adapter(path, family, model) for name, (path, _) in named.items()}
    return CheckedModel(family, model, info, states, {name: weight for name, (_, weight) in named.items()})


def check_size(size: tuple[int, int] | None, info: BaseInfo) -> None:
    """Checks that a base can generate images of a size.

    Raises:
        ConfigError: a side is no multiple of its step.
    """
    if size and (size[0] % info.size_step or size[1] % info.size_step):
        raise ConfigError(
            f"--size {size[0]}x{size[1]}: both sides must be multiples of {info.size_step} for this base."
        )


def load(model: ModelOptions, adapters: Adapters | None = None) -> Model:
    """Loads a base and attaches adapters.

    Args:
        model: the base.
        adapters: by the names that `Model.generate` knows them by.

    Raises:
        InputError: the base or an adapter cannot be used.
    """
    return check_model(model, adapters or {}).load()
