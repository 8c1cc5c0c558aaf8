from __future__ import annotations

import pytest

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.scoring.clip import BUILTIN, DEFAULT, is_encoder_of_base

_VIT_L, _VIT_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_VIT_G = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
@pytest.mark.parametrize(
    ("architecture", "own", "others"),
    [
        ("sd1", [_VIT_L], [_VIT_H, _VIT_G]),
        ("sd2", [_VIT_H], [_VIT_L, _VIT_G]),
        ("sdxl", [_VIT_L, _VIT_G], [_VIT_H]),
    ],
)
def test_a_bases_own_encoder_is_known_by_its_hub_id(
    prefix: str, architecture: str, own: list[str], others: list[str]
) -> None:
    assert all(is_encoder_of_base(prefix + name, DIFFUSION[architecture]) for name in own)
    assert not any(is_encoder_of_base(prefix + name, DIFFUSION[architecture]) for name in (*others, BUILTIN, DEFAULT))


def test_and_by_its_name_in_open_clip() -> None:
    assert is_encoder_of_base("ViT-L-14/openai", DIFFUSION["sd1"])
    assert is_encoder_of_base("ViT-bigG-14/laion2b_s39b_b160k", DIFFUSION["sdxl"])
    assert not is_encoder_of_base("ViT-H-14/laion2b_s32b_b79k", DIFFUSION["sd1"])
