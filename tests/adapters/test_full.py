"""Parts that are trained in full: the same as training the weights themselves, in a file that is a lora."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_diffusion.adapters import merge, variants
from lora_diffusion.adapters.inject import inject
from lora_diffusion.adapters.plan import InjectionPlan, plan
from lora_diffusion.adapters.state import load_state, read_state
from lora_diffusion.algebra.delta import delta_weight
from lora_diffusion.config.schema import AdapterConfig
from lora_diffusion.core import registry
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.tensorfile.arrays import in_float32
from tests.tiny_adapters import PARTS, answers, key_map, tiny_loaded

_BOTH = ("unet", "text_encoder")


def _plan(loaded: Loaded, **settings: object) -> InjectionPlan:
    config = AdapterConfig(rank=2, parts=_BOTH, full=("text_encoder",), **settings)  # type: ignore[arg-type]
    return plan(loaded.parts, PARTS, config)


def _trained(loaded: Loaded, **settings: object) -> dict[str, dict[str, torch.nn.Parameter]]:
    return inject(loaded, _plan(loaded, **settings), variants.find("lora"), 0.0, 0)


def _read(loaded: Loaded) -> torch.Tensor:
    return loaded.parts["text_encoder"](torch.arange(14).reshape(2, 7)).last_hidden_state.square().mean()


def test_every_weight_of_the_part_is_trained_and_nothing_else_of_it() -> None:
    loaded = tiny_loaded()
    weights = {
        path: module.weight.numel()
        for path, module in loaded.parts["text_encoder"].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    injection = _plan(loaded)
    assert {module.path: module.num_parameters for module in injection.of_part("text_encoder")} == weights
    assert all(not module.identity for module in injection.of_part("unet"))
    params = _trained(loaded)["text_encoder"]
    assert {name.rpartition(".")[0]: parameter.numel() for name, parameter in params.items()} == weights


def test_new_adapter_changes_nothing() -> None:
    loaded = tiny_loaded()
    before = answers(loaded)
    _trained(loaded)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(before, answers(loaded), strict=True))


def test_step_is_that_of_the_weights_themselves() -> None:
    loaded, plain = tiny_loaded(), tiny_loaded()
    params = inject(loaded, _plan(loaded), variants.find("lora"), 0.5, 0)["text_encoder"]
    modules = {module.path: module for module in _plan(plain).of_part("text_encoder")}
    weights = {path: plain.parts["text_encoder"].get_submodule(path).weight.requires_grad_() for path in modules}
    _read(loaded).backward()
    _read(plain).backward()
    for path, module in modules.items():
        name = "up" if module.identity == "down" else "down"
        gradient = params[f"{path}.{name}"].grad
        assert gradient is not None
        torch.testing.assert_close(gradient.reshape(module.shape), weights[path].grad, rtol=1e-3, atol=1e-5)
        change = torch.randn(module.shape, generator=torch.Generator().manual_seed(1))
        params[f"{path}.{name}"].data = change.reshape(params[f"{path}.{name}"].shape)
        state = read_state(loaded)
        assert torch.equal(delta_weight(state.modules[module.key]), change)


def test_file_is_a_lora_that_gives_the_same(tmp_path: Path) -> None:
    loaded, fresh = tiny_loaded(), tiny_loaded()
    for each in _trained(loaded).values():
        for parameter in each.values():
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    fresh_names, format_ = key_map("kohya", fresh), registry.find("formats", "kohya")
    path = write_verified(read_state(loaded), fresh_names, format_, tmp_path / "a.safetensors", torch.float32)
    load_state(fresh, in_float32(format_.read(parse_file(path), fresh_names)), "again")
    for one, other in zip(answers(loaded), answers(fresh), strict=True):
        torch.testing.assert_close(one, other)
    apart = answers(loaded)
    merge.merge(loaded, {"default": 1.0})
    for one, other in zip(apart, answers(loaded), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ("unet",)}, "adapter.full asks for text_encoder, which is not trained"),
        ({"variant": "dora"}, "use one of locon, lora, rslora"),
    ],
)
def test_refused(settings: dict[str, object], message: str) -> None:
    loaded = tiny_loaded()
    config = AdapterConfig(**{"rank": 2, "parts": _BOTH, "full": ("text_encoder",), **settings})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        plan(loaded.parts, PARTS, config)
