"""What is known of a published base without its weights: names, sizes, and what other programs call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_diffusion.core.base_model import Architecture

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
HEAD_WIDTH = 64
"""Channels of an attention head, where a network does not fix their number."""
CLIP_VOCABULARY = 49408
"""Tokens of CLIP: 256 letters, the same at the end of a word, the merges, and the two that begin and end a text."""
CLIP_LENGTH = 77
"""Tokens that CLIP reads, begin and end counted."""
_VAE_FACTOR = 8
"""Pixels of a side that become one latent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextOutputArchitecture(Architecture):
    """A model of transformers that answers in text; its parts belong to one model, so only PEFT names its modules."""

    model_classes: Mapping[str, str]
    """`model_type` of a base -> its class in transformers."""
    part_prefixes: Mapping[str, tuple[str, ...]]
    """Part -> where it stands in the model; the first today, the others in older versions of transformers."""
    task: str
    """What the hub calls what such a base does: `pipeline_tag`."""
    auto_class: str
    """Class of transformers that loads any base of this task."""
    paths: Mapping[str, tuple[str, ...]]
    """Part -> paths of all modules that a base of any size may have."""

    def model_class(self, modelspec: str) -> tuple[str, str] | None:
        """Returns module and class of transformers for a `modelspec.architecture`, None if it is not one of its own."""
        for model_type, name in self.modelspec.items():
            if name == modelspec.split("/")[0]:
                return f"transformers.models.{model_type}.modeling_{model_type}", self.model_classes[model_type]
        return None


@dataclass(frozen=True)
class UNet:
    """Sizes of a UNet2DConditionModel."""

    channels: tuple[int, ...]
    """By level."""
    depths: tuple[int, ...]
    """Transformer blocks of each attention, by level; the middle has those of the last level that attends."""
    context: int
    """Width of the text embedding."""
    has_linear_projections: bool
    """proj_in and proj_out are linear layers, not 1x1 convolutions."""
    num_heads: int | None = None
    """Of every attention; None where it follows from their width."""
    added: int = 0
    """Width of the added conditioning, sizes and pooled embeds together; 0 where there is none."""
    added_time: int = 0
    """Width of the embedding of each of the six sizes."""
    in_channels: int = 4
    out_channels: int = 4
    num_layers: int = 2
    """Residual blocks of a level on the way down; one more on the way up."""

    def config(self, sample_size: int) -> dict[str, Any]:
        """Returns the config.json of diffusers; `sample_size` is the side of its latents."""
        widths = [max(1, width // HEAD_WIDTH) for width in self.channels]
        config = {
            "_class_name": "UNet2DConditionModel",
            "sample_size": sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.channels),
            "layers_per_block": self.num_layers,
            "down_block_types": [CROSS_DOWN if depth else "DownBlock2D" for depth in self.depths],
            "up_block_types": [CROSS_UP if depth else "UpBlock2D" for depth in reversed(self.depths)],
            "transformer_layers_per_block": [max(depth, 1) for depth in self.depths],
            "cross_attention_dim": self.context,
            "attention_head_dim": self.num_heads or widths,
            "use_linear_projection": self.has_linear_projections,
        }
        if self.added:
            config |= {
                "addition_embed_type": "text_time",
                "projection_class_embeddings_input_dim": self.added,
                "addition_time_embed_dim": self.added_time,
            }
        return config


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder: its sizes, and what files call it."""

    part: str
    """text_encoder or text_encoder_2."""
    num_layers: int
    width: int
    model_class: str
    """In transformers."""
    kohya_prefixes: tuple[str, ...]
    """Of names in kohya's files; the first is written, all are read."""
    comfyui_name: str
    """What ComfyUI calls it in the files of its own nodes."""
    ldm_prefix: str
    """Of names in single-file checkpoints."""
    is_open_clip: bool = False
    """Its checkpoints keep q, k and v in one tensor, and it uses the exact GELU."""
    path_prefix: str = ""
    """What stands before "encoder.layers." in the paths of its modules, in transformers 5.6."""
    projection: int = 0
    """Width of its pooled embeds; 0 where the base does not use them."""
    num_dropped_layers: int = 0
    """Last layers that its checkpoints have and diffusers drops, since nothing reads them."""
    clips: tuple[str, ...] = ()
    """The CLIP that it was taken from, as open_clip and the hub name it: no fair scorer of this base."""

    @property
    def tokenizer(self) -> str:
        """Returns the component that makes its token ids."""
        return self.part.replace("text_encoder", "tokenizer")

    @property
    def column(self) -> str:
        """Returns the text column of prepared items that holds its embeddings, or token ids if it is trained."""
        return self.part.replace("text_encoder", "text")

    def config(self, inner: int | None = None, max_tokens: int = CLIP_LENGTH) -> dict[str, Any]:
        """Returns the config.json of transformers.

        Args:
            inner: width inside its MLPs; None for four times its own.
            max_tokens: longest text, begin and end counted.
        """
        return {
            "architectures": [self.model_class],
            "model_type": "clip_text_model",
            "vocab_size": CLIP_VOCABULARY,
            "hidden_size": self.width,
            "projection_dim": self.projection or self.width,
            "intermediate_size": inner or 4 * self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": max(1, self.width // HEAD_WIDTH),
            "max_position_embeddings": max_tokens,
            "bos_token_id": CLIP_VOCABULARY - 2,
            "eos_token_id": CLIP_VOCABULARY - 1,
            "pad_token_id": 1,
            "hidden_act": "gelu" if self.is_open_clip else "quick_gelu",
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class DiffusionArchitecture(Architecture):
    """A latent diffusion base of a UNet and CLIP text encoders."""

    unet: UNet
    text_encoders: tuple[TextEncoder, ...]
    pipeline: str = "StableDiffusionPipeline"
    """Its class in diffusers."""
    unused_components: tuple[str, ...] = ("safety_checker", "feature_extractor", "image_encoder")
    """Components of the pipeline that neither training nor generating needs."""
    resolutions: Mapping[str, int]
    """Prediction -> side in pixels of the square images it was trained on."""
    usual_prediction: str = "epsilon"
    """Of single-file checkpoints that do not say theirs."""
    latent_scaling: float
    is_vae_upcast: bool = False
    """Whether its VAE overflows in fp16."""
    scheduler: Mapping[str, Any]
    """Class and settings of its sampler in diffusers, besides those that all share."""
    zero_snr_scheduler: Mapping[str, Any]
    """The same for a base whose last timestep holds no signal."""
    has_zero_empty_prompt: bool = False
    """Whether it knows the empty prompt as zeros."""
    has_final_norm: bool = True
    """Whether the layer of the text encoders that is read goes through their final layer norm."""
    usual_clip_skip: int = 1
    """Layer of the text encoders that is read unless something else is asked, counted from the end."""
    clip_skip_apps: Mapping[str, int] = field(default_factory=dict)
    """App -> least clip skip that it can read with this base; those that are not named read the usual layer only."""
    is_clip_skip_kohyas: bool = False
    """Whether sd-scripts trains with `ss_clip_skip`, which it writes for every base."""
    has_ldm_names_in_kohya: bool = False
    """Whether kohya's files call the modules of the UNet as single-file checkpoints do."""
    ldm_mark: str
    """How names in a checkpoint begin that only this architecture has."""
    app_title: str = ""
    """What A1111 and Forge call it."""
    version_start: str = ""
    """How `ss_base_model_version` begins in what A1111 lists for it, where `ss_v2` does not tell it."""
    app_prefixes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """App -> prefixes of names whose modules it finds, as `compat` calls them."""
    a1111_misnamed: str = ""
    """Expression for the UNet paths that A1111's table, made for Stable Diffusion 1, calls otherwise."""

    @property
    def size_step(self) -> int:
        """Returns what width and height of an image must be multiples of."""
        return _VAE_FACTOR << (len(self.unet.channels) - 1)

    @property
    def networks(self) -> tuple[str, ...]:
        """Returns the components that have weights."""
        return ("unet", "vae", *(encoder.part for encoder in self.text_encoders))

    def sample_size(self, prediction: str) -> int:
        """Returns the side of the latents it was trained on."""
        return self.resolutions[prediction] // _VAE_FACTOR

    def unet_config(self, prediction: str | None = None) -> dict[str, Any]:
        """Returns the config.json of its UNet in diffusers."""
        return self.unet.config(self.sample_size(prediction or self.usual_prediction))
