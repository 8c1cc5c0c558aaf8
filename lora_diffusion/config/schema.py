"""Every setting: one dataclass field, its default, and one string under it. Read-only once loaded.

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

from lora_diffusion.core.samples import AudioText, Chat, ImageText, Sample

DEFAULT_STEPS = 1000
"""Optimizer steps where neither train.max_steps nor train.epochs is given."""
REQUIRED: Any = "???"
"""A value that the user must give; a file may say so, too."""


@dataclass(frozen=True)
class Contradiction:
    """Values that cannot go together."""

    text: str
    """What is told if neither gives way."""
    key: str = ""
    """The setting that gives way where a file says it, and the command line one of `against`; "" where none can."""
    against: tuple[str, ...] = ()
    instead: Any = None
    """What it becomes; None for its default."""


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

    defaults: ClassVar[Mapping[str, Any]] = {}
    """"section.key" -> the default that suits this family, where it differs from the one written below."""
    augmentation: ClassVar[Mapping[str, Any]] = {}
    """Keys that change what is seen while a run trains, here as in `data` -> the value that turns them off."""
    of_answers: ClassVar[frozenset[str]] = frozenset()
    """Keys that say how the base is asked, and do not change what it learns."""
    free: ClassVar[frozenset[str]] = frozenset({"path"})
    """Keys that may change when a run is resumed, here as in other sections: they say where something lies, whose
    content is compared, or how long, how fast or how visibly is computed, and not what."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on; each type of samples adds its own keys."""

    path: str = REQUIRED
    """Folder with the files to train on and what is to be learnt of each."""
    skip_bad: bool = False
    """Leave out what cannot be used, with a warning that counts it, instead of stopping: pictures that cannot be read;
    recordings and conversations with any fault, such as a missing file or too long a transcript."""

    sample_type: ClassVar[type[Sample]]
    """Of what is read with this section."""
    ranges: ClassVar[Mapping[str, Any]] = {}
    """Key -> what its value must satisfy, and that in words."""
    free: ClassVar[frozenset[str]] = frozenset({"path", "skip_bad"})
    augmentation: ClassVar[Mapping[str, Any]] = {}

    @property
    def held_out(self) -> str | None:
        """What the run is scored on while it trains and not trained on, as `validation` says; None without any."""
        return None

    def faults(self) -> Iterator[Contradiction]:
        """Yields each pair of values that cannot go together."""
        yield from ()


@dataclass(frozen=True)
class ImageDataConfig(DataConfig):
    """The pictures and their captions."""

    path: str = REQUIRED
    """Folder with pictures and captions (name.txt or name.caption beside each picture, or a metadata.jsonl or .csv), or
    with kohya folders such as "10_sks dog", or such a folder itself."""
    resolution: int | None = None
    """Side in pixels of a square picture; other shapes get the same area. None takes what the base was trained on."""
    buckets: bool = True
    """Keep the shape of pictures as far as the bucket sizes allow; false crops all to squares."""
    captions: str = "required"
    """required: every picture needs one. optional: those without take default_caption."""
    default_caption: str = ""
    """Caption of pictures that have none, with captions: optional."""
    caption_lines: str = "joined"
    """A caption of several lines: joined makes one caption of them. each makes a caption of its own of each line of a
    file, one of which is drawn each time. first takes the first line."""
    trigger: str = "auto"
    """Words that call up what is trained. auto takes the rare words that all captions share; "" means there are
    none."""
    flip: bool = False
    """Show each picture mirrored half of the time."""

    sample_type: ClassVar[type[Sample]] = ImageText
    ranges: ClassVar[Mapping[str, Any]] = {
        "resolution": (lambda v: 16 <= v <= 4096, "must be between 16 and 4096 pixels"),
        "captions": (lambda v: v in ("required", "optional"), "must be one of required, optional"),
        "caption_lines": (lambda v: v in ("joined", "each", "first"), "must be one of joined, each, first"),
    }

    def faults(self) -> Iterator[Contradiction]:
        """Yields one if a default caption is given that nothing uses."""
        if self.default_caption and self.captions == "required":
            text = "data.default_caption: is only used with data.captions=optional"
            yield Contradiction(text, "data.default_caption", ("data.captions",))


@dataclass(frozen=True)
class SplitDataConfig(DataConfig):
    """Samples with texts that the base writes: they come in splits, and the run can be scored on some of them."""

    split: str = "auto"
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
    long: str = "refuse"
    """Recordings that are longer than the base hears at once: refuse, or split at the timestamps of their transcript
    (<|0.00|> first words<|4.20|><|4.20|> next words<|9.10|>)."""
    speeds: tuple[float, ...] = (1.0,)
    """Each recording is heard at one of these speeds, drawn each time: 0.9, 1.0 and 1.1 are usual."""
    noise_db: tuple[float, ...] = ()
    """Signal-to-noise ratios in dB of white noise: each recording is heard clean or with one of these, drawn each
    time."""

    sample_type: ClassVar[type[Sample]] = AudioText
    augmentation: ClassVar[Mapping[str, Any]] = {"speeds": (1.0,), "noise_db": ()}
    ranges: ClassVar[Mapping[str, Any]] = {
        "split": (lambda v: v != "", "must be auto, all or the name of a split"),
        "long": (lambda v: v in ("refuse", "split"), "must be one of refuse, split"),
        "speeds": (
            lambda v: len(v) > 0 and len(set(v)) == len(v) and all(0.5 <= speed <= 2 for speed in v),
            "must be one or more different speeds between 0.5 and 2",
        ),
        "noise_db": (
            lambda v: len(set(v)) == len(v) and all(-20 <= ratio <= 80 for ratio in v),
            "must be different ratios between -20 and 80 dB",
        ),
    }


@dataclass(frozen=True)
class ChatDataConfig(SplitDataConfig):
    """The conversations about pictures."""

    path: str = REQUIRED
    """JSON or JSONL file, or a folder with such files, of LLaVA ("image" and "conversations"), ShareGPT or messages
    with role and content; Parquet files; or what `save_to_disk` of datasets wrote. Those without a picture are learnt
    as text alone."""
    split: str = "auto"
    """Which folders, files and splits of data.path are taken: auto leaves out those named test, validation, dev or
    eval; all takes everything; else the name of one."""
    images: str | None = None
    """Folder that the names of pictures are looked up in; None takes that of the file which names them."""
    max_tokens: int | None = None
    """Longest conversation in tokens, those of the picture counted; None takes what the base can read."""
    too_long: str = "refuse"
    """Conversations that are longer: refuse, or skip them with a warning, as data.skip_bad does with all faults."""
    zooms: tuple[float, ...] = (1.0,)
    """Each picture is seen at one of these scales, drawn each time: 1.1 cuts a rim off, 0.9 adds a white one."""

    sample_type: ClassVar[type[Sample]] = Chat
    free: ClassVar[frozenset[str]] = DataConfig.free | {"images"}
    augmentation: ClassVar[Mapping[str, Any]] = {"zooms": (1.0,)}
    ranges: ClassVar[Mapping[str, Any]] = {
        "split": (lambda v: v != "", "must be auto, all or the name of a split"),
        "max_tokens": (lambda v: v >= 1, "must be 1 or greater"),
        "too_long": (lambda v: v in ("refuse", "skip"), "must be one of refuse, skip"),
        "zooms": (
            lambda v: len(v) > 0 and len(set(v)) == len(v) and all(0.5 <= zoom <= 2 for zoom in v),
            "must be one or more different scales between 0.5 and 2",
        ),
    }


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

    variant: str = "lora"
    """Kind of adapter: lora, rslora, locon, dora, dora_out, loha or lokr."""
    rank: int = 16
    """Inner size; more rank holds more detail in a larger file."""
    alpha: float | None = None
    """The change is scaled by alpha / rank (rslora: alpha / sqrt(rank)). None takes the rank, that is scale 1."""
    conv_rank: int | None = None
    """Rank on convolutions larger than 1x1; None takes rank."""
    conv_alpha: float | None = None
    """Alpha on them; None keeps the scale of all else."""
    module_ranks: tuple[str, ...] = ()
    """Ranks of single modules, each as TARGET=RANK with a target as in targets, such as ff=32 or unet/attn=8. The last
    one that matches a module counts, before conv_rank and rank; the scale stays."""
    module_alphas: tuple[str, ...] = ()
    """Alphas of single modules, each as TARGET=ALPHA, likewise before conv_alpha and alpha; whatever their rank, the
    scale is alpha / rank."""
    lokr_factor: int = -1
    """Size of the first factor of lokr: small numbers train more parameters; -1 makes the smallest file."""
    dropout: float = 0.0
    """Share of the layer's inputs that the adapter does not see in a training step, 0 to 1."""
    parts: tuple[str, ...] = ("unet",)
    """Networks that get an adapter: unet, text_encoder; of Whisper encoder, decoder; of LLaVA language_model,
    projector, vision_tower."""
    targets: tuple[str, ...] = ("attn",)
    """Modules that get one: a group (attn, ff, conv, all-linear), the path of a module, or re:PATTERN for paths that
    the regular expression matches as a whole. "unet/attn" asks in one part only."""
    full: tuple[str, ...] = ()
    """Those of the parts in which the weight of every linear layer and convolution is trained in full, whatever the
    targets, as is usual with LLaVA's projector; norms and biases stay as they are."""


@dataclass(frozen=True)
class TrainConfig:
    """How the adapter is trained."""

    seed: int = 0
    """Decides every random draw of the run."""
    max_steps: int | None = None
    """Optimizer steps. Give this or epochs; without either 1000 steps are made."""
    epochs: int | None = None
    """Passes over the data, repeats counted."""
    batch_size: int = 1
    """Samples in one forward pass."""
    gradient_accumulation: int = 1
    """Forward passes in one optimizer step."""
    learning_rate: float = 1e-4
    """Highest learning rate of the UNet's adapter."""
    text_encoder_learning_rate: float | None = None
    """The same for text encoders; None takes a tenth of learning_rate."""
    part_learning_rates: tuple[str, ...] = ()
    """The same for single parts, each as part=rate, such as projector=2e-5."""
    module_learning_rates: tuple[str, ...] = ()
    """The same for single modules, each as TARGET=RATE with a target as in adapter.targets, such as ff=5e-5. The last
    one that matches a module counts, before all other rates."""
    optimizer: str = "adamw"
    """adamw, adamw8bit (moments in 8 bits: a quarter of their memory) or paged_adamw8bit (which may lie in main memory
    where the GPU's is full)."""
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
    save_adapter_every_steps: int = 0
    """Steps between adapter files in all of output.formats, such as name-000200.safetensors after step 200, which are
    never deleted; 0 writes none."""
    save_adapter_every_epochs: int = 0
    """The same by passes over the data, such as name-000002.safetensors after the second; give one of the two."""
    preview_every_steps: int = 0
    """Steps between previews; 0 makes none."""
    tracker: str = "none"
    """none or tensorboard (in the run folder)."""

    free: ClassVar[frozenset[str]] = frozenset(
        {"max_steps", "epochs", "gradient_checkpointing", "threads", "save_every_steps", "keep_checkpoints"}
        | {"save_adapter_every_steps", "save_adapter_every_epochs", "preview_every_steps", "tracker"}
    )


@dataclass(frozen=True)
class PreviewConfig:
    """What the model makes of the same requests while it is trained."""

    prompts: tuple[str, ...] = ()
    """Captions to draw, or recordings to transcribe; without any, the first of the data are taken."""
    negative: str = ""
    """What the pictures should not show."""
    seeds: tuple[int, ...] = (0,)
    """Each prompt is drawn once with each seed."""
    num_steps: int = 25
    """Denoising steps."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 turns it off, null takes what suits the base."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Pictures and scores of the checkpoints. They are drawn as `preview` says: num_steps, guidance, negative.

    Of bases that write text, every_steps, patience and metrics say how data.validation is scored.
    """

    after_training: bool = False
    """Evaluate the checkpoints once training is done, choose the best and link it as best.safetensors."""
    references: str | None = None
    """Folder of real pictures of what is trained, other than those it is trained on."""
    prompts: str | None = None
    """YAML file or shipped suite (configs/evaluate). None takes the captions of the references, with the trigger words
    and without."""
    class_words: str | None = None
    """What is trained in words that everybody knows, for {class} in the prompts."""
    weights: tuple[float, ...] = (0.7, 1.0)
    """Each checkpoint is tried with each of these weights."""
    seeds: tuple[int, ...] = (0, 1)
    """Each prompt is drawn once with each seed."""
    metrics: tuple[str, ...] = ()
    """Without any, all that can be computed. Of bases that write text: loss, and wer, cer or exact_match, token_f1; the
    first one decides which checkpoint is the best."""
    clip: str | None = None
    """The CLIP that scores: builtin:emoji-clip, an open_clip folder or "model/pretrained". None takes one that fits."""
    scorers: tuple[str, ...] = ()
    """Other models that score, as KIND=NAME: dino=FOLDER, preference=NAME, probe=FILE for the aesthetic score."""
    every_steps: int = 0
    """Steps between scores of the adapter while it is trained, on the first prompts and seeds; 0 makes none. With
    data.validation, 0 makes ten in a run."""
    patience: int = 0
    """End the run when so many of these scores in a row are no better than the best before; 0 never ends it early."""
    picture_draws: int | None = None
    """Noises with which the loss of each training picture is taken after training, to show bad captions; 0 leaves it
    out. None takes up to 8, of fewer pictures if need be, within 3 % of the passes of training, and none in runs of
    less than 100 steps."""


@dataclass(frozen=True)
class CacheConfig:
    """Prepared samples, kept by content."""

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
    """Put caption words and folder names into the metadata, as kohya does; false keeps them private."""
    title: str | None = None
    """Name that model sites and managers show; None takes the name of the file."""
    author: str | None = None
    """Who made the adapter."""
    description: str | None = None
    """What it is for, in a sentence or two."""
    license: str | None = None
    """Licence of the adapter, say CC-BY-4.0."""
    thumbnail: str | None = None
    """Picture that is made small and put into the file: a path, or preview for the last preview of the run."""


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
    told: InitVar[frozenset[str]] = frozenset()
    """Keys that the command line gave, over a file; they are no part of the config."""

    def __post_init__(self, told: frozenset[str]) -> None:
        """Keeps what the command line gave."""
        object.__setattr__(self, "told", told)

    def is_told(self, *keys: str) -> bool:
        """Says whether the command line gave one of these."""
        return not vars(self)["told"].isdisjoint(keys)


FREE_SECTIONS = frozenset({"preview", "evaluate", "cache", "output"})
"""Sections that may change as a whole when a run is resumed; of the others the keys in their `free`."""
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
