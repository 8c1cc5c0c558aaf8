"""Every setting: one dataclass field, its default, and one string under it. Read-only once loaded.

The `model:` section is the `options_type` of the chosen family and derives from ModelOptions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

REQUIRED: Any = "???"
"""A value that the user must give (OmegaConf's marker for a missing value)."""


@dataclass(frozen=True)
class ModelOptions:
    """The base model; a family adds what its loss can vary."""

    family: str = "sd1"
    """Kind of base model."""
    path: str = REQUIRED
    """builtin:emoji, a diffusers folder, a .safetensors checkpoint or a hub id."""
    quantization: str = "none"
    """Storage of the frozen weights: none, 8bit or nf4."""
    dtype: str = "auto"
    """Number type of the frozen weights: fp32, bf16 or fp16; auto takes bf16 on a GPU that has it, else fp32."""


@dataclass(frozen=True)
class DataConfig:
    """The pictures and their captions."""

    path: str = REQUIRED
    """Folder with pictures and captions (name.txt or name.caption beside each picture, or a metadata.jsonl), or with
    kohya folders such as "10_sks dog"."""
    resolution: int | None = None
    """Side in pixels of a square picture; other shapes get the same area. None takes what the base was trained on."""
    buckets: bool = True
    """Keep the shape of pictures as far as the bucket sizes allow; false crops all to squares."""
    captions: str = "required"
    """required: every picture needs one. optional: those without take default_caption."""
    default_caption: str = ""
    """Caption of pictures that have none, with captions: optional."""
    trigger: str = "auto"
    """Words that call up what is trained. auto takes the words that all captions share; "" means there are none."""
    flip: bool = False
    """Show each picture mirrored half of the time."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read, with a warning, instead of stopping."""


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter that is trained."""

    variant: str = "lora"
    """Kind of adapter."""
    rank: int = 16
    """Inner size; more rank holds more detail in a larger file."""
    alpha: float | None = None
    """The change is scaled by alpha / rank. None takes the rank, that is scale 1."""
    dropout: float = 0.0
    """Share of the layer's inputs that the adapter does not see in a training step, 0 to 1."""
    parts: tuple[str, ...] = ("unet",)
    """Networks that get an adapter: unet, text_encoder."""
    targets: tuple[str, ...] = ("attn",)
    """Modules that get one: a group (attn, ff, conv, all-linear), the path of a module, or re:PATTERN for paths that
    the regular expression matches as a whole. "unet/attn" asks in one part only."""


@dataclass(frozen=True)
class TrainConfig:
    """How the adapter is trained."""

    seed: int = 0
    """Decides every random draw of the run."""
    max_steps: int | None = None
    """Optimizer steps. Give this or epochs; without either 1000 steps are made."""
    epochs: int | None = None
    """Passes over the pictures, repeats counted."""
    batch_size: int = 1
    """Pictures in one forward pass."""
    gradient_accumulation: int = 1
    """Forward passes in one optimizer step."""
    learning_rate: float = 1e-4
    """Highest learning rate of the UNet's adapter."""
    text_encoder_learning_rate: float | None = None
    """The same for text encoders; None takes a tenth of learning_rate."""
    optimizer: str = "adamw"
    """adamw."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""
    schedule: str = "cosine"
    """Course of the learning rate: constant, linear (falls to 0) or cosine (falls to 0)."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    precision: str = "auto"
    """fp32, or autocast to bf16 or fp16; auto takes bf16 where the device is fast at it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    threads: str = "auto"
    """CPU threads: a number, or auto, which measures once per machine."""
    save_every_steps: int = 100
    """Steps between checkpoints; 0 keeps only the last."""
    keep_checkpoints: int = 3
    """Older checkpoints are deleted; 0 keeps all."""
    preview_every_steps: int = 0
    """Steps between preview pictures; 0 makes none."""
    tracker: str = "none"
    """none or tensorboard (in the run folder)."""


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures drawn while training, with the same seeds each time."""

    prompts: tuple[str, ...] = ()
    """Without any, the first captions of the data are taken."""
    negative: str = ""
    """What the pictures should not show."""
    seeds: tuple[int, ...] = (0,)
    """Each prompt is drawn once with each seed."""
    num_steps: int = 25
    """Denoising steps."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 turns it off."""


@dataclass(frozen=True)
class CacheConfig:
    """Prepared pictures and captions, kept by content."""

    path: str | None = None
    """Folder; None takes the user's cache folder."""


@dataclass(frozen=True)
class OutputConfig:
    """The run folder and the files made at the end."""

    path: str = REQUIRED
    """Run folder."""
    name: str | None = None
    """Name of the adapter file without ending; None takes the name of the run folder."""
    formats: tuple[str, ...] = ("kohya",)
    """Spellings to write: kohya (also ComfyUI, A1111 and Forge), diffusers, peft."""
    dtype: str = "fp16"
    """Number type in the files: fp32, fp16 or bf16."""
    publish_tags: bool = True
    """Put the caption words and folder names into the metadata, as kohya does; false keeps them private."""


@dataclass(frozen=True)
class Config:
    """A whole training run."""

    model: Any
    """ModelOptions of the family."""
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
