"""An adapter as plain data. Importing this file does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class ModuleKey(NamedTuple):
    """Names one module of a base: the part and the dotted path in it, as `named_modules()` gives it."""

    part: str
    path: str


@dataclass(frozen=True)
class ModuleAdapter:
    """The adapter of one module; `algebra.delta` says what it does to the weight."""

    variant: str
    """lora, dora, dora_out, loha, lokr, and of the last two with a magnitude loha+dora, loha+dora_out and so on; full,
    norm, set, ia3, oft, boft or glora."""
    tensors: Mapping[str, Tensor]
    """Two dimensions on a linear layer, four on a convolution where (k, k) stands; the names in brackets may be absent.

    lora        "down" [rank, in, (k, k)], "up" [out, rank, (1, 1)], ("mid" [rank, rank, k, k]: down is then 1x1)
    dora        the same and "magnitude" [1, in, (1, 1)]; dora_out: [out, 1, (1, 1)]
    loha        "w1_a", "w2_a" [out, rank] and "w1_b", "w2_b" [rank, in * k * k];
                with ("t1", "t2" [rank, rank, k, k]) [rank, out] and [rank, in]
    lokr        "w1" or "w1_a" and "w1_b"; "w2" or "w2_a" and "w2_b", ("t2")
    full        ("diff") in the shape of the weight; norm: the same, as LyCORIS writes it of norm layers
    set         "value" that takes the place of the weight
    ia3         "factor" of the inputs or outputs, "on_input" 1 or 0
    oft         "blocks" [number, size, size], ("rescale" [out, 1, (1, 1)]); boft: "blocks" [steps, number, size, size]
    glora       "a1" [in, rank], "a2" [rank, in], "b1" [out, rank], "b2" [rank, in, (k, k)], or as it was before 2024
                "a1" [rank, in], "a2" [in, rank], "b1" [rank, in, (k, k)], "b2" [out, rank]
    any         and ("bias" [out]), the change of the bias, which no alpha scales

    Float32, or numpy arrays of any dtype in what `Format.read` gives.
    """
    alpha: float
    """Of oft and boft the largest norm that the skew-symmetric matrix of a rotation may have, 0 for none. It means
    nothing for full, norm, set and ia3."""

    @property
    def rank(self) -> int:
        """Size between the factors; for lokr between those of its second factor, or of its first, or of neither.

        Of a change without factors the largest rank that it can have, and of rotations the size of a block.
        """
        for name in ("down", "w2_b", "w1_b"):
            if name in self.tensors:
                return int(self.tensors[name].shape[0])
        if "a1" in self.tensors:
            return int(min(self.tensors["a1"].shape[:2]))
        if "blocks" in self.tensors:
            return int(self.tensors["blocks"].shape[-1])
        whole = next(iter(self.tensors[name] for name in ("w2", "diff", "value") if name in self.tensors), None)
        if whole is None:
            return 1
        outputs, *inputs = whole.shape
        return min(outputs, math.prod(inputs))

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with: alpha / rank, and 1 where alpha is no scale."""
        return self.alpha / self.rank if self.has_scale else 1.0

    @property
    def has_scale(self) -> bool:
        """Says whether alpha scales the change, as it does not for lokr with two whole factors."""
        return bool({"down", "w1_b", "w2_b", "a1"} & self.tensors.keys())

    @property
    def needs_base(self) -> bool:
        """Says whether the change depends on the weight of the base."""
        return bool({"magnitude", "value", "factor", "blocks", "a1"} & self.tensors.keys())

    @property
    def changes_weight(self) -> bool:
        """Says whether anything but the bias is changed."""
        return bool(self.tensors.keys() - {"bias"})


@dataclass(frozen=True)
class AdapterState:
    """An adapter as plain data, free of any file's format; its modules may be of different variants."""

    modules: Mapping[ModuleKey, ModuleAdapter]
    metadata: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    """Text embeddings that come along in the file, by name and what they are for, "mychar.clip_l"; as stored. They are
    words for a prompt and change no weight."""

    def parts(self) -> tuple[str, ...]:
        """Returns the part names in the order of first appearance."""
        return tuple(dict.fromkeys(key.part for key in self.modules))

    def __iter__(self) -> Iterator[tuple[ModuleKey, ModuleAdapter]]:
        """Yields (key, adapter) in the order of the state."""
        return iter(self.modules.items())
