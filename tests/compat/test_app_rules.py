"""Our files give the same images in the programs that read them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from lora_diffusion.adapters.state import load_state
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.tensorfile.arrays import in_float32
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import answers, key_map, random_state, tiny_loaded

# float32, a few layers deep; diffusers and PEFT add the change in another order than we do.
_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _expected(state: AdapterState) -> tuple[torch.Tensor, torch.Tensor]:
    loaded = tiny_loaded()
    load_state(loaded, state, "ours")
    return answers(loaded)


def _uneven(state: AdapterState) -> AdapterState:
    """Gives every third module half the rank, every fourth another alpha."""
    modules = {}
    for index, (key, adapter) in enumerate(state):
        rank = 2 if index % 3 == 0 else adapter.rank
        tensors = {"down": adapter.tensors["down"][:rank], "up": adapter.tensors["up"][:, :rank]}
        modules[key] = ModuleAdapter("lora", tensors, 3.0 if index % 4 == 0 else adapter.alpha)
    return AdapterState(modules)


@pytest.mark.parametrize("format_name", ["kohya", "diffusers"])
@pytest.mark.parametrize("uneven", [False, True])
def test_diffusers_loads_every_key(
    format_name: str, uneven: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = tiny_loaded()
    state = random_state(loaded, groups="attn ff conv")
    state = _uneven(state) if uneven else state
    path = tmp_path / "adapter.safetensors"
    write_verified(state, key_map(format_name, loaded), registry.find("formats", format_name), path, torch.float32)

    pipeline = tiny_pipeline()
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
    assert not [record.message for record in caplog.records if record.name.startswith("diffusers")]

    for part in ("unet", "text_encoder"):
        adapted = {name for name, module in getattr(pipeline, part).named_modules() if isinstance(module, LoraLayer)}
        assert adapted == {key.path for key in state.modules if key.part == part}
    loaded.parts.update(unet=pipeline.unet, text_encoder=pipeline.text_encoder)
    for own, other in zip(_expected(state), answers(loaded), strict=True):
        assert torch.allclose(own, other, **_CLOSE)


@pytest.mark.parametrize("format_name", ["kohya", "diffusers"])
def test_diffusers_loads_a_text_encoder_without_attention(format_name: str, tmp_path: Path) -> None:
    loaded = tiny_loaded()
    state = random_state(loaded, groups="ff")
    path = tmp_path / "adapter.safetensors"
    format_ = registry.find("formats", format_name)
    written = in_float32(format_.read(parse_file(write_verified(state, key_map(format_name, loaded), format_, path, torch.float32)), key_map(format_name, loaded)))  # fmt: skip # noqa: E501
    added = [key.path for key in written.modules if key not in state.modules]
    assert len(added) == (4 if format_name == "diffusers" else 0)
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    loaded.parts.update(unet=pipeline.unet, text_encoder=pipeline.text_encoder)
    for own, other in zip(_expected(state), answers(loaded), strict=True):
        assert torch.allclose(own, other, **_CLOSE)


def test_peft_loads_each_part(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    state = _uneven(random_state(loaded))
    registry.find("formats", "peft").write(state, key_map("peft", loaded), tmp_path / "peft", torch.float32)
    for part, network in loaded.parts.items():
        model = PeftModel.from_pretrained(network, tmp_path / "peft" / part)
        loaded.parts[part] = model.get_base_model()
    for own, other in zip(_expected(state), answers(loaded), strict=True):
        assert torch.allclose(own, other, **_CLOSE)


def test_what_diffusers_writes_is_read(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = tiny_pipeline()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]
    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights="gaussian"))
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)

    loaded = tiny_loaded()
    path = tmp_path / "pytorch_lora_weights.safetensors"
    state = in_float32(registry.find("formats", "diffusers").read(parse_file(path), key_map("diffusers", loaded)))
    assert len(state.modules) == 4 * 8 + 4
    expected = answers(_with_unet(pipeline.unet))[0]
    load_state(loaded, state, "theirs")
    assert torch.allclose(answers(loaded)[0], expected, **_CLOSE)


def _with_unet(unet: torch.nn.Module):  # type: ignore[no-untyped-def]
    loaded = tiny_loaded()
    loaded.parts["unet"] = unet
    return loaded
