"""What apps make of files: the rules against the errors they must find, and against diffusers itself."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_diffusion.adapters.state import weight_shapes
from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.compat.app_rules import APPS
from lora_diffusion.compat.identify import guess_family
from lora_diffusion.compat.matched_file import Base, match_file
from lora_diffusion.compat.simulation import AppResult
from lora_diffusion.compat.verify import default_apps, verify
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleKey
from lora_diffusion.core.errors import AdapterFileError, ConfigError
from lora_diffusion.families.stable_diffusion.module_names import key_map
from lora_diffusion.formats.parsed_file import parse_file
from tests.tiny import tiny_pipeline, tiny_sdxl_pipeline
from tests.tiny_adapters import random_state, tiny_loaded

Tensors = dict[str, Tensor]
ALL = tuple(APPS)
_FORMATS = ("kohya", "diffusers", "peft")
_Q = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
_METADATA = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "modelspec.architecture": "stable-diffusion-v1/lora"}


def _base_of(parts: Mapping[str, torch.nn.Module], family: str) -> Base:
    names = [key_map(name, parts, DIFFUSION[family]) for name in (*_FORMATS, "norms")]
    return Base(DIFFUSION[family], weight_shapes(parts), names)


@pytest.fixture(scope="module")
def base() -> Base:
    return _base_of(tiny_loaded().parts, "sd1")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, base: Base) -> dict[str, Path]:
    """The same adapter in all spellings."""
    folder = tmp_path_factory.mktemp("files")
    state = AdapterState(random_state(tiny_loaded(), alpha=3.0).modules, _METADATA)
    paths = {}
    for name, names in zip(_FORMATS, base.names[:-1], strict=True):
        paths[name] = folder / (name if name == "peft" else f"{name}.safetensors")
        registry.find("formats", name).write(state, names, paths[name], torch.float32)
    return paths


def only(path: Path, base: Base, app: str) -> AppResult:
    (result,) = verify(match_file(parse_file(path), base), [app])
    return result


def kinds(result: AppResult) -> dict[str, str]:
    return {problem.error: problem.severity for problem in result.problems}


@pytest.mark.parametrize("app", ALL)
def test_what_we_write_is_applied_whole(app: str, files: dict[str, Path], base: Base) -> None:
    result = only(files["kohya"], base, app)
    assert result.problems == ()
    assert result.is_sound
    assert result.num_applied == result.num_modules == len(load_file(files["kohya"])) // 3
    assert result.largest_difference == (pytest.approx(0, abs=1e-3) if app == "a1111" else 0)
    for name in ("diffusers", "peft"):
        result = only(files[name], base, app)
        assert result.is_sound == (app == "diffusers"), (name, result.lines())


def _rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def _without(*ends: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


def _change(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: change(t) if name.endswith(end) else t for name, t in tensors.items()}


def _add(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


def _only(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if any(part in name for part in parts)}


def _dora(axis: int) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        down, up = tensors[f"lora_unet_{_Q}.lora_down.weight"], tensors[f"lora_unet_{_Q}.lora_up.weight"]
        scale = torch.ones(1, down.shape[1]) if axis == 1 else torch.ones(up.shape[0], 1)
        return {**tensors, f"lora_unet_{_Q}.dora_scale": scale}

    return change


def _loha(tensors: Tensors) -> Tensors:
    stem = f"lora_unet_{_Q}"
    factors = {"w1_a": (32, 2), "w1_b": (2, 32), "w2_a": (32, 2), "w2_b": (2, 32)}
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(stem)}
    own = {f"{stem}.hada_{role}": torch.full(shape, 0.1) for role, shape in factors.items()}
    return {**kept, **own, f"{stem}.alpha": torch.tensor(1.0)}


def _uneven_alpha(tensors: Tensors) -> Tensors:
    return {
        name: torch.tensor(2.0) if name.endswith("alpha") and ("to_q" in name or "q_proj" in name) else tensor
        for name, tensor in tensors.items()
    }


def _processor(tensors: Tensors) -> Tensors:
    own = f"lora_unet_{_Q}"
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    return {f"{path}.{role}.weight": tensors[f"{own}.lora_{role}.weight"] for role in ("down", "up")}


def _in_place_of_query(kind: str, shapes: dict[str, tuple[int, ...]]) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if _Q not in name}
        own = {f"lora_unet_{_Q}.{kind}{role}": torch.full(shape, 0.1) for role, shape in shapes.items()}
        return {**kept, **own}

    return change


def _hybrid(tensors: Tensors) -> Tensors:
    return _rename("lora_up", "lora_B")(_rename("lora_down", "lora_A")(tensors))


_LOST, _WRONG, _HIDDEN = "lost", "wrong", "hidden"
_KIND_OF_LYCORIS = {"comfyui": {}, "forge": {}, "a1111": {}}
_MISFITS = {"comfyui": {"shape": _LOST}, "a1111": {"shape": _LOST}, "forge": {"shape": _LOST}}


def _all(kinds: dict[str, str]) -> dict[str, dict[str, str]]:
    return dict.fromkeys(ALL, kinds)


ERRORS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, dict[str, str]]]] = {
    "renamed module": (
        _rename(f"{_Q}.", f"{_Q}x."),
        _all({"unknown": _LOST}),
    ),
    "renamed tensor": (
        _rename(f"{_Q}.lora_up.", f"{_Q}x.lora_up."),
        {"comfyui": {"unknown": _LOST, "no_up": _LOST}, "a1111": {"unknown": _LOST, "no_up": _LOST}}
        | {"kohya": {"unknown": _LOST, "no_up": _LOST}, "diffusers": {"unknown": _LOST, "no_up": _LOST}},
    ),
    "renamed role": (
        _rename(f"{_Q}.lora_up.", f"{_Q}.lora_upp."),
        _all({"stray": _LOST, "no_up": _LOST}),
    ),
    "stray tensor": (_add("noise", torch.ones(1)), {"kohya": {"stray": _LOST}, "diffusers": {"stray": _LOST}}),
    "stray tensor of lora": (_add("lora_x.noise", torch.ones(1)), {"diffusers": {"stray": _LOST}}),
    "all alphas missing": (_without(".alpha"), _all({"alpha missing": _HIDDEN})),
    "alpha of some missing": (
        _without("to_q.alpha"),
        {
            **_all({"alpha missing": _HIDDEN}),
            "diffusers": {"alpha missing": _HIDDEN, "alphas differ": _WRONG},
        },
    ),
    "uneven alphas": (_uneven_alpha, {"comfyui": {}, "kohya": {}, "a1111": {}, "diffusers": {"alphas differ": _WRONG}}),
    "te1 prefix": (
        _rename("lora_te_", "lora_te1_"),
        {"comfyui": {}, "a1111": {}, "diffusers": {}, "kohya": {"spelling": _LOST}},
    ),
    "te2 prefix": (
        _rename("lora_te_", "lora_te2_"),
        {**_all({"unknown": _LOST}), "forge": {"unknown": _LOST, "unmatched": _LOST}},
    ),
    "no text_model": (
        _rename("lora_te_text_model_", "lora_te_"),
        {"comfyui": {"spelling": _LOST}, "a1111": {"spelling": _LOST}, "kohya": {"spelling": _LOST}, "diffusers": {}},
    ),
    "dora along inputs": (
        _dora(1),
        {
            "comfyui": {},
            "forge": {},
            "a1111": {},
            "kohya": {"dora ignored": _WRONG},
            "diffusers": {"dora ignored": _WRONG},
        },
    ),
    "dora along outputs": (
        _dora(0),
        {**_all({"dora axis": _WRONG}), "diffusers": {"dora ignored": _WRONG}, "kohya": {"dora ignored": _WRONG}},
    ),
    "loha": (
        _loha,
        {"comfyui": {}, "forge": {}, "a1111": {}, "kohya": {"kind loha": _LOST}, "diffusers": {"kind loha": _LOST}},
    ),
    "overflow": (
        _change(f"{_Q}.lora_up.weight", lambda tensor: tensor * 1e6),
        {
            "comfyui": {"too large": _WRONG},
            "a1111": {"too large": _WRONG, "float16 overflow": _WRONG},
            "diffusers": {"too large": _WRONG, "float16 overflow": _WRONG},
        },
    ),
    "overflow without effect": (
        lambda tensors: _change(f"{_Q}.lora_up.weight", lambda tensor: tensor * 1e6)(
            _change(f"{_Q}.lora_down.weight", lambda tensor: tensor * 1e-7)(tensors)
        ),
        {"comfyui": {}, "a1111": {"float16 overflow": _WRONG}, "kohya": {"float16 overflow": _WRONG}},
    ),
    "implausible alpha": (
        _change(f"{_Q}.alpha", lambda tensor: tensor * 1e4),
        {app: {"too large": _WRONG} for app in ("comfyui", "forge", "a1111", "kohya")},
    ),
    "nan": (_change(f"{_Q}.lora_up.weight", lambda t: t * math.nan), _all({"not finite": _WRONG})),
    "wrong size": (
        _change(f"{_Q}.lora_down.weight", lambda tensor: tensor[:, :8].contiguous()),
        {**_all({"shape": _LOST}), "forge": {"shape": _WRONG}},
    ),
    "flat 1x1 convolution": (
        _change("proj_in.lora_down.weight", lambda tensor: tensor.flatten(1)),
        {"comfyui": {}, "a1111": {}, "kohya": {"dimensions": _LOST}, "diffusers": {"dimensions": _LOST}},
    ),
    "up alone": (_without(f"{_Q}.lora_down.weight"), _all({"no_down": _LOST})),
    "text encoder without out and mlp": (
        _without(
            *(
                f"{end}.{role}"
                for end in ("out_proj", "fc1", "fc2")
                for role in ("lora_down.weight", "lora_up.weight", "alpha")
            )
        ),
        {"comfyui": {}, "a1111": {}, "kohya": {}, "diffusers": {"text encoder": _LOST}},
    ),
    "hybrid names with dora": (
        lambda tensors: _hybrid(_change(".alpha", lambda tensor: tensor / tensor * 4)(_dora(1)(tensors))),
        {"comfyui": {}, "a1111": {"dora forgotten": _WRONG}, "kohya": {"style": _LOST}, "diffusers": {"style": _LOST}},
    ),
    "unknown ending": (
        _add(f"lora_unet_{_Q}.noise", torch.ones(1)),
        {"comfyui": {"stray": _LOST}, "kohya": {"stray": _LOST}, "diffusers": {"stray": _LOST}},
    ),
    "norm layers": (
        lambda tensors: {
            **tensors,
            **{
                f"lora_unet_{name}.{role}": torch.full((32,), 0.1)
                for name in ("down_blocks_0_resnets_0_norm1", "down_blocks_0_attentions_0_transformer_blocks_0_norm2")
                for role in ("w_norm", "b_norm")
            },
        },
        {**_KIND_OF_LYCORIS, "kohya": {"kind norm": _LOST}, "diffusers": {"kind norm": _LOST}},
    ),
    "half a norm": (
        _add("lora_unet_down_blocks_0_resnets_0_norm1.w_norm", torch.ones(32)),
        {"comfyui": {}, "a1111": {"no_up": _LOST}},
    ),
    "factors of a norm": (
        lambda tensors: {
            **tensors,
            "lora_unet_down_blocks_0_resnets_0_norm1.lora_down.weight": torch.ones(2, 32),
            "lora_unet_down_blocks_0_resnets_0_norm1.lora_up.weight": torch.ones(32, 2),
            "lora_unet_down_blocks_0_resnets_0_norm1.dora_scale": torch.ones(1, 32),
        },
        {"comfyui": {"shape": _LOST}, "kohya": {"shape": _LOST}},
    ),
    "processor names without unet": (
        _processor,
        {"comfyui": {}, "a1111": {"spelling": _LOST}, "kohya": {"spelling": _LOST}, "diffusers": {"spelling": _LOST}},
    ),
    "norm of another size": (
        lambda tensors: {
            **tensors,
            **{f"lora_unet_down_blocks_0_resnets_0_norm1.{role}": torch.ones(31) for role in ("w_norm", "b_norm")},
        },
        _MISFITS,
    ),
    "tucker core of another size": (
        _add("lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight", torch.ones(4, 3, 3, 3)),
        _MISFITS,
    ),
    "lokr of another size": (_in_place_of_query("lokr_", {"w1": (4, 4), "w2": (8, 9)}), _MISFITS),
    "loha core of another size": (
        _in_place_of_query("hada_", {"w1_a": (32, 2), "w1_b": (2, 31), "w2_a": (32, 2), "w2_b": (2, 31)}),
        _MISFITS,
    ),
    "oft of another size": (
        _in_place_of_query("oft_", {"blocks": (4, 4, 4)}),
        {"comfyui": {"shape": _LOST}, "a1111": {"shape": _LOST}},
    ),
    "oft of this size": (
        _in_place_of_query("", {"oft_blocks": (4, 8, 8), "rescale": (32, 1)}),
        {"comfyui": {}, "a1111": {}, "forge": {"kind oft": _LOST}, "diffusers": {"kind oft": _LOST}},
    ),
    "rescale alone": (_in_place_of_query("", {"rescale": (32, 1)}), {"comfyui": {"no_up": _LOST}}),
    "hybrid names": (
        _hybrid,
        {"comfyui": {}, "a1111": {"alpha forgotten": _WRONG}, "kohya": {"style": _LOST}, "diffusers": {"style": _LOST}},
    ),
    "tucker": (
        _add("lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight", torch.ones(4, 4, 3, 3)),
        {"kohya": {"kind tucker": _LOST}, "diffusers": {"kind tucker": _LOST}},
    ),
    "difference of a bias beside lora": (
        _add(f"lora_unet_{_Q.replace('to_q', 'to_out_0')}.diff_b", torch.ones(32)),
        {
            "comfyui": {},
            "forge": {},
            "a1111": {"beside diff_b": _WRONG},
            "kohya": {"beside diff_b": _WRONG},
            "diffusers": {"not converted": _LOST},
        },
    ),
    "difference beside lora": (
        _add(f"lora_unet_{_Q}.diff", torch.ones(32, 32)),
        {"comfyui": {"beside kohya": _WRONG}, "a1111": {"beside diff": _WRONG}, "diffusers": {"not converted": _LOST}},
    ),
    "embedding that comes along": (
        lambda tensors: {**tensors, "bundle_emb.x.clip_l": torch.ones(1, 32), "bundle_emb.x.clip_g": torch.ones(1, 32)},
        {"comfyui": {"embedding": _LOST}, "a1111": {}, "kohya": {"embedding": _LOST}},
    ),
    "shape to fill a weight up to": (
        _add(f"lora_unet_{_Q}.reshape_weight", torch.tensor([32, 32])),
        {"comfyui": {}, "forge": {"beside reshape": _WRONG}, "diffusers": {"not converted": _LOST}},
    ),
    "scale of its own": (
        _add(f"lora_unet_{_Q}.scale", torch.tensor(3.0)),
        {"comfyui": {"beside scale": _WRONG}, "a1111": {"own scale": _WRONG}, "diffusers": {"not converted": _LOST}},
    ),
    "named adapter in peft's names": (
        lambda tensors: {
            f"unet.{name}": t
            for name, t in {
                "conv_in.lora_A.default.weight": torch.full((2, 4, 3, 3), 0.1),
                "conv_in.lora_B.default.weight": torch.ones(32, 2, 1, 1),
            }.items()
        },
        {
            "comfyui": {},
            "a1111": {"spelling": _LOST},
            "kohya": {"spelling": _LOST},
            "diffusers": {"style": _LOST, "no module": _LOST},
        },
    ),
}


@pytest.fixture(params=ERRORS)
def error(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def damaged(error: str, files: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "damaged.safetensors"
    save_file(ERRORS[error][0](load_file(files["kohya"])), path, _METADATA)
    return path


def test_error_is_found_for_each_app(error: str, damaged: Path, base: Base) -> None:
    for app, expected in ERRORS[error][1].items():
        result = only(damaged, base, app)
        assert kinds(result) == expected, (app, result.lines())
        assert result.is_sound == (set(expected.values()) <= {_HIDDEN})
        if any(factor is None for factor in result.factors.values()):
            assert result.largest_difference is None
        elif (
            expected
            not in ({}, {"stray": _LOST}, {"embedding": _LOST}, {"alpha missing": _HIDDEN}, {"too large": _WRONG})
            or result.num_applied == 0
        ):
            assert result.largest_difference > 0.05


def _real_changes(pipeline: Any, path: Path) -> dict[ModuleKey, Tensor] | None:
    """Returns the change of each module that diffusers really makes, or None if it refuses the file."""
    pipeline = copy.deepcopy(pipeline)
    try:
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="x")
    except (ValueError, KeyError, RuntimeError, IndexError):
        return None
    return {
        ModuleKey(part, name): module.get_delta_weight("x").detach()
        for part in ("unet", "text_encoder", "text_encoder_2")
        for name, module in getattr(pipeline, part, torch.nn.Identity()).named_modules()
        # A layer on the meta device was made for the name, but got no numbers.
        if isinstance(module, LoraLayer) and "x" in module.lora_A and not module.lora_A["x"].weight.is_meta
    }


def _assert_diffusers_does_what_the_rules_say(pipeline: Any, path: Path, base: Base) -> None:
    """For every module, what diffusers adds is the factor that the rules tell, times what the file says."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    result, real = only(path, base, "diffusers"), _real_changes(pipeline, path)
    if real is None:
        assert set(result.factors.values()) == {0.0}, result.lines()
        return
    assert result.num_applied or not real
    for module in match_file(parse_file(path), base).modules:
        # Without its magnitude a DoRA is its factors.
        factor = 1.0 if result.factors[module.name] is None else result.factors[module.name]
        if not module.key or not module.is_whole or module.variant != "lora" or not math.isfinite(factor):
            continue
        own = module.scale * (module.roles["up"].float().flatten(1) @ module.roles["down"].float().flatten(1))
        change = real.get(module.key, torch.zeros_like(own)).flatten(1)
        assert torch.allclose(change, factor * own, rtol=1e-4, atol=1e-6), (module.name, factor)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_pipeline()


def test_diffusers_does_what_the_rules_say(damaged: Path, base: Base, pipeline: Any) -> None:
    _assert_diffusers_does_what_the_rules_say(pipeline, damaged, base)


@pytest.mark.parametrize(
    ("kept", "change", "is_told"),
    [
        ("unet|mlp", _rename("", ""), False),
        ("mlp", _rename("", ""), False),
        ("v_proj", _rename("", ""), True),
        ("mlp", lambda tensors: _rename("lora_B", "lora_linear_layer.up")(_rename("lora_A", "lora_linear_layer.down")(tensors)), True),  # noqa: E501
    ],
)  # fmt: skip
def test_attention_tells_diffusers_the_text_encoder(
    kept: str, change: Callable[[Tensors], Tensors], is_told: bool, files: dict[str, Path], base: Base, pipeline: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    path = tmp_path / "some.safetensors"
    tensors = {name: tensor for name, tensor in load_file(files["diffusers"]).items() if re.search(kept, name)}
    save_file(change(tensors), path, _METADATA)
    assert ("text encoder" not in kinds(only(path, base, "diffusers"))) == is_told
    _assert_diffusers_does_what_the_rules_say(pipeline, path, base)


_SDXL_FILES: dict[str, tuple[Callable[[Base, ModuleKey], str], Callable[[ModuleKey], float]]] = {
    "ldm names": (lambda base, key: base.names[0].name(key), lambda key: 1.0),
    "diffusers' names": (lambda base, key: _in_diffusers_blocks(key), lambda key: 1.0),
    "both": (
        lambda base, key: base.names[0].name(key) if "mid" in key.path else _in_diffusers_blocks(key),
        lambda key: 1.0,
    ),
    "uneven alphas": (lambda base, key: base.names[0].name(key), lambda key: 2.0 if "fc1" in key.path else 1.0),
    "te2 without text_model": (
        lambda base, key: base.names[0].name(key).replace("te2_text_model", "te2"),
        lambda key: 1.0,
    ),
}


@pytest.mark.parametrize("kind", _SDXL_FILES)
def test_diffusers_does_with_sdxl_what_the_rules_say(kind: str, tmp_path: Path, sdxl_pipeline: Any) -> None:
    parts = {name: getattr(sdxl_pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    base = _base_of(parts, "sdxl")
    usual = re.compile(r".*(attn[12]?\.|\.ff\.|proj_in|mlp|conv1|samplers).*")
    keys = [key for key in base.shapes if usual.fullmatch(key.path)]
    spell, alpha = _SDXL_FILES[kind]
    path = _sdxl_file(tmp_path / "a.safetensors", base, lambda key: spell(base, key), tuple(keys), alpha)
    _assert_diffusers_does_what_the_rules_say(sdxl_pipeline, path, base)


@pytest.fixture(scope="module")
def sdxl_pipeline() -> Any:
    return tiny_sdxl_pipeline()


@pytest.fixture(scope="module")
def sdxl() -> Base:
    return _published("sdxl")


def _published(family: str) -> Base:
    architecture = DIFFUSION[family]
    return Base(architecture, published_shapes(architecture), [key_map(name, None, architecture) for name in _FORMATS])


_SDXL_MODULES = (
    ModuleKey("unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"),
    ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.2"),
    ModuleKey("unet", "up_blocks.0.upsamplers.0.conv"),
    *(ModuleKey("text_encoder", f"encoder.layers.0.self_attn.{name}_proj") for name in ("q", "k", "v", "out")),
    *(
        ModuleKey("text_encoder_2", f"text_model.encoder.layers.0.self_attn.{name}_proj")
        for name in ("q", "k", "v", "out")
    ),
)


def _sdxl_file(
    path: Path,
    base: Base,
    spell: Callable[[ModuleKey], str],
    keys: tuple[ModuleKey, ...],
    alpha: Callable[[ModuleKey], float] = lambda key: 1.0,
) -> Path:
    tensors = {}
    for key in keys:
        weight = base.shapes[key]
        tensors[f"{spell(key)}.lora_down.weight"] = torch.ones(1, *weight[1:])
        tensors[f"{spell(key)}.lora_up.weight"] = torch.ones(weight[0], 1, *(1,) * (len(weight) - 2))
        tensors[f"{spell(key)}.alpha"] = torch.tensor(alpha(key))
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"})
    return path


def _in_diffusers_blocks(key: ModuleKey) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}[key.part]
    return prefix + key.path.replace(".", "_")


def test_sdxl_in_our_spelling_is_applied_whole(sdxl: Base, tmp_path: Path) -> None:
    path = _sdxl_file(tmp_path / "a.safetensors", sdxl, sdxl.names[0].name, _SDXL_MODULES)
    assert guess_family(parse_file(path)) == "sdxl"
    for result in verify(match_file(parse_file(path), sdxl)):
        assert (result.problems, result.largest_difference) == ((), 0)


def test_sdxl_in_the_wrong_block_spelling(sdxl: Base, tmp_path: Path) -> None:
    path = _sdxl_file(tmp_path / "a.safetensors", sdxl, _in_diffusers_blocks, _SDXL_MODULES)
    results = {result.app: kinds(result) for result in verify(match_file(parse_file(path), sdxl))}
    assert results == {**_all({}), "a1111": {"missed": _LOST}}
    mixed = _sdxl_file(
        tmp_path / "b.safetensors",
        sdxl,
        lambda key: sdxl.names[0].name(key) if "mid" in key.path else _in_diffusers_blocks(key),
        _SDXL_MODULES,
    )
    assert kinds(only(mixed, sdxl, "diffusers")) == {"two spellings": _LOST}
    sd1 = _published("sd1")
    keys = (ModuleKey("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),)
    ldm = _sdxl_file(
        tmp_path / "c.safetensors", sd1, lambda _: "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", keys
    )
    results = {result.app: kinds(result) for result in verify(match_file(parse_file(ldm), sd1))}
    hidden = {"version": "hidden"}
    assert results["kohya"] == {"spelling": _LOST}
    assert results["diffusers"] == {"spelling": _LOST}
    assert (results["comfyui"], results["forge"], results["a1111"]) == ({}, hidden, hidden)


def test_a1111_wants_all_of_fused_attention(sdxl: Base, tmp_path: Path) -> None:
    keys = tuple(key for key in _SDXL_MODULES if not key.path.endswith("out_proj"))
    path = _sdxl_file(tmp_path / "a.safetensors", sdxl, sdxl.names[0].name, keys)
    result = only(path, sdxl, "a1111")
    (problem,) = result.problems
    assert (problem.error, problem.severity) == ("fused attention", _LOST)
    assert sorted(problem.modules) == sorted(sdxl.names[0].name(key) for key in keys if key.part == "text_encoder_2")
    assert result.num_applied == len(keys) - 3


def test_metadata_decide_where_people_find_a_file(files: dict[str, Path], base: Base, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = load_file(files["kohya"])
    hidden = {
        "version": {"ss_v2": "True"},
        "details": {**_METADATA, "ss_dataset_dirs": "None"},
        "hash": {**_METADATA, "sshs_model_hash": "0"},
    }
    for kind, metadata in hidden.items():
        save_file(tensors, path, metadata)
        for app in ("a1111", "forge"):
            result = only(path, base, app)
            assert kinds(result) == {kind: "hidden"}
            assert result.is_sound
    save_file(tensors, path, {**_METADATA, "ss_tag_frequency": json.dumps({"x" * 2**20: 1})})
    assert kinds(only(path, base, "comfyui")) == {"large header": "hidden"}
    content = path.read_bytes().replace(b'{"', b'{ "', 1)
    length = int.from_bytes(content[:8], "little") + 1
    path.write_bytes(length.to_bytes(8, "little") + content[8:])
    assert kinds(only(path, base, "a1111")) == {"header start": "hidden"}


def test_numbers_too_small_for_float16(files: dict[str, Path], base: Base, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(_change("lora_up.weight", lambda t: 1e-6 * t)(load_file(files["kohya"])), path, _METADATA)
    result = only(path, base, "a1111")
    assert kinds(result) == {"float16 underflow": _WRONG}
    adapter = load_file(path)
    down, up = adapter[f"lora_unet_{_Q}.lora_down.weight"], adapter[f"lora_unet_{_Q}.lora_up.weight"]
    own = up.double() @ down.double()
    moved = (up.half().double() @ down.half().double() - own).norm() / own.norm()
    found = only(path, base, "a1111").largest_difference
    assert moved <= found < 1
    save_file({name: t for name, t in adapter.items() if _Q in name}, path, _METADATA)
    assert only(path, base, "a1111").largest_difference == pytest.approx(float(moved), rel=1e-6)


@pytest.mark.parametrize("name", ["diffusers", "peft"])
def test_rank_other_than_the_record_says(
    name: str, files: dict[str, Path], base: Base, tmp_path: Path, pipeline: Any
) -> None:
    path = tmp_path / "a.safetensors"
    if name == "diffusers":
        tensors, record = load_file(files[name]), {f"unet.{key}": value for key, value in _RANK_5.items()}
        save_file(tensors, path, {"lora_adapter_metadata": json.dumps(record)})
        _assert_diffusers_does_what_the_rules_say(pipeline, path, base)
    else:
        path = Path(shutil.copytree(files[name], tmp_path / "peft"))
        config_path = path / "unet" / "adapter_config.json"
        config_path.write_text(json.dumps({**json.loads(config_path.read_text()), "r": 5}))
        with pytest.raises(RuntimeError, match="size mismatch"):
            PeftModel.from_pretrained(copy.deepcopy(pipeline.unet), path / "unet")
    result = only(path, base, "diffusers")
    assert kinds(result) == {"rank": _LOST}
    assert result.num_applied == 0


_RANK_5 = {"r": 5, "lora_alpha": 5, "target_modules": ".*attn1.to_q"}


def test_truncated_file_and_unknown_app(files: dict[str, Path], base: Base, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(files["kohya"].read_bytes()[:-1])
    with pytest.raises(AdapterFileError, match="is damaged: its header announces"):
        verify(match_file(parse_file(path), base))
    with pytest.raises(ConfigError, match=r'no app \'comfy\' \(did you mean "comfyui"'):
        verify(match_file(parse_file(files["kohya"]), base), ["comfy"])


def test_apps_that_a_written_file_is_meant_for(files: dict[str, Path], base: Base, tmp_path: Path) -> None:
    assert default_apps("kohya", match_file(parse_file(files["kohya"]), base)) == list(ALL)
    assert default_apps("peft", match_file(parse_file(files["peft"]), base)) == ["diffusers"]
    save_file(_loha(load_file(files["kohya"])), tmp_path / "a.safetensors")
    assert default_apps("kohya", match_file(parse_file(tmp_path / "a.safetensors"), base)) == [
        "comfyui",
        "a1111",
        "forge",
    ]


def test_family_is_told_by_content(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    for width, family in ((768, "sd1"), (1024, "sd2"), (2048, "sdxl")):
        save_file({stem: torch.ones(1, width)}, path)
        assert guess_family(parse_file(path)) == family
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1, 1)}, path)
    with pytest.raises(AdapterFileError, match="does not tell which base"):
        guess_family(parse_file(path))
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1, 1)}, path, {"ss_base_model_version": "sd_v2_v"})
    assert guess_family(parse_file(path)) == "sd2"
    save_file({stem: torch.ones(1, 768)}, path, {"modelspec.architecture": "whisper/lora"})
    with pytest.raises(AdapterFileError, match="architecture whisper/lora; rules are known"):
        guess_family(parse_file(path))


_TE1 = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
_QUERY = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.mark.parametrize(
    ("tensors", "version", "family"),
    [
        ({f"{_TE1}.lora_down.weight": (2, 768)}, "sd_v1", "sd1"),
        ({f"{_TE1}.lora_down.weight": (2, 768)}, "", "sdxl"),
        ({f"{_QUERY}.lokr_w1": (32, 32), f"{_QUERY}.lokr_w2": (32, 32)}, "sd_v2_v", "sd2"),
        ({f"{_QUERY}.lora_down.weight": (2, 1024)}, "sd_v1", "sd2"),
        *(({"lora_te_x.lokr_w1": (2, 2)}, version, family)
          for version, family in (("sd_1.5", "sd1"), ("sd_2.1", "sd2"), ("sdxl_1.0", "sdxl"))),
    ],
)  # fmt: skip
def test_sizes_then_metadata_then_names_tell_the_base(
    tensors: dict[str, tuple[int, ...]], version: str, family: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path, {"ss_base_model_version": version})
    assert guess_family(parse_file(path)) == family
