"""The text encoders of Stable Diffusion without transformers; see `_plain`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.families._plain import Network, Recomputable, split_heads, told_sizes

_TOWER_SIZES: Mapping[str, Any] = {
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
_TOWER: Mapping[str, Any] = {"attention_dropout": 0.0, "model_type": "clip_text_model"}
_TOWER_REST = frozenset(
    {"architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_factor", "initializer_range"}
    | {"pad_token_id", "torch_dtype", "transformers_version", "dropout"}
)
"""What changes neither layers nor tensors."""


def text_encoder(config: Mapping[str, Any], *, kind: str) -> nn.Module | None:
    """Returns the text encoder of a config, on the device of the context, or None if it is not plain.

    Args:
        config: of the text encoder.
        kind: CLIPTextModel or CLIPTextModelWithProjection.
    """
    sizes = told_sizes(config, _TOWER, _TOWER_SIZES, _TOWER_REST)
    if sizes is None or sizes.hidden_act not in _ACTIVATIONS:
        return None
    sizes.model_type = "clip_text_model"
    return {"CLIPTextModel": _Tower, "CLIPTextModelWithProjection": _ProjectedTower}[kind](sizes)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": functional.gelu}


class _CausalAttention(nn.Module):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__()
        self.num_heads = sizes.num_attention_heads
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            self.add_module(name, nn.Linear(sizes.hidden_size, sizes.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(made(x), self.num_heads) for made in (self.q_proj, self.k_proj, self.v_proj))
        made = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(made.transpose(1, 2).contiguous().reshape(x.shape))  # type: ignore[no-any-return]


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
    return nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)


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


class _Tower(Network):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__(sizes)
        self.embeddings = _Embeddings(sizes)
        self.encoder = _Encoder(sizes)
        self.final_layer_norm = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.final_layer_norm(self.encoder(self.embeddings(input_ids)))
        places = torch.empty(len(x), dtype=torch.int64, device=x.device), input_ids.int().argmax(dim=-1)
        return x, x[places]


class _ProjectedTower(Network):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__(sizes)
        self.text_model = _Tower(sizes)
        self.text_projection = nn.Linear(sizes.hidden_size, sizes.projection_dim, bias=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        states, summary = self.text_model(input_ids)
        return self.text_projection(summary), states
