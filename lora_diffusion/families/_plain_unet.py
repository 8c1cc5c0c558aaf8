"""The UNet of Stable Diffusion without diffusers; see `_plain`."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.families._plain import Network, Recomputable, each_level, split_heads, told_sizes

_UNET: Mapping[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
"""What must be so for a UNet to be plain; what is not named in a config is so."""
_UNET_SIZES: Mapping[str, Any] = {
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "sample_size": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "upcast_attention": False,
    "use_linear_projection": False,
}
"""What a plain UNet can be told, and what diffusers takes if it is not told."""


def unet(config: Mapping[str, Any]) -> nn.Module | None:
    """Returns the UNet2DConditionModel of a config, on the device of the context, or None if it is not plain."""
    sizes = told_sizes(config, _UNET, _UNET_SIZES, frozenset())
    if sizes is None or not _is_plain_unet(sizes):
        return None
    return _UNet(sizes)


def _is_plain_unet(sizes: SimpleNamespace) -> bool:
    kinds = {*sizes.down_block_types, *sizes.up_block_types}
    is_one_width = isinstance(sizes.cross_attention_dim, int) and isinstance(sizes.layers_per_block, int)
    return (
        is_one_width
        and kinds <= {f"{cross}{way}Block2D" for cross in ("CrossAttn", "") for way in ("Down", "Up")}
        and sizes.addition_embed_type in (None, "text_time")
        and all(isinstance(own, int) for own in each_level(sizes.transformer_layers_per_block, sizes))
    )


class Resnet(Recomputable):
    def __init__(self, width_in: int, width_out: int, time: int | None, groups: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        if time:
            self.time_emb_proj = nn.Linear(time, width_out)
        self.norm2 = nn.GroupNorm(groups, width_out, eps)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = h + self.time_emb_proj(functional.silu(time))[:, :, None, None]
        h = self.conv2(functional.silu(self.norm2(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return (x + h) / 1.0


class _Attention(nn.Module):
    def __init__(self, width: int, width_of_keys: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width_of_keys, width, bias=False)
        self.to_v = nn.Linear(width_of_keys, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        made = self.to_q(x), self.to_k(context), self.to_v(context)
        query, key, value = (split_heads(own, self.num_heads) for own in made)
        x = functional.scaled_dot_product_attention(query, key, value)
        return self.to_out[0](x.transpose(1, 2).reshape(len(x), -1, query.shape[1] * query.shape[3])) / 1.0  # type: ignore[no-any-return]


class _Geglu(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * functional.gelu(gate)


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Geglu(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class _TransformerBlock(Recomputable):
    def __init__(self, width: int, width_of_text: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = _Attention(width, width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = _Attention(width, width_of_text, num_heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = _FeedForward(width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = self.attn1(normed, normed) + x
        x = self.attn2(self.norm2(x), text) + x
        return self.ff(self.norm3(x)) + x  # type: ignore[no-any-return]


class _Transformer(nn.Module):
    def __init__(self, sizes: SimpleNamespace, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.is_linear = sizes.use_linear_projection
        make = nn.Linear if self.is_linear else lambda *widths: nn.Conv2d(*widths, 1)
        self.norm = nn.GroupNorm(sizes.norm_num_groups, width, 1e-6)
        self.proj_in = make(width, width)
        blocks = (_TransformerBlock(width, sizes.cross_attention_dim, num_heads) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = make(width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        residual, (batch, width, *size) = x, x.shape
        x = self.norm(x)
        x = x if self.is_linear else self.proj_in(x)
        x = x.permute(0, 2, 3, 1).reshape(batch, -1, width)
        x = self.proj_in(x) if self.is_linear else x
        for block in self.transformer_blocks:
            x = block(x, text)
        x = self.proj_out(x) if self.is_linear else x
        x = x.reshape(batch, *size, width).permute(0, 3, 1, 2).contiguous()
        return (x if self.is_linear else self.proj_out(x)) + residual  # type: ignore[no-any-return]


class _Resample(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    """A level of the UNet on its way down or up, with attention or without."""

    def __init__(self, attentions: list[_Transformer], resnets: list[Resnet], width: int, sampler: str) -> None:
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        if sampler:
            self.add_module(sampler, nn.ModuleList([_Resample(width, 2 if sampler == "downsamplers" else 1)]))

    def layer(self, index: int, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.resnets[index](x, time)
        return self.attentions[index](x, text) if hasattr(self, "attentions") else x


class _Down(Block):
    def forward(self, x: Tensor, time: Tensor, text: Tensor, residuals: list[Tensor]) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.layer(index, x, time, text)
            residuals.append(x)
        for sampler in getattr(self, "downsamplers", ()):
            x = sampler(x)
            residuals.append(x)
        return x


class _Up(Block):
    def forward(self, x: Tensor, time: Tensor, text: Tensor, own: list[Tensor], others: list[Tensor]) -> Tensor:
        for index in range(len(self.resnets)):
            x = torch.cat([x, own[-1 - index]], dim=1)
            x = self.layer(index, x, time, text)
        for sampler in getattr(self, "upsamplers", ()):
            x = sampler(functional.interpolate(x, size=others[-1].shape[2:], mode="nearest"))
        return x


class _Middle(nn.Module):
    def __init__(self, attentions: list[_Transformer], resnets: list[Resnet]) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        first, second = self.resnets
        return second(self.attentions[0](nn.Module.__call__(first, x, time), text), time)  # type: ignore[no-any-return]


class _Embedding(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(functional.silu(self.linear_1(x)))  # type: ignore[no-any-return]


def _waves(values: Tensor, width: int) -> Tensor:
    """Returns what has the shape of the sines and cosines of numbers, [count, width] float32."""
    angles = values[:, None].float() * torch.exp(torch.empty(width // 2, device=values.device))
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class _UNet(Network):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__(sizes)
        widths, num_layers = sizes.block_out_channels, sizes.layers_per_block
        time, groups = 4 * widths[0], sizes.norm_num_groups
        depths = each_level(sizes.transformer_layers_per_block, sizes)
        heads = each_level(sizes.num_attention_heads or sizes.attention_head_dim, sizes)

        def resnet(width_in: int, width_out: int) -> Resnet:
            return Resnet(width_in, width_out, time, groups, sizes.norm_eps)

        def attentions(kind: str, level: int, count: int) -> list[_Transformer]:
            has_any = kind.startswith("CrossAttn")
            own = (sizes, widths[level], depths[level], heads[level])
            return [_Transformer(*own) for _ in range(count if has_any else 0)]

        self.conv_in = nn.Conv2d(sizes.in_channels, widths[0], 3, padding=1)
        self.time_embedding = _Embedding(widths[0], time)
        if sizes.addition_embed_type:
            self.add_embedding = _Embedding(sizes.projection_class_embeddings_input_dim, time)
        last, before, skipped = len(widths) - 1, widths[0], [widths[0]]
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, (kind, width) in enumerate(zip(sizes.down_block_types, widths, strict=True)):
            resnets = [resnet(width if index else before, width) for index in range(num_layers)]
            sampler = "downsamplers" if level < last else ""
            self.down_blocks.append(_Down(attentions(kind, level, num_layers), resnets, width, sampler))
            skipped += [width] * (num_layers + bool(sampler))
            before = width
        self.mid_block = _Middle(attentions("CrossAttn", last, 1), [resnet(before, before) for _ in range(2)])
        for kind, level in zip(sizes.up_block_types, range(last, -1, -1), strict=True):
            resnets = []
            for _ in range(num_layers + 1):
                resnets.append(resnet(before + skipped.pop(), widths[level]))
                before = widths[level]
            made = _Up(attentions(kind, level, num_layers + 1), resnets, before, "upsamplers" if level else "")
            self.up_blocks.append(made)
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], sizes.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], sizes.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor]:
        time = self.time_embedding(_waves(timestep, self.conv_in.out_channels).to(sample.dtype))
        if added_cond_kwargs:
            text, sizes = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
            told = _waves(sizes.flatten(), self.config.addition_time_embed_dim).reshape(len(text), -1)
            time = time + self.add_embedding(torch.cat([text, told], dim=-1).to(time.dtype))
        x = self.conv_in(sample)
        residuals = [x]
        for block in self.down_blocks:
            x = block(x, time, encoder_hidden_states, residuals)
        x = self.mid_block(x, time, encoder_hidden_states)
        for block in self.up_blocks:
            count = len(block.resnets)
            own, residuals = residuals[-count:], residuals[:-count]
            x = block(x, time, encoder_hidden_states, own, residuals)
        return (self.conv_out(functional.silu(self.conv_norm_out(x))),)
