"""Stable Diffusion XL: two text encoders, a summary of the prompt, and a UNet that is told sizes and crops.

Source: Podell et al. 2023, arXiv 2307.01952, sections 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_diffusion.architectures import sdxl
from lora_diffusion.core.base_model import BaseInfo, Example, Loaded, LossOutput, Part
from lora_diffusion.core.samples import PIECES, Batch, ImageText, Output, Prepared, Request
from lora_diffusion.families.sd1 import TEXT_ENCODER, UNET
from lora_diffusion.families.stable_diffusion.options import StableDiffusionOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_diffusion.core.keymap import KeyMap
    from lora_diffusion.families.stable_diffusion.sampling import Condition

_TOWERS = {"text_encoder": ("tokenizer", "text"), "text_encoder_2": ("tokenizer_2", "text_2")}
"""Text encoder -> its tokenizer, and the column that holds its embeddings, or token ids if it is trained."""
_SUMMARY = "summary"
_SHOWN = "shown"
_ENDINGS = ("", "_empty", "_prior")
"""Of the text columns."""


@dataclass(frozen=True)
class SDXLOptions(StableDiffusionOptions):
    """A Stable Diffusion XL base and its training objective."""

    family: str = "sdxl"
    """Kind of base model."""


class StableDiffusionXL:
    """The family object; see core.protocols.Family for what each method must do."""

    architecture = sdxl.ARCHITECTURE
    options_type = SDXLOptions
    sample_type = ImageText
    parts: Mapping[str, Part] = {"unet": UNET, "text_encoder": TEXT_ENCODER, "text_encoder_2": TEXT_ENCODER}

    def check(self, options: SDXLOptions) -> BaseInfo:
        """Reads the configs of the base."""
        from lora_diffusion.families.stable_diffusion import loading

        return loading.find(options).info(options)

    def skeleton(self, options: SDXLOptions) -> dict[str, nn.Module]:
        """Builds UNet and both text encoders on the meta device."""
        from lora_diffusion.families.stable_diffusion import loading

        return loading.find(options).skeleton()

    def key_map(self, format_name: str, options: SDXLOptions | None) -> KeyMap:
        """Maps linear and convolution layers to file names; text encoder names always hold `text_model`."""
        from lora_diffusion.families.stable_diffusion import loading, module_names

        parts = None if options is None else loading.find(options).outline()
        return module_names.key_map(format_name, parts, self.architecture)

    def load(self, options: SDXLOptions, device: torch.device) -> Loaded:
        """Loads the pipeline's networks, tokenizers and scheduler."""
        from lora_diffusion.families.stable_diffusion import loading

        return loading.find(options).load(options, device)

    def cache_key(self, options: SDXLOptions, trained: frozenset[str], pieces: frozenset[str] = PIECES) -> str:
        """Names the VAE and the text encoders that are not trained by the hash of their weights."""
        from lora_diffusion.families.stable_diffusion import loading

        return loading.cache_key(options, trained, pieces)

    def prepare(
        self, loaded: Loaded, samples: Sequence[ImageText], trained: frozenset[str], pieces: frozenset[str] = PIECES
    ) -> list[Prepared]:
        """Gives "moments" and "time_ids" of each view, and text columns.

        "text" and "text_2" hold embeddings [captions, length, dim], or token ids if that encoder is trained; "summary"
        [captions, dim] is there unless the second is. "shown" is 0 for an empty caption that the base knows as zeros.
        """
        from lora_diffusion.families.stable_diffusion import text_encoding, training_loss

        def describe(prompts: Sequence[str]) -> dict[str, Tensor]:
            columns = {}
            for tower, (tokenizer, column) in _TOWERS.items():
                ids = text_encoding.tokenize(loaded.modules[tokenizer], prompts)
                if tower in trained:
                    columns[column] = ids
                    continue
                columns |= text_encoding.in_chunks(lambda rows, tower=tower: _read(loaded, tower, rows), ids)
            return columns

        items = training_loss.prepare(loaded, samples, describe, pieces)
        return [_completed(loaded, item, sample) for item, sample in zip(items, samples, strict=True)]

    def collate(self, items: Sequence[Prepared]) -> Batch:
        """Stacks items; captions are padded with zeros to the largest number of them."""
        from lora_diffusion.families.stable_diffusion import training_loss

        return training_loss.collate(items)

    def loss(self, loaded: Loaded, batch: Batch, rng: torch.Generator) -> LossOutput:
        """Mean squared error of the prediction over each sample's latents, weighted by min-SNR if asked."""
        from lora_diffusion.families.stable_diffusion import training_loss

        return training_loss.loss(loaded, batch, rng, _encode)

    def example(self, options: SDXLOptions, trained: frozenset[str], batch_size: int, size: tuple[int, int]) -> Example:
        """Gives latents, timesteps, text and sizes for the UNet, and token ids for trained text encoders."""
        from lora_diffusion.families.stable_diffusion import loading, sampling

        parts = loading.find(options).outline()
        return Example(sampling.example(parts, self.check(options), options, trained, batch_size, size))

    def generate(self, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        """Draws pictures in batches of requests that differ in prompt and seed only."""
        from lora_diffusion.families.stable_diffusion import sampling

        return sampling.generate(loaded, requests, _embed)


def _read(loaded: Loaded, tower: str, token_ids: Tensor) -> dict[str, Tensor]:
    """Returns a text encoder's columns: embeddings [num_prompts, length, dim], and from the second the summary."""
    from lora_diffusion.families.stable_diffusion import text_encoding
    from lora_diffusion.families.stable_diffusion.components import LAYOUTS

    skip = loaded.options.clip_skip or LAYOUTS[FAMILY.architecture.name].usual_skip
    hidden, summary = text_encoding.encode_raw(loaded.parts[tower], token_ids, skip)
    column = _TOWERS[tower][1]
    return {column: hidden} if summary is None else {column: hidden, _SUMMARY: summary}


def _completed(loaded: Loaded, item: Prepared, sample: ImageText) -> Prepared:
    """Adds what the UNet is told of the sizes of a picture's views, and which captions are shown to it."""
    sizes = _sizes(sample)[: len(item.tensors["moments"])] if "moments" in item.tensors else None
    added = {**({} if sizes is None else {"time_ids": sizes}), **_shown(loaded, item.tensors)}
    return replace(item, tensors={**item.tensors, **added})


def _sizes(sample: ImageText) -> Tensor:
    """Returns original size, crop and size of the picture and of its mirror image, [2, 6]."""
    import torch

    width, height = sample.original_size
    left, top, right, _ = sample.crop
    # What was cut off at the right is at the left of the mirror image.
    rows = [[height, width, top, offset, sample.size[1], sample.size[0]] for offset in (left, right)]
    return torch.tensor(rows, dtype=torch.float32)


def _shown(loaded: Loaded, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    lengths = {ending: len(tensors[f"text{ending}"]) for ending in _ENDINGS if f"text{ending}" in tensors}
    shown = {f"{_SHOWN}{ending}": torch.ones(length) for ending, length in lengths.items()}
    if "" in lengths and loaded.modules["zero_empty_prompt"]:
        shown[f"{_SHOWN}_empty"] = torch.zeros(1)
    return shown


def _encode(loaded: Loaded, rows: Mapping[str, Tensor]) -> Condition:
    """Returns embeddings of both encoders side by side, summary and sizes, on the device; token ids are encoded."""
    import torch

    found = dict(rows)
    for tower, (_, column) in _TOWERS.items():
        if not rows[column].is_floating_point():
            found |= _read(loaded, tower, rows[column])
    dtype: Any = loaded.parts["unet"].dtype
    hidden = [found[column].to(loaded.device, dtype) for _, column in _TOWERS.values()]
    shown = found[_SHOWN].to(loaded.device, dtype)[:, None]
    return {
        "context": torch.cat(hidden, dim=-1) * shown[:, None],
        "text_embeds": found[_SUMMARY].to(loaded.device, dtype) * shown,
        "time_ids": found["time_ids"].to(loaded.device, dtype),
    }


def _embed(loaded: Loaded, requests: Sequence[Request], size: tuple[int, int]) -> tuple[Condition, Condition]:
    """Returns the conditions of the prompts and of the negative prompts, for whole pictures of this size."""
    import torch

    from lora_diffusion.families.stable_diffusion import text_encoding

    names = (*(column for _, column in _TOWERS.values()), _SUMMARY)

    def embed(prompts: Sequence[str]) -> tuple[Tensor, ...]:
        found: dict[str, Tensor] = {}
        for tower, (tokenizer, _) in _TOWERS.items():
            found |= _read(loaded, tower, text_encoding.tokenize(loaded.modules[tokenizer], prompts))
        return tuple(found[name] for name in names)

    def condition(prompts: list[str], is_shown: list[bool]) -> Condition:
        rows = dict(zip(names, text_encoding.remembered(loaded, prompts, embed), strict=True))
        times = torch.tensor([[size[1], size[0], 0, 0, size[1], size[0]]]).repeat(len(prompts), 1)
        return _encode(loaded, {**rows, _SHOWN: torch.tensor(is_shown), "time_ids": times})

    negatives = [request.negative for request in requests]
    shown = [bool(negative) or not loaded.modules["zero_empty_prompt"] for negative in negatives]
    return condition([r.prompt for r in requests], [True] * len(requests)), condition(negatives, shown)


FAMILY = StableDiffusionXL()
