from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_diffusion.core.errors import ModelError
from lora_diffusion.families.sd1 import FAMILY, SD1Options
from tests.families.ldm import save_single_file, sd1_shaped_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return sd1_shaped_pipeline()


@pytest.fixture(scope="module")
def checkpoint(pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_single_file(pipeline, tmp_path_factory.mktemp("ldm") / "model.safetensors")


def test_weights_and_configs_are_those_of_the_pipeline(pipeline, checkpoint: Path) -> None:
    loaded = FAMILY.load(SD1Options(path=str(checkpoint)), torch.device("cpu"))
    for name in ("unet", "text_encoder"):
        expected = getattr(pipeline, name).state_dict()
        got = loaded.parts[name].state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    expected = pipeline.vae.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.modules["vae"].state_dict().items())
    assert loaded.parts["unet"].config.attention_head_dim == 8
    assert loaded.info.resolution == 512
    assert loaded.info.size_step == 64


def test_tokenizer_is_that_of_clip(checkpoint: Path) -> None:
    import open_clip

    loaded = FAMILY.load(SD1Options(path=str(checkpoint)), torch.device("cpu"))
    prompts = ["a photo of an astronaut, riding a horse!", "naïve café 12345", "don't"]
    ids = loaded.modules["tokenizer"](prompts, padding="max_length", max_length=77).input_ids
    expected = open_clip.get_tokenizer("ViT-L-14")(prompts)
    for got, want in zip(ids, expected.tolist(), strict=True):
        end = want.index(49407)
        assert got[: end + 1] == want[: end + 1]


def test_skeleton_needs_no_weights(checkpoint: Path) -> None:
    skeleton = FAMILY.skeleton(SD1Options(path=str(checkpoint)))
    assert {p.device.type for part in skeleton.values() for p in part.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_x.lora_down.weight", "LoRA adapter, not a base"),
        ("conditioner.embedders.0.x", "Stable Diffusion XL"),
        ("something.else", "holds no unet, vae"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=message):
        FAMILY.check(SD1Options(path=str(path)))


def test_truncated_and_pickled_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"cut.safetensors is not a whole"):
        FAMILY.check(SD1Options(path=str(cut)))
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"take the \.safetensors version"):
        FAMILY.check(SD1Options(path=str(pickled)))
