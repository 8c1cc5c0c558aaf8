"""Ranks and alphas of single modules: who gets which, and what has no use is refused."""

from __future__ import annotations

import json

import pytest
from torch import nn

from lora_diffusion.adapters.plan import InjectionPlan, plan
from lora_diffusion.config.schema import AdapterConfig
from lora_diffusion.core.errors import ConfigError, TargetError
from tests.tiny_adapters import PARTS, tiny_loaded

_MID = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return tiny_loaded().parts


def _config(variant: str = "lora", **values: object) -> AdapterConfig:
    usual = {"rank": 4, "parts": ("unet", "text_encoder"), "targets": ("attn", "ff", "unet/conv")}
    return AdapterConfig(variant, **{**usual, **values})  # type: ignore[arg-type]


def _sizes(made: InjectionPlan) -> dict[str, tuple[int, float]]:
    """Returns rank and alpha of some modules of every layer type."""
    paths = {
        "to_q": f"unet/{_MID}.attn1.to_q",
        "to_k": f"unet/{_MID}.attn2.to_k",
        "ff": f"unet/{_MID}.ff.net.2",
        "conv": "unet/mid_block.resnets.0.conv1",
        "q_proj": "text_encoder/encoder.layers.0.self_attn.q_proj",
        "fc1": "text_encoder/encoder.layers.1.mlp.fc1",
    }
    sizes = {f"{module.part}/{module.path}": (module.rank, module.alpha) for module in made.modules}
    return {name: sizes[path] for name, path in paths.items()}


def test_every_form_of_target_and_the_last_match_counts(networks: dict[str, nn.Module]) -> None:
    ranks = ("attn=8", f"unet/{_MID}.ff.net.2=6", "text_encoder/attn=2", r"re:.*attn2\.to_(k|v)=3", "conv=5")
    injection = plan(networks, PARTS, _config(module_ranks=ranks))
    assert {name: rank for name, (rank, _) in _sizes(injection).items()} == {
        "to_q": 8,
        "to_k": 3,
        "ff": 6,
        "conv": 5,
        "q_proj": 2,
        "fc1": 4,
    }
    # Only the one module is named by its path; its siblings keep adapter.rank.
    assert {module.rank for module in injection.modules if ".ff." in module.path} == {4, 6}
    for module in injection.modules:
        assert module.tensors["down"][0] == module.tensors["up"][1] == module.rank


@pytest.mark.parametrize(("variant", "power"), [("lora", 1.0), ("rslora", 0.5)])
def test_rank_keeps_the_scale_and_alpha_sets_it(networks: dict[str, nn.Module], variant: str, power: float) -> None:
    config = _config(
        variant, alpha=2.0, module_ranks=("attn=8", "re:.*fc1=2"), module_alphas=("text_encoder/attn=6", "unet/ff=1")
    )
    scales = {name: alpha / rank for name, (rank, alpha) in _sizes(plan(networks, PARTS, config)).items()}
    usual = 2 / 4**power
    assert scales == pytest.approx(
        {
            "to_q": usual,
            "to_k": usual,
            "ff": 1 / 4**power,
            "conv": usual,
            "q_proj": 6 / 8**power,
            "fc1": usual,
        }
    )


def test_single_modules_come_before_convolutions_and_all_else(networks: dict[str, nn.Module]) -> None:
    settings = {"alpha": 2.0, "conv_rank": 8, "conv_alpha": 2.0}
    path = "mid_block.resnets.0.conv1"
    by_rank = _sizes(plan(networks, PARTS, _config(**settings, module_ranks=(f"{path}=16",))))
    assert (by_rank["conv"], by_rank["to_q"]) == ((16, 4.0), (4, 2.0))
    by_alpha = _sizes(plan(networks, PARTS, _config(**settings, module_alphas=(f"{path}=1",))))
    assert (by_alpha["conv"], by_alpha["to_q"]) == ((8, 1.0), (4, 2.0))


def test_alpha_stays_what_it_was_to_the_last_bit(networks: dict[str, nn.Module]) -> None:
    injection = plan(networks, PARTS, _config(rank=3, alpha=0.1, module_ranks=("attn=3",)))
    assert {module.alpha for module in injection.modules} == {0.1}


@pytest.mark.parametrize("variant", ["lora", "rslora", "locon", "dora", "dora_out", "loha", "lokr"])
def test_all_variants_take_them(networks: dict[str, nn.Module], variant: str) -> None:
    injection = plan(
        networks, PARTS, _config(variant, module_ranks=("text_encoder/attn=2",), module_alphas=("attn=1",))
    )
    assert _sizes(injection)["q_proj"][0] == 2
    assert _sizes(injection)["to_q"][0] == _sizes(injection)["fc1"][0] == 4


def test_learning_rates_reach_every_trained_module(networks: dict[str, nn.Module]) -> None:
    """Parts in full have no rank, but they learn."""
    injection = plan(networks, PARTS, _full(), ("attn=1e-3", "text_encoder/ff=2e-3", "re:.*to_k=3e-3"))
    rates = {f"{key.part}/{key.path}": rate for key, rate in injection.module_rates().items()}
    assert set(rates.values()) == {1e-3, 2e-3, 3e-3}
    assert rates[f"unet/{_MID}.attn2.to_k"] == 3e-3
    assert rates["text_encoder/encoder.layers.0.self_attn.q_proj"] == 1e-3
    assert f"unet/{_MID}.ff.net.2" not in rates
    assert InjectionPlan.from_json(json.loads(json.dumps(injection.to_json()))) == injection
    assert [line.endswith("learning rate 0.003") for line in injection.module_lines()].count(True) == 8
    with pytest.raises(TargetError, match=r'train.module_learning_rates: "conv_in" matches no trained module of unet'):
        plan(networks, PARTS, _config(), ("conv_in=1e-3",))
    with pytest.raises(TargetError, match=r'train.module_learning_rates: "unet/ff=0.001" acts on no module'):
        plan(networks, PARTS, _config(), ("unet/ff=1e-3", "ff=2e-3"))


def _full(**values: object) -> AdapterConfig:
    return _config(full=("text_encoder",), **values)


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        (_config(module_ranks=("atn=8",)), TargetError, '"atn" matches no trained module of unet, text_encoder (did'),
        (_config(module_alphas=("atn=8",)), TargetError, 'adapter.module_alphas: "atn" matches no'),
        (_config(module_alphas=("atn=8",)), TargetError, '(did you mean "attn"?)'),
        (_config(targets=("attn",), module_ranks=("unet/ff=8",)), TargetError, "Use a group (attn), the path"),
        (_config(module_ranks=(f"{_MID}.attn1.to_qq=8",)), TargetError, f'did you mean "{_MID}.attn1.to_q"'),
        (_config(module_ranks=("re:((=8",)), TargetError, 'module_ranks: "re:((" is not a regular expression'),
        (
            _config(parts=("unet",), module_ranks=("text_encoder/attn=8",)),
            TargetError,
            "add text_encoder to adapter.pa",
        ),
        (_config(module_ranks=("vae/attn=8",)), TargetError, 'part "vae", which the base does not have'),
        (_config(module_ranks=("unet/attn=8", "attn=4")), TargetError, '"unet/attn=8" acts on no module, since the'),
        (_config(module_ranks=("attn=8", "attn=8")), TargetError, '"attn=8" acts on no module'),
        (_config(module_ranks=("re:.*to_q=8", "unet/attn=4")), TargetError, "Drop it, or move it down."),
        (_config(module_ranks=("attn",)), ConfigError, "'attn' must be TARGET=VALUE, the value a whole"),
        (_config(module_ranks=("attn=33",)), ConfigError, 'adapter.module_ranks: "attn=33" is larger than'),
        (_config(module_ranks=("attn=33",)), ConfigError, "holds rank 32 at most"),
        (_config(conv_rank=2, module_ranks=("conv=3",)), ConfigError, "have their own in adapter.module_ranks; take"),
        (_config(conv_alpha=2.0, module_alphas=("conv=3",)), ConfigError, "adapter.conv_alpha=2 has no module to"),
        (_full(module_ranks=("text_encoder/attn=2",)), TargetError, "which adapter.full trains in full, without"),
        (_full(targets=("text_encoder/attn", "unet/attn")), TargetError, "which adapter.full trains in full, without"),
        (_full(targets=("attn",), module_ranks=("re:.*fc1=2",)), TargetError, "matches no trained module of unet."),
        (_config(parts=("unet",), full=("unet",), module_alphas=("attn=2",)), TargetError, "trains every part in full"),
        (_config("lokr", rank=1000, module_alphas=("attn=2",)), ConfigError, '"attn=2" does nothing, since lokr'),
    ],
)
def test_refusals(networks: dict[str, nn.Module], config: AdapterConfig, error: type[ConfigError], text: str) -> None:
    with pytest.raises(error) as caught:
        plan(networks, PARTS, config)
    assert text in str(caught.value)


def test_rank_of_the_others_is_checked_without_them(networks: dict[str, nn.Module]) -> None:
    """What is too small for adapter.rank can have a rank of its own, and parts in full have none."""
    with pytest.raises(ConfigError, match=r"adapter.rank=33 is larger than .* fits all of them is 32. Lower the rank"):
        plan(networks, PARTS, _config(targets=("attn", "conv"), rank=33, module_ranks=("unet/conv=2",)))
    settings = {"parts": ("unet",), "targets": ("conv_out", "mid_block.resnets.0.conv1"), "rank": 5}
    injection = plan(networks, PARTS, _config(**settings, module_ranks=("conv_out=4",)))
    assert {module.path: module.rank for module in injection.modules} == {"conv_out": 4, "mid_block.resnets.0.conv1": 5}
