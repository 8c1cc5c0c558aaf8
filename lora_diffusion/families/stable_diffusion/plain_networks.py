"""Networks as torch alone gives them, to look at and for a step on fake tensors.

diffusers and transformers take seconds to import. What is asked before a base is loaded, its layers and what a step
needs of memory, needs neither: plain networks have the layers of theirs in the same order under the same names, and
make the same tensors. They are never given weights. A config that asks for more is the libraries' own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Recompute = Callable[..., Tensor]
"""(function, its arguments) -> its answer, whose insides are computed again in the backward pass."""


def known_sizes(
    config: Mapping[str, Any], needed: Mapping[str, Any], sizes: Mapping[str, Any], rest: frozenset[str]
) -> SimpleNamespace | None:
    """Returns the sizes that a config gives, or None where it gives what is not known here."""
    given = {key: value for key, value in config.items() if not key.startswith("_") and key not in rest}
    is_known = all(key in sizes or (key in needed and value == needed[key]) for key, value in given.items())
    return SimpleNamespace(**{**sizes, **{key: given[key] for key in sizes if key in given}}) if is_known else None


def each_level(value: Any, sizes: SimpleNamespace) -> Sequence[Any]:
    """Returns a value for each level."""
    return value if isinstance(value, list | tuple) else [value] * len(sizes.block_out_channels)


class Recomputable(nn.Module):
    """A module whose insides can be computed again in the backward pass."""

    recompute: Recompute | None = None

    def __call__(self, *args: Any) -> Tensor:
        """Answers as the module does."""
        call = super().__call__
        answer: Tensor = self.recompute(call, *args) if self.recompute and torch.is_grad_enabled() else call(*args)
        return answer


class Network(nn.Module):
    """What diffusers and transformers offer on their networks, as far as it is asked for here."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config

    def enable_gradient_checkpointing(self, recompute: Recompute) -> None:
        """Lets each block be computed again in the backward pass."""
        for module in self.modules():
            if isinstance(module, Recomputable):
                module.recompute = recompute


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Turns [batch, length, heads * width] into [batch, heads, length, width]."""
    return x.view(len(x), -1, num_heads, x.shape[-1] // num_heads).transpose(1, 2)


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
    sizes = known_sizes(config, _UNET, _UNET_SIZES, frozenset())
    if sizes is None or not _is_plain_unet(sizes):
        return None
    return _UNet(sizes)


def _is_plain_unet(sizes: SimpleNamespace) -> bool:
    types = {*sizes.down_block_types, *sizes.up_block_types}
    is_one_width = isinstance(sizes.cross_attention_dim, int) and isinstance(sizes.layers_per_block, int)
    return (
        is_one_width
        and types <= {f"{cross}{way}Block2D" for cross in ("CrossAttn", "") for way in ("Down", "Up")}
        and sizes.addition_embed_type in (None, "text_time")
        and all(isinstance(depth, int) for depth in each_level(sizes.transformer_layers_per_block, sizes))
    )


class Resnet(Recomputable):
    """Two convolutions beside a shortcut, told the timestep between them."""

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
        """Takes x [batch, width_in, height, width] and time [batch, time]; gives [batch, width_out, height, width]."""
        h = self.conv1(functional.silu(self.norm1(x)))
        h = h + self.time_emb_proj(functional.silu(time))[:, :, None, None]
        h = self.conv2(functional.silu(self.norm2(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        result: Tensor = (x + h) / 1.0
        return result


class _Attention(nn.Module):
    def __init__(self, width: int, width_of_keys: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width_of_keys, width, bias=False)
        self.to_v = nn.Linear(width_of_keys, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        query, key, value = (split_heads(x, self.num_heads) for x in projected)
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
        make: Callable[[int, int], nn.Module] = nn.Linear if self.is_linear else partial(nn.Conv2d, kernel_size=1)
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
        """Runs a residual block on x [batch, channels, height, width], and its attention where there is one."""
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
    def forward(self, x: Tensor, time: Tensor, text: Tensor, skipped: list[Tensor], others: list[Tensor]) -> Tensor:
        for index in range(len(self.resnets)):
            x = torch.cat([x, skipped[-1 - index]], dim=1)
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

        def attentions(block_type: str, level: int, count: int) -> list[_Transformer]:
            has_any = block_type.startswith("CrossAttn")
            settings = (sizes, widths[level], depths[level], heads[level])
            return [_Transformer(*settings) for _ in range(count if has_any else 0)]

        self.conv_in = nn.Conv2d(sizes.in_channels, widths[0], 3, padding=1)
        self.time_embedding = _Embedding(widths[0], time)
        if sizes.addition_embed_type:
            self.add_embedding = _Embedding(sizes.projection_class_embeddings_input_dim, time)
        last, before, skipped = len(widths) - 1, widths[0], [widths[0]]
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, (block_type, width) in enumerate(zip(sizes.down_block_types, widths, strict=True)):
            resnets = [resnet(width if index else before, width) for index in range(num_layers)]
            sampler = "downsamplers" if level < last else ""
            self.down_blocks.append(_Down(attentions(block_type, level, num_layers), resnets, width, sampler))
            skipped += [width] * (num_layers + bool(sampler))
            before = width
        self.mid_block = _Middle(attentions("CrossAttn", last, 1), [resnet(before, before) for _ in range(2)])
        for block_type, level in zip(sizes.up_block_types, range(last, -1, -1), strict=True):
            resnets = []
            for _ in range(num_layers + 1):
                resnets.append(resnet(before + skipped.pop(), widths[level]))
                before = widths[level]
            block = _Up(attentions(block_type, level, num_layers + 1), resnets, before, "upsamplers" if level else "")
            self.up_blocks.append(block)
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
            added = _waves(sizes.flatten(), self.config.addition_time_embed_dim).reshape(len(text), -1)
            time = time + self.add_embedding(torch.cat([text, added], dim=-1).to(time.dtype))
        x = self.conv_in(sample)
        residuals = [x]
        for block in self.down_blocks:
            x = block(x, time, encoder_hidden_states, residuals)
        x = self.mid_block(x, time, encoder_hidden_states)
        for block in self.up_blocks:
            count = len(block.resnets)  # type: ignore[arg-type]
            skipped, residuals = residuals[-count:], residuals[:-count]
            x = block(x, time, encoder_hidden_states, skipped, residuals)
        return (self.conv_out(functional.silu(self.conv_norm_out(x))),)


_TEXT_SIZES: Mapping[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "projection_dim": 512,
    "vocab_size": 49408,
}
_TEXT: Mapping[str, Any] = {"attention_dropout": 0.0, "model_type": "clip_text_model"}
_TEXT_REST = frozenset(
    {"architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_factor", "initializer_range"}
    | {"pad_token_id", "torch_dtype", "transformers_version", "dropout"}
)
"""What changes neither layers nor tensors."""


def text_encoder(config: Mapping[str, Any], model_class: str) -> nn.Module | None:
    """Returns the text encoder of a config, on the device of the context, or None if it is not plain.

    Args:
        config: of the text encoder.
        model_class: CLIPTextModel or CLIPTextModelWithProjection.
    """
    sizes = known_sizes(config, _TEXT, _TEXT_SIZES, _TEXT_REST)
    if sizes is None or sizes.hidden_act not in _ACTIVATIONS:
        return None
    sizes.model_type = "clip_text_model"
    return {"CLIPTextModel": _TextEncoder, "CLIPTextModelWithProjection": _ProjectedTextEncoder}[model_class](sizes)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": functional.gelu}


class _CausalAttention(nn.Module):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__()
        self.num_heads = sizes.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            nn.Linear(sizes.hidden_size, sizes.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            split_heads(project(x), self.num_heads) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(attended.transpose(1, 2).contiguous().reshape(x.shape))  # type: ignore[no-any-return]


class _Perceptron(nn.Module):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[sizes.hidden_act]
        self.fc1 = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.fc2 = nn.Linear(sizes.intermediate_size, sizes.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))  # type: ignore[no-any-return]


class _EncoderLayer(Recomputable):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__()
        self.self_attn = _CausalAttention(sizes)
        self.layer_norm1 = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)
        self.mlp = _Perceptron(sizes)
        self.layer_norm2 = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


def _embedding(count: int, width: int) -> nn.Embedding:
    # To draw its first values on the meta device torch would import its compiler.
    embedding: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)
    return embedding


class _Embeddings(nn.Module):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__()
        self.token_embedding = _embedding(sizes.vocab_size, sizes.hidden_size)
        self.position_embedding = _embedding(sizes.max_position_embeddings, sizes.hidden_size)
        positions = torch.empty(1, sizes.max_position_embeddings, dtype=torch.int64)
        self.register_buffer("position_ids", positions, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding(self.position_ids[:, : ids.shape[-1]])  # type: ignore[index,no-any-return]


class _Encoder(nn.Module):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_EncoderLayer(sizes) for _ in range(sizes.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _TextEncoder(Network):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__(sizes)
        self.embeddings = _Embeddings(sizes)
        self.encoder = _Encoder(sizes)
        self.final_layer_norm = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.final_layer_norm(self.encoder(self.embeddings(input_ids)))
        places = torch.empty(len(x), dtype=torch.int64, device=x.device), input_ids.int().argmax(dim=-1)
        return x, x[places]


class _ProjectedTextEncoder(Network):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__(sizes)
        self.text_model = _TextEncoder(sizes)
        self.text_projection = nn.Linear(sizes.hidden_size, sizes.projection_dim, bias=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        states, pooled = self.text_model(input_ids)
        return self.text_projection(pooled), states


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
    sizes = known_sizes(config, _VAE, _VAE_SIZES, _VAE_REST)
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
