from __future__ import annotations

import json

import pytest

from lora_diffusion.algebra.lowrank import AtRank
from lora_diffusion.compose import record
from lora_diffusion.compose.linear import Term, add
from lora_diffusion.compose.record import Source
from lora_diffusion.core.errors import AdapterFileError
from tests.compose.adapters import lora

BASE = {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_v2": "False"}


def source(name: str, **metadata: str) -> Source:
    fields = {key.replace("__", "."): value for key, value in metadata.items()}
    return Source(name, f"hash of {name}", {"unet": 0.5}, {**BASE, **fields})


@pytest.fixture(scope="module")
def composed():
    return add([Term("a", lora(0, rank=4), {"unet": 1.0, "text_encoder": 1.0})], AtRank(3))


def test_of_several_the_base_is_kept_and_triggers_are_joined(composed) -> None:
    sources = [
        source("a", modelspec__trigger_phrase="zwx", ss_steps="10", ss_clip_skip="1"),
        source("b", modelspec__trigger_phrase="blob style", ss_steps="10", ss_clip_skip="2"),
        source("c", modelspec__trigger_phrase="zwx"),
    ]
    fields = record.metadata(sources, composed, "both", 0)
    assert fields["modelspec.trigger_phrase"] == "zwx, blob style"
    assert fields["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert "ss_steps" not in fields
    assert "ss_clip_skip" not in fields
    assert fields["ss_output_name"] == fields["modelspec.title"] == "both"
    assert fields["modelspec.merged_from"] == "a, b, c"
    assert json.loads(fields["lora_diffusion.made_from"])[1] == {
        "file": "b",
        "sha256": "hash of b",
        "weights": {"unet": 0.5},
    }
    assert float(fields["lora_diffusion.relative_error"]) == pytest.approx(composed.error, rel=1e-5)


def test_one_alone_keeps_what_it_told_but_the_size(composed) -> None:
    fields = record.metadata(
        [source("a", ss_steps="10", ss_network_dim="4", sshs_model_hash="old")], composed, "small", 0
    )
    assert fields["ss_steps"] == "10"
    assert fields["ss_network_dim"] == "3"
    assert "sshs_model_hash" not in fields


def test_another_architecture_is_refused() -> None:
    record.check_one_base([source("a"), Source("b", "", {}, {})])
    with pytest.raises(AdapterFileError) as caught:
        record.check_one_base([source("a"), source("b", modelspec__architecture="stable-diffusion-xl-v1-base/lora")])
    assert caught.value.errors == ("base: sd1 in a, sdxl in b",)


def test_kinds_of_base_are_compared_and_not_words() -> None:
    def fields(name: str, version: str) -> Source:
        return Source(name, "", {}, {"ss_base_model_version": version})

    record.check_one_base([fields("a", "sdxl_base_v1-0"), fields("b", "sdxl_1.0")])
    record.check_one_base([fields("a", "sd_v2_v"), fields("b", "sd_2.1")])
    with pytest.raises(AdapterFileError) as caught:
        record.check_one_base([fields("a", "sd_v2_v"), fields("b", "sd_v2")])
    assert caught.value.errors == ("prediction: v_prediction in a, epsilon in b",)
