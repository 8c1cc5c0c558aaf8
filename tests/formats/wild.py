"""Adapter files as other programs spell them, written from the rules of the spellings and not from our tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from lora_diffusion.core.adapter_state import AdapterState, ModuleKey

Name = Callable[[ModuleKey], str]
_LDM_LEAVES = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def ldm(path: str, attending_up_blocks: str = "123") -> str:
    """Returns a path of a UNet with two layers in each block in flat LDM names; blocks are counted on from 1 and 0."""
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        number = {"resnets0": 0, "attentions0": 1, "resnets1": 2}[match[1] + match[2]]
        return f"middle_block_{number}_{_LDM_LEAVES.get(match[3], match[3].replace('.', '_'))}"
    if match := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", path):
        return f"input_blocks_{3 + 3 * int(match[1])}_0_op"
    if match := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", path):
        return f"output_blocks_{3 * int(match[1]) + 2}_{2 if match[1] in attending_up_blocks else 1}_conv"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", path)
    assert match, path
    block = 3 * int(match[2]) + int(match[4])
    side = f"input_blocks_{block + 1}" if match[1] == "down" else f"output_blocks_{block}"
    kind = "0" if match[3] == "resnets" else "1"
    return f"{side}_{kind}_{_LDM_LEAVES.get(match[5], match[5].replace('.', '_'))}"


def flat(prefixes: Mapping[str, str], ldm_blocks: str = "", text_model: str = "text_model_") -> Name:
    """Returns kohya's names, the UNet's in the blocks of diffusers or, given the up blocks that attend, of LDM."""

    def name(key: ModuleKey) -> str:
        if key.part == "unet":
            return prefixes["unet"] + (ldm(key.path, ldm_blocks) if ldm_blocks else key.path.replace(".", "_"))
        return prefixes[key.part] + text_model + key.path.removeprefix("text_model.").replace(".", "_")

    return name


def dotted(unet: str = "unet.", text_model: str = "text_model.") -> Name:
    """Returns the names of diffusers."""
    return lambda key: (
        f"{unet}{key.path}" if key.part == "unet" else f"{key.part}.{text_model}{key.path.removeprefix('text_model.')}"
    )


def old_processor(key: ModuleKey) -> str:
    """Returns the names of attention processors of 2023: ...attn1.processor.to_q_lora, and to_out_lora without .0."""
    path = re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".processor.to_\1_lora", key.path)
    return f"unet.{path}" if key.part == "unet" else f"{key.part}.text_model.{key.path.removeprefix('text_model.')}"


def spelled(
    state: AdapterState, name: Name, down: str, up: str, *, with_alpha: bool = True, magnitude: str = ".dora_scale"
) -> dict[str, Tensor]:
    """Returns the tensors of a lora or dora adapter in a file."""
    import torch

    tensors = {}
    for key, adapter in state:
        tensors[name(key) + down] = adapter.tensors["down"].contiguous()
        tensors[name(key) + up] = adapter.tensors["up"].contiguous()
        if "magnitude" in adapter.tensors:
            tensors[name(key) + magnitude] = adapter.tensors["magnitude"].contiguous()
        if with_alpha:
            tensors[name(key) + ".alpha"] = torch.tensor(adapter.alpha)
    return tensors
