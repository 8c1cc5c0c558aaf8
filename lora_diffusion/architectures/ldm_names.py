"""How the single-file checkpoints of Stable Diffusion name the modules of a base.

A name is that of the weight without ".weight". Two marks say where a module is only a piece of a tensor; what stands
before them is then the whole name:

    ...attn.in_proj_weight#q    the first third of the rows (#k the second, #v the third)
    ...text_projection#t        the tensor is stored transposed
    ...positional_embedding#w   the whole tensor, whose name has no ".weight" behind it

Source: the tables of `scripts/convert_diffusers_to_original_sdxl.py` and `..._stable_diffusion.py` in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from lora_diffusion.architectures.base import TextEncoder
from lora_diffusion.core.adapter_state import ModuleKey

UNET = "model.diffusion_model."
_FIXED = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}
_OPEN_CLIP = {
    "self_attn.q_proj": "attn.in_proj_weight#q",
    "self_attn.k_proj": "attn.in_proj_weight#k",
    "self_attn.v_proj": "attn.in_proj_weight#v",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}
_OPEN_CLIP_ENDS = {
    "text_projection": "text_projection#t",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "positional_embedding#w",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.(.+)")


def unet_names(paths: Collection[str]) -> dict[str, str]:
    """Returns the path in diffusers -> the name below `model.diffusion_model.`, for all modules of one UNet.

    Args:
        paths: linear and convolution layers of a UNet2DConditionModel; together they tell its layers per block.

    >>> paths = [f"down_blocks.0.{layer}.0.proj_in" for layer in ("attentions", "resnets")]
    >>> unet_names([*paths, "down_blocks.0.resnets.1.conv1"])["down_blocks.0.attentions.0.proj_in"]
    'input_blocks.1.1.proj_in'
    """
    indices = re.findall(r"(?m)^down_blocks\.\d+\.resnets\.(\d+)\.", "\n".join(paths))
    num_layers = 1 + max(map(int, indices), default=0)
    attending = {path.split(".")[1] for path in paths if re.match(r"up_blocks\.\d+\.attentions\.", path)}
    return {path: _unet_name(path, num_layers, attending) for path in paths}


def _unet_name(path: str, num_layers: int, attending: Collection[str]) -> str:
    for old, new in _FIXED.items():
        if path == old or path.startswith(f"{old}."):
            return new + _inside(path.removeprefix(old))
    match = _BLOCK.fullmatch(path)
    assert match, f"{path} is no module of a Stable Diffusion UNet"
    side, block, layer, index, rest = match.groups()
    first = int(block) * (num_layers + 1)
    if layer == "downsamplers":
        return f"input_blocks.{first + num_layers + 1}.0.op"
    if layer == "upsamplers":
        return f"output_blocks.{first + num_layers}.{2 if block in attending else 1}.{rest}"
    number = f"input_blocks.{1 + first + int(index)}" if side == "down" else f"output_blocks.{first + int(index)}"
    return f"{number}.0{_inside('.' + rest)}" if layer == "resnets" else f"{number}.1.{rest}"


def _inside(rest: str) -> str:
    return f".{_RESNET[rest[1:]]}" if rest[1:] in _RESNET else rest


def clip_names(prefix: str) -> Callable[[str], str]:
    """Returns the naming of a text encoder that is stored as transformers has it, always with `text_model`."""
    return lambda path: f"{prefix}text_model.{path.removeprefix('text_model.')}"


def open_clip_names(prefix: str) -> Callable[[str], str]:
    """Returns the naming of a text encoder that is stored as open_clip has it, with q, k and v in one tensor.

    >>> open_clip_names("cond_stage_model.model.")("encoder.layers.3.mlp.fc1")
    'cond_stage_model.model.transformer.resblocks.3.mlp.c_fc'
    """

    def name(path: str) -> str:
        end = _OPEN_CLIP_ENDS.get(path.removeprefix("text_model."))
        if end:
            return prefix + end
        match = _LAYER.fullmatch(path)
        assert match, f"{path} is no module of a CLIP text encoder"
        return f"{prefix}transformer.resblocks.{match[1]}.{_OPEN_CLIP[match[2]]}"

    return name


def text_encoder_names(encoder: TextEncoder) -> Callable[[str], str]:
    """Returns path -> name of the modules of a text encoder."""
    return (open_clip_names if encoder.is_open_clip else clip_names)(encoder.ldm_prefix)


def other_names(key: ModuleKey, name: str) -> list[str]:
    """Returns what else single files call a module: UNets alone, CLIP before 2023, and names of diffusers.

    >>> other_names(ModuleKey("unet", "conv_out"), "model.diffusion_model.out.2")
    ['diffusion_model.out.2', 'out.2', 'conv_out', 'unet.conv_out']
    """
    if key.part == "unet":
        bare = name.removeprefix(UNET)
        return [f"diffusion_model.{bare}", bare, key.path, f"unet.{key.path}"]
    return [name.replace(_CLIP, _OLD_CLIP)] if _CLIP in name else []


def checkpoint_name(names: Collection[str]) -> Callable[[str], str]:
    """Returns the function that gives a tensor of a single file the name that most checkpoints give it.

    Args:
        names: all of the file, which tell how its UNet is named.
    """
    prefix = next((prefix for prefix in (UNET, "diffusion_model.") if _any_begin(names, prefix)), "")
    if prefix or _any_begin(names, "input_blocks."):
        unet = {name: UNET + name.removeprefix(prefix) for name in names if name.startswith(prefix or _BARE)}
    else:
        prefix = "unet." if _any_begin(names, "unet.") else ""
        unet_tensors = {name: name.removeprefix(prefix).rpartition(".") for name in names if name.startswith(prefix)}
        paths = {path for path, _, _ in unet_tensors.values() if _OF_DIFFUSERS.fullmatch(path)}
        blocks = unet_names(paths)
        unet = {name: f"{UNET}{blocks[path]}.{end}" for name, (path, _, end) in unet_tensors.items() if path in blocks}
    is_old = not any(_CLIP in name for name in names)
    return lambda name: unet.get(name) or (_OLD_CLIP_NAME.sub(_CLIP, name) if is_old else name)


def _any_begin(names: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


_CLIP, _OLD_CLIP = ".transformer.text_model.", ".transformer."
_OLD_CLIP_NAME = re.compile(r"\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)")
_BARE = ("input_blocks.", "middle_block.", "output_blocks.", "out.", "time_embed.", "label_emb.")
"""How names below `model.diffusion_model.` begin."""
_OF_DIFFUSERS = re.compile(
    r"(down|up)_blocks\.\d+\.(resnets|attentions|(down|up)samplers)\.\d+\..+|mid_block\.(resnets\.[01]|attentions\.0)\..+"
    r"|(time|add)_embedding\.linear_[12]|conv_(in|norm_out|out)"
)
"""Paths of a UNet2DConditionModel."""
