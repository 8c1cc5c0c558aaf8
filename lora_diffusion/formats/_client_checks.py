"""Checks that hold for every client: names, kinds, sizes, scales, numbers."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lora_diffusion.core import lowrank
from lora_diffusion.core.delta import change_shape
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.soundness import ABSURD
from lora_diffusion.core.types import ModuleAdapter
from lora_diffusion.formats._client_file import PAIRS, FileModule
from lora_diffusion.formats._client_rules import CLIENTS, LARGEST_FLOAT16, LOST, WRONG, Fate
from lora_diffusion.formats._trial import Trial

if TYPE_CHECKING:
    from torch import Tensor

_CLOSE = 1e-3
"""Scales this close are the same, so that an alpha rounded to bf16 is no fault."""
_ROUNDING = 1e-2
"""A change may be off by this share through float16: it has 11 bits, but few for numbers below 6e-5."""
_CONVERT = "write it anew: lora-diffusion convert FILE NEW --to {}"
_AGAIN = "get the file again, or write it anew from the run: lora-diffusion export"
_DESCRIPTIONS: Mapping[str, tuple[str, str]] = {
    "unknown": ("name(s) that no module of this base has", "correct the names, or name the right base with --base"),
    "spelling": ("module(s) spelled as it does not know them", _CONVERT),
    "style": ("module(s) with tensors called as it does not read them", _CONVERT),
    "no_down": ("module(s) without their down tensor", _AGAIN),
    "no_up": ("module(s) of which tensors are missing", _AGAIN),
    "shape": ("module(s) whose tensors do not fit the base", "use it with the base it was made for, named with --base"),
    "dimensions": ("1x1 convolution(s) or linear layer(s) with factors of another number of dimensions", _CONVERT),
    "unreached": ("module(s) that it never adapts", "train without them"),
}


def find_lost(trial: Trial) -> None:
    """Finds the modules whose names, kind or size the client cannot use, and tensors that belong to none."""
    faulty: dict[str, list[str]] = defaultdict(list)
    for module in trial.file.modules:
        if fault := _fault(trial, module):
            faulty[fault].append(module.name)
    spelling = "diffusers" if trial.client.name == "diffusers" else "kohya"
    for fault, names in faulty.items():
        what, remedy = _DESCRIPTIONS.get(fault) or _other_kind(fault)
        if fault == "unknown":
            remedy += _meant(trial, names)
        trial.suffer(fault, _fate(trial, fault), what, remedy.format(spelling), names)
    strays = list(trial.file.strays)
    if strays:
        fate = trial.client.fates.get("stray", trial.client.fates["unknown"])
        trial.suffer("stray", fate, "tensor(s) with unknown or repeated names", _AGAIN, strays)


def _fault(trial: Trial, module: FileModule) -> str | None:
    client = trial.client
    if module.key is None:
        return "unknown"
    if module.spelling not in client.spellings[trial.base.family]:
        return "spelling"
    if client.unreached and re.fullmatch(client.unreached, module.key.path):
        return "unreached"
    if module.style in PAIRS and module.style not in client.styles:
        return "style"
    if module.style and module.variant not in client.variants:
        return f"kind {module.variant}"
    if not module.style or not module.is_whole:
        return "no_down" if "up" in module.roles and "down" not in module.roles else "no_up"
    return _size_fault(trial, module, trial.base.shapes[module.key])


def _size_fault(trial: Trial, module: FileModule, weight: tuple[int, ...]) -> str | None:
    if module.variant != "lora" or len(weight) == 1:
        return None if _fits_otherwise(module, weight) else "shape"
    down, up = tuple(module.roles["down"].shape), tuple(module.roles["up"].shape)
    kernel = weight[2:]
    if min(len(down), len(up)) < 2 or not down[0] or (up[0], up[1], down[1]) != (weight[0], down[0], weight[1]):
        return "shape"
    if _plain(down[2:]) != _plain(kernel) or _plain(up[2:]):
        return "shape"
    other = len(down) != len(weight) or len(up) != len(weight)
    return "dimensions" if other and trial.client.flat_convolution else None


def _plain(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return () if set(kernel) <= {1} else kernel


def _fits_otherwise(module: FileModule, weight: tuple[int, ...]) -> bool:
    sizes = {role: tensor.numel() for role, tensor in module.roles.items()}
    if module.variant in _WHOLE_SIZES:
        whole, others = _WHOLE_SIZES[module.variant]
        return sizes.get(whole, math.prod(weight)) == math.prod(weight) and sizes.get(others, weight[0]) == weight[0]
    if len(weight) == 1:
        return False
    if module.variant in ("oft", "boft"):
        return math.prod(module.roles["oft_blocks"].shape[-3:-1]) == weight[0]
    if module.variant not in _KINDS_WITH_FACTORS:
        return True
    adapter = ModuleAdapter(module.variant.replace("tucker", "lora"), module.roles, 0.0)
    try:
        return change_shape(adapter) == (weight[0], math.prod(weight[1:]))
    except AdapterFileError:
        return False


_WHOLE_SIZES = {"full": ("diff", "diff_b"), "norm": ("w_norm", "b_norm")}
"""Kind -> the tensor of the size of the weight, and that of the size of the outputs."""
_KINDS_WITH_FACTORS = ("tucker", "loha", "lokr")


def _fate(trial: Trial, fault: str) -> Fate:
    fates = trial.client.fates
    if fault == "dimensions":
        assert trial.client.flat_convolution, "only a client that minds has this fault"
        return trial.client.flat_convolution
    if fault.startswith("kind "):
        return fates.get(fault.removeprefix("kind "), fates["variant"])
    return fates["unknown"] if fault == "unreached" else fates[fault]


def _other_kind(fault: str) -> tuple[str, str]:
    kind = fault.removeprefix("kind ")
    able = [client.title for client in CLIENTS.values() if kind in client.variants]
    where = f"use it in {', '.join(able)}, or " if able else ""
    return f"{kind} module(s), a kind that it does not read", where + "merge it into the base: lora-diffusion merge"


def _meant(trial: Trial, names: Iterable[str]) -> str:
    """Returns a hint where a text encoder's prefix is that of another family, the commonest reason."""
    prefixes = {name.split("text_model")[0] for name in names if name.startswith("lora_te")}
    wrong = {prefix for prefix in prefixes if prefix in ("lora_te_", "lora_te1_", "lora_te2_")}
    own = {"sd1": "lora_te_", "sd2": "lora_te_", "sdxl": "lora_te1_ and lora_te2_"}[trial.base.family]
    return f"; text encoders of {trial.base.family} begin with {own}, not {', '.join(sorted(wrong))}" if wrong else ""


def find_other_ranks(trial: Trial) -> None:
    """Finds factors of another rank than the record beside them says, by which PEFT makes its layers."""
    names = [
        module.name
        for module in trial.applied()
        if module.variant == "lora" and module.recorded_rank not in (None, module.rank)
    ]
    what = "module(s) of another rank than the record of ranks says"
    trial.suffer("rank", trial.client.fates["shape"], what, _CONVERT.format("diffusers"), names)


def find_double_names(trial: Trial) -> None:
    """Finds modules that the file names in two spellings, of which each client lets another one win."""
    by_key = defaultdict(list)
    for module in trial.applied():
        by_key[module.key].append(module.name)
    double = [name for key, names in by_key.items() if key and len(names) > 1 for name in names]
    if double:
        text = f"{len(double)} names for modules that the file names twice; only one of each two is applied"
        trial.report("twice", LOST, text, "keep one spelling of each module", double)


def find_odd_alpha(trial: Trial) -> None:
    """Finds alphas that are not one number, at which every client stops."""
    odd = [module.name for module in trial.applied() if "alpha" in module.roles and module.roles["alpha"].numel() != 1]
    fate = Fate("file", LOST, "stops with an error and applies nothing")
    trial.suffer("alpha", fate, "module(s) whose alpha is not one number", _AGAIN, odd)


def find_missing_alpha(trial: Trial) -> None:
    """Finds factors without an alpha, which all clients then scale by 1, whatever they were trained with."""
    without = [
        module.name
        for module in trial.applied()
        if (module.style == "kohya" or module.style in ("loha", "lokr", "glora"))
        and (module.rank or module.style == "glora")
        and module.alpha is None
        and module.recorded_alpha is None
    ]
    if without:
        text = f"{len(without)} module(s) without alpha; {trial.client.title} takes alpha = rank for them, or another's"
        remedy = "ask for the alpha of its training; lora-diffusion convert FILE NEW --to kohya writes alpha = rank"
        trial.report("alpha missing", WRONG, text, remedy, without)


def find_ignored_record(trial: Trial) -> None:
    """Finds alphas that only diffusers' record in the metadata tells."""
    factors = {
        module.name: 1 / module.scale if module.scale else math.inf
        for module in trial.applied()
        if module.alpha is None and module.recorded_alpha is not None and abs(module.scale - 1) > _CLOSE
    }
    report_scales(trial, factors, "alpha in the record", "alpha only in diffusers' record, which it does not read")


def report_scales(trial: Trial, factors: Mapping[str, float], kind: str, what: str) -> None:
    """Reports modules that the client scales otherwise than the file says."""
    off = {name: factor for name, factor in factors.items() if abs(factor - 1) > _CLOSE}
    if off:
        farthest = max(off.values(), key=lambda factor: abs(factor - 1))
        text = f"{len(off)} module(s) with {what}: applied up to {farthest:.3g} times as strong"
        trial.report(
            kind, WRONG, text, "give all one alpha: lora-diffusion compose FILE:1 --output NEW.safetensors", off
        )
        trial.scale(off)


def find_dora(trial: Trial) -> None:
    """Finds magnitudes that the client ignores, or takes to run along the other axis."""
    modules = [module for module in trial.applied() if module.is_dora]
    ignored = [module.name for module in modules if _ignores(trial, module)]
    turned = [
        module.name
        for module in modules
        if trial.client.dora == "input" and module.name not in ignored and not _is_along_inputs(trial, module)
    ]
    if ignored:
        text = f"{len(ignored)} module(s) with a DoRA magnitude that {trial.client.title} leaves out"
        remedy = "use it in ComfyUI, Forge or A1111 in kohya's spelling, or merge it into the base"
        trial.report("dora ignored", WRONG, text, remedy, ignored)
    if turned:
        text = f"{len(turned)} module(s) with a DoRA scale that does not run along the inputs ([1, in])"
        remedy = "train DoRA with the magnitude along the inputs, or merge it into the base: lora-diffusion merge"
        trial.report("dora axis", WRONG, text, remedy, turned)
    trial.scale(dict.fromkeys([*ignored, *turned]))


def _ignores(trial: Trial, module: FileModule) -> bool:
    wanted = {"input": "dora_scale", "own": "magnitude"}.get(trial.client.dora)
    return wanted not in module.roles


def _is_along_inputs(trial: Trial, module: FileModule) -> bool:
    shape = tuple(module.roles["dora_scale"].shape)
    assert module.key, "an applied module is one of the base"
    return len(shape) > 1 and shape[0] == 1 and (math.prod(shape),) == trial.base.shapes[module.key][1:2]


def find_bad_numbers(trial: Trial) -> None:
    """Finds NaN and infinity, which every client loads, and numbers that float16 cannot hold."""
    bad = set(trial.file.bad_numbers)
    spoilt = [module.name for module in trial.applied() if any(name in bad for name in _tensor_names(module, bad))]
    if spoilt:
        text = f"{len(spoilt)} module(s) with NaN or infinity; {trial.client.title} loads them and draws black pictures"
        trial.report("not finite", WRONG, text, "use an earlier checkpoint of the run", spoilt)
        trial.scale(dict.fromkeys(spoilt, math.nan))
    absurd = [module.name for module in trial.applied() if module.name in trial.file.absurd - {*spoilt}]
    if absurd:
        remedy = "use an earlier checkpoint of the run, or find out whether its alphas are right"
        trial.report("too large", WRONG, f"{len(absurd)} {ABSURD}", remedy, absurd)
    whole = [module.name for module in trial.applied() if _has_whole_numbers(module)]
    if whole:
        text = f"{len(whole)} module(s) whose factors are whole numbers, which no adapter has"
        trial.report("whole numbers", WRONG, text, "make the file again with the tool that wrote it", whole)
    if not trial.client.small_floats:
        return
    large = [
        module.name for module in trial.applied() if module.name not in spoilt and _largest(module) > LARGEST_FLOAT16
    ]
    if large:
        text = f"{len(large)} module(s) with numbers above {LARGEST_FLOAT16:g}, infinite in float16, which "
        text += f"{trial.client.title} uses {trial.client.small_floats}"
        trial.report("float16 overflow", WRONG, text, "train it again with a lower learning rate", large)
        trial.scale(dict.fromkeys(large, math.nan))


def _tensor_names(module: FileModule, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{module.name}.")]


def _has_whole_numbers(module: FileModule) -> bool:
    factors = (tensor for role, tensor in module.roles.items() if role != "alpha")
    return any(tensor.numel() > 1 and not tensor.is_floating_point() for tensor in factors)


def _largest(module: FileModule) -> float:
    tensors = [tensor for role, tensor in module.roles.items() if role != "alpha" and tensor.numel()]
    return max((float(tensor.float().abs().max()) for tensor in tensors), default=0.0)


def find_small_numbers(trial: Trial) -> None:
    """Finds changes that move by more than rounding in float16: by factors near its smallest number."""
    modules = [module for module in trial.applied() if module.variant == "lora" and trial.factors[module.name]]
    finite = [module for module in modules if math.isfinite(trial.factors[module.name] or 0.0)]
    trial.moved = {module.name: moves for module in finite if (moves := _moves(module))}
    far = [name for name, moves in trial.moved.items() if moves > _ROUNDING]
    if far:
        text = f"{len(far)} module(s) with numbers too small for float16, which {trial.client.title} uses "
        text += f"{trial.client.small_floats}: off by up to {max(trial.moved.values()):.2g}"
        trial.report("float16 underflow", WRONG, text, "write the file in fp16 and look at its pictures", far)


def _moves(module: FileModule) -> float:
    down, up = module.roles["down"], module.roles["up"]
    if not down.is_floating_point() or not up.is_floating_point():
        return 0.0
    small_down, small_up = _rounded(down), _rounded(up)
    if bool((small_down == down.float()).all()) and bool((small_up == up.float()).all()):
        return 0.0
    own = lowrank.Factors(down, up)
    size = lowrank.norm(own)
    off = lowrank.total([own, lowrank.Factors(small_down, small_up, -1.0)])
    return lowrank.norm(off) / size if size else 0.0


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.half().float()
