"""What each app does with each name and each variant: data, read from or measured on their own loading code.

Versions: ComfyUI a125cd84 (October 2025), Forge dfdcbab6 (June 2025), A1111 1.10, kohya sd-scripts 48d368fa (February
2026), diffusers 0.42.1 with PEFT 0.21.2 and transformers 5.23. Namings and styles are those of `matched_file`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lora_diffusion.architectures.base import DiffusionArchitecture
from lora_diffusion.compat.matched_file import PAIRS

LOST, WRONG, HIDDEN = "lost", "wrong", "hidden"
"""Nothing is applied; something else is applied; all is applied, but people do not see something of the file."""


class Consequence(NamedTuple):
    """What an app does where something is not as it wants it."""

    scope: str
    """module, or file where nothing of the file is applied."""
    severity: str
    text: str


@dataclass(frozen=True, eq=False)
class App:
    """The rules of one app."""

    name: str
    title: str
    prefixes: str
    """Key of `DiffusionArchitecture.app_prefixes`; empty where it reads the names of the base itself."""
    styles: frozenset[str]
    """Namings of a pair's tensors that it reads."""
    variants: frozenset[str]
    """Those that it applies."""
    consequences: Mapping[str, Consequence]
    """Error -> what happens: unknown (no such module), spelling, style, variant, no_down, no_up, shape."""
    dora: str
    """input: applies a magnitude that runs along the inputs; ignored: applies the factors alone."""
    unreached: str = ""
    """Regular expression of module paths that it never adapts."""
    flat_convolution: Consequence | None = None
    """What happens to factors of two dimensions on a 1x1 convolution, if it minds."""
    format: str = "kohya"
    """That which it reads best."""
    small_floats: str = ""
    """When it holds the factors in float16, if it does."""
    order: tuple[str, ...] = PAIRS
    """Styles of tensors; of several at one module the first is applied."""
    by_trigger: bool = False
    """Whether one tensor makes it take a module for a style, even if others are missing."""
    biases: frozenset[str] = frozenset()
    """Tensors of biases that it applies beside whatever changes the weight."""
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

    def finds(self, naming: str, architecture: DiffusionArchitecture) -> bool:
        """Says whether it finds modules that are named so, as `naming_of` tells it."""
        return naming in architecture.app_prefixes[self.prefixes] if self.prefixes else naming == "in-model"


_COMFY_STYLES = frozenset(("kohya", "peft", "diffusers", "linear_layer", "processor"))
_LYCORIS = frozenset(("lora", "tucker", "loha", "lokr", "full", "norm", "glora"))
_LAST_WINS = ("set", "full", "norm", "oft", "glora", "lokr", "loha", *PAIRS)
"""How ComfyUI and Forge go through the styles, each of which replaces the one before."""
_NOT_LOADED = Consequence("module", LOST, "writes 'lora key not loaded' to its log and goes on")
_RAISES = Consequence("file", LOST, "stops with an error and applies nothing")
_SILENT = Consequence("module", LOST, "says nothing and goes on without it")


COMFYUI = App(
    name="comfyui",
    title="ComfyUI",
    prefixes="comfyui",
    styles=_COMFY_STYLES | {"peft-named", "bare"},
    variants=_LYCORIS | {"oft", "boft", "set"},
    order=_LAST_WINS,
    by_trigger=True,
    biases=frozenset(("diff_b",)),
    reads_mid=True,
    reads_reshape=True,
    consequences={
        "unknown": _NOT_LOADED,
        "spelling": _NOT_LOADED,
        "style": _NOT_LOADED,
        "variant": _NOT_LOADED,
        "no_down": Consequence("file", LOST, "stops with a KeyError"),
        "no_up": _NOT_LOADED,
        "shape": Consequence("module", LOST, "logs an error and leaves the module out"),
        "inner": _RAISES,
        "no constraint": Consequence("module", LOST, "logs an error and leaves the module out"),
    },
    dora="input",
)

_LISTED = Consequence("module", LOST, "lists the key in its console and goes on")
FORGE = App(
    name="forge",
    title="Forge",
    prefixes="forge",
    styles=_COMFY_STYLES,
    variants=_LYCORIS | {"set"},
    order=tuple(style for style in _LAST_WINS if style not in ("oft", "bare", "peft-named")),
    by_trigger=True,
    biases=frozenset(("diff_b",)),
    reads_mid=True,
    consequences={
        "unknown": _LISTED,
        "spelling": _LISTED,
        "style": _LISTED,
        "variant": _LISTED,
        "no_down": Consequence("file", LOST, "stops with a KeyError"),
        "no_up": _LISTED,
        "shape": _RAISES,
        "filled": Consequence("module", WRONG, "fills it up with zeros"),
        "not merged": Consequence("module", LOST, "says so in its console and goes on without it"),
    },
    dora="input",
)
FORGE_MOST_UNMATCHED = 12
"""With more unmatched tensors Forge applies nothing."""

_DROPPED = Consequence("file", LOST, "drops the whole file; only its console says so")
A1111 = App(
    name="a1111",
    title="A1111",
    prefixes="a1111",
    styles=frozenset(("kohya", "peft")),
    variants=_LYCORIS | {"ia3", "oft", "boft"},
    order=("kohya", "peft", "loha", "ia3", "lokr", "full", "norm", "glora", "oft"),
    reads_mid=True,
    reads_scale=True,
    reads_bundled=True,
    copies_kernels=True,
    unreached=r"text_projection",
    consequences={
        "unknown": _SILENT,
        "spelling": _SILENT,
        "style": _DROPPED,
        "variant": _DROPPED,
        "no_down": _DROPPED,
        "no_up": _DROPPED,
        "shape": Consequence("module", LOST, "counts it under 'Networks with errors' and leaves it out"),
        "kernel": _DROPPED,
        "on_input": _DROPPED,
    },
    dora="input",
    small_floats="on every graphics card",
)
KOHYA = App(
    name="kohya",
    title="kohya sd-scripts",
    prefixes="kohya",
    styles=frozenset(("kohya",)),
    variants=frozenset(("lora",)),
    order=("kohya",),
    consequences={
        "unknown": _SILENT,
        "spelling": _SILENT,
        "style": _SILENT,
        "variant": _SILENT,
        "tucker": Consequence("file", LOST, "stops with a size mismatch"),
        "no_down": _SILENT,
        "no_up": _SILENT,
        "shape": Consequence("file", LOST, "stops with a size mismatch"),
    },
    dora="ignored",
    unreached=r"conv_(in|out)|(time|add)_embedding\..*|text_projection",
    flat_convolution=Consequence("file", LOST, "stops with a size mismatch"),
    small_floats="where the network runs in float16",
)

DIFFUSERS = App(
    name="diffusers",
    title="diffusers",
    format="diffusers",
    prefixes="diffusers",
    styles=frozenset(("kohya",)),
    variants=frozenset(("lora",)),
    consequences={
        "unknown": Consequence("module", LOST, "warns of unexpected keys and goes on"),
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

_IGNORED_KEYS = Consequence("module", LOST, "warns of keys that it does not use, or says nothing")
DIFFUSERS_DOTTED = App(
    name="diffusers",
    title="diffusers",
    prefixes="diffusers dotted",
    styles=frozenset(("peft", "diffusers", "linear_layer", "processor")),
    variants=frozenset(("lora",)),
    order=("peft", "diffusers", "linear_layer", "processor"),
    consequences={
        "unknown": _IGNORED_KEYS,
        "spelling": _IGNORED_KEYS,
        "style": _IGNORED_KEYS,
        "variant": _RAISES,
        "no_down": Consequence("module", LOST, "warns of missing keys and goes on"),
        "drawn": Consequence("module", WRONG, "draws them at random, as transformers does in text encoders"),
        "no_up": Consequence("module", LOST, "warns of missing keys and goes on"),
        "shape": _RAISES,
    },
    dora="own",
    flat_convolution=_RAISES,
    small_floats="where the pipeline runs in float16",
)
"""With a file in names of its own."""
DIFFUSERS_KOHYA_STARTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
"""If every tensor's name begins so, the file is taken for one of kohya's."""

PEFT_FOLDER = App(
    name="diffusers",
    title="diffusers",
    prefixes="",
    styles=frozenset(("peft",)),
    variants=frozenset(("lora",)),
    order=("peft",),
    consequences={
        **DIFFUSERS_DOTTED.consequences,
        "unknown": Consequence("module", LOST, "warns of missing keys, or says nothing"),
        "no_down": Consequence("module", WRONG, "warns of missing keys and draws them at random"),
    },
    dora="own",
    flat_convolution=_RAISES,
    small_floats="where the pipeline runs in float16",
    reads_folders=True,
)
"""With a folder that `PeftModel.from_pretrained` reads for each network."""

APPS: Mapping[str, App] = {app.name: app for app in (COMFYUI, A1111, FORGE, KOHYA, DIFFUSERS)}

LARGEST_VIEWED_HEADER = 2**20
"""Bytes of header above which ComfyUI's /view_metadata answers 404."""
LARGEST_FLOAT16 = 65504.0
