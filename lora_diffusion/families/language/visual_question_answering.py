"""Families that answer questions about images: LLaVA, at any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.architectures.base import TextOutputArchitecture
from lora_diffusion.core.base_model import ChatInfo, Example, Loaded, LossOutput, Part
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.keymap import KeyMap, naming
from lora_diffusion.core.samples import PIECES, Batch, Chat, Output, Prepared, Request
from lora_diffusion.families.language.options import LlavaOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora_diffusion.families.language.training_loss import DrawnChats

_MAX_BATCH = 16
"""Questions answered at once."""


class VisualQuestionAnswering:
    """A family object; see core.protocols.Family for what each method must do."""

    sample_type = Chat

    def __init__(
        self,
        architecture: TextOutputArchitecture,
        options_type: type[LlavaOptions],
        parts: Mapping[str, Part],
        builtins: Mapping[str, str],
    ) -> None:
        """Makes the family of an architecture.

        Args:
            architecture: of its bases.
            options_type: the `model:` section.
            parts: networks that can hold an adapter, and their groups of modules.
            builtins: name after "builtin:" -> folder that comes along.
        """
        self.architecture, self.options_type, self.parts, self._builtins = architecture, options_type, parts, builtins

    def _find(self, options: LlavaOptions) -> Path:
        from lora_diffusion.families.language import loading

        return loading.find(options, self._builtins, self.architecture)

    def check(self, options: LlavaOptions) -> ChatInfo:
        """Reads config, tokenizer, chat template and image processor of the base."""
        from lora_diffusion.families.language import vision
        from lora_diffusion.families.model_files import explained

        folder = self._find(options)
        with explained(folder):
            return vision.describe(folder, options)

    def meta_modules(self, options: LlavaOptions) -> dict[str, nn.Module]:
        """Builds the parts on the meta device."""
        from lora_diffusion.families.language import loading, vision

        folder = self._find(options)
        return vision.parts_of(loading.on_meta(folder, vision.model_class(folder, self.architecture)))

    def key_map(self, format_name: str, options: LlavaOptions | None) -> KeyMap:
        """Maps layers to their paths in LlavaForConditionalGeneration; only PEFT has names for them."""
        from lora_diffusion.families.language import loading

        if naming(format_name) != "peft":
            raise UnsupportedError(f"LLaVA adapters have no format {format_name}; use peft.")
        return loading.peft_map(self.architecture, None if options is None else self.meta_modules(options))

    def load(self, options: LlavaOptions, device: torch.device) -> Loaded:
        """Loads model and processor; the image encoder is a part only, so that it can be released."""
        from lora_diffusion.families.language import conversation, loading, vision

        folder = self._find(options)
        info = self.check(options)
        model = loading.load(folder, vision.model_class(folder, self.architecture), options, device)
        parts = vision.parts_of(model)
        # The projector is small, and often trained in full.
        quantized = {name: part for name, part in parts.items() if name != "projector"}
        loading.place(model, quantized, options.quantization, device)
        model.model.vision_tower = None
        modules = {"model": model, "processor": conversation.read_processor(folder, options.chat_template)}
        image_encoder = frozenset({"vision_tower"})
        return Loaded(parts, modules, options, device, info, encoders=image_encoder, decoders=image_encoder)

    def cache_key(self, options: LlavaOptions, trained: frozenset[str], pieces: frozenset[str] = PIECES) -> str:
        """Names processor, chat template and, unless it is trained, the image encoder by the hash of its weights."""
        from lora_diffusion.families.language import vision

        named = vision.fingerprint(self._find(options), options, "vision_tower" in trained, pieces)
        return f"{self.architecture.name} {named}"

    def prepare(
        self, loaded: Loaded, samples: Sequence[Chat], trained: frozenset[str], pieces: frozenset[str] = PIECES
    ) -> list[Prepared]:
        """Tokenizes conversations, and encodes their images.

        Tensors of an item: "input_ids" and "labels" [tokens], labels -100 but for the answers; "pixels" [views, tiles,
        3, height, width] if the image encoder is trained, else "features" [views, tiles, patches, width], tiles of all
        images joined; "image_size" [images, 2], height and width, and "num_tiles" [images].
        """
        import torch

        from lora_diffusion.families.language import conversation, vision

        items = []
        for sample in samples:
            tensors: dict[str, torch.Tensor] = {}
            if "texts" in pieces:
                ids, labels = conversation.tokens_and_labels(loaded.modules["processor"], sample)
                tensors |= {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
            if "views" in pieces:
                tensors |= vision.prepare_views(loaded, sample, "vision_tower" in trained)
            items.append(Prepared(sample.key, tensors, sample.group, sample.num_repeats))
        return items

    def collate(self, items: Sequence[Prepared]) -> Batch:
        """Pads tokens with 0 and labels with -100 on the right; joins the tiles of all images."""
        from lora_diffusion.families.language import vision

        return Batch(tuple(item.key for item in items), vision.collate([item.tensors for item in items]))

    def draw(self, loaded: Loaded, batch: Batch, rng: torch.Generator) -> DrawnChats:
        """Draws one view of the images of each sample."""
        del loaded
        from lora_diffusion.families.language import training_loss

        return training_loss.draw_chats(batch, rng)

    def loss(self, loaded: Loaded, drawn: DrawnChats) -> LossOutput:
        """Mean cross-entropy of the tokens of each sample's answers."""
        from lora_diffusion.families.language import training_loss

        return training_loss.chat_loss(loaded, drawn)

    def example(
        self, options: LlavaOptions, trained: frozenset[str], batch_size: int, size: tuple[int, int]
    ) -> Example:
        """Gives pixels for a trained image encoder, features for the projector, and embeddings of conversations."""
        from lora_diffusion.families.language import examples

        return examples.chat_example(self.meta_modules(options), self._find(options), trained, batch_size, size)

    def generate(self, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        """Answers questions about images, in batches of equal adapter weights; alone where tokens are drawn."""
        from lora_diffusion.families.language import sampling, vision

        at_once = 1 if loaded.options.temperature else _MAX_BATCH
        return sampling.generate(requests, partial(vision.answer, loaded), lambda _: None, at_once)
