"""Adapter files with errors and oddities, drawn at random: the same ones for the same seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.compat.matched_file import Base
from lora_diffusion.core.adapter_state import ModuleKey

Tensors = dict[str, Tensor]
_LARGEST = 4_000_000
"""Numbers in a weight; larger ones would take long and show nothing else."""
_ENDS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "layers": (".lora.down.weight", ".lora.up.weight"),
    "linear": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "named": (".lora_A.default.weight", ".lora_B.default.weight"),
}


@dataclass
class Draft:
    """A file that is being made."""

    base: Base
    rng: random.Random
    generator: torch.Generator
    modules: dict[str, ModuleKey]
    """Name in the file -> module."""
    tensors: Tensors
    labels: list[str] = field(default_factory=list)

    def some(self, most: int = 3, only: str = "") -> list[str]:
        """Returns up to `most` names of modules whose keys hold an expression."""
        names = [name for name, key in self.modules.items() if re.search(only, f"{key.part}.{key.path}")]
        return self.rng.sample(names, min(len(names), self.rng.randint(1, most)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a module's weight."""
        return self.base.shapes[self.modules[name]]

    def noise(self, *shape: int) -> Tensor:
        """Returns numbers of the size of an adapter's."""
        return torch.randn(shape, generator=self.generator) * 0.1

    def own(self, name: str) -> list[str]:
        """Returns the names of a module's tensors."""
        return [tensor for tensor in self.tensors if tensor.startswith(f"{name}.")]

    def drop(self, name: str) -> None:
        """Takes a module's tensors out."""
        for tensor in self.own(name):
            del self.tensors[tensor]


def draw(base: Base, seed: int) -> tuple[Tensors, str]:
    """Returns the tensors of a file with up to three mutations, and what was done, in words."""
    rng = random.Random(seed)
    spelling = rng.choices(list(_SPELLINGS), [6, 2, 2, 2, 2, 1])[0]
    modules = _choose(base, rng, spelling)
    draft = Draft(base, rng, torch.Generator().manual_seed(seed), modules, {}, [spelling])
    _fill(draft, spelling)
    for mutation in rng.sample(_MUTATIONS, rng.randint(1, 3)):
        mutation(draft)
        draft.labels.append(mutation.__name__.strip("_"))
    if rng.random() < 0.5:
        items = list(draft.tensors.items())
        rng.shuffle(items)
        draft.tensors = dict(items)
    return {name: tensor.clone().contiguous() for name, tensor in draft.tensors.items()}, ", ".join(draft.labels)


def _choose(base: Base, rng: random.Random, spelling: str) -> dict[str, ModuleKey]:
    """Returns modules of all kinds, named in a spelling; those of blocks and layers that small models have too."""
    name = _SPELLINGS[spelling]
    fitting = [
        key
        for key, shape in base.shapes.items()
        if len(shape) > 1
        and torch.Size(shape).numel() <= _LARGEST
        and re.search(r"attn|ff\.net|conv\d|proj|mlp|samplers", key.path)
        and not re.search(r"transformer_blocks\.[2-9]|layers\.([2-9]|\d\d)|text_projection|add_|time_emb", key.path)
    ]
    unet = [key for key in fitting if key.part == "unet"]
    text = [key for key in fitting if key.part != "unet"]
    chosen = rng.sample(unet, 8) if rng.random() < 0.9 else []
    if rng.random() < 0.7 or not chosen:
        for part in sorted({key.part for key in text}):
            encoder = [key for key in text if key.part == part]
            layer = [key for key in encoder if ".0.self_attn" in key.path]
            chosen += layer if rng.random() < 0.6 else rng.sample(encoder, 3)
    named = {name(base, key): key for key in chosen}
    return {name: key for name, key in named.items() if name}


def _kohya(base: Base, key: ModuleKey) -> str:
    return base.names[0].name(key)


def _other_blocks(base: Base, key: ModuleKey) -> str:
    """Returns kohya's names with the blocks that it does not use for this base: LDM for SD 1, diffusers for XL."""
    spelled = [name for name in base.names[0].all_names()[key] if name.startswith(("lora_unet_", "lora_te"))]
    return spelled[1] if key.part == "unet" and len(spelled) > 1 else spelled[0]


def _diffusers(base: Base, key: ModuleKey) -> str:
    return base.names[1].name(key)


def _comfyui(base: Base, key: ModuleKey) -> str:
    if key.part != "unet":
        clip = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[key.part]
        bare = key.path.removeprefix("text_model.")
        return f"text_encoders.{clip}.transformer.text_model.{bare}"
    names = base.names[1].all_names()[key]
    return next((name for name in names if name.startswith("diffusion_model.")), "")


def _processor(base: Base, key: ModuleKey) -> str:
    if key.part != "unet":
        return _diffusers(base, key)
    return "unet." + re.sub(r"(attn[12])\.to_(q|k|v|out)(\.0)?$", r"\1.processor.to_\2", key.path)


_SPELLINGS: Mapping[str, Callable[[Base, ModuleKey], str]] = {
    "kohya": _kohya,
    "other blocks": _other_blocks,
    "peft": _diffusers,
    "comfyui": _comfyui,
    "layers": _diffusers,
    "processor": _processor,
}


def _fill(draft: Draft, spelling: str) -> None:
    rank = draft.rng.choice((1, 2, 4))
    for name, key in draft.modules.items():
        style = {"peft": "peft", "layers": "layers", "processor": "peft"}.get(spelling, "kohya")
        if spelling == "layers" and key.part != "unet":
            style = "linear"
        down, up = _ENDS[style]
        shape = draft.shape(name)
        if ".processor." in name:
            name, down, up = f"{name}_lora", ".down.weight", ".up.weight"  # noqa: PLW2901
        draft.tensors[name + down] = draft.noise(rank, *shape[1:])
        draft.tensors[name + up] = draft.noise(shape[0], rank, *(1,) * len(shape[2:]))
        if style == "kohya":
            draft.tensors[f"{name}.alpha"] = torch.tensor(float(draft.rng.choice((1, rank))))


def _drop_tensors(draft: Draft) -> None:
    for name in draft.rng.sample(list(draft.tensors), min(2, len(draft.tensors))):
        del draft.tensors[name]


def _rename_modules(draft: Draft) -> None:
    for name in draft.some():
        for tensor in draft.own(name):
            draft.tensors[tensor.replace(name, f"{name}x", 1)] = draft.tensors.pop(tensor)


def _rename_many_modules(draft: Draft) -> None:
    for name in list(draft.modules)[:5]:
        for tensor in draft.own(name):
            draft.tensors[tensor.replace(name, f"{name}_y", 1)] = draft.tensors.pop(tensor)


def _rename_tensors(draft: Draft) -> None:
    for name in draft.rng.sample(list(draft.tensors), min(2, len(draft.tensors))):
        draft.tensors[re.sub(r"(\w+)(\.weight)?$", r"\1p\2", name)] = draft.tensors.pop(name)


def _swap_text_prefix(draft: Draft) -> None:
    old, new = draft.rng.choice((("lora_te1_", "lora_te_"), ("lora_te_", "lora_te1_"), ("lora_te_", "lora_te2_")))
    _replace(draft, old, new)


def _drop_text_model(draft: Draft) -> None:
    _replace(draft, "text_model_", "")
    _replace(draft, "text_model.", "")


def _change_unet_prefix(draft: Draft) -> None:
    _replace(draft, *draft.rng.choice((("unet.", ""), ("lora_unet_", "lycoris_"), ("diffusion_model.", "unet."))))


def _replace(draft: Draft, old: str, new: str) -> None:
    draft.tensors = {name.replace(old, new, 1) if name.startswith(old) or old.startswith("text_model") else name: tensor
                     for name, tensor in draft.tensors.items()}  # fmt: skip
    draft.modules = {
        name.replace(old, new, 1) if name.startswith(old) or old.startswith("text_model") else name: key
        for name, key in draft.modules.items()
    }


def _name_twice(draft: Draft) -> None:
    for name in draft.some(2):
        others = {"lora_te_": "lora_te1_", "lora_te1_": "lora_te_", "unet.": "lora_unet_"}
        for old, new in others.items():
            if name.startswith(old):
                other = new + (name[len(old) :].replace(".", "_") if old == "unet." else name[len(old) :])
                draft.tensors |= {tensor.replace(name, other, 1): draft.tensors[tensor] for tensor in draft.own(name)}


def _drop_alphas(draft: Draft) -> None:
    names = list(draft.modules) if draft.rng.random() < 0.5 else draft.some(4)
    for name in names:
        draft.tensors.pop(f"{name}.alpha", None)


def _odd_alphas(draft: Draft) -> None:
    oddity = draft.rng.choice(("one", "int", "two", "uneven", "uneven"))
    for name in draft.some(4):
        alpha = {"one": torch.ones(1), "int": torch.tensor(2), "two": torch.ones(2), "uneven": torch.tensor(0.5)}[
            oddity
        ]
        draft.tensors[f"{name}.alpha"] = alpha


def _add_dora(draft: Draft) -> None:
    axis = draft.rng.random() < 0.6
    for name in draft.some(4):
        shape = draft.shape(name)
        size = (1, shape[1], *(1,) * len(shape[2:])) if axis else (shape[0], *(1,) * len(shape[1:]))
        draft.tensors[f"{name}.dora_scale"] = draft.noise(*size).abs() + 1


def _add_magnitudes(draft: Draft) -> None:
    for name in draft.some(4):
        shape = draft.shape(name)
        draft.tensors[f"{name}.lora_magnitude_vector"] = draft.noise(shape[0]).abs() + 1


def _add_difference(draft: Draft) -> None:
    for name in draft.some(3):
        shape = draft.shape(name)
        if draft.rng.random() < 0.3:
            draft.drop(name)
        if draft.rng.random() < 0.5:
            draft.tensors[f"{name}.diff"] = draft.noise(*shape)
        if draft.rng.random() < 0.7:
            draft.tensors[f"{name}.diff_b"] = draft.noise(shape[0])


def _add_wrong_difference(draft: Draft) -> None:
    for name in draft.some(2):
        shape = draft.shape(name)
        draft.tensors[f"{name}.diff"] = draft.noise(shape[0], shape[1] - 1, *shape[2:])


def _add_norms(draft: Draft) -> None:
    """Norm layers in LyCORIS' names, whole or halved, as differences too."""
    norms = [(key, name) for key, name in base_norms(draft.base) if key in draft.base.shapes]
    for key, name in draft.rng.sample(norms, min(3, len(norms))):
        width = draft.base.shapes[key][0]
        ends = draft.rng.choice((("w_norm", "b_norm"), ("w_norm",), ("b_norm",), ("diff", "diff_b"), ("diff_b",)))
        draft.tensors |= {f"{name}.{end}": draft.noise(width) for end in ends}


def base_norms(base: Base) -> list[tuple[ModuleKey, str]]:
    """Returns the norm layers and their names in LyCORIS."""
    return list(base.names[-1])


def _add_middle(draft: Draft) -> None:
    for name in draft.some(3):
        downs = [tensor for tensor in draft.own(name) if re.search(r"lora_(down|A)\.weight$", tensor)]
        for down in downs:
            rank, shape = draft.tensors[down].shape[0], draft.shape(name)
            ones = (1,) * len(shape[2:])
            draft.tensors[down] = draft.noise(rank, shape[1], *ones)
            kernel = shape[2:] or draft.rng.choice(((), (1, 1)))
            draft.tensors[f"{name}.lora_mid.weight"] = draft.noise(rank, rank, *kernel)


def _add_reshape(draft: Draft) -> None:
    for name in draft.some(2):
        draft.tensors[f"{name}.reshape_weight"] = torch.tensor(draft.shape(name))


def _add_embedding(draft: Draft) -> None:
    names = draft.rng.choice((("clip_l", "clip_g"), ("string_to_param.*",), ("emb_params",), ("clip_l", "t5")))
    draft.tensors |= {f"bundle_emb.mine.{name}": draft.noise(2, 768) for name in names}


def _add_stray(draft: Draft) -> None:
    name = draft.rng.choice(("noise", "lora_unet_x.noise", "lora_te_x.alpha", "unet.x.lora_A.weight"))
    draft.tensors[name] = torch.ones(())


def _add_text_projection(draft: Draft) -> None:
    key = ModuleKey("text_encoder_2", "text_projection")
    if key in draft.base.shapes:
        name = draft.rng.choice(("lora_te2_text_projection", "text_encoder_2.text_projection"))
        ends = _ENDS["kohya" if name.startswith("lora") else "peft"]
        draft.tensors |= {name + ends[0]: draft.noise(2, 1280), name + ends[1]: draft.noise(1280, 2)}


def _wrong_sizes(draft: Draft) -> None:
    for name in draft.rng.sample(list(draft.tensors), min(2, len(draft.tensors))):
        tensor = draft.tensors[name]
        if tensor.ndim > 1:
            axis = draft.rng.randrange(2)
            draft.tensors[name] = tensor.narrow(axis, 0, max(1, tensor.shape[axis] - 1))


def _transpose(draft: Draft) -> None:
    for name in draft.some(2):
        for tensor in draft.own(name):
            if draft.tensors[tensor].ndim == 2:
                draft.tensors[tensor] = draft.tensors[tensor].T


def _other_dimensions(draft: Draft) -> None:
    for name in draft.some(3):
        for tensor in draft.own(name):
            value = draft.tensors[tensor]
            if value.ndim == 4 and value.shape[2:].numel() == 1:
                draft.tensors[tensor] = value.flatten(1)
            elif value.ndim == 2 and draft.rng.random() < 0.3:
                draft.tensors[tensor] = value[..., None, None]


def _cast(draft: Draft) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    one = draft.rng.choice((*dtypes, None))
    for name, tensor in draft.tensors.items():
        if tensor.is_floating_point():
            draft.tensors[name] = tensor.to(one or draft.rng.choice(dtypes))


def _cast_small(draft: Draft) -> None:
    for name in draft.some(2):
        for tensor in draft.own(name):
            draft.tensors[tensor] = draft.tensors[tensor].to(torch.float8_e4m3fn)


def _hybrid(draft: Draft) -> None:
    pairs = draft.rng.choice((("kohya", "peft"), ("peft", "kohya"), ("peft", "named"), ("layers", "peft")))
    names = draft.some(4) if draft.rng.random() < 0.5 else list(draft.modules)
    for old, new in zip(*(_ENDS[name] for name in pairs), strict=True):
        for name in names:
            if name + old in draft.tensors:
                draft.tensors[name + new] = draft.tensors.pop(name + old)


def _loha(draft: Draft) -> None:
    def tensors(shape: tuple[int, ...]) -> Tensors:
        rows, columns = shape[0], torch.Size(shape[1:]).numel()
        sizes: Mapping[str, tuple[int, ...]] = {
            "w1_a": (rows, 2),
            "w1_b": (2, columns),
            "w2_a": (rows, 2),
            "w2_b": (2, columns),
        }
        if len(shape) > 2 and torch.Size(shape[2:]).numel() > 1 and draft.rng.random() < 0.5:
            factors = {f"w{n}_a": (2, rows) for n in (1, 2)} | {f"w{n}_b": (2, shape[1]) for n in (1, 2)}
            sizes = {**factors, **{f"t{n}": (2, 2, *shape[2:]) for n in (1, 2)}}
        return {f"hada_{role}": draft.noise(*size) for role, size in sizes.items()}

    _replace_by(draft, tensors)


def _lokr(draft: Draft) -> None:
    def tensors(shape: tuple[int, ...]) -> Tensors:
        rows, columns = shape[0] // 4, shape[1] // 4
        first = {"lokr_w1": draft.noise(4, 4)}
        if draft.rng.random() < 0.3:
            first = {"lokr_w1_a": draft.noise(4, 2), "lokr_w1_b": draft.noise(2, 4)}
        if draft.rng.random() < 0.4:
            return {**first, "lokr_w2": draft.noise(rows, columns, *shape[2:])}
        inner = torch.Size((columns, *shape[2:])).numel()
        return {**first, "lokr_w2_a": draft.noise(rows, 2), "lokr_w2_b": draft.noise(2, inner)}

    _replace_by(draft, tensors)


def _oft(draft: Draft) -> None:
    _replace_by(draft, lambda shape: {"oft_blocks": draft.noise(4, shape[0] // 4, shape[0] // 4)})


def _boft(draft: Draft) -> None:
    _replace_by(draft, lambda shape: {"oft_blocks": draft.noise(2, shape[0] // 4, 4, 4)})


def _glora(draft: Draft) -> None:
    def tensors(shape: tuple[int, ...]) -> Tensors:
        sizes = {"a1": (shape[1], 2), "a2": (2, shape[1]), "b1": (shape[0], 2), "b2": (2, shape[1])}
        return {f"{role}.weight": draft.noise(*size) for role, size in sizes.items()}

    _replace_by(draft, tensors, only=r"attn|mlp|ff")


def _ia3(draft: Draft) -> None:
    def tensors(shape: tuple[int, ...]) -> Tensors:
        return {"weight": draft.noise(shape[0], 1), "on_input": torch.tensor(False)}

    _replace_by(draft, tensors, only=r"attn|mlp|ff")


def _full(draft: Draft) -> None:
    _replace_by(draft, lambda shape: {"diff": draft.noise(*shape)})


def _set_weight(draft: Draft) -> None:
    _replace_by(draft, lambda shape: {"set_weight": draft.noise(*shape)})


def _replace_by(draft: Draft, tensors: Callable[[tuple[int, ...]], Tensors], only: str = "") -> None:
    """Puts another kind in the place of some modules, sometimes beside what is there, sometimes not whole."""
    for name in draft.some(4, only):
        if draft.rng.random() < 0.85:
            draft.drop(name)
        factors = tensors(draft.shape(name))
        if draft.rng.random() < 0.15:
            del factors[draft.rng.choice(list(factors))]
        draft.tensors |= {f"{name}.{role}": tensor for role, tensor in factors.items()}
        if draft.rng.random() < 0.7:
            draft.tensors[f"{name}.alpha"] = torch.tensor(1.0)


def _add_scale(draft: Draft) -> None:
    for name in draft.some(2):
        draft.tensors[f"{name}.scale"] = torch.tensor(0.25)


_MUTATIONS: list[Callable[[Draft], Any]] = [
    *(_drop_tensors, _rename_modules, _rename_many_modules, _rename_tensors, _swap_text_prefix, _drop_text_model),
    *(_change_unet_prefix, _name_twice, _drop_alphas, _odd_alphas, _add_dora, _add_magnitudes, _add_difference),
    *(_add_wrong_difference, _add_norms, _add_middle, _add_reshape, _add_embedding, _add_stray, _wrong_sizes),
    *(_add_text_projection, _transpose, _other_dimensions, _cast, _cast_small, _hybrid, _loha, _lokr, _oft, _boft),
    *(_glora, _ia3, _full, _set_weight, _add_scale),
]
