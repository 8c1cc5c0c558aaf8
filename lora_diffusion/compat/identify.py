"""Which kind of base an adapter file was made for."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from lora_diffusion.architectures import DIFFUSION, TEXT_OUTPUT
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.compat.other_bases import OtherBase, Sizes, find_other_base
from lora_diffusion.core import registry
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.text import shown
from lora_diffusion.formats.metadata import base_of, other_base_of
from lora_diffusion.formats.parsed_file import ParsedFile
from lora_diffusion.formats.tensor_names import ParsedTensor, is_read, unread_variant

if TYPE_CHECKING:
    from lora_diffusion.core.keymap import KeyMap

Shape = tuple[int, ...]

_LAST_FIRST = list(DIFFUSION.values())[::-1]
"""What the names of the later say is more particular."""
_BY_WIDTH = {architecture.unet.context: architecture.name for architecture in DIFFUSION.values()}
_TEXT_WIDTHS = Counter(
    width for architecture in DIFFUSION.values() for width in {encoder.width for encoder in architecture.text_encoders}
)
_BY_TEXT_WIDTH = {
    encoder.width: architecture.name
    for architecture in DIFFUSION.values()
    for encoder in architecture.text_encoders
    if _TEXT_WIDTHS[encoder.width] == 1
}
_BY_PROJECTION = {architecture.unet.has_linear_projections: architecture.name for architecture in _LAST_FIRST}
"""Whether it is linear -> the first architecture that has it so; a convolution is in one of them only."""
_BY_NAME = [(mark, architecture.name) for architecture in _LAST_FIRST for mark in architecture.name_marks]
_OF_WHOLE_MODELS = [
    (mark, architecture.name) for architecture in list(TEXT_OUTPUT.values())[::-1] for mark in architecture.name_marks
]
"""Expression found in a name of a PEFT folder of a whole model -> the family of the model."""
_TEXT = re.compile(
    r"(^|text_encoder(_2)?\.|text_encoders\.clip_\w\.transformer\.|lora_te[12]?_)(text_model[._])?encoder[._]layers[._]\d+[._]"
    r"(self_attn|mlp[._]fc1)"
)
"""Layer of a text encoder whose inputs are as many as its width; other models have some of the same widths."""
_AXES: Mapping[tuple[str, str], tuple[str, tuple[int, ...]]] = {
    ("lora", "down"): ("a", (1,)),
    ("lora", "up"): ("a", (0,)),
    ("loha", "w1_b"): ("a", (1,)),
    ("loha", "w1_a"): ("a", (0,)),
    ("full", "diff"): ("a", (0, 1)),
    **{
        ("lokr", f"w{n}{end}"): (f"w{n}", axes)
        for n in (1, 2)
        for end, axes in (("", (0, 1)), ("_a", (0,)), ("_b", (1,)))
    },
}
"""Variant and tensor -> its factor, and the axes of the weight (0 outputs, 1 inputs) that its own tell."""


def guess_family(file: ParsedFile) -> str:
    """Returns the name of a published diffusion base, as an adapter's sizes, metadata or, at last, names tell.

    Names come last, since some programs give all text encoders the prefix of SDXL's first.

    Raises:
        AdapterFileError: nothing tells it, or metadata tell another architecture.
        UnsupportedError: names and sizes tell a base of another kind.
    """
    refuse_other(file)
    file.check_record()
    for architecture in (other_base_of(header.metadata) for header in file.headers):
        if architecture:
            raise _other_architecture(file, architecture)
    family = family_by_content(file) or _by_names(_without_misfits(file), _BY_NAME)
    if family is not None and family in DIFFUSION:
        return family
    if family is not None:
        raise _other_architecture(file, family)
    names = list(file.shapes)
    if not names:
        raise AdapterFileError(f"{file.path} holds no tensors; get the file again.")
    if not any(is_read(tensor) or unread_variant(tensor.name) for tensor in file.tensors):
        raise AdapterFileError(f"{file.path} is not an adapter in a known format. Its first tensors:", names[:5])
    raise AdapterFileError(
        f"{file.path} does not tell which base it is for: its names and sizes fit no published one, or several. Say it "
        f"with --base {', '.join(DIFFUSION)} or a folder."
    )


def other_architecture(file: ParsedFile) -> OtherBase | None:
    """Returns the kind of base that is not known here which a file is for, as names and sizes tell, if it is."""
    if _by_names(file.shapes, _OF_WHOLE_MODELS):
        return None
    keys = ("modelspec.architecture", "ss_base_model_version")
    words = " ".join(header.metadata.get(key, "") for header in file.headers for key in keys)
    other = find_other_base(_sizes(file), words)
    return None if other is None or other.family in registry.available("families") else other


def refuse_other(file: ParsedFile) -> None:
    """Raises UnsupportedError, with its name, where a file is for a kind of base that is not known here."""
    other = other_architecture(file)
    if other:
        raise UnsupportedError(f"{file.path} was made for {other.title}, a kind of base that is not known here.")


def family_by_content(file: ParsedFile) -> str | None:
    """Returns the family of the base, if sizes, metadata or the names of a whole model's modules tell it."""
    architecture = next(filter(None, (base_of(header.metadata) for header in file.headers)), None)
    return sized_as(file) or (architecture.name if architecture else None) or _by_names(file.shapes, _OF_WHOLE_MODELS)


def sized_as(file: ParsedFile) -> str | None:
    """Returns the one family whose modules have these names and sizes, else what single widths tell."""
    fits = _fits(file)
    best = [family for family, num in fits.items() if num == max(fits.values())]
    if len(best) == 1 and fits[best[0]]:
        return best[0]
    return _commonest(family for tensor in file.tensors if (family := _by_shape(file, tensor)) in best)


def _fits(file: ParsedFile, sides: Callable[[Iterable[bool]], bool] = all) -> dict[str, int]:
    """Returns for each published base how many modules it has by the same name and in the same size.

    Args:
        file: the adapter.
        sides: whether outputs and inputs must fit, all or any.
    """
    sizes = {name: wanted for name, wanted in _sizes(file).items() if any(wanted)}
    flat = any(name.startswith(("lora_", "lycoris_")) for name in sizes)
    fits = {}
    for family in DIFFUSION:
        names, shapes = _names(family, "kohya" if flat else "diffusers"), published_shapes(DIFFUSION[family])
        fits[family] = sum(
            any(
                _fits_one(wanted, shapes.get(names.key(alias), ()), sides) for alias in _aliases(name) if alias in names
            )
            for name, wanted in sizes.items()
        )
    return fits


@cache
def _names(family: str, format_name: str) -> KeyMap:
    names: KeyMap = registry.find("families", family).key_map(format_name, None)
    return names


def _aliases(name: str) -> list[str]:
    """Returns how diffusers may call a module that ComfyUI or the folder of one part names otherwise."""
    part = re.match(r"text_encoders\.clip_([lhg])\.transformer\.", name)
    if part:
        return [f"text_encoder{'_2' if part[1] == 'g' else ''}.{name[part.end() :]}"]
    is_bare = name.startswith(("encoder.layers.", "text_model."))
    return [f"text_encoder.{name}", f"text_encoder_2.{name}"] if is_bare else [name]


def _fits_one(sizes: Sizes, shape: Shape, sides: Callable[[Iterable[bool]], bool]) -> bool:
    return bool(shape) and sides(size == known for size, known in zip(sizes, (*shape, 0), strict=False) if size)


def _sizes(file: ParsedFile) -> dict[str, Sizes]:
    """Returns outputs and inputs of each module's weight, 0 where no tensor tells them."""
    modules: dict[str, dict[str, list[int]]] = {}
    for tensor in file.tensors:
        module, factor, axes = _axes(tensor, file.shapes[tensor.name])
        sizes = modules.setdefault(module, {}).setdefault(factor, [0, 0])
        for axis, size in axes.items():
            sizes[axis] = size
    return {module: _product(factors) for module, factors in modules.items()}


def _axes(tensor: ParsedTensor, shape: Shape) -> tuple[str, str, dict[int, int]]:
    """Returns module and factor that a tensor belongs to, and the axis of the weight -> the size that it tells."""
    row = tensor.suffix
    if row is None:
        return re.split(r"\.(?=\w+(\.weight)?$)", tensor.name)[0], "a", {}
    if row.tensor == "blocks":
        return tensor.module, "a", {0: math.prod(shape[-3:-1])} if len(shape) > 2 else {}
    variant = "lora" if row.role in ("down", "up") else row.variant or ""
    factor, axes = _AXES.get((variant, row.tensor), ("a", ()))
    return tensor.module, factor, {axis: shape[axis] for axis in axes} if len(shape) > max(axes, default=0) else {}


def _product(factors: Mapping[str, list[int]]) -> Sizes:
    if "w1" in factors or "w2" in factors:
        first, second = factors.get("w1", [0, 0]), factors.get("w2", [0, 0])
        return first[0] * second[0], first[1] * second[1]
    return factors["a"][0], factors["a"][1]


def _without_misfits(file: ParsedFile) -> list[str]:
    """Returns the names, or none where modules have sizes, and no published base has one of them."""
    sizes, fits = _sizes(file), _fits(file, any)
    return [] if any(any(wanted) for wanted in sizes.values()) and not any(fits.values()) else list(file.shapes)


def _other_architecture(file: ParsedFile, name: str) -> AdapterFileError:
    return AdapterFileError(
        f"{file.path} is for the architecture {shown(name)}; rules are known for Stable Diffusion 1, 2 and XL only."
    )


def _by_names(names: Iterable[str], marks: Iterable[tuple[str, str]]) -> str | None:
    return _commonest(family for name in names for pattern, family in marks if re.search(pattern, name))


def _commonest(families: Iterable[str | None]) -> str | None:
    votes = Counter(filter(None, families))
    return votes.most_common(1)[0][0] if votes else None


def _by_shape(file: ParsedFile, tensor: ParsedTensor) -> str | None:
    name, shape = tensor.name, file.shapes[tensor.name]
    axes = _axes(tensor, shape)[2]
    if 1 not in axes:
        return None
    if re.search(r"attn2[._](processor\.)?to[._][kv]", name):
        return _BY_WIDTH.get(axes[1])
    if re.search(r"attentions[._]\d[._]proj_(in|out)\.", name) and len(shape) > 2:
        return _BY_PROJECTION.get(False)  # a linear layer in the others
    return _BY_TEXT_WIDTH.get(axes[1]) if _TEXT.search(name) else None
