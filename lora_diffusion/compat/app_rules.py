"""What each client does with each name and each kind of tensor: data, read from or measured on their own loading code.

Versions: ComfyUI a125cd84 (October 2025), Forge dfdcbab6 (June 2025), A1111 1.10, kohya sd-scripts 48d368fa (February
2026), diffusers 0.42.1 with PEFT 0.21.2 and transformers 5.23. Spellings and styles are those of `_client_file`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lora_diffusion.compat.adapter_file import PAIRS

LOST, WRONG, HIDDEN = "lost", "wrong", "hidden"
"""Nothing is applied; something else is applied; all is applied, but people do not see something of the file."""


class Fate(NamedTuple):
    """What a client does where something is not as it wants it."""

    scope: str
    """module, or file where nothing of the file is applied."""
    severity: str
    text: str


@dataclass(frozen=True, eq=False)
class Client:
    """The rules of one client."""

    name: str
    title: str
    spellings: Mapping[str, frozenset[str]]
    """Family -> spellings of module names that it finds."""
    styles: frozenset[str]
    """Namings of a pair's tensors that it reads."""
    variants: frozenset[str]
    """Kinds of adapter that it applies."""
    fates: Mapping[str, Fate]
    """Fault -> what happens: unknown (no such module), spelling, style, variant, no_down, no_up, shape."""
    dora: str
    """input: applies a magnitude that runs along the inputs; ignored: applies the factors alone."""
    unreached: str = ""
    """Regular expression of module paths that it never adapts."""
    flat_convolution: Fate | None = None
    """What happens to factors of two dimensions on a 1x1 convolution, if it minds."""
    small_floats: str = ""
    """When it holds the factors in float16, if it does."""
    order: tuple[str, ...] = PAIRS
    """Kinds of tensors, by style; of several at one module the first is applied."""
    by_trigger: bool = False
    """Whether one tensor makes it take a module for a kind, even if others are missing."""
    biases: frozenset[str] = frozenset()
    """Tensors of biases that it applies beside whatever kind changes the weight."""
    reads_mid: bool = False
    """Whether it reads the middle factor of a pair."""
    reads_reshape: bool = False
    """Whether it reads the shape that a weight is filled up to."""
    reads_scale: bool = False
    """Whether it takes a scale of the file in place of alpha / rank."""
    copies_kernels: bool = False
    """Whether it copies tensors into layers of the base's kernel, of whatever shape with as many numbers."""
    reads_bundled: bool = False
    """Whether it reads embeddings that a file brings along."""
    reads_folders: bool = False


_KOHYA_UNET = ("lora_unet_", "lora_unet_ ldm")
_DIFFUSERS_DOTTED = ("unet.", "unet. attention", "unet. processor", "text_encoder.", "text_encoder. short")
_COMFY_UNET = (*_KOHYA_UNET, "lycoris_", "unet.", "unet. processor", "bare", "processor", "diffusion_model.")
_COMFY_TEXT = ("lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2.")
_COMFY_NAMES = (*_COMFY_UNET, *_COMFY_TEXT)
_COMFY_STYLES = frozenset(("kohya", "peft", "diffusers", "linear_layer", "processor"))
_LYCORIS = frozenset(("lora", "tucker", "loha", "lokr", "full", "norm", "glora"))
_LAST_WINS = ("set", "full", "norm", "oft", "glora", "lokr", "loha", *PAIRS)
"""How ComfyUI and Forge go through the kinds, each of which replaces the one before."""
_NOT_LOADED = Fate("module", LOST, "writes 'lora key not loaded' to its log and goes on")
_RAISES = Fate("file", LOST, "stops with an error and applies nothing")
_SILENT = Fate("module", LOST, "says nothing and goes on without it")


def _everywhere(*names: str) -> dict[str, frozenset[str]]:
    return {family: frozenset(names) for family in ("sd1", "sd2", "sdxl")}


COMFYUI = Client(
    name="comfyui",
    title="ComfyUI",
    spellings=_everywhere(*_COMFY_NAMES, "text_encoders."),
    styles=_COMFY_STYLES | {"peft-named", "bare"},
    variants=_LYCORIS | {"oft", "boft", "set"},
    order=_LAST_WINS,
    by_trigger=True,
    biases=frozenset(("diff_b",)),
    reads_mid=True,
    reads_reshape=True,
    fates={
        "unknown": _NOT_LOADED,
        "spelling": _NOT_LOADED,
        "style": _NOT_LOADED,
        "variant": _NOT_LOADED,
        "no_down": Fate("file", LOST, "stops with a KeyError"),
        "no_up": _NOT_LOADED,
        "shape": Fate("module", LOST, "logs an error and leaves the module out"),
        "inner": _RAISES,
        "no constraint": Fate("module", LOST, "logs an error and leaves the module out"),
    },
    dora="input",
)

_LISTED = Fate("module", LOST, "lists the key in its console and goes on")
FORGE = Client(
    name="forge",
    title="Forge",
    spellings=_everywhere(*_COMFY_NAMES),
    styles=_COMFY_STYLES,
    variants=_LYCORIS | {"set"},
    order=tuple(style for style in _LAST_WINS if style not in ("oft", "bare", "peft-named")),
    by_trigger=True,
    biases=frozenset(("diff_b",)),
    reads_mid=True,
    fates={
        "unknown": _LISTED,
        "spelling": _LISTED,
        "style": _LISTED,
        "variant": _LISTED,
        "no_down": Fate("file", LOST, "stops with a KeyError"),
        "no_up": _LISTED,
        "shape": _RAISES,
        "filled": Fate("module", WRONG, "fills it up with zeros"),
        "not merged": Fate("module", LOST, "says so in its console and goes on without it"),
    },
    dora="input",
)
FORGE_MOST_UNMATCHED = 12
"""With more unmatched tensors Forge applies nothing."""

_DROPPED = Fate("file", LOST, "drops the whole file; only its console says so")
A1111 = Client(
    name="a1111",
    title="A1111",
    spellings={
        "sd1": frozenset((*_KOHYA_UNET, "lora_te_", "lora_te1_")),
        "sd2": frozenset((*_KOHYA_UNET, "lora_te_")),
        "sdxl": frozenset((*_KOHYA_UNET, "lora_te1_", "lora_te2_")),
    },
    styles=frozenset(("kohya", "peft")),
    variants=_LYCORIS | {"ia3", "oft", "boft"},
    order=("kohya", "peft", "loha", "ia3", "lokr", "full", "norm", "glora", "oft"),
    reads_mid=True,
    reads_scale=True,
    reads_bundled=True,
    copies_kernels=True,
    unreached=r"text_projection",
    fates={
        "unknown": _SILENT,
        "spelling": _SILENT,
        "style": _DROPPED,
        "variant": _DROPPED,
        "no_down": _DROPPED,
        "no_up": _DROPPED,
        "shape": Fate("module", LOST, "counts it under 'Networks with errors' and leaves it out"),
        "kernel": _DROPPED,
        "on_input": _DROPPED,
    },
    dora="input",
    small_floats="on every graphics card",
)
A1111_MISSED = ("sdxl", "lora_unet_", r"up_blocks\.0\.upsamplers\.0\.conv")
"""Family, spelling and path of the one module that its tables, made for SD1, spell wrong."""
A1111_FUSED = {"sd2": "text_encoder", "sdxl": "text_encoder_2"}
"""Family -> the OpenCLIP tower, whose q, k and v are one matrix there."""

KOHYA = Client(
    name="kohya",
    title="kohya sd-scripts",
    spellings={
        "sd1": frozenset(("lora_unet_", "lora_te_")),
        "sd2": frozenset(("lora_unet_", "lora_te_")),
        "sdxl": frozenset((*_KOHYA_UNET, "lora_te1_", "lora_te2_")),
    },
    styles=frozenset(("kohya",)),
    variants=frozenset(("lora",)),
    order=("kohya",),
    fates={
        "unknown": _SILENT,
        "spelling": _SILENT,
        "style": _SILENT,
        "variant": _SILENT,
        "tucker": Fate("file", LOST, "stops with a size mismatch"),
        "no_down": _SILENT,
        "no_up": _SILENT,
        "shape": Fate("file", LOST, "stops with a size mismatch"),
    },
    dora="ignored",
    unreached=r"conv_(in|out)|(time|add)_embedding\..*|text_projection",
    flat_convolution=Fate("file", LOST, "stops with a size mismatch"),
    small_floats="where the network runs in float16",
)

DIFFUSERS = Client(
    name="diffusers",
    title="diffusers",
    spellings={
        "sd1": frozenset(("lora_unet_", "lora_te_", "lora_te_ short", "lora_te1_", "lora_te1_ short")),
        "sd2": frozenset(("lora_unet_", "lora_te_", "lora_te_ short", "lora_te1_", "lora_te1_ short")),
        "sdxl": frozenset((*_KOHYA_UNET, "lora_te_", "lora_te_ short", "lora_te1_", "lora_te1_ short", "lora_te2_")),
    },
    styles=frozenset(("kohya",)),
    variants=frozenset(("lora",)),
    fates={
        "unknown": Fate("module", LOST, "warns of unexpected keys and goes on"),
        "stray": _RAISES,
        "spelling": _RAISES,
        "style": _RAISES,
        "variant": _RAISES,
        "beside": _RAISES,
        "no_down": _RAISES,
        "no_up": _RAISES,
        "shape": _RAISES,
    },
    dora="ignored",
    order=("kohya",),
    flat_convolution=_RAISES,
    small_floats="where the pipeline runs in float16",
)
"""With a file in kohya's names, which it converts."""

_IGNORED_KEYS = Fate("module", LOST, "warns of keys that it does not use, or says nothing")
DIFFUSERS_DOTTED = Client(
    name="diffusers",
    title="diffusers",
    spellings={
        "sd1": frozenset(_DIFFUSERS_DOTTED),
        "sd2": frozenset(_DIFFUSERS_DOTTED),
        "sdxl": frozenset((*_DIFFUSERS_DOTTED, "text_encoder_2.", "text_encoder_2. projection")),
    },
    styles=frozenset(("peft", "diffusers", "linear_layer", "processor")),
    variants=frozenset(("lora",)),
    order=("peft", "diffusers", "linear_layer", "processor"),
    fates={
        "unknown": _IGNORED_KEYS,
        "spelling": _IGNORED_KEYS,
        "style": _IGNORED_KEYS,
        "variant": _RAISES,
        "no_down": Fate("module", LOST, "warns of missing keys and goes on"),
        "drawn": Fate("module", WRONG, "draws them at random, as transformers does in text encoders"),
        "no_up": Fate("module", LOST, "warns of missing keys and goes on"),
        "shape": _RAISES,
    },
    dora="own",
    flat_convolution=_RAISES,
    small_floats="where the pipeline runs in float16",
)
"""With a file in names of its own."""
DIFFUSERS_KOHYA_STARTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
"""If every tensor's name begins so, the file is taken for one of kohya's."""

PEFT_FOLDER = Client(
    name="diffusers",
    title="diffusers",
    spellings=_everywhere("in-model"),
    styles=frozenset(("peft",)),
    variants=frozenset(("lora",)),
    order=("peft",),
    fates={
        **DIFFUSERS_DOTTED.fates,
        "unknown": Fate("module", LOST, "warns of missing keys, or says nothing"),
        "no_down": Fate("module", WRONG, "warns of missing keys and draws them at random"),
    },
    dora="own",
    flat_convolution=_RAISES,
    small_floats="where the pipeline runs in float16",
    reads_folders=True,
)
"""With a folder that `PeftModel.from_pretrained` reads for each network."""

CLIENTS: Mapping[str, Client] = {client.name: client for client in (COMFYUI, A1111, FORGE, KOHYA, DIFFUSERS)}

LARGEST_VIEWED_HEADER = 2**20
"""Bytes of header above which ComfyUI's /view_metadata answers 404."""
LARGEST_FLOAT16 = 65504.0
