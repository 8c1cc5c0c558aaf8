"""Every setting: one dataclass field, its default, range and whether it may change on resume, and one string under it.

Read-only once loaded.

The `model:` section is the `options_type` of the chosen family and derives from ModelOptions; the `data:` section is
that of the type of its samples.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from lora_diffusion.config.settings import (
    AT_LEAST_ONE,
    FILLED,
    MAX_DENOISING_STEPS,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_WEIGHTS,
    SEEDS,
    SHARE,
    Allowed,
    Choice,
    different,
    fixed,
    free,
    from_to,
    one_of,
)
from lora_diffusion.core.samples import AudioText, Chat, ImageText, Sample

DEFAULT_STEPS = 1000
"""Optimizer steps where neither train.max_steps nor train.epochs is given."""
REQUIRED: Any = "???"
"""A value that the user must give; a file may say so, too."""
_SPLIT = Allowed(lambda v: v != "", "must be auto, all or the name of a split")
_THREADS = Allowed(
    lambda v: v == "auto" or (v.isdecimal() and len(v) < 6 and int(v) > 0), "must be auto or a number of threads"
)


@dataclass(frozen=True)
class Contradiction:
    """Values that cannot go together."""

    text: str
    """What the error says if neither gives way."""
    key: str = ""
    """The setting that gives way where a file says it, and the command line one of `against`; "" where none can."""
    against: tuple[str, ...] = ()
    instead: Any = None
    """What it becomes; None for its default."""


@dataclass(frozen=True)
class ModelOptions:
    """The base model; a family adds what its loss can vary."""

    family: str = fixed("sd1", Choice(group="families"))
    """Family of the base model."""
    path: str = free(REQUIRED, FILLED)
    """builtin:emoji, a diffusers folder, a .safetensors checkpoint or a hub id."""
    quantization: str = fixed("none", one_of("none", "8bit", "nf4"))
    """Storage of the frozen weights: none, 8bit or nf4."""
    dtype: str = fixed("auto", one_of("auto", "fp32", "bf16", "fp16"))
    """dtype of the frozen weights: fp32, bf16 or fp16; auto takes bf16 on a GPU that has it, else fp32."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """"section.key" -> the default that suits this family, where it differs from the one written below."""
    augmentation: ClassVar[Mapping[str, Any]] = {}
    """Keys that change what is seen while a run trains, here as in `data` -> the value that turns them off."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yields each pair of values that cannot go together."""
        yield from ()


@dataclass(frozen=True)
class DataConfig:
    """What is trained on; each type of samples adds its own keys."""

    path: str = free(REQUIRED, FILLED)
    """Folder with the files to train on and what is to be learnt of each."""
    skip_bad: bool = free(False)
    """Leave out what cannot be used, with a warning that counts it, instead of stopping: images that cannot be read;
    recordings and conversations with any error, such as a missing file or too long a transcript."""

    sample_type: ClassVar[type[Sample]]
    """Of what is read with this section."""
    augmentation: ClassVar[Mapping[str, Any]] = {}

    @property
    def held_out(self) -> str | None:
        """What the run is scored on while it trains and not trained on, as `validation` says; None without any."""
        return None

    def contradictions(self) -> Iterator[Contradiction]:
        """Yields each pair of values that cannot go together."""
        yield from ()


@dataclass(frozen=True)
class ImageDataConfig(DataConfig):
    """The images and their captions."""

    path: str = REQUIRED
    """Folder with images and captions (name.txt or name.caption beside each image, or a metadata.jsonl or .csv), or
    with kohya folders such as "10_sks dog", or such a folder itself."""
    resolution: int | None = fixed(None, from_to(16, 4096, "must be between 16 and 4096 pixels"))
    """Side in pixels of a square image; other shapes get the same area. None takes what the base was trained on."""
    buckets: bool = True
    """Keep the shape of images as far as the bucket sizes allow; false crops all to squares."""
    captions: str = fixed("required", one_of("required", "optional"))
    """required: every image needs one. optional: those without take default_caption."""
    default_caption: str = ""
    """Caption of images that have none, with captions: optional."""
    caption_lines: str = fixed("joined", one_of("joined", "each", "first"))
    """A caption of several lines: joined makes one caption of them. each makes a caption of its own of each line of a
    file, one of which is drawn each time. first takes the first line."""
    trigger: str = "auto"
    """Words that call up what is trained. auto takes the rare words that all captions share; "" means there are
    none."""
    flip: bool = False
    """Show each image mirrored half of the time."""

    sample_type: ClassVar[type[Sample]] = ImageText

    def contradictions(self) -> Iterator[Contradiction]:
        """Yields one if a default caption is given that nothing uses."""
        if self.default_caption and self.captions == "required":
            text = "data.default_caption: is only used with data.captions=optional"
            yield Contradiction(text, "data.default_caption", ("data.captions",))


@dataclass(frozen=True)
class SplitDataConfig(DataConfig):
    """Samples with texts that the base writes: they come in splits, and the run can be scored on some of them."""

    split: str = fixed("auto", _SPLIT)
    """Which folders, tables and splits are taken: auto leaves out those named test, validation, dev or eval; all takes
    everything; else the name of one, say validated."""
    validation: str | None = None
    """What the run is scored on while it trains, and not trained on: a share of the samples such as 0.1, a folder or
    file as data.path takes it, or the name of a split of data.path."""

    @property
    def held_out(self) -> str | None:
        """See DataConfig."""
        return self.validation


@dataclass(frozen=True)
class RecordingDataConfig(SplitDataConfig):
    """The recordings and their transcripts."""

    path: str = REQUIRED
    """Folder with recordings and transcripts (name.txt beside each recording, a metadata.csv or a metadata.jsonl, the
    layouts of Common Voice, LibriSpeech and LJSpeech), Parquet files, or what `save_to_disk` of datasets wrote."""
    long: str = fixed("refuse", one_of("refuse", "split"))
    """Recordings that are longer than the base hears at once: refuse, or split at the timestamps of their transcript
    (<|0.00|> first words<|4.20|><|4.20|> next words<|9.10|>)."""
    speeds: tuple[float, ...] = fixed((1.0,), different(0.5, 2, "one or more different speeds"))
    """Each recording is heard at one of these speeds, drawn each time: 0.9, 1.0 and 1.1 are usual."""
    noise_db: tuple[float, ...] = fixed((), different(-20, 80, "different ratios", " dB", fewest=0))
    """Signal-to-noise ratios in dB of white noise: each recording is heard clean or with one of these, drawn each
    time."""

    sample_type: ClassVar[type[Sample]] = AudioText
    augmentation: ClassVar[Mapping[str, Any]] = {"speeds": (1.0,), "noise_db": ()}


@dataclass(frozen=True)
class ChatDataConfig(SplitDataConfig):
    """The conversations about images."""

    path: str = REQUIRED
    """JSON or JSONL file, or a folder with such files, of LLaVA ("image" and "conversations"), ShareGPT or messages
    with role and content; Parquet files; or what `save_to_disk` of datasets wrote. Those without an image are learnt
    as text alone."""
    split: str = "auto"
    """Which folders, files and splits of data.path are taken: auto leaves out those named test, validation, dev or
    eval; all takes everything; else the name of one."""
    images: str | None = free(None)
    """Folder that the names of images are looked up in; None takes that of the file which names them."""
    max_tokens: int | None = fixed(None, AT_LEAST_ONE)
    """Longest conversation in tokens, those of the image counted; None takes what the base can read."""
    too_long: str = fixed("refuse", one_of("refuse", "skip"))
    """Conversations that are longer: refuse, or skip them with a warning, as data.skip_bad does with all errors."""
    zooms: tuple[float, ...] = fixed((1.0,), different(0.5, 2, "one or more different scales"))
    """Each image is seen at one of these scales, drawn each time: 1.1 cuts a rim off, 0.9 adds a white one."""

    sample_type: ClassVar[type[Sample]] = Chat
    augmentation: ClassVar[Mapping[str, Any]] = {"zooms": (1.0,)}


Section = TypeVar("Section", ModelOptions, DataConfig)


def without_augmentation(section: Section) -> Section:
    """Returns a section with which samples are always seen alike, as they are."""
    return replace(section, **section.augmentation)


DATA_SECTIONS: tuple[type[DataConfig], ...] = (ImageDataConfig, RecordingDataConfig, ChatDataConfig)


def data_section(sample_type: type[Sample]) -> type[DataConfig]:
    """Returns the class of the `data:` section for a type of samples, as a family names it."""
    return next(section for section in DATA_SECTIONS if section.sample_type is sample_type)


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter that is trained."""

    variant: str = fixed("lora", Choice(group="variants"))
    """Variant of the adapter, such as lora, rslora, locon, dora, dora_out, loha or lokr."""
    rank: int = fixed(16, AT_LEAST_ONE)
    """Inner size; more rank holds more detail in a larger file."""
    alpha: float | None = fixed(None, POSITIVE)
    """The change is scaled by alpha / rank (rslora: alpha / sqrt(rank)). None takes the rank, that is scale 1."""
    conv_rank: int | None = fixed(None, AT_LEAST_ONE)
    """Rank on convolutions larger than 1x1; None takes rank."""
    conv_alpha: float | None = fixed(None, POSITIVE)
    """Alpha on them; None keeps the scale of all else."""
    module_ranks: tuple[str, ...] = ()
    """Ranks of single modules, each as TARGET=RANK with a target as in targets, such as ff=32 or unet/attn=8. The last
    one that matches a module counts, before conv_rank and rank; the scale stays."""
    module_alphas: tuple[str, ...] = ()
    """Alphas of single modules, each as TARGET=ALPHA, likewise before conv_alpha and alpha; whatever their rank, the
    scale is alpha / rank."""
    lokr_factor: int = fixed(-1, Allowed(lambda v: v == -1 or v >= 1, "must be 1 or greater, or -1"))
    """Size of the first factor of lokr: small numbers train more parameters; -1 makes the smallest file."""
    dropout: float = fixed(0.0, SHARE)
    """Share of the layer's inputs that the adapter does not see in a training step, 0 to 1."""
    parts: tuple[str, ...] = fixed(("unet",), FILLED)
    """Networks that get an adapter: unet, text_encoder; of Whisper encoder, decoder; of LLaVA language_model,
    projector, vision_tower."""
    targets: tuple[str, ...] = fixed(("attn",), FILLED)
    """Modules that get one: a group (attn, ff, conv, all-linear), the path of a module, or re:PATTERN for paths that
    the regular expression matches as a whole. "unet/attn" asks in one part only."""
    full: tuple[str, ...] = ()
    """Those of the parts in which the weight of every linear layer and convolution is trained in full, whatever the
    targets, as is usual with LLaVA's projector; norms and biases stay as they are."""


@dataclass(frozen=True)
class TrainConfig:
    """How the adapter is trained."""

    seed: int = fixed(0, NOT_NEGATIVE)
    """Decides every random draw of the run."""
    max_steps: int | None = free(None, AT_LEAST_ONE)
    """Optimizer steps. Give this or epochs; without either 1000 steps are made."""
    epochs: int | None = free(None, AT_LEAST_ONE)
    """Passes over the data, repeats counted."""
    batch_size: int = fixed(1, AT_LEAST_ONE)
    """Samples in one forward pass."""
    gradient_accumulation: int = fixed(1, AT_LEAST_ONE)
    """Forward passes in one optimizer step."""
    learning_rate: float = fixed(1e-4, POSITIVE)
    """Highest learning rate of the UNet's adapter."""
    text_encoder_learning_rate: float | None = fixed(None, POSITIVE)
    """The same for text encoders; None takes a tenth of learning_rate."""
    part_learning_rates: tuple[str, ...] = ()
    """The same for single parts, each as part=rate, such as projector=2e-5."""
    module_learning_rates: tuple[str, ...] = ()
    """The same for single modules, each as TARGET=RATE with a target as in adapter.targets, such as ff=5e-5. The last
    one that matches a module counts, before all other rates."""
    optimizer: str = fixed("adamw", one_of("adamw", "adamw8bit", "paged_adamw8bit"))
    """adamw, adamw8bit (moments in 8 bits: a quarter of their memory) or paged_adamw8bit (which may lie in main memory
    where the GPU's is full)."""
    weight_decay: float = fixed(0.01, NOT_NEGATIVE)
    """Decoupled weight decay of AdamW."""
    schedule: str = fixed("cosine", one_of("constant", "linear", "cosine"))
    """Course of the learning rate: constant, linear (falls to 0) or cosine (falls to 0)."""
    warmup_steps: int = fixed(0, NOT_NEGATIVE)
    """Steps in which the learning rate rises from 0."""
    max_grad_norm: float = fixed(1.0, NOT_NEGATIVE)
    """Gradients are scaled down to this norm; 0 leaves them."""
    precision: str = fixed("auto", one_of("auto", "fp32", "bf16", "fp16"))
    """fp32, or autocast to bf16 or fp16; auto takes bf16 where the device is fast at it, else fp32."""
    gradient_checkpointing: bool = free(False)
    """Recompute activations in the backward pass: less memory, about a third slower."""
    threads: str = free("auto", _THREADS)
    """CPU threads: a number, or auto, which measures once per machine."""
    save_every_steps: int = free(100, NOT_NEGATIVE)
    """Steps between checkpoints; 0 keeps only the last."""
    keep_checkpoints: int = free(3, NOT_NEGATIVE)
    """Older checkpoints are deleted; 0 keeps all."""
    save_adapter_every_steps: int = free(0, NOT_NEGATIVE)
    """Steps between adapter files in all of output.formats, such as name-000200.safetensors after step 200, which are
    never deleted; 0 writes none."""
    save_adapter_every_epochs: int = free(0, NOT_NEGATIVE)
    """The same by passes over the data, such as name-000002.safetensors after the second; give one of the two."""
    preview_every_steps: int = free(0, NOT_NEGATIVE)
    """Steps between previews; 0 makes none."""
    tracker: str = free("none", one_of("none", "tensorboard"))
    """none or tensorboard (in the run folder)."""


@dataclass(frozen=True)
class PreviewConfig:
    """What the model makes of the same requests while it is trained."""

    prompts: tuple[str, ...] = free(())
    """Captions to draw, or recordings to transcribe; without any, the first of the data are taken."""
    negative: str = free("")
    """What the images should not show."""
    seeds: tuple[int, ...] = free((0,), SEEDS)
    """Each prompt is drawn once with each seed."""
    num_steps: int = free(25, from_to(1, MAX_DENOISING_STEPS, f"must be from 1 to {MAX_DENOISING_STEPS}"))
    """Denoising steps."""
    guidance: float | None = free(None, AT_LEAST_ONE)
    """Classifier-free guidance scale; 1 turns it off, null takes what suits the base."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Images and scores of the checkpoints. They are generated as `preview` says: num_steps, guidance, negative.

    Of bases that write text, every_steps, patience and metrics say how data.validation is scored.
    """

    after_training: bool = free(False)
    """Evaluate the checkpoints once training is done, choose the best and link it as best.safetensors."""
    references: str | None = free(None)
    """Folder of real images of what is trained, other than those it is trained on."""
    prompts: str | None = free(None)
    """YAML file or shipped suite (configs/evaluate). None takes the captions of the references, with the trigger words
    and without."""
    class_words: str | None = free(None)
    """What is trained in words that everybody knows, for {class} in the prompts."""
    weights: tuple[float, ...] = free((0.7, 1.0), POSITIVE_WEIGHTS)
    """Each checkpoint is tried with each of these weights."""
    seeds: tuple[int, ...] = free((0, 1), SEEDS)
    """Each prompt is drawn once with each seed."""
    metrics: tuple[str, ...] = free(())
    """Without any, all that can be computed. Of bases that write text: loss, and wer, cer or exact_match, token_f1; the
    first one decides which checkpoint is the best."""
    clip: str | None = free(None)
    """The CLIP that scores: builtin:emoji-clip, an open_clip folder or "model/pretrained". None takes one that fits."""
    scorers: tuple[str, ...] = free(())
    """Other models that score, as KIND=NAME: dino=FOLDER, preference=NAME, probe=FILE for the aesthetic score."""
    every_steps: int = free(0, NOT_NEGATIVE)
    """Steps between scores of the adapter while it is trained, on the first prompts and seeds; 0 makes none. With
    data.validation, 0 makes ten in a run."""
    patience: int = free(0, NOT_NEGATIVE)
    """End the run when so many of these scores in a row are no better than the best before; 0 never ends it early."""
    picture_draws: int | None = free(None, NOT_NEGATIVE)
    """Noises with which the loss of each training image is taken after training, to show bad captions; 0 leaves it
    out. None takes up to 8, of fewer images if need be, within 3 % of the passes of training, and none in runs of
    less than 100 steps."""


@dataclass(frozen=True)
class CacheConfig:
    """Prepared samples, kept by content."""

    path: str | None = free(None)
    """Folder; None takes the user's cache folder."""


@dataclass(frozen=True)
class OutputConfig:
    """The run folder and the files made at the end."""

    path: str = free(REQUIRED, FILLED)
    """Run folder."""
    name: str | None = free(None)
    """Name of the adapter file without ending; None takes the name of the run folder."""
    formats: tuple[str, ...] = free(("kohya",), Choice(group="formats", is_list=True))
    """Formats to write: kohya (also ComfyUI, A1111 and Forge), diffusers, peft, or one of another package."""
    dtype: str = free("fp16", one_of("fp32", "fp16", "bf16"))
    """dtype in the files: fp32, fp16 or bf16."""
    publish_tags: bool = free(True)
    """Put caption words and folder names into the metadata, as kohya does; false keeps them private."""
    title: str | None = free(None)
    """Name that model sites and managers show; None takes the name of the file."""
    author: str | None = free(None)
    """Who made the adapter."""
    description: str | None = free(None)
    """What it is for, in a sentence or two."""
    license: str | None = free(None)
    """Licence of the adapter, say CC-BY-4.0."""
    thumbnail: str | None = free(None)
    """Image that is made small and put into the file: a path, or preview for the last preview of the run."""


@dataclass(frozen=True)
class Config:
    """A whole training run."""

    model: Any
    """ModelOptions of the family."""
    data: Any = field(default_factory=ImageDataConfig)
    """DataConfig of the type of the family's samples."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    given: InitVar[frozenset[str]] = frozenset()
    """Keys that the command line gave, over a file; they are no part of the config."""

    def __post_init__(self, given: frozenset[str]) -> None:
        """Keeps what the command line gave."""
        object.__setattr__(self, "given", given)

    def is_given(self, *keys: str) -> bool:
        """Says whether the command line gave one of these."""
        return not vars(self)["given"].isdisjoint(keys)


PATHS = frozenset(
    {
        "model.path",
        "data.path",
        "data.images",
        "data.validation",
        "evaluate.references",
        "evaluate.prompts",
        "evaluate.clip",
    }
    | {"output.thumbnail"}
)
"""Keys whose value may be a path, which is relative to where the run was started."""


def field_docs(section_type: type[Any]) -> Mapping[str, str]:
    """Returns field name -> the string under it, those of base classes included."""
    docs: dict[str, str] = {}
    for owner in reversed(section_type.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_text(following):
                docs[line.target.id] = " ".join(following.value.value.split())  # type: ignore[attr-defined]
    return docs


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
