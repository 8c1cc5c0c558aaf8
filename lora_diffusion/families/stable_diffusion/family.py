"""The Stable Diffusion families: one class, which a description of the base makes into a family.

A family of another package that is built alike needs an architecture and options of its own and no other code:

    FAMILY = StableDiffusion(ARCHITECTURE, MyOptions)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_diffusion.architectures.base import DiffusionArchitecture
from lora_diffusion.core.base_model import BaseInfo, Example, Loaded, LossOutput, Part
from lora_diffusion.core.samples import PIECES, Batch, ImageText, Output, Prepared, Request
from lora_diffusion.families.stable_diffusion.options import StableDiffusionOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora_diffusion.core.keymap import KeyMap
    from lora_diffusion.families.stable_diffusion.loading import Source
    from lora_diffusion.families.stable_diffusion.training_loss import Drawn

_PROJECTIONS, _PERCEPTRON = r".*\.self_attn\.(q|k|v|out)_proj", r".*\.mlp\.fc[12]"
UNET = Part(
    groups={
        "attn": (r".*\.attn[12]\.to_(q|k|v|out\.0)",),
        "ff": (r".*\.ff\.net\.(0\.proj|2)",),
        "proj": (r".*\.proj_(in|out)",),
        "conv": (r".*\.resnets\.\d+\.conv(1|2|_shortcut)", r".*\.(down|up)samplers\.\d+\.conv"),
        "all-linear": (r".*\.attn[12]\.to_(q|k|v|out\.0)", r".*\.ff\.net\.(0\.proj|2)", r".*\.time_emb_proj"),
    }
)
TEXT_ENCODER = Part(groups={"attn": (_PROJECTIONS,), "ff": (_PERCEPTRON,), "all-linear": (_PROJECTIONS, _PERCEPTRON)})


class StableDiffusion:
    """A family object; see core.protocols.Family for what each method must do."""

    sample_type = ImageText

    def __init__(self, architecture: DiffusionArchitecture, options_type: type[StableDiffusionOptions]) -> None:
        """Makes the family of an architecture; `options_type.family` must be its name."""
        self.architecture, self.options_type = architecture, options_type
        encoders = dict.fromkeys((encoder.part for encoder in architecture.text_encoders), TEXT_ENCODER)
        self.parts: Mapping[str, Part] = {"unet": UNET, **encoders}

    def _find(self, options: StableDiffusionOptions) -> Source:
        from lora_diffusion.families.stable_diffusion import loading

        return loading.find(self.architecture, options)

    def check(self, options: StableDiffusionOptions) -> BaseInfo:
        """Reads the configs of the base."""
        return self._find(options).info(options)

    def meta_modules(self, options: StableDiffusionOptions) -> dict[str, nn.Module]:
        """Builds UNet and text encoders on the meta device."""
        return self._find(options).meta_modules()

    def key_map(self, format_name: str, options: StableDiffusionOptions | None) -> KeyMap:
        """Maps linear and convolution layers to file names; text encoder names always hold `text_model`."""
        from lora_diffusion.families.stable_diffusion import module_names

        parts = None if options is None else self._find(options).shared_meta_modules()
        return module_names.key_map(format_name, parts, self.architecture)

    def load(self, options: StableDiffusionOptions, device: torch.device) -> Loaded:
        """Loads the pipeline's networks, tokenizers and scheduler."""
        return self._find(options).load(options, device)

    def cache_key(
        self, options: StableDiffusionOptions, trained: frozenset[str], pieces: frozenset[str] = PIECES
    ) -> str:
        """Names the VAE and the text encoders that are not trained by the hash of their weights."""
        from lora_diffusion.families.stable_diffusion import loading

        return loading.cache_key(self.architecture, options, trained, pieces)

    def prepare(
        self, loaded: Loaded, samples: Sequence[ImageText], trained: frozenset[str], pieces: frozenset[str] = PIECES
    ) -> list[Prepared]:
        """Gives "moments" of each view, text columns, and sizes for a UNet that is told of them."""
        from lora_diffusion.families.stable_diffusion import text_encoding, training_loss

        describe = partial(text_encoding.describe, loaded, self.architecture, trained=trained)
        complete = partial(text_encoding.sizes_and_visibility, loaded, self.architecture)
        return training_loss.prepare(loaded, samples, describe, complete, pieces)

    def collate(self, items: Sequence[Prepared]) -> Batch:
        """Stacks items; captions are padded with zeros to the largest number of them."""
        from lora_diffusion.families.stable_diffusion import training_loss

        return training_loss.collate(items)

    def draw(self, loaded: Loaded, batch: Batch, rng: torch.Generator) -> Drawn:
        """Draws a view, latents, timestep, noise and caption of each sample."""
        from lora_diffusion.families.stable_diffusion import training_loss

        return training_loss.draw(loaded, batch, rng)

    def loss(self, loaded: Loaded, drawn: Drawn) -> LossOutput:
        """Mean squared error of the prediction over each sample's latents, weighted by min-SNR if asked."""
        from lora_diffusion.families.stable_diffusion import text_encoding, training_loss

        encode = partial(text_encoding.encode_rows, loaded, self.architecture)
        return training_loss.loss(loaded, drawn, encode)

    def example(
        self, options: StableDiffusionOptions, trained: frozenset[str], batch_size: int, size: tuple[int, int]
    ) -> Example:
        """Gives latents, timesteps, text and sizes for the UNet, and token ids for trained text encoders."""
        from lora_diffusion.families.stable_diffusion import sampling

        parts: Mapping[str, Any] = self._find(options).shared_meta_modules()
        return Example(sampling.example(parts, self.check(options), options, trained, batch_size, size))

    def generate(self, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        """Generates images in batches of requests that differ in prompt and seed only."""
        from lora_diffusion.families.stable_diffusion import sampling, text_encoding

        return sampling.generate(loaded, requests, partial(text_encoding.encode_requests, loaded, self.architecture))
