"""What can be said of an adapter file without its base."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_diffusion.algebra.delta import change_shape, delta_norm
from lora_diffusion.algebra.magnitude_limits import IMPLAUSIBLE, change_rms, is_implausible
from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.compat.identify import family_by_content, guess_family, other_architecture, sized_as
from lora_diffusion.compat.other_bases import OtherBase
from lora_diffusion.core.adapter_state import ModuleAdapter
from lora_diffusion.core.errors import AdapterFileError, LoraDiffusionError
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.formats.detect import formats_of
from lora_diffusion.formats.metadata import base_and_prediction
from lora_diffusion.formats.parsed_file import ParsedFile, ParsedPart
from lora_diffusion.formats.peft_config import recorded_alpha, recorded_rank
from lora_diffusion.formats.read_modules import fits_magnitude
from lora_diffusion.formats.tensor_names import EMBEDDING, ParsedModule, ParsedTensor, group, unread_variant
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array, as_array, upcast

_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
_PARTS_OF_MODELS = {
    r"(^|\.)vision_tower\.": "vision_tower",
    r"(^|\.)multi_modal_projector\.": "projector",
    r"(^|\.)language_model\.|^model\.layers\.": "language_model",
    r"^model\.encoder\.": "encoder",
    r"^model\.decoder\.": "decoder",
}
"""Expression found in a path of a whole model -> the part of it."""
_UNET = re.compile(r"((down|up)_blocks|mid_block|conv_(in|out)|(time|add)_embedding)\.")
_TEXT_ENCODER = re.compile(r"(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp)\.")
_BLOCK = re.compile(r"(?:down|up|input|output)_blocks_\d+|mid_block|middle_block|layers_\d+")


@dataclass(frozen=True)
class FileReport:
    """What `inspect` shows."""

    path: str
    format: str
    """Format names joined by "+"; more than one is among the problems."""
    variant: str
    family: str | None
    """That of the base; for other bases their name or what the metadata call it; None if unknown."""
    num_modules: Mapping[str, int]
    """By part, guessed from the prefixes."""
    ranks: Mapping[str, int]
    """Rank -> number of modules."""
    alphas: Mapping[str, int]
    """Alpha, divided by the rank the scale of a change -> number of modules."""
    dtypes: Mapping[str, int]
    """Dtype -> number of tensors."""
    block_norms: Mapping[str, float]
    """Part and block -> Frobenius norm of all its changes of weight."""
    metadata: Mapping[str, str]
    problems: tuple[str, ...]
    errors: tuple[str, ...]
    """Those of the problems with which no program can use all of it."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        values = asdict(self)
        errors = values.pop("errors")
        return {**values, "faults": errors}

    def text(self) -> str:
        """Returns lines for people."""
        counts = {
            "modules": [f"{count} in {part}" for part, count in self.num_modules.items()],
            "ranks": [f"{rank} ({count})" for rank, count in self.ranks.items()],
            "alphas": [f"{alpha} ({count})" for alpha, count in self.alphas.items()],
            "tensors": [f"{count} {dtype}" for dtype, count in self.dtypes.items()],
        }
        base = f" for {shown(self.family)}" if self.family else " for an unknown base"
        lines = [self.path, f"{self.format} format, {self.variant}{base}"]
        lines += [f"{label:<9}{', '.join(values)}" for label, values in counts.items()]
        lines += ["norm of the change of each block:"]
        lines += [f"  {block:<36}{norm:.4g}" for block, norm in self.block_norms.items()]
        lines += ["metadata:", *(f"  {shown(name)}: {shown(value)}" for name, value in sorted(self.metadata.items()))]
        if self.problems:
            lines += [f"problems of this adapter{base}:", *(f"  {problem}" for problem in self.problems)]
        else:
            lines += ["no problems found"]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Module:
    name: str
    parsed: ParsedModule
    adapter: ModuleAdapter | None
    """None where tensors are missing, of several variants, or do not fit each other."""
    alpha: float | None
    recorded_rank: int | None = None
    """What the record beside the tensors says."""
    has_misfit: bool = False
    """A magnitude is not of the size of the weight's inputs or outputs."""

    @property
    def variant(self) -> str:
        """That of its tensors; the axis of a magnitude is not looked at."""
        has_magnitude = bool({"magnitude", "magnitude_out"} & self.parsed.names.keys())
        if self.adapter and self.adapter.variant == "boft":
            return "boft"
        return "+".join(
            [
                *sorted(self.parsed.variants - {"lora"} if has_magnitude else self.parsed.variants),
                *["dora"] * has_magnitude,
            ]
        )


def describe_file(file: ParsedFile) -> FileReport:
    """Says what is in an adapter file or folder and what is wrong with it.

    Raises:
        AdapterFileError: it cannot be read at all.
    """
    file.check_record()
    names: dict[str, ParsedTensor] = {}
    tensors: dict[str, Array] = {}
    configs = file.diffusers_record
    for part in file.parts:
        in_file = part.tensors
        if file.is_folder:
            name = part.part or _root_part(file, part)
            in_file = part.tensors_in(name)
            configs[name] = part.config
        stored = zip(in_file, part.tensors, strict=True)
        tensors |= {tensor.name: part.unchecked[old.name] for tensor, old in stored}
        names |= {tensor.name: tensor for tensor in in_file}
    formats = formats_of(file.names)
    parsed, strange = group(names.values())
    modules = [_module(name, module, tensors, configs) for name, module in parsed.items()]
    norms, errors = _norms(modules), tuple(_errors(modules, tensors))
    packed = [name for name in strange if name.startswith(EMBEDDING)]
    strange = [name for name in strange if name not in packed]
    other = other_architecture(file)
    variants = Counter(module.variant for module in modules) + Counter(filter(None, map(unread_variant, strange)))
    variants += Counter("embedding" for _ in packed)
    return FileReport(
        path=str(file.path),
        format="+".join(formats) or "unknown",
        variant=" and ".join(name for name in variants if name) or "unknown",
        family=other.title if other else _family(file),
        num_modules=_count(_part(module.name) for module in modules),
        ranks=_count(str(module.adapter.rank) for module in modules if module.adapter),
        alphas=_count("none" if module.alpha is None else f"{module.alpha:g}" for module in modules if module.adapter),
        dtypes=_count(info.dtype for header in file.headers for info in header.tensors.values()),
        block_norms=_block_norms(norms),
        metadata=file.metadata,
        problems=(*errors, *_other_base(other), *_oddities(formats, strange, modules, norms)),
        errors=errors,
    )


def _family(file: ParsedFile) -> str | None:
    try:
        return family_by_content(file) or guess_family(file)
    except LoraDiffusionError:
        architecture = base_and_prediction(file.metadata)[0]
        return architecture.removesuffix("/lora") if architecture else None


def _root_part(file: ParsedFile, part: ParsedPart) -> str:
    """Returns the part that a PEFT folder which is not named after one is for; "" for a whole model."""
    bare = [tensor.name for tensor in part.tensors_in("")]
    if any(map(_UNET.match, bare)):
        return "unet"
    if not any(map(_TEXT_ENCODER.match, bare)):
        return ""
    sized = sized_as(file)
    return DIFFUSION[sized].text_encoders[-1].part if sized else "text_encoder"


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values))


def _module(
    name: str, parsed: ParsedModule, tensors: Mapping[str, Array], configs: Mapping[str, Mapping[str, Any]]
) -> _Module:
    stored = {tensor: tensors[full] for tensor, full in parsed.names.items()}
    part = next((part for part in configs if not part or name.startswith(f"{part}.")), None)
    path = name.removeprefix(f"{part}.")
    alpha = None if part is None else recorded_alpha(configs[part], path)
    rank = None if part is None or parsed.variants != {"lora"} else recorded_rank(configs[part], path)
    if "alpha" in stored:
        beside = upcast(stored.pop("alpha"))
        alpha = float(beside.reshape(-1)[0]) if beside.size else None
    # What a magnitude does depends on the base; the change before it is known.
    plain: dict[str, Any] = {
        tensor: values for tensor, values in stored.items() if not tensor.startswith("magnitude") and tensor != "shape"
    }
    if len(parsed.variants) != 1 or parsed.lacking:
        return _Module(name, parsed, None, alpha)
    (variant,) = parsed.variants
    adapter = ModuleAdapter("boft" if variant == "oft" and plain["blocks"].ndim == 4 else variant, plain, 1.0)
    try:
        is_empty = not all(values.size for values in plain.values())
        if adapter.changes_weight and variant not in ("ia3", "oft"):
            is_empty |= not math.prod(change_shape(adapter))
        is_empty |= not adapter.rank
    except (AdapterFileError, IndexError):
        return _Module(name, parsed, None, alpha)
    if is_empty:
        return _Module(name, parsed, None, alpha)
    adapter = replace(adapter, alpha=float(adapter.rank) if alpha is None else alpha)
    has_misfit = variant in ("lora", "loha", "lokr") and not fits_magnitude(stored)
    return _Module(name, parsed, adapter, alpha, rank, has_misfit)


def _part(name: str) -> str:
    flat = next((part for prefix, part in _PREFIXES.items() if name.startswith(prefix)), None)
    return flat or next((part for mark, part in _PARTS_OF_MODELS.items() if re.search(mark, name)), "unknown")


def _block(name: str) -> str:
    block = _BLOCK.search(name.replace(".", "_"))
    return f"{_part(name)} {block.group() if block else 'other'}"


def _norms(modules: Iterable[_Module]) -> dict[str, float]:
    """Returns the Frobenius norm of the change of each sound module."""
    return {
        module.name: delta_norm(_widened(module.adapter))
        for module in modules
        if module.adapter
        and module.adapter.changes_weight
        and not module.adapter.needs_base
        and math.isfinite(module.adapter.alpha)
        and not safetensors_file.non_finite(module.adapter.tensors)
    }


def _widened(adapter: ModuleAdapter) -> ModuleAdapter:
    tensors: dict[str, Any] = {name: upcast(as_array(array)) for name, array in adapter.tensors.items()}
    return replace(adapter, tensors=tensors)


def _block_norms(norms: Mapping[str, float]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        squares[_block(name)] = squares.get(_block(name), 0.0) + norm**2
    return {block: square**0.5 for block, square in sorted(squares.items(), key=lambda item: _natural(item[0]))}


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (0, piece) for piece in re.split(r"(\d+)", text)]


def _errors(modules: list[_Module], tensors: Mapping[str, Array]) -> Iterable[str]:
    """Yields what no program can use, or use as it was meant."""
    if not tensors:
        yield "no tensors at all; get the file again"
    yield from _told(
        {
            **_incomplete(modules),
            "tensor(s) with NaN, infinity or more than float32 can hold": safetensors_file.non_finite(tensors),
            "tensor(s) that are empty or hold whole numbers": safetensors_file.not_weights(tensors),
            "module(s) whose tensors do not fit each other": [
                m.name for m in modules if not m.adapter and not m.parsed.lacking and len(m.parsed.variants) == 1
            ],
            "module(s) whose alpha is not one number": [
                module.name
                for module in modules
                if "alpha" in module.parsed.names and tensors[module.parsed.names["alpha"]].size != 1
            ],
            "module(s) of another rank than the record beside the tensors says; PEFT and diffusers refuse them": [
                m.name for m in modules if m.adapter and m.recorded_rank not in (None, m.adapter.rank)
            ],
            "module(s) whose DoRA magnitude is not of the size of the inputs or the outputs": [
                module.name for module in modules if module.has_misfit
            ],
        }
    )


def _other_base(other: OtherBase | None) -> Iterable[str]:
    if other:
        yield f"made for {other.title}, a kind of base that is not known here; other commands refuse it"


def _oddities(
    formats: list[str], strange: list[str], modules: list[_Module], norms: Mapping[str, float]
) -> Iterable[str]:
    """Yields what some programs can use, or what may be meant so."""
    if len(formats) > 1:
        yield f"formats {' and '.join(formats)} are mixed; no program reads all of it"
    names_of = {
        "tensor(s) with unknown names": strange,
        IMPLAUSIBLE: [
            module.name
            for module in modules
            if module.adapter
            and module.name in norms
            and is_implausible(change_rms(module.adapter, norms[module.name]))
        ],
        "module(s) that change nothing, since a factor is zero": [name for name, norm in norms.items() if norm == 0],
        "module(s) of loha or lokr with DoRA, which only ComfyUI, Forge and A1111 read": [
            m.name for m in modules if m.variant in ("loha+dora", "lokr+dora")
        ],
    }
    if formats == ["kohya"]:
        names_of["module(s) without alpha; most programs then take alpha = rank"] = [
            module.name for module in modules if module.adapter and module.adapter.has_scale and module.alpha is None
        ]
    yield from _told(names_of)


def _told(names_of: Mapping[str, list[str]]) -> Iterable[str]:
    return (f"{len(names)} {what}: {name_some(names)}" for what, names in names_of.items() if names)


def _incomplete(modules: Iterable[_Module]) -> dict[str, list[str]]:
    names_of: dict[str, list[str]] = {}
    for module in modules:
        if module.parsed.lacking:
            there = sorted(module.parsed.names.keys() - {"alpha"})
            what = f"module(s) with {' and '.join(there)} but no {' and '.join(module.parsed.lacking)}"
        elif len(module.parsed.variants) > 1:
            what = f"module(s) of several kinds at once, {' and '.join(sorted(module.parsed.variants))}"
        elif not module.parsed.variants:
            what = f"module(s) with {' and '.join(sorted(module.parsed.names))} and nothing else"
        else:
            continue
        names_of.setdefault(what, []).append(module.name)
    return names_of
