"""Bases in 8 and 4 bits: what is stored how, what PEFT makes of it, and the same laws as on plain bases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_diffusion import quantize
from lora_diffusion.adapters import variants
from lora_diffusion.adapters.inject import inject
from lora_diffusion.adapters.merge import merge, unmerge
from lora_diffusion.adapters.plan import plan
from lora_diffusion.adapters.switch import PeftSwitch
from lora_diffusion.config.schema import AdapterConfig
from lora_diffusion.core import registry
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import Batch, ImageText, Request
from tests.tiny import save_tiny_pipeline, save_tiny_sd2_pipeline, save_tiny_sdxl_pipeline

CPU = torch.device("cpu")
SAVERS = {"sd1": save_tiny_pipeline, "sd2": save_tiny_sd2_pipeline, "sdxl": save_tiny_sdxl_pipeline}
LAYERS = {"8bit": {nn.Linear: "Linear8bitLt"}, "nf4": {nn.Linear: "Linear4bit", nn.Conv2d: "Conv2d4bit"}}
PLAIN = {"8bit": {"Conv2d"}, "nf4": {"Conv2d", "Linear"}}
PEFT_LAYERS = {name: name for name in ("Linear8bitLt", "Linear4bit", "Conv2d", "Linear")} | {"Conv2d4bit": "Conv2d"}
# Mean difference of a loss against fp32, relative: 8 bits round to 1/127, 4 bits to about 9 % of a weight's size.
CLOSE = {"8bit": 0.01, "nf4": 0.1}

pytestmark = [
    pytest.mark.parametrize("family", SAVERS),
    pytest.mark.parametrize("kind", ["8bit", "nf4"]),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name) / "base") for name, save in SAVERS.items()}


@pytest.fixture
def load(family: str, folders: dict[str, Path]) -> Any:
    found = registry.find("families", family)

    def loaded(kind: str = "none", **options: Any) -> Loaded:
        return found.load(found.options_type(path=str(folders[family]), quantization=kind, **options), CPU)

    return loaded


def batch(family: str, loaded: Loaded) -> Batch:
    generator = torch.Generator().manual_seed(0)
    samples = [
        ImageText(
            key,
            Path(key),
            captions=(f"a {key}",),
            size=(16, 16),
            original_size=(32, 32),
            pixels=torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1,
        )
        for key in ("cat", "dog")
    ]
    found = registry.find("families", family)
    return found.collate(found.prepare(loaded, samples, frozenset(found.parts)))


def inject_all(family: str, loaded: Loaded, variant: str = "lora", seed: int | None = None) -> dict[str, Any]:
    """Adds an adapter to every linear layer and convolution that a group names, with random factors if seeded."""
    found = registry.find("families", family)
    parts = tuple(found.parts)
    targets = ("attn", "ff", "unet/proj", "unet/conv")
    config = AdapterConfig(rank=2, parts=parts, targets=targets, variant=variant)
    made = plan(found.meta_modules(loaded.options), found.parts, config)
    params = inject(loaded, made, variants.find(variant, loaded.options.quantization), 0.0, 0)
    generator = torch.Generator().manual_seed(seed or 0)
    for parameter in [value for own in params.values() for value in own.values()] if seed is not None else ():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return params


def losses(family: str, loaded: Loaded, inputs: Batch) -> torch.Tensor:
    return (
        registry.find("families", family)
        .loss(loaded, registry.find("families", family).draw(loaded, inputs, derive(0, "loss")))
        .per_sample
    )


def test_only_what_should_be_is_quantized(load: Any, family: str, kind: str) -> None:
    plain, loaded = load(), load(kind)
    for part, network in loaded.parts.items():
        for path, module in plain.parts[part].named_modules():
            stored = network.get_submodule(path)
            is_kept = any(word in path for word in ("time_emb", "add_emb", "conv_in", "conv_out", "text_projection"))
            last_block = f"up_blocks.{len(network.up_blocks) - 1}." if part == "unet" else None
            is_kept |= isinstance(module, nn.Conv2d) and bool(last_block) and path.startswith(last_block)
            is_kept |= kind == "nf4" and part != "unet" and "encoder.layers.0." in path
            expected = LAYERS[kind].get(type(module), type(module).__name__)
            assert type(stored).__name__ == (type(module).__name__ if is_kept else expected), path
            if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.Embedding):
                assert stored.weight.dtype == torch.float32
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert {network.training for network in loaded.parts.values()} == {False}


def test_peft_chooses_its_quantized_layers(load: Any, family: str, kind: str) -> None:
    loaded = load(kind)
    inject_all(family, loaded)
    assert isinstance(loaded.adapters, PeftSwitch)
    found = {(type(layer.get_base_layer()).__name__, type(layer).__name__) for _, layer in loaded.adapters.layers()}
    assert found == {(base, layer) for base, layer in PEFT_LAYERS.items() if base in {own for own, _ in found}}
    assert {base for base, _ in found} == {*LAYERS[kind].values(), *PLAIN[kind]}
    for part, network in loaded.parts.items():
        assert any(LAYERS[kind][nn.Linear] == type(module).__name__ for module in network.modules()), part


def test_bytes_are_those_of_the_estimate(load: Any, family: str, kind: str) -> None:
    plain, loaded = load(), load(kind)
    for part, network in loaded.parts.items():
        held = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(network))
        assert held == quantize.weight_bytes(plain.parts[part], kind, torch.float32)
        assert held < 0.9 * quantize.weight_bytes(plain.parts[part], "none", torch.float32)


def _tensors(network: nn.Module) -> Iterator[torch.Tensor]:
    yield from network.parameters()
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if (scales := getattr(weight, "SCB", None)) is not None:
            yield scales
        if (state := getattr(weight, "quant_state", None)) is not None:
            yield from (state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)


def test_loss_is_near_that_of_the_plain_base(load: Any, family: str, kind: str) -> None:
    plain, loaded = load(), load(kind)
    inputs = batch(family, plain)
    expected, own = losses(family, plain, inputs), losses(family, loaded, inputs)
    assert torch.isfinite(own).all()
    assert ((own - expected).abs() / expected).max() < CLOSE[kind]


def test_only_adapters_get_gradients_and_a_zero_adapter_changes_nothing(load: Any, family: str, kind: str) -> None:
    loaded = load(kind)
    inputs = batch(family, loaded)
    before = losses(family, loaded, inputs)
    params = inject_all(family, loaded)
    torch.testing.assert_close(losses(family, loaded, inputs), before, rtol=1e-5, atol=1e-6)
    for own in params.values():
        for path, parameter in own.items():
            if path.endswith(".up"):
                parameter.data.fill_(0.01)
    losses(family, loaded, inputs).sum().backward()
    moved = {id(p) for network in loaded.parts.values() for p in network.parameters() if p.grad is not None}
    trained = {id(parameter) for own in params.values() for parameter in own.values()}
    assert moved <= trained
    assert len(moved) > 0.9 * len(trained)


@pytest.mark.parametrize("variant", ["lora", "dora", "dora_out"])
def test_merged_is_unmerged(load: Any, family: str, kind: str, variant: str) -> None:
    loaded = load(kind)
    inputs = batch(family, loaded)
    inject_all(family, loaded, variant, seed=1)
    assert loaded.adapters is not None
    with torch.no_grad():
        apart = losses(family, loaded, inputs)
        bases = [layer.get_base_layer() for _, layer in loaded.adapters.layers()]
        merge(loaded, {"default": 1.0})
        assert {type(layer.get_base_layer()) for _, layer in loaded.adapters.layers()} == {nn.Linear, nn.Conv2d}
        # Products of 8-bit weights round their inputs too, those of the upcast copy do not.
        torch.testing.assert_close(losses(family, loaded, inputs), apart, rtol=CLOSE["8bit"], atol=1e-4)
        unmerge(loaded)
        assert [layer.get_base_layer() for _, layer in loaded.adapters.layers()] == bases
        assert torch.equal(losses(family, loaded, inputs), apart)


@pytest.mark.parametrize("dtype", ["bf16"])
def test_narrow_numbers_work_too(load: Any, family: str, kind: str, dtype: str) -> None:
    loaded = load(kind, dtype=dtype)
    inject_all(family, loaded, seed=1)
    inputs = batch(family, loaded)
    value = losses(family, loaded, inputs)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    norms = {
        parameter.dtype
        for module in loaded.parts["unet"].modules()
        if isinstance(module, nn.GroupNorm)
        for parameter in module.parameters()
    }
    assert norms == {torch.bfloat16}


def test_images_are_drawn(load: Any, family: str, kind: str) -> None:
    request = Request("a cat", 1, num_steps=2)
    found = registry.find("families", family)
    (own,), (plain,) = (found.generate(base, [request]) for base in (load(kind), load()))
    difference = np.abs(np.asarray(own.image).astype(int) - np.asarray(plain.image).astype(int))
    assert 0 < difference.mean() < 20


def test_device_without_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch, family: str, kind: str, folders: dict[str, Path]
) -> None:
    monkeypatch.setattr(quantize, "pick_device", lambda: torch.device("mps"))
    found = registry.find("families", family)
    with pytest.raises(UnsupportedError, match=rf"{kind} cannot run on the device mps.*set model.quantization=none"):
        found.check(found.options_type(path=str(folders[family]), quantization=kind))
