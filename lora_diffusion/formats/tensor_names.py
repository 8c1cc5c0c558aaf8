"""How tensors are called in adapter files: THE table of suffixes, and what names tell of modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.text import shown


class Suffix(NamedTuple):
    """A row of the table: how a tensor's name ends, and what that says."""

    end: str
    variant: str | None
    """Of adapter that it belongs to: "" for what stands beside any, None for what only other programs read."""
    tensor: str
    """Its name in ModuleAdapter; "alpha", "shape" and "magnitude_out", along the outputs, besides."""
    style: str | None
    """Naming of a pair of factors, else the variant, as programs tell them apart: "" for what stands beside any, None
    for what no program reads."""
    role: str
    """What programs call the tensor."""


def _rows(variant: str, style: str, pattern: str, names: Iterable[str]) -> list[Suffix]:
    return [Suffix(pattern.format(name), variant, name, style, name) for name in names]


IA3_FACTOR = Suffix(".weight", "ia3", "factor", "ia3", "weight")
"""Ends many other names too: of an adapter it is only beside an .on_input, and for programs where no dot precedes."""
SUFFIXES: tuple[Suffix, ...] = (
    *_rows("lora", "kohya", ".lora_{}.weight", ("down", "up", "mid")),
    *(
        Suffix(end.format(letter), variant, tensor, style, tensor)
        for end, variant, style in ((".lora_{}.weight", "lora", "peft"), (".lora_{}", None, "bare"))
        for letter, tensor in (("A", "down"), ("B", "up"))
    ),
    # What save_lora_weights of diffusers wrote for attention, by age.
    *_rows("lora", "diffusers", ".lora.{}.weight", ("down", "up")),
    *_rows("lora", "linear_layer", ".lora_linear_layer.{}.weight", ("down", "up")),
    *_rows("lora", "processor", ".{}.weight", ("down", "up")),
    *_rows("loha", "loha", ".hada_{}", ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *_rows("lokr", "lokr", ".lokr_{}", ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *_rows("glora", "glora", ".{}.weight", ("a1", "a2", "b1", "b2")),
    Suffix(".diff", "full", "diff", "full", "diff"),
    Suffix(".w_norm", "norm", "diff", "norm", "w_norm"),
    # Changes of biases stand beside adapters of any variant.
    Suffix(".diff_b", "", "bias", "full", "diff_b"),
    Suffix(".b_norm", "", "bias", "norm", "b_norm"),
    Suffix(".set_weight", "set", "value", "set", "set_weight"),
    Suffix(".on_input", "ia3", "on_input", "ia3", "on_input"),
    # Blocks of four dimensions are boft.
    Suffix(".oft_blocks", "oft", "blocks", "oft", "oft_blocks"),
    Suffix(".rescale", "oft", "rescale", "oft", "rescale"),
    Suffix(".dora_scale", "", "magnitude", "", "dora_scale"),
    Suffix(".lora_magnitude_vector", "", "magnitude_out", "", "magnitude"),
    Suffix(".lora_magnitude_vector.weight", "", "magnitude_out", "", "magnitude"),
    Suffix(".alpha", "", "alpha", "", "alpha"),
    Suffix(".reshape_weight", "", "shape", "", "reshape"),
    Suffix(".scale", None, "scale", "", "scale"),
    IA3_FACTOR,
)
"""Of kohya and LyCORIS, PEFT, diffusers, ComfyUI, OneTrainer. Every format is read with all of them."""


def _ends(variant: str, styles: Collection[str]) -> dict[str, str]:
    return {row.tensor: row.end for row in SUFFIXES if row.variant == variant and row.style in styles}


_LOHA, _LOKR = _ends("loha", ["loha"]), _ends("lokr", ["lokr"])
KOHYA: Mapping[str, Mapping[str, str]] = {
    "lora": {**_ends("lora", ["kohya"]), "magnitude": ".dora_scale"},
    "loha": {**_LOHA, "magnitude": ".dora_scale"},
    "lokr": {**_LOKR, "magnitude": ".dora_scale"},
    "norm": {**_ends("norm", ["norm"]), "bias": ".b_norm"},
    "boft": _ends("oft", ["oft"]),
    **{variant: _ends(variant, [variant]) for variant in ("full", "set", "ia3", "oft", "glora")},
}
"""Variant -> tensor -> how kohya, LyCORIS and ComfyUI write it; a change of the bias beside others is .diff_b."""
PEFT: Mapping[str, Mapping[str, str]] = {
    "lora": {**_ends("lora", ["peft"]), "magnitude": ".lora_magnitude_vector"},
    "loha": _LOHA,
    "lokr": _LOKR,
}
"""Variant -> tensor -> how PEFT writes it."""
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before every name in its own files."""
LIVE = "peft-named"
"""Style of PEFT's names of a live model, which hold the adapter's name: .lora_A.default.weight."""
_LIVE = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$)[^.]+(\.weight)?$")
COMPLETE: Mapping[str, tuple[frozenset[str], ...]] = {
    "lora": (frozenset({"down", "up"}),),
    "loha": (frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),),
    "lokr": tuple(
        frozenset({*first, *second}) for first in (("w1",), ("w1_a", "w1_b")) for second in (("w2",), ("w2_a", "w2_b"))
    ),
    "full": (frozenset({"diff"}),),
    "norm": (frozenset({"diff"}),),
    "set": (frozenset({"value"}),),
    "ia3": (frozenset({"factor", "on_input"}),),
    "oft": (frozenset({"blocks"}),),
    "glora": (frozenset({"a1", "a2", "b1", "b2"}),),
}
"""Variant -> the sets of tensors of which one must be there."""
_UNREAD = {
    r"\.boft_": "boft as PEFT writes it",
    r"^oft_": "oft as kohya's networks.oft writes it",
    r"\.oft_(R|diag)": "oft as PEFT or LyCORIS before 2024 writes it",
    r"\.ia3_l": "ia3 as PEFT writes it",
    r"\.bm\.weight$": "glora with a Tucker core",
    r"\.scale$": "lora with a scale of its own",
    r"\.bias_(indices|values|size)$": "lora with a sparse bias",
}
"""Expression found in a name -> variant that is known, but not read."""
EMBEDDING = "bundle_emb."
"""How names of text embeddings begin that OneTrainer packs into an adapter file, and A1111 reads."""


class ParsedTensor(NamedTuple):
    """A tensor's name, taken apart."""

    name: str
    module: str
    """What stands before the suffix; the whole name without one."""
    suffix: Suffix | None
    """None where the name ends in no known way."""


@dataclass
class ParsedModule:
    """The tensors of one module in a file, as far as they are read."""

    variants: set[str] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)
    """Tensor of the adapter -> its name in the file; "alpha" among them."""

    @property
    def lacking(self) -> list[str]:
        """Returns the tensors without which those that are there mean nothing."""
        if len(self.variants) != 1:
            return []
        if self.variants == {"full"} and "bias" in self.names:
            return []
        wanted = COMPLETE[next(iter(self.variants))]
        return min((sorted(choice - self.names.keys()) for choice in wanted), key=len)


def split_name(name: str) -> ParsedTensor:
    """Returns a tensor's name taken apart, as far as it alone tells.

    >>> split_name("lora_unet_conv_in.hada_w1_a")[1:]
    ('lora_unet_conv_in', Suffix(end='.hada_w1_a', variant='loha', tensor='w1_a', style='loha', role='w1_a'))
    """
    plain = _LIVE.sub(r".\1\2", name)
    for row in SUFFIXES:
        module = plain.removesuffix(row.end)
        # The ends of the oldest names are those of many other modules.
        if module == plain or row is IA3_FACTOR or (row.style == "processor" and not module.endswith("_lora")):
            continue
        return ParsedTensor(name, module, row if plain == name else _as_live(row))
    return ParsedTensor(name, name, None)


def _as_live(row: Suffix) -> Suffix:
    return row._replace(style=LIVE if row.style == "peft" else None)


def parse_names(names: Collection[str]) -> list[ParsedTensor]:
    """Takes all names of a file apart, whatever mixture of formats they are in."""
    return [_parse_name(name, names) for name in names]


def _parse_name(name: str, names: Collection[str]) -> ParsedTensor:
    if name.startswith(EMBEDDING):
        return ParsedTensor(name, name, None)
    module = name.removesuffix(IA3_FACTOR.end)
    if module != name and f"{module}.on_input" in names:
        return ParsedTensor(name, module, IA3_FACTOR)
    parsed = split_name(name)
    is_flat = parsed.suffix is None and module != name and "." not in module
    return ParsedTensor(name, module, IA3_FACTOR) if is_flat else parsed


def is_read(tensor: ParsedTensor) -> bool:
    """Says whether a name ends as those of an adapter that is read do."""
    return tensor.suffix is not None and tensor.suffix.variant is not None


def group(tensors: Iterable[ParsedTensor]) -> tuple[dict[str, ParsedModule], list[str]]:
    """Returns the tensors of each module, and the names that end in no known way or say again what another says."""
    tensors = list(tensors)
    sided = {tensor.module for tensor in tensors if tensor.suffix and tensor.suffix.tensor == "on_input"}
    modules: dict[str, ParsedModule] = {}
    strange = []
    for tensor in tensors:
        row = tensor.suffix
        is_stray_factor = row is IA3_FACTOR and tensor.module not in sided
        if row is None or row.variant is None or is_stray_factor:
            strange.append(tensor.name)
            continue
        module = modules.get(tensor.module) or ParsedModule()
        if row.tensor in module.names:
            strange.append(tensor.name)
            continue
        modules[tensor.module] = module
        module.names[row.tensor] = tensor.name
        module.variants |= {row.variant} - {""}
    for module in modules.values():
        # A bias may change alone.
        if not module.variants and module.names.keys() == {"bias"}:
            module.variants.add("full")
    return modules, strange


def unread_variant(name: str) -> str | None:
    """Returns the variant that is known but not read, if a tensor's name gives one away."""
    return next((variant for mark, variant in _UNREAD.items() if re.search(mark, name)), None)


def refuse_unread(names: Iterable[str], source: Path) -> None:
    """Raises where a tensor belongs to a variant that is known but not read.

    Raises:
        UnsupportedError: names the variant.
    """
    unread = next(((variant, name) for name in names if (variant := unread_variant(name))), None)
    if unread:
        raise UnsupportedError(
            f"{source} holds an adapter of the kind {unread[0]} ({shown(unread[1])}), which cannot be read; merge it "
            "into its base with the program that made it. What can be read: lora, loha and lokr with and without dora, "
            "full differences, norms, and ia3, oft, boft and glora as LyCORIS writes them."
        )
