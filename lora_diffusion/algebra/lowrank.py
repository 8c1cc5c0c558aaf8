"""Algebra on the two factors of a change of weight, without the dense matrix.

A change M = scale * up @ down of rank r is known by two r x r matrices, the Gram matrices of its factors: with
up^T up = L L^T the singular values of M are those of L^T down, whose Gram matrix is again r x r. All of it is computed
in float64, where a Gram matrix still tells singular values apart that differ by 1e-7 of the largest; that costs
a third of what a QR of both factors does, and a convolution is its flattened matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lora_diffusion.core.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NOISE = 1e-7
"""Singular values below this share of the largest rank-one term are rounding of the float32 factors."""
_EXACT_SIDE = 384
"""Matrices whose smaller side is at most this are decomposed exactly: a sketch would not be faster."""
_OVERSAMPLING = 16
_POWER_ITERATIONS = 3


class Factors(NamedTuple):
    """A change of weight, scale * up @ down."""

    down: Tensor
    """[rank, in] or [rank, in, k, k]."""
    up: Tensor
    """[out, rank] or [out, rank, 1, 1]."""
    scale: float = 1.0
    """Weight * alpha / rank."""

    @property
    def rank(self) -> int:
        """Number of rows of the down matrix."""
        return int(self.down.shape[0])


class Truncated(NamedTuple):
    """The change of a chosen rank that is nearest to a given one."""

    factors: Factors
    """float32, scale 1; each row of down is as long as its column of up."""
    norm: float
    """Frobenius norm of the given change."""
    error: float
    """Frobenius norm of what was cut off."""


class RankRule(Protocol):
    """Decides how many components of a change are kept."""

    @property
    def first_guess(self) -> int:
        """How many components are worth looking for at first."""

    def choose(self, values: Tensor, energy: float) -> int | None:
        """Returns how many of the leading singular values to keep, or None if more must be known.

        Args:
            values: [count], largest first, float64.
            energy: sum of the squares of all singular values, whether known or not.
        """


@dataclass(frozen=True)
class AtRank:
    """Keeps a number of components."""

    rank: int

    @property
    def first_guess(self) -> int:
        """Returns the rank."""
        return self.rank

    def choose(self, values: Tensor, energy: float) -> int | None:
        """Returns the rank, or the number of values [count] if that is less."""
        del energy
        return min(self.rank, len(values))


@dataclass(frozen=True)
class ByEnergy:
    """Keeps as few components as hold a share of the squared norm."""

    share: float
    first_guess: int = 48

    def choose(self, values: Tensor, energy: float) -> int | None:
        """Returns the smallest sufficient number of the values [count], 0 where there is no energy."""
        if energy == 0:
            return 0
        missing = energy * self.share - values.square().cumsum(0)
        # What float64 sums of squares cannot tell from zero must not ask for one more component.
        enough = (missing <= 1e-12 * energy).nonzero()
        return int(enough[0]) + 1 if len(enough) else None


def rank_rule(rank: int | None, energy: float | None) -> RankRule | None:
    """Returns the rule that a rank or a share of the energy asks for; None where neither is given.

    Raises:
        ConfigError: both are given, or one is out of range.
    """
    if rank is not None and energy is not None:
        raise ConfigError(f"--rank {rank} and --energy {energy:g}: give one of the two.")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: must be 1 or greater.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy {energy:g}: must be greater than 0 and at most 1.")
    if rank is not None:
        return AtRank(rank)
    return ByEnergy(energy) if energy is not None else None


def required_rank_rule(rank: int | None, energy: float | None) -> RankRule:
    """Returns the rule as `rank_rule` does.

    Raises:
        ConfigError: neither is given, both are, or one is out of range.
    """
    rule = rank_rule(rank, energy)
    if rule is None:
        raise ConfigError("How much is kept must be given: --rank, or --energy, say 0.95.")
    return rule


def total(terms: Sequence[Factors]) -> Factors:
    """Returns the exact sum of changes: the factors side by side, with scale 1 and the sum of the ranks.

    Args:
        terms: at least one, all of one shape; a 1x1 convolution may come with two or with four dimensions.
    """
    import torch

    most = max(terms, key=lambda term: term.down.dim())
    down = torch.cat([term.down.flatten(1).float() for term in terms])
    up = torch.cat([term.up.flatten(1).float() * term.scale for term in terms], dim=1)
    return Factors(down.reshape(-1, *most.down.shape[1:]), up.reshape(len(up), -1, *most.up.shape[2:]))


def inner(first: Factors, second: Factors) -> float:
    """Returns the Frobenius inner product of two changes, the sum over all weights of their products."""
    rows = first.down.flatten(1).double() @ second.down.flatten(1).double().T
    columns = first.up.flatten(1).double().T @ second.up.flatten(1).double()
    return first.scale * second.scale * float((rows * columns).sum())


def norm(factors: Factors) -> float:
    """Returns the Frobenius norm of a change."""
    down, up = factors.down.flatten(1).double(), factors.up.flatten(1).double()
    square = float(((down @ down.T) * (up.T @ up)).sum())
    return abs(factors.scale) * math.sqrt(max(0.0, square))


def rounding_error(factors: Factors, dtype: torch.dtype) -> float:
    """Returns the Frobenius norm of what a change loses where both of its factors are rounded to a dtype.

    It is that of (up - up') @ down + up' @ (down - down'), in which nothing large cancels. Infinity where the number
    type cannot hold a value.
    """
    down, up = factors.down.flatten(1).double(), factors.up.flatten(1).double()
    near_down, near_up = (tensor.flatten(1).to(dtype).double() for tensor in (factors.down, factors.up))
    lost_down, lost_up = down - near_down, up - near_up
    squares = (down @ down.T) * (lost_up.T @ lost_up) + (lost_down @ lost_down.T) * (near_up.T @ near_up)
    square = float((squares + 2 * (down @ lost_down.T) * (lost_up.T @ near_up)).sum())
    return abs(factors.scale) * math.sqrt(max(0.0, square)) if math.isfinite(square) else math.inf


def spectrum(factors: Factors) -> Tensor:
    """Returns the singular values of a change that are not rounding, largest first, [at most rank] float64."""
    return abs(factors.scale) * _decompose(factors).values


def energy_rank(values: Tensor, share: float) -> int:
    """Returns how many leading singular values [count] hold a share of the sum of their squares; 0 where all are zero.

    >>> import torch
    >>> energy_rank(torch.tensor([3.0, 1.0, 1.0]).double(), 0.8)
    1
    """
    return ByEnergy(share).choose(values, float(values.square().sum())) or 0


def truncate(factors: Factors, rule: RankRule) -> Truncated:
    """Returns the nearest change whose rank a rule chooses (Eckart and Young 1936).

    Components that are rounding are left out, so the rank can be smaller than asked; a zero change has rank 1.
    """
    core = _decompose(factors)
    scale = abs(factors.scale)
    energy = float(core.squares.sum())
    chosen = rule.choose(scale * core.values, scale**2 * energy)
    num_kept = len(core.values) if chosen is None else min(chosen, len(core.values))
    down, up = core.factors(factors, num_kept)
    kept = Factors(
        down.float().reshape(-1, *factors.down.shape[1:]), up.float().reshape(len(up), -1, *factors.up.shape[2:])
    )
    cut = float(core.squares[num_kept:].sum())
    return Truncated(kept, scale * math.sqrt(energy), scale * math.sqrt(cut))


def truncate_dense(change: Tensor, rule: RankRule, rng: torch.Generator) -> Truncated:
    """Returns the nearest change whose rank a rule chooses, from the dense matrix.

    A small matrix is decomposed exactly. Of a large one the leading singular vectors are found by a randomized range
    finder with power iterations (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4), and the error is measured on what
    they leave.

    Args:
        change: [out, in] or [out, in, k, k], float32.
        rule: see `AtRank` and `ByEnergy`.
        rng: CPU generator of the sketch.
    """
    import torch

    matrix = change.flatten(1)
    size = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    smaller, width = min(matrix.shape), rule.first_guess + _OVERSAMPLING
    while True:
        is_whole = smaller <= max(_EXACT_SIDE, 2 * width)
        basis, rows = _orthogonal(matrix) if is_whole else _sketch(matrix, width, rng)
        sketch = Factors(rows, basis)
        if is_whole or rule.choose(spectrum(sketch), size**2) is not None:
            break
        width *= 2
    kept = truncate(sketch, _Within(rule, size**2)).factors
    left = torch.addmm(matrix, kept.up, kept.down, alpha=-1)
    kept = Factors(
        kept.down.reshape(-1, *change.shape[1:]), kept.up.reshape(*kept.up.shape, *(1,) * (change.dim() - 2))
    )
    return Truncated(kept, size, float(torch.linalg.vector_norm(left, dtype=torch.float64)))


@dataclass(frozen=True)
class _Within:
    """A rule that evaluates a sketch by the energy of the whole."""

    rule: RankRule
    energy: float

    @property
    def first_guess(self) -> int:
        return self.rule.first_guess

    def choose(self, values: Tensor, energy: float) -> int | None:
        del energy
        return self.rule.choose(values, self.energy)


def _orthogonal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns all of a matrix as basis [out, k] and rows [k, in], with the identity on its smaller side."""
    import torch

    out, width = matrix.shape
    if out <= width:
        return torch.eye(out), matrix
    return matrix, torch.eye(width)


def _sketch(matrix: Tensor, width: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns an orthonormal basis [out, width] of nearly the leading left space, and the matrix in it [width, in]."""
    import torch

    basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], width, generator=rng)).Q
    for _ in range(_POWER_ITERATIONS):
        rows = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ rows).Q
    return basis, basis.T @ matrix


@dataclass(frozen=True)
class _Core:
    """The singular value decomposition of a change without its scale, in terms of its factors.

    Rank-one terms are first balanced, so that row i of down is as long as column i of up.
    """

    squares: Tensor
    """[rank] squared singular values, largest first, rounding included."""
    values: Tensor
    """Singular values above rounding."""
    vectors: Tensor
    """[rank, rank] their left vectors W in C = root^T @ down = W S V^T."""
    root: Tensor
    """L with L @ L^T = up^T @ up."""
    rows: Tensor
    """down @ down^T."""
    to_down: Tensor
    """[rank, 1] what balances down."""
    to_up: Tensor
    """[rank, 1] what balances up."""

    def factors(self, factors: Factors, num: int) -> tuple[Tensor, Tensor]:
        """Returns down [num, in] and up [out, num] of the leading components, float64, with the scale in both."""
        if num == 0:
            return factors.down[:1].flatten(1).double() * 0, factors.up[:, :1].flatten(1).double() * 0
        # V^T is S^-1 W^T L^T down, and up @ down @ V is up @ rows @ L W S^-1: the inverse of L, which may be singular,
        # is not needed, and V is orthonormal whatever was rounded on the way.
        values, turned = self.values[:num], self.root @ self.vectors[:, :num]
        scale = math.sqrt(abs(factors.scale))
        down = (self.to_down * turned * (scale / values.sqrt())).T @ factors.down.flatten(1).double()
        mixed = self.to_up * (self.rows @ turned) * (math.copysign(scale, factors.scale) / values**1.5)
        return down, factors.up.flatten(1).double() @ mixed


def _decompose(factors: Factors) -> _Core:
    import torch

    down, up = factors.down.flatten(1).double(), factors.up.flatten(1).double()
    rows, columns = down @ down.T, up.T @ up
    down_size, up_size = rows.diagonal().sqrt(), columns.diagonal().sqrt()
    is_used = (down_size * up_size > 0).double()
    to_down = (torch.where(is_used > 0, up_size / down_size, 0.0).sqrt())[:, None]
    to_up = (torch.where(is_used > 0, down_size / up_size, 0.0).sqrt())[:, None]
    rows, columns = to_down * rows * to_down.T, to_up * columns * to_up.T
    root = _root(columns)
    squares, vectors = torch.linalg.eigh(root.T @ rows @ root)
    squares = squares.flip(0).clamp(min=0)
    most = min(len(squares), down.shape[1], up.shape[0])
    values = squares[:most].sqrt()
    values = values[values > _NOISE * (down_size * up_size).max()]
    return _Core(squares, values, vectors.flip(1), root, rows, to_down, to_up)


def _root(gram: Tensor) -> Tensor:
    """Returns L with L @ L^T = gram; the triangular one costs a tenth, but exists for definite matrices only."""
    import torch

    root: Tensor
    root, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        squares, vectors = torch.linalg.eigh(gram)
        root = vectors * squares.clamp(min=0).sqrt()
    return root
