"""Which kind of base an adapter file was made for."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.compat.other_bases import Architecture, Sizes, find_architecture
from lora_diffusion.core import registry
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.text import shown
from lora_diffusion.formats.metadata import told_architecture, told_family
from lora_diffusion.formats.peft import full_name, headers, part_folders, tensor_files
from lora_diffusion.formats.tensor_names import split_name, unread_kind
from lora_diffusion.tensorfile import safetensors_file

if TYPE_CHECKING:
    from lora_diffusion.core.keymap import KeyMap

Shape = tuple[int, ...]

_BY_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_BY_TEXT_WIDTH = {1024: "sd2", 1280: "sdxl"}
_BY_NAME = (
    (r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.", "sdxl"),
    (r"attentions[._]\d[._]transformer_blocks[._][1-9]|_blocks_\d_1_transformer_blocks[._][1-9]|label_emb", "sdxl"),
    (r"add_embedding|lora_te1_", "sdxl"),
    (r"text_encoders\.clip_h\.", "sd2"),
    (r"lora_te_|text_encoder\.", "sd1"),
    (r"(lora_unet_|unet\.)(up|down)_blocks[._]3|(in|out)put_blocks[._](9|10|11)[._]", "sd1"),
    (r"^(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp)\.", "sd1"),
)
_OF_WHOLE_MODELS = (
    (r"(^|\.)(language_model|vision_tower|multi_modal_projector)\.", "llava"),
    (r"^model\.(en|de)coder\.layers\.|\.encoder_attn\.", "whisper"),
)
"""Expression found in a name of a PEFT folder of a whole model -> the family of the model."""
_TEXT = re.compile(
    r"(^|text_encoder(_2)?\.|text_encoders\.clip_\w\.transformer\.|lora_te[12]?_)(text_model[._])?encoder[._]layers[._]\d+[._]"
    r"(self_attn|mlp[._]fc1)"
)
"""Layer of a text encoder whose inputs are as many as its width; other models have some of the same widths."""
_PLACES: Mapping[str, tuple[str, int, int]] = {
    **dict.fromkeys((".lora_down.weight", ".lora_A.weight", ".lora.down.weight", ".down.weight"), ("a", 1, 1)),
    **dict.fromkeys((".lora_linear_layer.down.weight", ".lora_A.default.weight", ".lora_A"), ("a", 1, 1)),
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora.up.weight", ".up.weight"), ("a", 0, 0)),
    **dict.fromkeys((".lora_linear_layer.up.weight", ".lora_B.default.weight", ".lora_B"), ("a", 0, 0)),
    ".hada_w1_b": ("a", 1, 1),
    ".hada_w1_a": ("a", 0, 0),
    **{f".lokr_w{n}_b": (f"w{n}", 1, 1) for n in (1, 2)},
    **{f".lokr_w{n}_a": (f"w{n}", 0, 0) for n in (1, 2)},
}
"""End of a name -> its factor, the axis of the weight (0 outputs, 1 inputs) that it tells, and the axis of its own."""
_WHOLE: Mapping[str, str] = {".diff": "a", ".lokr_w1": "w1", ".lokr_w2": "w2"}
"""End of a name -> the factor whose outputs and inputs it has."""


def guess_family(path: Path) -> str:
    """Returns sd1, sd2 or sdxl, as an adapter's sizes, metadata or, at last, names tell.

    Names come last, since some programs give all text encoders the prefix of SDXL's first.

    Raises:
        AdapterFileError: nothing tells it, or metadata tell another architecture.
        UnsupportedError: names and sizes tell a base of another kind.
    """
    refuse_other(path)
    for kind in (told_architecture(header.metadata) for header in headers(path)):
        if kind:
            raise _other_architecture(path, kind)
    shapes = _shapes(path)
    found = told_by_content(path) or _by_names(_without_misfits(shapes), _BY_NAME)
    if found is not None and found in DIFFUSION:
        return found
    if found is not None:
        raise _other_architecture(path, found)
    names = list(shapes)
    if not names:
        raise AdapterFileError(f"{path} holds no tensors; get the file again.")
    if not any(split_name(name) or unread_kind(name) for name in names):
        raise AdapterFileError(f"{path} is not an adapter in a known spelling. Its first tensors:", names[:5])
    raise AdapterFileError(
        f"{path} does not tell which base it is for: its names and sizes fit no published one, or several. Say it with "
        "--base sd1, sd2, sdxl or a folder."
    )


def other_architecture(path: Path) -> Architecture | None:
    """Returns the kind of base that is not known here which a file is for, as names and sizes tell, if it is.

    Raises:
        AdapterFileError: it cannot be read.
    """
    shapes = _shapes(path)
    if _by_names(shapes, _OF_WHOLE_MODELS):
        return None
    metadata = [header.metadata for header in _headers(path)]
    told = " ".join(own.get(key, "") for own in metadata for key in ("modelspec.architecture", "ss_base_model_version"))
    found = find_architecture(_sizes(shapes), told)
    return None if found is None or found.family in registry.available("families") else found


def refuse_other(path: Path) -> None:
    """Raises UnsupportedError, with its name, where a file is for a kind of base that is not known here."""
    found = other_architecture(path)
    if found:
        raise UnsupportedError(f"{path} was made for {found.title}, a kind of base that is not known here.")


def sized_as(path: Path) -> str | None:
    """Returns sd1, sd2 or sdxl, if an adapter's sizes tell it."""
    return _sized(_shapes(path))


def told_by_content(path: Path) -> str | None:
    """Returns the family of the base, if sizes, metadata or the names of a whole model's modules tell it."""
    told = next(filter(None, (told_family(header.metadata) for header in headers(path))), None)
    shapes = _shapes(path)
    return _sized(shapes) or told or _by_names(shapes, _OF_WHOLE_MODELS)


def _sized(shapes: Mapping[str, Shape]) -> str | None:
    """Returns the one family whose modules have these names and sizes, else what single widths tell."""
    fits = _fits(shapes)
    best = [family for family, num in fits.items() if num == max(fits.values())]
    if len(best) == 1 and fits[best[0]]:
        return best[0]
    return _commonest(found for name, shape in shapes.items() if (found := _by_shape(name, shape)) in best)


def _fits(shapes: Mapping[str, Shape], sides: Callable[[Iterable[bool]], bool] = all) -> dict[str, int]:
    """Returns for each published base how many modules it has by the same name and in the same size.

    Args:
        shapes: of the tensors, by name.
        sides: whether outputs and inputs must fit, all or any.
    """
    sizes = {name: own for name, own in _sizes(shapes).items() if any(own)}
    flat = any(name.startswith(("lora_", "lycoris_")) for name in sizes)
    fits = {}
    for family in DIFFUSION:
        names, known = _names(family, "kohya" if flat else "diffusers"), published_shapes(DIFFUSION[family])
        fits[family] = sum(
            any(_fits_one(own, known.get(names.key(full), ()), sides) for full in _standard(name) if full in names)
            for name, own in sizes.items()
        )
    return fits


@cache
def _names(family: str, spelling: str) -> KeyMap:
    names: KeyMap = registry.find("families", family).key_map(spelling, None)
    return names


def _standard(name: str) -> list[str]:
    """Returns how diffusers may call a module that ComfyUI or the folder of one part names otherwise."""
    part = re.match(r"text_encoders\.clip_([lhg])\.transformer\.", name)
    if part:
        return [f"text_encoder{'_2' if part[1] == 'g' else ''}.{name[part.end() :]}"]
    is_bare = name.startswith(("encoder.layers.", "text_model."))
    return [f"text_encoder.{name}", f"text_encoder_2.{name}"] if is_bare else [name]


def _fits_one(own: Sizes, shape: Shape, sides: Callable[[Iterable[bool]], bool]) -> bool:
    return bool(shape) and sides(size == known for size, known in zip(own, (*shape, 0), strict=False) if size)


def _sizes(shapes: Mapping[str, Shape]) -> dict[str, Sizes]:
    """Returns outputs and inputs of each module's weight, 0 where no tensor tells them."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, shape in shapes.items():
        module, factor, axes = _told_axes(name, shape)
        sizes = found.setdefault(module, {}).setdefault(factor, [0, 0])
        for axis, size in axes.items():
            sizes[axis] = size
    return {module: _product(factors) for module, factors in found.items()}


def _told_axes(name: str, shape: Shape) -> tuple[str, str, dict[int, int]]:
    """Returns module and factor that a tensor belongs to, and the axis of the weight -> the size that it tells."""
    for end, (factor, axis, own) in _PLACES.items():
        if name.endswith(end) and len(shape) > own:
            return name.removesuffix(end), factor, {axis: shape[own]}
    for end, factor in _WHOLE.items():
        if name.endswith(end) and len(shape) > 1:
            return name.removesuffix(end), factor, {0: shape[0], 1: shape[1]}
    blocks = re.search(r"\.oft_blocks$", name)
    if blocks and len(shape) > 2:
        return name[: blocks.start()], "a", {0: math.prod(shape[-3:-1])}
    found = split_name(name)
    return (found[0] if found else re.split(r"\.(?=\w+(\.weight)?$)", name)[0]), "a", {}


def _product(factors: Mapping[str, list[int]]) -> Sizes:
    if "w1" in factors or "w2" in factors:
        first, second = factors.get("w1", [0, 0]), factors.get("w2", [0, 0])
        return first[0] * second[0], first[1] * second[1]
    return factors["a"][0], factors["a"][1]


def _without_misfits(shapes: Mapping[str, Shape]) -> list[str]:
    """Returns the names, or none where modules have sizes, and no published base has one of them."""
    sizes, fits = _sizes(shapes), _fits(shapes, any)
    return [] if any(any(own) for own in sizes.values()) and not any(fits.values()) else list(shapes)


def _other_architecture(path: Path, kind: str) -> AdapterFileError:
    return AdapterFileError(
        f"{path} is for the architecture {shown(kind)}; rules are known for Stable Diffusion 1, 2 and XL only."
    )


def _headers(path: Path) -> list[safetensors_file.Header]:
    return [safetensors_file.read_header(file) for file in (tensor_files(path) if path.is_dir() else [path])]


def _shapes(path: Path) -> dict[str, Shape]:
    folders = part_folders(path) if path.is_dir() else [path]
    return {
        full_name(name, "" if folder == path else folder.name): info.shape
        for folder, header in zip(folders, _headers(path), strict=True)
        for name, info in header.tensors.items()
    }


def _by_names(names: Iterable[str], marks: Iterable[tuple[str, str]]) -> str | None:
    return _commonest(family for name in names for pattern, family in marks if re.search(pattern, name))


def _commonest(families: Iterable[str | None]) -> str | None:
    votes = Counter(filter(None, families))
    return votes.most_common(1)[0][0] if votes else None


def _by_shape(name: str, shape: Shape) -> str | None:
    axes = _told_axes(name, shape)[2]
    if 1 not in axes:
        return None
    if re.search(r"attn2[._](processor\.)?to[._][kv]", name):
        return _BY_WIDTH.get(axes[1])
    if re.search(r"attentions[._]\d[._]proj_(in|out)\.", name) and len(shape) > 2:
        return "sd1"  # a convolution there, a linear layer in the others
    return _BY_TEXT_WIDTH.get(axes[1]) if _TEXT.search(name) else None
