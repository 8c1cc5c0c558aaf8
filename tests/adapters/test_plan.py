"""Targets are resolved in full, or refused before any weight is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from lora_diffusion.adapters import variants
from lora_diffusion.adapters.plan import InjectionPlan, plan
from lora_diffusion.config.schema import AdapterConfig
from lora_diffusion.core.errors import ConfigError, TargetError, UnsupportedError
from tests.tiny_adapters import PARTS, tiny_loaded

_TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return tiny_loaded().parts


def _config(*targets: str, parts: tuple[str, ...] = ("unet",), rank: int = 4, **values: float) -> AdapterConfig:
    return AdapterConfig(targets=targets, parts=parts, rank=rank, **values)  # type: ignore[arg-type]


def test_group_covers_every_module_of_every_part(networks: dict[str, nn.Module]) -> None:
    injection = plan(networks, PARTS, _config("attn", parts=("unet", "text_encoder")))
    assert len(injection.of_part("unet")) == 4 * 8
    assert len(injection.of_part("text_encoder")) == 2 * 4
    assert {module.alpha for module in injection.modules} == {4.0}


def test_counts_and_shares(networks: dict[str, nn.Module]) -> None:
    injection = plan(networks, PARTS, _config("mid_block.resnets.0.conv1", alpha=1.0))
    module = injection.modules[0]
    assert (module.layer_type, module.shape, module.alpha) == ("conv", (64, 64, 3, 3), 1.0)
    assert module.num_parameters == injection.num_parameters == 4 * (64 * 9 + 64)
    size = sum(parameter.numel() for parameter in networks["unet"].parameters())
    assert injection.lines() == [f"unet: 1 modules, 2,560 trained parameters ({256000 / size:.2f} % of {size:,})"]
    assert "rank 4  alpha 1" in injection.module_lines()[0]


def test_works_on_the_meta_device(networks: dict[str, nn.Module]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(networks["unet"].config)
    assert plan({"unet": unet}, PARTS, _config("attn")) == plan(networks, PARTS, _config("attn"))


def test_path_pattern_and_part_prefix(networks: dict[str, nn.Module]) -> None:
    both = ("unet", "text_encoder")
    injection = plan(networks, PARTS, _config(f"unet/{_TO_Q}", "text_encoder/re:.*fc1", parts=both))
    assert [module.path for module in injection.modules] == [
        _TO_Q,
        "encoder.layers.0.mlp.fc1",
        "encoder.layers.1.mlp.fc1",
    ]


def test_pattern_must_match_the_whole_path(networks: dict[str, nn.Module]) -> None:
    with pytest.raises(TargetError, match="matches no module"):
        plan(networks, PARTS, _config("re:to_q"))


def test_json_gives_the_plan_back(networks: dict[str, nn.Module]) -> None:
    injection = plan(networks, PARTS, _config("attn", "conv"))
    assert InjectionPlan.from_json(json.loads(json.dumps(injection.to_json()))) == injection


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        (_config("attn", "atn"), TargetError, '"atn" matches no module of unet (did you mean "attn"?)'),
        (_config(_TO_Q.replace("to_q", "to_qq")), TargetError, _TO_Q),
        (_config("attn", parts=("unet", "text_encodr")), ConfigError, 'did you mean "text_encoder"'),
        (_config("unet/attn", parts=("unet", "text_encoder")), TargetError, "asks for text_encoder, but"),
        (_config("text_encoder/attn"), TargetError, "add text_encoder to adapter.parts"),
        (_config("vae/attn"), TargetError, 'part "vae", which the base does not have'),
        (_config("re:(("), TargetError, "not a regular expression"),
        (_config(r"re:.*attn1\.to_qq"), TargetError, r'(did you mean "re:.*attn1\.to_q"'),
        (_config("re:to_q"), TargetError, '(did you mean "re:.*to_q"?)'),
        (_config("re:(?i)to_q"), TargetError, "matches no module of unet. Use a group"),
        (_config("re:.*norm1"), TargetError, "a GroupNorm"),
        (_config("mid_block.attentions.0"), TargetError, "a Transformer2DModel"),
        (_config("attn", rank=0), ConfigError, "adapter.rank=0"),
        (_config("conv", "conv_in", rank=33), ConfigError, "largest rank that fits all of them is 32"),
        (_config("attn", alpha=0.0), ConfigError, "adapter.alpha=0"),
        (_config("attn", dropout=1.0), ConfigError, "adapter.dropout=1"),
        (_config("attn", parts=()), ConfigError, "adapter.parts is empty"),
    ],
)
def test_refusals(networks: dict[str, nn.Module], config: AdapterConfig, error: type[ConfigError], text: str) -> None:
    with pytest.raises(error) as caught:
        plan(networks, PARTS, config)
    assert text in str(caught.value)


def test_module_that_is_too_small_is_named(networks: dict[str, nn.Module]) -> None:
    with pytest.raises(ConfigError, match="unet/conv_out holds rank 4 at most"):
        plan(networks, PARTS, _config("conv_out", rank=5))


def test_unknown_variant_and_combination() -> None:
    with pytest.raises(ConfigError, match='did you mean "lora"'):
        variants.find("lorra")
    with pytest.raises(
        UnsupportedError, match=r"adapter.variant=lora cannot train on a int3 base; set .*=none or 8bit or nf4"
    ):
        variants.find("lora", "int3")


def test_variants_and_formats_do_not_import_torch() -> None:
    names = "adapters.variants adapters.plan formats formats.kohya formats.diffusers formats.peft formats.metadata"
    imports = "; ".join(f"import lora_diffusion.{name}" for name in names.split())
    code = f"{imports}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
