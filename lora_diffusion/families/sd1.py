"""Stable Diffusion 1.x: one CLIP text encoder, a UNet on VAE latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_diffusion.architectures import sd1
from lora_diffusion.architectures.base import DiffusionArchitecture
from lora_diffusion.core.base_model import BaseInfo, Example, Loaded, LossOutput, Part
from lora_diffusion.core.samples import PIECES, Batch, ImageText, Output, Prepared, Request
from lora_diffusion.families.stable_diffusion.options import StableDiffusionOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_diffusion.core.keymap import KeyMap
    from lora_diffusion.families.stable_diffusion.sampling import Condition

UNET = Part(
    groups={
        "attn": (r".*\.attn[12]\.to_(q|k|v|out\.0)",),
        "ff": (r".*\.ff\.net\.(0\.proj|2)",),
        "proj": (r".*\.proj_(in|out)",),
        "conv": (r".*\.resnets\.\d+\.conv(1|2|_shortcut)", r".*\.(down|up)samplers\.\d+\.conv"),
        "all-linear": (r".*\.attn[12]\.to_(q|k|v|out\.0)", r".*\.ff\.net\.(0\.proj|2)", r".*\.time_emb_proj"),
    }
)
TEXT_ENCODER = Part(
    groups={
        "attn": (r".*\.self_attn\.(q|k|v|out)_proj",),
        "ff": (r".*\.mlp\.fc[12]",),
        "all-linear": (r".*\.self_attn\.(q|k|v|out)_proj", r".*\.mlp\.fc[12]"),
    }
)


@dataclass(frozen=True)
class SD1Options(StableDiffusionOptions):
    """A Stable Diffusion 1.x base and its training objective."""

    family: str = "sd1"
    """Kind of base model."""


class StableDiffusion1:
    """The family object; see core.protocols.Family for what each method must do."""

    architecture: DiffusionArchitecture = sd1.ARCHITECTURE
    options_type: type[StableDiffusionOptions] = SD1Options
    sample_type = ImageText
    parts: Mapping[str, Part] = {"unet": UNET, "text_encoder": TEXT_ENCODER}

    def check(self, options: StableDiffusionOptions) -> BaseInfo:
        """Reads the configs of the base."""
        from lora_diffusion.families.stable_diffusion import loading

        return loading.find(options).info(options)

    def skeleton(self, options: StableDiffusionOptions) -> dict[str, nn.Module]:
        """Builds UNet and text encoder on the meta device."""
        from lora_diffusion.families.stable_diffusion import loading

        return loading.find(options).skeleton()

    def key_map(self, format_name: str, options: StableDiffusionOptions | None) -> KeyMap:
        """Maps linear and convolution layers to file names; text encoder names always hold `text_model`."""
        from lora_diffusion.families.stable_diffusion import loading, module_names

        parts = None if options is None else loading.find(options).outline()
        return module_names.key_map(format_name, parts, self.architecture)

    def load(self, options: StableDiffusionOptions, device: torch.device) -> Loaded:
        """Loads the pipeline's networks, tokenizer and scheduler."""
        from lora_diffusion.families.stable_diffusion import loading

        return loading.find(options).load(options, device)

    def cache_key(
        self, options: StableDiffusionOptions, trained: frozenset[str], pieces: frozenset[str] = PIECES
    ) -> str:
        """Names the VAE and, unless it is trained, the text encoder by the hash of their weights."""
        from lora_diffusion.families.stable_diffusion import loading

        return loading.cache_key(options, trained, pieces)

    def prepare(
        self, loaded: Loaded, samples: Sequence[ImageText], trained: frozenset[str], pieces: frozenset[str] = PIECES
    ) -> list[Prepared]:
        """Gives "moments", and the column "text": embeddings [captions, length, dim], or token ids if trained."""
        from lora_diffusion.families.stable_diffusion import text_encoding, training_loss

        def describe(prompts: Sequence[str]) -> dict[str, Tensor]:
            ids = text_encoding.tokenize(loaded.modules["tokenizer"], prompts)
            if "text_encoder" in trained:
                return {"text": ids}
            return text_encoding.in_chunks(lambda rows: {"text": _read(loaded, rows)}, ids)

        return training_loss.prepare(loaded, samples, describe, pieces)

    def collate(self, items: Sequence[Prepared]) -> Batch:
        """Stacks items; captions are padded with zeros to the largest number of them."""
        from lora_diffusion.families.stable_diffusion import training_loss

        return training_loss.collate(items)

    def loss(self, loaded: Loaded, batch: Batch, rng: torch.Generator) -> LossOutput:
        """Mean squared error of the prediction over each sample's latents, weighted by min-SNR if asked."""
        from lora_diffusion.families.stable_diffusion import training_loss

        return training_loss.loss(loaded, batch, rng, _encode)

    def example(
        self, options: StableDiffusionOptions, trained: frozenset[str], batch_size: int, size: tuple[int, int]
    ) -> Example:
        """Gives latents, timesteps and text for the UNet, and token ids for a trained text encoder."""
        from lora_diffusion.families.stable_diffusion import loading, sampling

        parts = loading.find(options).outline()
        return Example(sampling.example(parts, self.check(options), options, trained, batch_size, size))

    def generate(self, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        """Draws pictures in batches of requests that differ in prompt and seed only."""
        from lora_diffusion.families.stable_diffusion import sampling

        return sampling.generate(loaded, requests, _embed)


def _read(loaded: Loaded, token_ids: Tensor) -> Tensor:
    """Returns the text encoder's embeddings, [num_prompts, length, dim]."""
    from lora_diffusion.families.stable_diffusion import text_encoding

    return text_encoding.encode(loaded.parts["text_encoder"], token_ids, loaded.options.clip_skip or 1)


def _encode(loaded: Loaded, rows: Mapping[str, Tensor]) -> Condition:
    """Returns embeddings on the device; token ids are encoded, with gradient."""
    text = rows["text"]
    context = text if text.is_floating_point() else _read(loaded, text)
    return {"context": context.to(loaded.device, loaded.parts["unet"].dtype)}  # type: ignore[arg-type]


def _embed(loaded: Loaded, requests: Sequence[Request], size: tuple[int, int]) -> tuple[Condition, Condition]:
    """Returns the conditions of the prompts and of the negative prompts."""
    from lora_diffusion.families.stable_diffusion import text_encoding

    del size

    def embed(prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return (_read(loaded, text_encoding.tokenize(loaded.modules["tokenizer"], prompts)),)

    def condition(prompts: list[str]) -> Condition:
        (text,) = text_encoding.remembered(loaded, prompts, embed)
        return _encode(loaded, {"text": text})

    return condition([r.prompt for r in requests]), condition([r.negative for r in requests])


FAMILY = StableDiffusion1()
