"""Metadata that A1111, Forge and model sites rely on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from lora_diffusion.architectures import find_modelspec
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.base_model import Architecture
from lora_diffusion.formats.metadata import build, with_base
from lora_diffusion.tensorfile import safetensors_file
from tests.tiny_adapters import key_map, random_state, tiny_loaded

_STATE = AdapterState({ModuleKey("unet", "x"): ModuleAdapter("lora", {"down": torch.ones(4, 2)}, 2.0)})


def _build(**values: object) -> dict[str, str]:
    modelspec = values.get("modelspec", "stable-diffusion-v1")
    defaults = {
        "architecture": find_modelspec(str(modelspec)),
        "modelspec": modelspec,
        "name": "mine",
        "written_at": 0.0,
    }
    return build(_STATE, **{**defaults, "resolution": (512, 768), **values})  # type: ignore[arg-type]


def test_texts() -> None:
    told = _build(trigger="sks", training={"seed": 3, "learning_rate": 1e-4, "dataset_dirs": {"d": {"img_count": 2}}})
    assert told["ss_base_model_version"] == "sd_v1"
    assert told["ss_v2"] == "False"
    assert (told["ss_network_module"], told["ss_network_dim"], told["ss_network_alpha"]) == ("networks.lora", "4", "2")
    assert (told["ss_seed"], told["ss_learning_rate"]) == ("3", "0.0001")
    assert json.loads(told["ss_dataset_dirs"]) == {"d": {"img_count": 2}}
    assert told["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert told["modelspec.resolution"] == "512x768"
    assert told["modelspec.prediction_type"] == told["modelspec.predict_key"] == "epsilon"
    assert told["modelspec.trigger_phrase"] == "sks"
    assert all(isinstance(value, str) for value in told.values())


@pytest.mark.parametrize(
    ("modelspec", "prediction", "version", "is_v2"),
    [
        ("stable-diffusion-v1", "v_prediction", "sd_v1_v", "False"),
        ("stable-diffusion-v2-512", "epsilon", "sd_v2", "True"),
        ("stable-diffusion-v2-768-v", "v_prediction", "sd_v2_v", "True"),
        ("stable-diffusion-xl-v1-base", "epsilon", "sdxl_base_v1-0", "False"),
    ],
)
def test_base_versions(modelspec: str, prediction: str, version: str, is_v2: str) -> None:
    told = _build(modelspec=modelspec, prediction_type=prediction)
    assert (told["ss_base_model_version"], told["ss_v2"]) == (version, is_v2)


def test_none_is_left_out() -> None:
    assert "ss_clip_skip" not in _build(training={"clip_skip": None})


def test_base_of_another_package_is_named_as_its_description_says() -> None:
    other = Architecture(
        name="mine", title="Mine", modelspec={"epsilon": "mine-v1"}, implementation="https://example.org/mine"
    )
    told = _build(architecture=other, modelspec="mine-v1")
    assert told["modelspec.architecture"] == "mine-v1/lora"
    assert told["modelspec.implementation"] == "https://example.org/mine"
    assert "ss_base_model_version" not in told
    assert with_base({"a": "b"}, other) == {"a": "b"}


@pytest.mark.parametrize("rank", [4, 32])
def test_hashes(rank: int, tmp_path: Path) -> None:
    loaded = tiny_loaded()
    # Rank 32 makes a file of more than 1 MiB, so that the legacy hash covers something.
    state = AdapterState(random_state(loaded, rank=rank).modules, {"ss_seed": "1", "modelspec.title": "t"})
    path = tmp_path / "a.safetensors"
    registry.find("formats", "kohya").write(state, key_map("kohya", loaded), path, torch.float32)
    content = path.read_bytes()
    told = safetensors_file.read_header(path).metadata
    start = 8 + int.from_bytes(content[:8], "little")
    assert told["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()

    header = json.loads(content[8:start])
    header["__metadata__"] = {"ss_seed": "1"}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    legacy = (len(text).to_bytes(8, "little") + text + content[start:])[0x100000:0x110000]
    assert told["sshs_legacy_hash"] == hashlib.sha256(legacy).hexdigest()[:8]
    assert (len(legacy) > 0) == (rank == 32)
    assert content[8:10] == b'{"'
