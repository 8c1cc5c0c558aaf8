"""The loss of models that write: cross-entropy of the tokens that they should, and what it takes in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from lora_diffusion.families.language.loading import IGNORED


def loss(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy over the labels of each sample, [batch] float32.

    Args:
        hidden: [batch, tokens, width], the last states of the model.
        head: gives the logits; only of tokens that are asked for, which saves most of the memory.
        labels: [batch, tokens], what each state should foretell, -100 where it is not asked.
    """
    labels = labels.to(hidden.device)
    is_asked = labels != IGNORED
    each = cross_entropy(head(hidden[is_asked]).float(), labels[is_asked], reduction="none")
    sums = each.new_zeros(len(labels)).index_add(0, is_asked.nonzero()[:, 0], each)
    return sums / is_asked.sum(dim=1)


class Head(nn.Module):
    """What the same takes, on the meta device: the layer that gives the logits, and the cross-entropy of all tokens."""

    def __init__(self, vocabulary: int, width: int, *, is_tied: bool) -> None:
        """Makes the layer; `is_tied` if its weight is that of the embedding, and in memory already."""
        super().__init__()
        weight = torch.empty(vocabulary, width, device="meta")
        if is_tied:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        """Returns the cross-entropy of each token; `hidden` is [tokens, width]."""
        logits = linear(hidden, self.weight).float()
        return (cross_entropy(logits, torch.zeros_like(hidden[:, 0], dtype=torch.int64), reduction="none"),)
