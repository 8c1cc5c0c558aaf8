"""The layers of Stable Diffusion's VAE without diffusers, for their names; see `_plain`."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from lora_diffusion.families._plain import told_sizes
from lora_diffusion.families._plain_unet import Block, Resnet

_VAE: Mapping[str, Any] = {"act_fn": "silu"}
_VAE_SIZES: Mapping[str, Any] = {
    "block_out_channels": (64,),
    "down_block_types": ("DownEncoderBlock2D",),
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ("UpDecoderBlock2D",),
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_VAE_REST = frozenset({"force_upcast", "latents_mean", "latents_std", "sample_size", "scaling_factor", "shift_factor"})


def vae(config: Mapping[str, Any]) -> nn.Module | None:
    """Returns the layers of the AutoencoderKL of a config, on the device of the context, or None if it is not plain."""
    sizes = told_sizes(config, _VAE, _VAE_SIZES, _VAE_REST)
    if sizes is None or {*sizes.down_block_types, *sizes.up_block_types} - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        return None
    return _VaeLayers(sizes)


class _VaeAttention(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])


class _VaeHalf(nn.Module):
    """Encoder or decoder."""

    def __init__(self, sizes: SimpleNamespace, name: str, num_layers: int, width_in: int, width_out: int) -> None:
        super().__init__()
        groups, is_down = sizes.norm_num_groups, name == "down"
        widths = [*sizes.block_out_channels] if is_down else [*reversed(sizes.block_out_channels)]
        self.conv_in = nn.Conv2d(width_in, widths[0], 3, padding=1)
        blocks, before = nn.ModuleList(), widths[0]
        for level, width in enumerate(widths):
            resnets = [Resnet(before if index == 0 else width, width, None, groups) for index in range(num_layers)]
            blocks.append(Block([], resnets, width, f"{name}samplers" if level < len(widths) - 1 else ""))
            before = width
        self.add_module(f"{name}_blocks", blocks)
        inner = sizes.block_out_channels[-1]
        self.mid_block = nn.Module()
        self.mid_block.resnets = nn.ModuleList(Resnet(inner, inner, None, groups) for _ in range(2))
        if sizes.mid_block_add_attention:
            self.mid_block.attentions = nn.ModuleList([_VaeAttention(inner, groups)])
        self.conv_norm_out = nn.GroupNorm(groups, before)
        self.conv_out = nn.Conv2d(before, width_out, 3, padding=1)


class _VaeLayers(nn.Module):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__()
        latents, num_layers = sizes.latent_channels, sizes.layers_per_block
        self.encoder = _VaeHalf(sizes, "down", num_layers, sizes.in_channels, 2 * latents)
        self.decoder = _VaeHalf(sizes, "up", num_layers + 1, latents, sizes.out_channels)
        if sizes.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        if sizes.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(latents, latents, 1)
