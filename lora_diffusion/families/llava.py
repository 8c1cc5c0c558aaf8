"""LLaVA: an image tower, a projector, and a language model that answers questions about a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_diffusion.architectures import llava
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.config.settings import AT_LEAST_ONE, NOT_NEGATIVE, free
from lora_diffusion.core.base_model import ChatInfo, Example, Loaded, LossOutput, Part
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.keymap import KeyMap, naming
from lora_diffusion.core.samples import PIECES, Batch, Chat, Output, Prepared, Request

if TYPE_CHECKING:
    import torch
    from torch import nn


_BUILTIN = {"emoji-llava": "emoji-llava"}
_TITLE = "LLaVA as save_pretrained of transformers makes it"
_MAX_BATCH = 16
"""Questions answered at once."""


@dataclass(frozen=True)
class LlavaOptions(ModelOptions):
    """A LLaVA base, 1.5 or NeXT, and how it answers."""

    family: str = "llava"
    """Kind of base model."""
    path: str = "builtin:emoji-llava"
    """builtin:emoji-llava, a folder of LLaVA as save_pretrained makes it, or a hub id."""
    chat_template: str | None = None
    """File with a Jinja chat template; null takes that of the base."""
    max_new_tokens: int = free(64, AT_LEAST_ONE)
    """Longest answer in tokens."""
    temperature: float = free(0.0, NOT_NEGATIVE)
    """0 always takes the likeliest token; above, tokens are drawn, decided by the seed of the request."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "adapter.parts": ("language_model",),
        "adapter.targets": ("all-linear",),
        "output.formats": ("peft",),
    }


class Llava:
    """The family object; see core.protocols.Family for what each method must do."""

    architecture = llava.ARCHITECTURE
    options_type = LlavaOptions
    sample_type = Chat
    parts: Mapping[str, Part] = {
        "language_model": Part(
            groups={
                "attn": (r".*\.self_attn\.(q|k|v|o)_proj",),
                "ff": (r".*\.mlp\.(gate|up|down)_proj",),
                "all-linear": (r".*\.self_attn\.(q|k|v|o)_proj", r".*\.mlp\.(gate|up|down)_proj"),
            }
        ),
        "projector": Part(groups={"all-linear": (r"linear_\d",)}),
        "vision_tower": Part(
            groups={
                "attn": (r".*\.self_attn\.(q|k|v|out)_proj",),
                "ff": (r".*\.mlp\.fc[12]",),
                "all-linear": (r".*\.self_attn\.(q|k|v|out)_proj", r".*\.mlp\.fc[12]"),
            }
        ),
    }

    def check(self, options: LlavaOptions) -> ChatInfo:
        """Reads config, tokenizer, chat template and image processor of the base."""
        from lora_diffusion.families.language import vision
        from lora_diffusion.families.stable_diffusion import loading

        folder = _find(options)
        with loading.explained(folder):
            return vision.describe(folder, options)

    def skeleton(self, options: LlavaOptions) -> dict[str, nn.Module]:
        """Builds the parts on the meta device."""
        from lora_diffusion.families.language import loading, vision

        folder = _find(options)
        return vision.parts_of(loading.on_meta(folder, vision.model_class(folder)))

    def key_map(self, format_name: str, options: LlavaOptions | None) -> KeyMap:
        """Maps layers to their paths in LlavaForConditionalGeneration; only PEFT has names for them."""
        from lora_diffusion.families.language import loading, vision

        if naming(format_name) != "peft":
            raise UnsupportedError(f"LLaVA adapters have no spelling {format_name}; use peft.")
        paths = vision.published_paths() if options is None else loading.layers(self.skeleton(options))
        return vision.peft_map(paths)

    def load(self, options: LlavaOptions, device: torch.device) -> Loaded:
        """Loads model and processor; the image tower is a part only, so that it can be released."""
        from lora_diffusion.families.language import conversation, loading, vision

        folder = _find(options)
        info = self.check(options)
        model = loading.load(folder, vision.model_class(folder), options, device)
        parts = vision.parts_of(model)
        # The projector is small, and often trained in full.
        quantized = {name: part for name, part in parts.items() if name != "projector"}
        loading.place(model, quantized, options.quantization, device)
        model.model.vision_tower = None
        modules = {"model": model, "processor": conversation.read_processor(folder, options.chat_template)}
        tower = frozenset({"vision_tower"})
        return Loaded(parts, modules, options, device, info, encoders=tower, decoders=tower)

    def cache_key(self, options: LlavaOptions, trained: frozenset[str], pieces: frozenset[str] = PIECES) -> str:
        """Names processor and chat template, and, unless it is trained, the image tower by the hash of its weights."""
        from lora_diffusion.families.language import vision

        named = vision.fingerprint(_find(options), options, "vision_tower" in trained, pieces)
        return f"{self.architecture.name} {named}"

    def prepare(
        self, loaded: Loaded, samples: Sequence[Chat], trained: frozenset[str], pieces: frozenset[str] = PIECES
    ) -> list[Prepared]:
        """Spells conversations, and looks at their images.

        Tensors of an item: "input_ids" and "labels" [tokens], labels -100 but for the answers; "pixels" [views, tiles,
        3, height, width] if the image tower is trained, else "features" [views, tiles, patches, width], tiles of all
        images joined; "image_size" [images, 2], height and width, and "num_tiles" [images].
        """
        import torch

        from lora_diffusion.families.language import conversation, vision

        items = []
        for sample in samples:
            tensors = {}
            if "texts" in pieces:
                ids, labels = conversation.spell(loaded.modules["processor"], sample)
                tensors |= {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
            if "views" in pieces:
                tensors |= vision.prepare_views(loaded, sample, "vision_tower" in trained)
            items.append(Prepared(sample.key, tensors, sample.group, sample.num_repeats))
        return items

    def collate(self, items: Sequence[Prepared]) -> Batch:
        """Pads tokens with 0 and labels with -100 on the right; joins the tiles of all images."""
        from lora_diffusion.families.language import vision

        return Batch(tuple(item.key for item in items), vision.collate([item.tensors for item in items]))

    def loss(self, loaded: Loaded, batch: Batch, rng: torch.Generator) -> LossOutput:
        """Mean cross-entropy of the tokens of each sample's answers; one view of each sample is drawn."""
        from lora_diffusion.families.language import training_loss, vision

        features = vision.draw_view(loaded, batch, rng)
        embedded = vision.embed(loaded, batch.tensors["input_ids"], features, batch.tensors["image_size"])
        # Padding is on the right, where causal attention never looks, so no mask is needed.
        output = loaded.parts["language_model"](inputs_embeds=embedded, use_cache=False)
        head, labels = loaded.modules["model"].lm_head, batch.tensors["labels"]
        # The state at a token foretells the next one.
        per_sample = training_loss.loss(output.last_hidden_state[:, :-1], head, labels[:, 1:])
        return LossOutput(per_sample if features else per_sample + vision.nothing_of(loaded))

    def example(
        self, options: LlavaOptions, trained: frozenset[str], batch_size: int, size: tuple[int, int]
    ) -> Example:
        """Gives pixels for a trained tower, features for the projector, and embeddings of the longest conversation."""
        from lora_diffusion.families.language import vision

        return vision.example(self.skeleton(options), _find(options), trained, batch_size, size)

    def generate(self, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        """Answers questions about pictures, in batches of equal adapter weights; alone where tokens are drawn."""
        from lora_diffusion.families.language import vision

        at_once = 1 if loaded.options.temperature else _MAX_BATCH
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            weights = None if request.weights is None else sorted(request.weights.items())
            groups.setdefault(repr(weights), []).append(index)
        for indices in groups.values():
            for start in range(0, len(indices), at_once):
                chunk = indices[start : start + at_once]
                answers.update(zip(chunk, vision.answer(loaded, [requests[i] for i in chunk]), strict=True))
        return [Output(request, text=answers[index]) for index, request in enumerate(requests)]


def _find(options: LlavaOptions) -> Path:
    from lora_diffusion.families.language import loading, vision

    return loading.find(options, _BUILTIN, tuple(vision.MODEL_CLASSES), _TITLE)


FAMILY = Llava()
