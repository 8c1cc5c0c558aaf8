"""The CLIP that scores images. It is never the one that the base model reads its prompts with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL.Image import Image
from torch import Tensor, nn

from lora_diffusion.architectures.base import DiffusionArchitecture
from lora_diffusion.core.base_model import Architecture
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.files import builtin_path, user_path
from lora_diffusion.core.model_folder import check_model_folder, check_sizes
from lora_diffusion.core.text import shown
from lora_diffusion.scoring.image_encoding import CentreCrop, Preprocessing, encode_images, network_outputs

BUILTIN = "builtin:emoji-clip"
DEFAULT = "ViT-B-32/datacomp_xl_s13b_b90k"
"""For bases of photographs. Trained on DataComp, by which no text encoder of a base that we load was trained."""
_TEXT_BATCH = 256
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_LARGEST = 10_000
"""Width, length or size in any CLIP's config."""
_TOKENIZER_ARGUMENTS = frozenset({"clean", "strip_sep_token", "reduction_mask"})
"""Those that open_clip's own configs give, and that change texts only."""


@dataclass(frozen=True)
class Clip:
    """An open_clip model, or one that is called like it, with its tokenizer."""

    name: str
    """What the scores are stated with: scores of two CLIPs cannot be compared."""
    model: Any
    preprocessing: Preprocessing
    tokenizer: Any

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def encode_images(self, images: Sequence[Path | Image]) -> Tensor:
        """Returns unit vectors, [num_images, dim] float32 on the CPU."""
        return encode_images(self.model.encode_image, self.preprocessing, images, self._device)

    def encode_looks(self, images: Sequence[Path | Image]) -> Tensor:
        """Returns how images are drawn rather than what they show, [num_images, dim] float32 on the CPU.

        That is mean and standard deviation over the image of each channel of the encoder's early layers.

        Raises:
            ModelError: the layers of this image encoder are not known.
        """
        layers = early_layers(self.name, self.model)

        def forward(pixels: Tensor) -> Tensor:
            statistics: list[Tensor] = []
            hooks = [layer.register_forward_hook(lambda *call: statistics.append(_spread(call[2]))) for layer in layers]
            try:
                self.model.encode_image(pixels)
            finally:
                for hook in hooks:
                    hook.remove()
            return torch.cat(statistics, dim=1)

        return network_outputs(forward, self.preprocessing, images, self._device)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns unit vectors, [num_texts, dim] float32 on the CPU; equal texts are encoded once."""
        distinct = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        ids = self.tokenizer(list(distinct)).to(self._device)
        rows = torch.cat(
            [self.model.encode_text(part, normalize=True).float().cpu() for part in ids.split(_TEXT_BATCH)]
        )
        return rows[[distinct[text] for text in texts]]


def early_layers(name: str, model: Any) -> list[nn.Module]:
    """Returns the layers of an image encoder in which the look of an image is seen, more than what it shows.

    Of a ResNet the stem and the first two stages, of a transformer the first quarter of its blocks.

    Args:
        name: of the CLIP.
        model: `Clip.model`.

    Raises:
        ModelError: it is neither.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    visual = model.visual
    if isinstance(visual, ModifiedResNet):
        return [visual.act3, visual.layer1, visual.layer2]
    blocks = visual.transformer.resblocks if isinstance(visual, VisionTransformer) else getattr(visual, "layers", None)
    if blocks is None:
        raise ModelError(f"The layers of the image encoder of {name} are not known ({type(visual).__name__}).")
    return list(blocks[: max(1, len(blocks) // 4)])


def _spread(output: Any) -> Tensor:
    """Returns mean and standard deviation of each channel, [batch, 2 * channels].

    Args:
        output: of a layer, [batch, channels, height, width] or [batch, tokens, channels].
    """
    places = output.flatten(2).transpose(1, 2) if output.dim() == 4 else output
    return torch.cat([places.mean(dim=1), places.std(dim=1)], dim=1)


def load_clip(name: str = BUILTIN, device: str | torch.device = "cpu") -> Clip:
    """Loads a CLIP.

    Args:
        name: builtin:emoji-clip, model/tag as open_clip names them, say ViT-B-32/datacomp_xl_s13b_b90k, or a folder
            or hub id of a model in the format of open_clip or of transformers.
        device: where it computes.

    Raises:
        ModelError: open_clip does not know it, or its files are missing and cannot be fetched.
    """
    import open_clip

    try:
        if _is_of_transformers(name, open_clip.list_models()):
            folder = user_path(name, "scorer")
            check_model_folder(folder, f"The CLIP {name}")
            return Clip(name, *load(str(folder) if folder.is_dir() else name, device))
        architecture, tag = _source(name, open_clip.list_models())
        trust = _check_config(name, open_clip.get_model_config(architecture))
        model, _, transform = open_clip.create_model_and_transforms(
            architecture, pretrained=tag, device=device, weights_only=True
        )
        tokenizer = open_clip.get_tokenizer(architecture, **trust)
        preprocessing = _preprocessing(transform)
    except ModelError:
        raise
    except Exception as error:  # what libraries raise on wrong files is of every type
        reason = shown(next(iter(str(error).splitlines()), type(error).__name__), 300)
        raise ModelError(
            f"The CLIP {name} cannot be loaded: {reason}. Give --clip a folder or hub id in the format of open_clip or "
            f"transformers, {BUILTIN}, or MODEL/TAG of open_clip, say {DEFAULT}; without a network, its files must "
            "have been fetched before."
        ) from error
    return Clip(name, model.eval(), preprocessing, tokenizer)


def _check_config(name: str, config: Any) -> dict[str, bool]:
    """Checks that a config of open_clip, from a folder or the hub, has only what open_clip publishes build the model.

    Args:
        name: of the CLIP, as the user gave it.
        config: has the sections text_cfg and vision_cfg.

    Returns:
        What else its tokenizer takes.

    Raises:
        ModelError: it names other models, whose code would be loaded, or arguments of the tokenizer that can do so.
    """
    import open_clip

    check_sizes(config, f"The CLIP {name}", _LARGEST)
    errors = []
    for section, key in (("text_cfg", "hf_model_name"), ("vision_cfg", "timm_model_name")):
        if inner := config[section].get(key):
            known = {open_clip.get_model_config(model)[section].get(key) for model in open_clip.list_models()}
            if str(inner) not in known or Path(str(inner)).exists():
                errors.append(f"{section}.{key}={shown(str(inner))} is no model that open_clip publishes one with")
    arguments = set(config["text_cfg"].get("tokenizer_kwargs", {})) - _TOKENIZER_ARGUMENTS
    errors += [f"text_cfg.tokenizer_kwargs has {shown(str(key))}" for key in sorted(arguments)]
    if errors:
        raise ModelError(f"The CLIP {name} is not loaded, since its {_OPEN_CLIP_CONFIG} could run code.", errors)
    # open_clip hands this on to transformers, and knows no such argument where it has a tokenizer of its own.
    return {"trust_remote_code": False} if config["text_cfg"].get("hf_tokenizer_name") else {}


def default_clip(model_path: str) -> str:
    """Returns the scorer for a base: its own for the built-in one, else `DEFAULT`."""
    return BUILTIN if model_path.startswith("builtin:") else DEFAULT


def is_encoder_of_base(name: str, architecture: Architecture) -> bool:
    """Says whether a base of this architecture reads its prompts with the text encoder of this CLIP."""
    encoders = architecture.text_encoders if isinstance(architecture, DiffusionArchitecture) else ()
    return any(name.removeprefix("hf-hub:") in encoder.clips for encoder in encoders)


def _is_of_transformers(name: str, known: Sequence[str]) -> bool:
    """Says whether a folder or hub id lacks what open_clip needs."""
    if name == BUILTIN or name.partition("/")[0] in known or name.startswith("hf-hub:"):
        return False
    folder = user_path(name, "scorer")
    if folder.is_dir():
        return not (folder / _OPEN_CLIP_CONFIG).is_file()
    try:
        hf_hub_download(name, _OPEN_CLIP_CONFIG)
    except EntryNotFoundError:
        return True
    return False


def _source(name: str, known: Sequence[str]) -> tuple[str, str | None]:
    """Returns what open_clip calls a model, and its tag."""
    if name == BUILTIN:
        return f"local-dir:{builtin_path('emoji-clip')}", None
    folder = user_path(name, "scorer")
    if folder.is_dir():
        return f"local-dir:{folder.resolve()}", None
    architecture, _, tag = name.partition("/")
    if architecture in known:
        return architecture, tag or None
    return f"hf-hub:{name.removeprefix('hf-hub:')}", None


def _preprocessing(transform: Any) -> Preprocessing:
    """Takes open_clip's transform apart: what Pillow does to each image, and what can be done in batches."""
    steps = list(transform.transforms)
    names = [type(step).__name__ for step in steps]
    if names[-2:] != ["MaybeToTensor", "Normalize"]:
        raise ValueError(f"it prepares images by {', '.join(names)}")

    def resize(image: Image) -> Image:
        for step in steps[:-2]:
            image = step(image)
        return image

    return Preprocessing(resize, steps[-1].mean, steps[-1].std)


class TransformersClip:
    """A CLIPModel, called as open_clip calls its models."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.parameters = model.parameters
        self.visual = model.vision_model.encoder

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Returns [batch, dim] of normalised pixels [batch, 3, height, width]."""
        return self._model.get_image_features(pixel_values=pixels).pooler_output  # type: ignore[no-any-return]

    def encode_text(self, ids: Tensor, normalize: bool) -> Tensor:
        """Returns [batch, dim] of token ids [batch, length]."""
        vectors: Tensor = self._model.get_text_features(input_ids=ids).pooler_output
        return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def load(name: str, device: str | torch.device) -> tuple[TransformersClip, Preprocessing, Any]:
    """Returns model, preprocessing, and what turns texts into ids [num_texts, length].

    Args:
        name: a folder, or a hub id.
        device: where the model computes.

    Raises:
        OSError: there is no such model, or its files are missing and cannot be fetched.
        ModelError: it is a model of another type.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

    model_type = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    if model_type != "clip":
        raise ModelError(f"{name} is a model of type {model_type}, not clip; scores need a CLIPModel of transformers.")
    model: Any = CLIPModel.from_pretrained(
        name, dtype=torch.float32, trust_remote_code=False, weights_only=True, attn_implementation="sdpa"
    )
    model.to(device).eval()
    processor_class: Any = AutoImageProcessor
    images = processor_class.from_pretrained(name, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    length = model.config.text_config.max_position_embeddings

    def tokenize(texts: Sequence[str]) -> Tensor:
        batch = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return batch.input_ids  # type: ignore[no-any-return]

    resize = CentreCrop(images.crop_size["height"], images.size["shortest_edge"])
    return TransformersClip(model), Preprocessing(resize, images.image_mean, images.image_std), tokenize
