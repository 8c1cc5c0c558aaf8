"""Checks that hold for every app: names, variants, sizes, scales, numbers."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lora_diffusion.algebra import lowrank
from lora_diffusion.algebra.delta import change_shape
from lora_diffusion.algebra.magnitude_limits import IMPLAUSIBLE
from lora_diffusion.compat.app_rules import APPS, HIDDEN, LARGEST_FLOAT16, LOST, WRONG, App, Consequence
from lora_diffusion.compat.matched_file import PAIRS, MatchedModule
from lora_diffusion.compat.simulation import Simulation, taken, unused
from lora_diffusion.core.adapter_state import ModuleAdapter
from lora_diffusion.core.errors import AdapterFileError

if TYPE_CHECKING:
    from torch import Tensor


def size_error(app: App, module: MatchedModule, weight: tuple[int, ...]) -> str | None:
    """Returns the error of a whole module that an app takes for its variant but cannot add to the weight; else None."""
    if module.variant in _WHOLE_SIZES:
        return _whole_error(app, module, weight)
    if module.variant == "lora":
        return _pair_error(app, module, weight)
    if module.variant in ("oft", "boft"):
        fits = math.prod(module.roles["oft_blocks"].shape[-3:-1]) == weight[0] and len(weight) > 1
        return None if fits else "shape"
    if module.variant == "glora":
        return None if _fits_glora(app, module, weight) else "shape"
    if module.variant == "tucker" and (error := _middle_error(app, module, weight)):
        return error
    if module.variant not in _WITH_FACTORS or len(weight) == 1:
        return None if len(weight) > 1 else "shape"
    adapter = ModuleAdapter(module.variant.replace("tucker", "lora"), module.roles, 0.0)
    try:
        return None if change_shape(adapter) == (weight[0], math.prod(weight[1:])) else "shape"
    except AdapterFileError:
        return "shape" if _fits_inside(module) else "inner"


def _fits_glora(app: App, module: MatchedModule, weight: tuple[int, ...]) -> bool:
    """Says whether the four matrices of a GLoRA fit, in the old order of LyCORIS, or today's, unknown to A1111."""
    a1, a2, b1, b2 = ((*module.roles[role].shape, 0, 0)[:2] for role in ("a1", "a2", "b1", "b2"))
    out, inner = (*weight, 0)[:2]
    old = (a1[1], a2[0], b1[1], b2[0]) == (inner, inner, inner, out) and (a1[0], b1[0]) == (a2[1], b2[1])
    new = (a1[0], a2[1], b1[0], b2[1]) == (inner, inner, out, inner) and (a1[1], b1[1]) == (a2[0], b2[0])
    return old or (new and app.by_trigger)


def _middle_error(app: App, module: MatchedModule, weight: tuple[int, ...]) -> str | None:
    """Returns the error of a middle factor that an app reads by its four dimensions, or shapes as the kernel."""
    mid = tuple(module.roles["mid"].shape)
    if app.by_trigger:
        return None if len(mid) == 4 else "inner"
    if len(weight) == 2:
        return "shape"
    return None if math.prod(mid[2:]) == math.prod(weight[2:]) else "kernel"


def _fits_inside(module: MatchedModule) -> bool:
    """Says whether the products fit that a program multiplies out before it looks at the weight."""
    shapes = {role: tuple(tensor.shape) for role, tensor in module.roles.items()}
    if module.variant == "tucker":
        mid = shapes["mid"]
        return len(mid) == 4 and mid[1] == shapes["down"][0]
    products = [(shapes[f"{name}_a"], shapes[f"{name}_b"]) for name in ("w1", "w2") if f"{name}_a" in shapes]
    return all(len(first) == len(second) == 2 and first[1] == second[0] for first, second in products)


def _pair_error(app: App, module: MatchedModule, weight: tuple[int, ...]) -> str | None:
    down, up = tuple(module.roles["down"].shape), tuple(module.roles["up"].shape)
    kernel = weight[2:]
    if len(weight) == 1 or min(len(down), len(up)) < 2 or not down[0]:
        return "shape"
    other_kernel = plain(down[2:]) != plain(kernel) or plain(up[2:])
    if up[1] != down[0] or (other_kernel and app.copies_kernels):
        return "kernel" if other_kernel and app.copies_kernels else "shape"
    if (up[0], down[1]) != weight[:2] or other_kernel:
        is_filled = up[0] == weight[0] and len(weight) == 2 and not other_kernel
        return "filled" if is_filled and "filled" in app.consequences else "shape"
    other = len(down) != len(weight) or len(up) != len(weight)
    return "dimensions" if other and app.flat_convolution else None


def _whole_error(app: App, module: MatchedModule, weight: tuple[int, ...]) -> str | None:
    """Compares what has the size of a weight, by its shape or, where the app reshapes it, by its numbers."""
    role = _WHOLE_SIZES[module.variant]
    if role not in module.roles:
        return "shape"
    shape = tuple(module.roles[role].shape)
    bias = next((module.roles[other] for other in ("diff_b", "b_norm") if other in module.roles), None)
    if (math.prod(shape) != math.prod(weight)) if app.copies_kernels else shape != weight:
        is_filled = len(shape) == len(weight) == 4 and "filled" in app.consequences
        return "filled" if is_filled else "not merged"
    return "shape" if bias is not None and tuple(bias.shape) != weight[:1] else None


def plain(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a kernel, () for those of one number and for none."""
    return () if set(kernel) <= {1} else kernel


_WHOLE_SIZES = {"full": "diff", "norm": "w_norm", "set": "set_weight"}
"""Variant -> the tensor of the size of the weight."""
_WITH_FACTORS = ("tucker", "loha", "lokr")


_CLOSE = 1e-3
"""Scales this close are the same, so that an alpha rounded to bf16 is no error."""
_ROUNDING = 1e-2
"""A change may be off by this share through float16: it has 11 bits, but few for numbers below 6e-5."""
_CONVERT = "write it again: lora-diffusion convert FILE NEW --to {}"
_AGAIN = "get the file again, or write it again from the run: lora-diffusion export"
_DESCRIPTIONS: Mapping[str, tuple[str, str]] = {
    "unknown": ("name(s) that no module of this base has", "correct the names, or name the right base with --base"),
    "spelling": ("module(s) named as it does not know them", _CONVERT),
    "untargeted": ("module(s) that the record beside them does not name as targets", "name them in target_modules"),
    "style": ("module(s) with tensors called as it does not read them", _CONVERT),
    "no_down": ("module(s) without their down tensor", _AGAIN),
    "drawn": ("module(s) without their down tensor", _AGAIN),
    "no_up": ("module(s) of which tensors are missing", _AGAIN),
    "shape": ("module(s) whose tensors do not fit the base", "use it with the base it was made for, named with --base"),
    "inner": ("module(s) whose tensors do not fit each other", _AGAIN),
    "kernel": (
        "module(s) of another kernel than the base's",
        "use it with the base it was made for, named with --base",
    ),
    "filled": ("module(s) of another size than the base's", "use it with the base it was made for, named with --base"),
    "not merged": (
        "module(s) of another size than the base's",
        "use it with the base it was made for, named with --base",
    ),
    "no constraint": ("BOFT module(s) without alpha, which it compares with a number", _AGAIN),
    "on_input": ("module(s) of IA3 that do not say on which side", _AGAIN),
    "dimensions": ("1x1 convolution(s) or linear layer(s) with factors of another number of dimensions", _CONVERT),
    "unreached": ("module(s) that it never adapts", "train without them"),
}


def find_lost(sim: Simulation) -> None:
    """Finds the modules whose names, variant or size the app cannot use, and tensors that belong to none."""
    names_by_error: dict[str, list[str]] = defaultdict(list)
    for module in sim.modules:
        if error := _error(sim, module):
            names_by_error[error].append(module.name)
    format_name = "diffusers" if sim.app.name == "diffusers" else "kohya"
    for error, names in names_by_error.items():
        what, remedy = _DESCRIPTIONS.get(error) or _other_variant(error)
        if error == "unknown":
            remedy += _meant(sim, names)
        sim.fail(_REPORTED_AS.get(error, error), _consequence(sim, error), what, remedy.format(format_name), names)
    unmatched = list(sim.file.unmatched)
    if unmatched:
        consequence = sim.app.consequences.get("stray", sim.app.consequences["unknown"])
        sim.fail("stray", consequence, "tensor(s) with unknown or repeated names", _AGAIN, unmatched)
    if sim.file.embeddings and not sim.app.reads_bundled:
        consequence = sim.app.consequences.get("stray", sim.app.consequences["unknown"])
        what = "tensor(s) of embeddings that come along"
        sim.fail(
            "embedding",
            consequence,
            what,
            "use it in A1111, or save them as files of their own",
            sim.file.embeddings,
        )


_REPORTED_AS = {**dict.fromkeys(("inner", "kernel", "filled", "not merged"), "shape"), "drawn": "no_down"}
"""Error -> what it is reported as, where that differs."""


def find_beside(sim: Simulation) -> None:
    """Finds tensors of other variants at modules that are applied, which the app leaves out or lets win."""
    left: dict[str, list[str]] = defaultdict(list)
    for module in sim.applied():
        roles = {role for role in unused(sim.app, module) if role not in _TOLD_OTHERWISE}
        replaced = {style for style in taken(sim.app, module)[1:] if sim.app.by_trigger}
        # A1111 gives a layer the bias that it lacks.
        has_bias = not module.key or sim.base.has_bias(module.key) or not sim.app.by_trigger
        biases = set() if has_bias else {"diff_b", "b_norm"} & _all_roles(module)
        if others := sorted(roles | replaced | biases):
            left[", ".join(others)].append(module.name)
    for others_named, names in left.items():
        consequence = sim.app.consequences.get("beside", _LEFT_OUT)
        what = f"module(s) with {others_named} beside what it applies"
        sim.fail(f"beside {others_named}", consequence, what, "merge it into the base: lora-diffusion merge", names)


_LEFT_OUT = Consequence("module", WRONG, "leaves that out")
_TOLD_OTHERWISE = frozenset({"dora_scale", "magnitude"})


def _all_roles(module: MatchedModule) -> set[str]:
    return {*module.roles, *(role for roles in module.beside.values() for role in roles)}


def _error(sim: Simulation, module: MatchedModule) -> str | None:
    app = sim.app
    if module.key is None:
        return "unknown"
    if not app.finds(module.naming, sim.base.architecture):
        return "untargeted" if module.naming == "untargeted" else "spelling"
    if app.unreached and re.fullmatch(app.unreached, module.key.path):
        return "unreached"
    if not taken(app, module):
        return None if _is_bias_alone(sim, module) else _why_not_taken(app, module)
    if module.variant == "tucker" and not app.reads_mid:
        is_plain = app.name == "kohya" and not plain(sim.base.shapes[module.key][2:])
        return None if is_plain else "kind tucker"
    if module.style == "ia3" and "on_input" not in module.roles:
        return "on_input"
    if module.variant == "boft" and app.by_trigger and module.alpha is None:
        return "no constraint"
    if app.by_trigger and (lacking := _lacks_what_is_looked_up(module)):
        return lacking
    return size_error(app, module, sim.base.shapes[module.key])


def _is_bias_alone(sim: Simulation, module: MatchedModule) -> bool:
    """Says whether the app changes nothing but the bias."""
    bias = module.styles.get("full", {}).get("diff_b")
    return bool(
        bias is not None
        and "diff_b" in sim.app.biases
        and module.key
        and sim.base.has_bias(module.key)
        and tuple(bias.shape) == sim.base.shapes[module.key][:1]
    )


def _why_not_taken(app: App, module: MatchedModule) -> str:
    if module.style in PAIRS and module.style not in app.order:
        return "style"
    if module.style and module.variant not in app.variants:
        return f"kind {module.variant}"
    if "up" not in module.roles or "down" in module.roles:
        return "no_up"
    is_drawn = "drawn" in app.consequences and module.key is not None and module.key.part != "unet"
    return "drawn" if is_drawn else "no_down"


def _lacks_what_is_looked_up(module: MatchedModule) -> str | None:
    """Returns the error of a module of which ComfyUI looks a tensor up that is not there, whatever else is applied."""
    for style, roles in module.styles.items():
        wanted = {"down"} if style in PAIRS and "up" in roles else _LOOKED_UP.get(style, set())
        is_taken = style in PAIRS or _FIRST[style] in roles if style in _FIRST or style in PAIRS else False
        if is_taken and not wanted <= roles.keys():
            return "no_down"
    has_half_core = any({"t1"} <= roles.keys() and "t2" not in roles for roles in module.styles.values())
    is_cut = module.style == "lokr" and not module.is_whole
    return "no_down" if has_half_core or is_cut else None


_LOOKED_UP = {"loha": {"w1_b", "w2_a", "w2_b"}, "glora": {"a2", "b1", "b2"}}
_FIRST = {"loha": "w1_a", "glora": "a1"}


def _consequence(sim: Simulation, error: str) -> Consequence:
    consequences = sim.app.consequences
    if error == "dimensions":
        assert sim.app.flat_convolution, "only an app that minds has this error"
        return sim.app.flat_convolution
    if error.startswith("kind "):
        return consequences.get(error.removeprefix("kind "), consequences["variant"])
    return (
        consequences["unknown"]
        if error in ("unreached", "untargeted")
        else consequences.get(error) or consequences["shape"]
    )


def _other_variant(error: str) -> tuple[str, str]:
    variant = error.removeprefix("kind ")
    able = [app.title for app in APPS.values() if variant in app.variants]
    where = f"use it in {', '.join(able)}, or " if able else ""
    return f"{variant} module(s), a kind that it does not read", where + "merge it into the base: lora-diffusion merge"


def _meant(sim: Simulation, names: Iterable[str]) -> str:
    """Returns a hint where a text encoder's prefix is that of another family, the commonest reason."""
    prefixes = {name.split("text_model")[0] for name in names if name.startswith("lora_te")}
    wrong = {prefix for prefix in prefixes if prefix in ("lora_te_", "lora_te1_", "lora_te2_")}
    right = " and ".join(encoder.kohya_prefixes[0] for encoder in sim.base.architecture.text_encoders)
    name = sim.base.architecture.name
    return f"; text encoders of {name} begin with {right}, not {', '.join(sorted(wrong))}" if wrong else ""


def find_other_ranks(sim: Simulation) -> None:
    """Finds factors of another rank than the record beside them says, by which PEFT makes its layers."""
    names = [
        module.name
        for module in sim.applied()
        if module.variant == "lora" and module.is_whole and module.recorded_rank not in (None, module.rank)
    ]
    what = "module(s) of another rank than the record of ranks says"
    sim.fail("rank", sim.app.consequences["shape"], what, _CONVERT.format("diffusers"), names)


def find_double_names(sim: Simulation) -> None:
    """Finds modules that the file names by two names, of which each app lets another one win."""
    by_key = defaultdict(list)
    for module in sim.applied():
        by_key[module.key].append(module.name)
    double = [name for key, names in by_key.items() if key and len(names) > 1 for name in names]
    if double:
        text = f"{len(double)} names for modules that the file names twice; only one of each two is applied"
        sim.report("twice", LOST, text, "keep one name of each module", double)


def find_odd_alpha(sim: Simulation) -> None:
    """Finds alphas that are not one number, at which every app stops."""
    odd = [module.name for module in sim.applied() if "alpha" in module.roles and module.roles["alpha"].numel() != 1]
    consequence = Consequence("file", LOST, "stops with an error and applies nothing")
    sim.fail("alpha", consequence, "module(s) whose alpha is not one number", _AGAIN, odd)


def find_missing_alpha(sim: Simulation) -> None:
    """Finds factors without an alpha, which all apps scale by 1: nobody is told if they were trained otherwise."""
    without = [
        module.name
        for module in sim.applied()
        if (module.style == "kohya" or module.style in ("loha", "lokr", "glora"))
        and (module.rank or module.style == "glora")
        and module.alpha is None
        and module.recorded_alpha is None
    ]
    if without:
        text = f"{len(without)} module(s) without alpha; {sim.app.title} takes alpha = rank for them"
        remedy = "if it was trained with another alpha, ask for it; every program reads the file so"
        sim.report("alpha missing", HIDDEN, text, remedy, without)


def find_ignored_record(sim: Simulation) -> None:
    """Finds alphas that only diffusers' record in the metadata tells."""
    factors = {
        module.name: 1 / module.scale if module.scale else math.inf
        for module in sim.applied()
        if module.alpha is None and module.recorded_alpha is not None and abs(module.scale - 1) > _CLOSE
    }
    report_scales(sim, factors, "alpha in the record", "alpha only in diffusers' record, which it does not read")


def report_scales(sim: Simulation, factors: Mapping[str, float], error: str, what: str) -> None:
    """Reports modules that the app scales otherwise than the file says."""
    off = {name: factor for name, factor in factors.items() if abs(factor - 1) > _CLOSE}
    if off:
        farthest = max(off.values(), key=lambda factor: abs(factor - 1))
        text = f"{len(off)} module(s) with {what}: applied up to {farthest:.3g} times as strong"
        sim.report(
            error, WRONG, text, "give all one alpha: lora-diffusion compose FILE:1 --output NEW.safetensors", off
        )
        sim.scale(off)


def find_dora(sim: Simulation) -> None:
    """Finds magnitudes that the app ignores, or takes to run along the other axis."""
    modules = [module for module in sim.applied() if module.is_dora]
    ignored = [module.name for module in modules if _ignores(sim, module)]
    turned = [
        module.name
        for module in modules
        if sim.app.dora == "input" and module.name not in ignored and not _is_along_inputs(sim, module)
    ]
    if ignored:
        text = f"{len(ignored)} module(s) with a DoRA magnitude that {sim.app.title} leaves out"
        remedy = "use it in ComfyUI, Forge or A1111 in the kohya format, or merge it into the base"
        sim.report("dora ignored", WRONG, text, remedy, ignored)
    if turned:
        text = f"{len(turned)} module(s) with a DoRA scale that does not run along the inputs ([1, in])"
        remedy = "train DoRA with the magnitude along the inputs, or merge it into the base: lora-diffusion merge"
        sim.report("dora axis", WRONG, text, remedy, turned)
    sim.scale(dict.fromkeys([*ignored, *turned]))


def _ignores(sim: Simulation, module: MatchedModule) -> bool:
    wanted = {"input": "dora_scale", "own": "magnitude"}.get(sim.app.dora)
    return wanted not in module.roles


def _is_along_inputs(sim: Simulation, module: MatchedModule) -> bool:
    shape = tuple(module.roles["dora_scale"].shape)
    assert module.key, "an applied module is one of the base"
    return len(shape) > 1 and shape[0] == 1 and (math.prod(shape),) == sim.base.shapes[module.key][1:2]


def find_created_magnitudes(sim: Simulation) -> None:
    """Finds magnitudes that PEFT cannot load, and modules that get one of the base because others have one."""
    modules = [module for module in sim.modules if module.makes_magnitude and module.key]
    misfits = [
        module.name
        for module in modules
        if "magnitude" in module.roles
        and module.key
        and tuple(module.roles["magnitude"].shape) != _peft_magnitude(sim.base.shapes[module.key])
    ]
    what = "module(s) whose DoRA magnitude is not of the shape that it makes"
    sim.fail("magnitude", sim.app.consequences["shape"], what, _CONVERT.format("diffusers"), misfits)
    without = [module.name for module in modules if "magnitude" not in module.roles and sim.factors[module.name] != 0]
    if without:
        text = f"{len(without)} module(s) without a DoRA magnitude, for which {sim.app.title} makes one"
        sim.report("magnitude missing", WRONG, text, "train it again with DoRA in all modules, or in none", without)
        sim.scale(dict.fromkeys(without))


def _peft_magnitude(weight: tuple[int, ...]) -> tuple[int, ...]:
    return (1, weight[0], *(1,) * len(weight[2:])) if len(weight) > 2 else weight[:1]


def find_bad_numbers(sim: Simulation) -> None:
    """Finds NaN and infinity, which every app loads, and numbers that float16 cannot hold."""
    bad = set(sim.file.bad_numbers)
    spoilt = [module.name for module in sim.applied() if any(name in bad for name in _tensor_names(module, bad))]
    if spoilt:
        text = f"{len(spoilt)} module(s) with NaN or infinity; {sim.app.title} loads them and makes black images"
        sim.report("not finite", WRONG, text, "use an earlier checkpoint of the run", spoilt)
        sim.scale(dict.fromkeys(spoilt, math.nan))
    implausible = [module.name for module in sim.applied() if module.name in sim.file.implausible - {*spoilt}]
    if implausible:
        remedy = "use an earlier checkpoint of the run, or find out whether its alphas are right"
        sim.report("too large", WRONG, f"{len(implausible)} {IMPLAUSIBLE}", remedy, implausible)
    whole = [module.name for module in sim.applied() if _has_whole_numbers(module)]
    if whole:
        text = f"{len(whole)} module(s) whose factors are whole numbers, which no adapter has"
        sim.report("whole numbers", WRONG, text, "make the file again with the tool that wrote it", whole)
    if not sim.app.small_floats:
        return
    large = [
        module.name for module in sim.applied() if module.name not in spoilt and _largest(module) > LARGEST_FLOAT16
    ]
    if large:
        text = f"{len(large)} module(s) with numbers above {LARGEST_FLOAT16:g}, infinite in float16, which "
        text += f"{sim.app.title} uses {sim.app.small_floats}"
        sim.report("float16 overflow", WRONG, text, "train it again with a lower learning rate", large)
        sim.scale(dict.fromkeys(large, math.nan))


def _tensor_names(module: MatchedModule, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{module.name}.")]


def _has_whole_numbers(module: MatchedModule) -> bool:
    factors = (tensor for role, tensor in module.roles.items() if role not in ("alpha", "reshape", "on_input"))
    return any(tensor.numel() > 1 and not tensor.is_floating_point() for tensor in factors)


def _largest(module: MatchedModule) -> float:
    tensors = [tensor for role, tensor in module.roles.items() if role != "alpha" and tensor.numel()]
    return max((float(tensor.float().abs().max()) for tensor in tensors), default=0.0)


def find_small_numbers(sim: Simulation) -> None:
    """Finds changes that move by more than rounding in float16: by factors near its smallest number."""
    modules = [module for module in sim.applied() if module.variant == "lora" and sim.factors[module.name]]
    finite = [module for module in modules if math.isfinite(sim.factors[module.name] or 0.0)]
    sim.moved = {module.name: moves for module in finite if (moves := _moves(module))}
    far = [name for name, moves in sim.moved.items() if moves > _ROUNDING]
    if far:
        text = f"{len(far)} module(s) with numbers too small for float16, which {sim.app.title} uses "
        text += f"{sim.app.small_floats}: off by up to {max(sim.moved.values()):.2g}"
        sim.report("float16 underflow", WRONG, text, "write the file in fp16 and look at its images", far)


def _moves(module: MatchedModule) -> float:
    down, up = module.roles["down"], module.roles["up"]
    if not down.is_floating_point() or not up.is_floating_point():
        return 0.0
    small_down, small_up = _rounded(down), _rounded(up)
    if bool((small_down == down.float()).all()) and bool((small_up == up.float()).all()):
        return 0.0
    factors = lowrank.Factors(down, up)
    size = lowrank.norm(factors)
    difference = lowrank.total([factors, lowrank.Factors(small_down, small_up, -1.0)])
    return lowrank.norm(difference) / size if size else 0.0


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.half().float()
