"""Which kind of base an adapter file was made for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.logs import shown
from lora_diffusion.formats._published import PUBLISHED
from lora_diffusion.formats._spelling import split_name, unread_kind
from lora_diffusion.formats.metadata import told_family
from lora_diffusion.formats.peft import full_name, headers, part_folders

_BY_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_BY_TEXT_WIDTH = {1024: "sd2", 1280: "sdxl"}
_INNER = re.compile(r"(lora_down|lora_A|down)\.weight$|hada_w[12]_b$")
"""Tensors whose second size is that of the module's input."""
_BY_NAME = (
    (r"lora_te2_|text_encoder_2\.|transformer_blocks[._][1-9]|label_emb|add_embedding", "sdxl"),
    (r"lora_te1_", "sdxl"),
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
    r"(^|text_encoder(_2)?\.|lora_te[12]?_)(text_model[._])?encoder[._]layers[._]\d+[._](self_attn|mlp[._]fc1)[._]"
)
"""Layer of a text encoder whose inputs are as many as its width; other models have some of the same widths."""


_OF_OTHERS = {
    r"(double|single|joint)_blocks[._]|single_transformer_blocks|^(transformer\.|lora_transformer_)": (
        "a transformer such as FLUX or Stable Diffusion 3"
    ),
    r"^lora_prior_unet_": "Stable Cascade",
}
"""Expression found in a name -> the base that it is for."""


def guess_family(path: Path) -> str:
    """Returns sd1, sd2 or sdxl, as an adapter's sizes, metadata or, at last, names tell.

    Names come last, since some programs give all text encoders the prefix of SDXL's first.

    Raises:
        AdapterFileError: nothing tells it, or metadata tell another architecture.
        UnsupportedError: names tell a base of another kind.
    """
    for kind in (header.metadata.get("modelspec.architecture", "") for header in headers(path)):
        if kind and not kind.startswith("stable-diffusion"):
            raise _other_architecture(path, kind)
    names = list(_shapes(path))
    found = told_by_content(path) or _by_names(names, _BY_NAME)
    if found in PUBLISHED:
        return found
    if found is not None:
        raise _other_architecture(path, found)
    if not names:
        raise AdapterFileError(f"{path} holds no tensors; get the file again.")
    others = next((kind for name in names for pattern, kind in _OF_OTHERS.items() if re.search(pattern, name)), None)
    if others:
        raise UnsupportedError(f"{path} was made for {others}, a kind of base that is not known here.")
    if not any(split_name(name) or unread_kind(name) for name in names):
        raise AdapterFileError(f"{path} is not an adapter in a known spelling. Its first tensors:", names[:5])
    raise AdapterFileError(f"{path} does not tell which base it is for; say it with --base sd1, sd2, sdxl or a folder.")


def sized_as(path: Path) -> str | None:
    """Returns sd1, sd2 or sdxl, if an adapter's sizes tell it."""
    return _commonest(_by_shape(name, shape) for name, shape in _shapes(path).items())


def told_by_content(path: Path) -> str | None:
    """Returns the family of the base, if sizes, metadata or the names of a whole model's modules tell it."""
    told = next(filter(None, (told_family(header.metadata) for header in headers(path))), None)
    return sized_as(path) or told or _by_names(_shapes(path), _OF_WHOLE_MODELS)


def _other_architecture(path: Path, kind: str) -> AdapterFileError:
    return AdapterFileError(
        f"{path} is for the architecture {shown(kind)}; rules are known for Stable Diffusion 1, 2 and XL only."
    )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    folders = part_folders(path) if path.is_dir() else [path]
    return {
        full_name(name, "" if folder == path else folder.name): info.shape
        for folder, header in zip(folders, headers(path), strict=True)
        for name, info in header.tensors.items()
    }


def _by_names(names: Iterable[str], marks: Iterable[tuple[str, str]]) -> str | None:
    return _commonest(family for name in names for pattern, family in marks if re.search(pattern, name))


def _commonest(families: Iterable[str | None]) -> str | None:
    votes = Counter(filter(None, families))
    return votes.most_common(1)[0][0] if votes else None


def _by_shape(name: str, shape: tuple[int, ...]) -> str | None:
    if len(shape) < 2 or not _INNER.search(name):
        return None
    if re.search(r"attn2[._](processor\.)?to[._][kv]", name):
        return _BY_WIDTH.get(shape[1])
    return _BY_TEXT_WIDTH.get(shape[1]) if _TEXT.search(name) else None
