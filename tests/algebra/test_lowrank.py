"""Laws of the algebra on factors, against float64 sums of dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.algebra.lowrank import (
    AtRank,
    ByEnergy,
    Factors,
    energy_rank,
    inner,
    norm,
    rounding_error,
    spectrum,
    total,
    truncate,
    truncate_dense,
)


def dense(factors: Factors) -> Tensor:
    return factors.scale * (factors.up.flatten(1).double() @ factors.down.flatten(1).double())


def random_factors(rng: torch.Generator, out: int, width: int, rank: int, scale: float, kernel: int = 0) -> Factors:
    """Returns factors whose terms differ in length by powers of ten, as trained ones do."""
    sizes = 10 ** torch.empty(rank).uniform_(-2, 2, generator=rng)
    down = torch.randn(rank, width, generator=rng) * sizes[:, None]
    up = torch.randn(out, rank, generator=rng) / sizes
    if kernel:
        return Factors(down.reshape(rank, -1, kernel, kernel), up[:, :, None, None], scale)
    return Factors(down, up, scale)


@st.composite
def sums(draw: st.DrawFn) -> list[Factors]:
    """Several changes of one shape: ranks also above the sides, weights also 0 and negative, repeats, zeros."""
    kernel = draw(st.sampled_from([0, 0, 1, 3]))
    out, width = draw(st.integers(1, 24)), draw(st.integers(1, 24)) * max(1, kernel) ** 2
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weights = st.sampled_from([0.0, 1.0, -1.0, 0.6, -0.25, 3.0])
    terms = [
        random_factors(rng, out, width, draw(st.integers(1, 30)), draw(weights), kernel)
        for _ in range(draw(st.integers(1, 4)))
    ]
    if draw(st.booleans()):
        terms.append(terms[0]._replace(scale=draw(weights)))
    if draw(st.booleans()):
        terms.append(terms[0]._replace(up=torch.zeros_like(terms[0].up)))
    return terms


def size_of(terms: list[Factors]) -> float:
    """Returns what rounding of a sum is measured by: terms may cancel each other."""
    return sum(float(torch.linalg.matrix_norm(dense(term))) for term in terms)


@settings(max_examples=60, deadline=None)
@given(sums())
def test_exact_sum_is_the_dense_sum(terms: list[Factors]) -> None:
    total_factors = total(terms)
    assert total_factors.rank == sum(term.rank for term in terms)
    assert total_factors.down.shape[1:] == terms[0].down.shape[1:]
    assert float((dense(total_factors) - sum(map(dense, terms))).norm()) <= 1e-6 * size_of(terms)


@settings(max_examples=120, deadline=None)
@given(sums(), st.integers(1, 30))
def test_no_change_of_that_rank_is_nearer(terms: list[Factors], rank: int) -> None:
    whole = total(terms)
    reference = dense(whole)
    singular = torch.linalg.svdvals(reference)
    best = float(singular[rank:].norm())
    size = size_of(terms)
    kept, found_norm, error = truncate(whole, AtRank(rank))
    assert kept.rank <= min(rank, *reference.shape)
    assert kept.down.shape[1:] == whole.down.shape[1:]
    assert kept.up.shape == (len(reference), kept.rank, *whole.up.shape[2:])
    measured = float((dense(kept) - reference).norm())
    assert measured == pytest.approx(best, rel=1e-5, abs=1e-5 * size)
    assert error == pytest.approx(measured, rel=1e-5, abs=1e-5 * size)
    assert found_norm == pytest.approx(float(singular.norm()), rel=1e-6, abs=1e-6 * size)


@settings(max_examples=40, deadline=None)
@given(sums(), st.randoms(use_true_random=False))
def test_order_of_the_terms_does_not_matter(terms: list[Factors], random: object) -> None:
    shuffled = list(terms)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    # All components: where two are equally large, either may be cut off.
    first, second = (truncate(total(order), AtRank(200)).factors for order in (terms, shuffled))
    assert float((dense(first) - dense(second)).norm()) <= 1e-6 * size_of(terms)


@settings(max_examples=60, deadline=None)
@given(sums())
def test_spectrum_norm_and_inner_product(terms: list[Factors]) -> None:
    whole, size = total(terms), size_of(terms)
    singular = torch.linalg.svdvals(dense(whole))
    values = spectrum(whole)
    assert len(values) <= len(singular)
    assert (values.diff() <= 0).all()
    assert torch.allclose(values, singular[: len(values)], rtol=1e-6, atol=1e-6 * size)
    assert float(singular[len(values) :].norm()) <= 1e-5 * size
    assert norm(whole) == pytest.approx(float(singular.norm()), abs=1e-6 * size)
    for term in terms:
        expected = float((dense(terms[0]) * dense(term)).sum())
        assert inner(terms[0], term) == pytest.approx(expected, rel=1e-9, abs=1e-9 * size**2)
        assert norm(term) == pytest.approx(float(dense(term).norm()), rel=1e-6, abs=1e-7 * size)


@settings(max_examples=60, deadline=None)
@given(sums(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.sampled_from([1e-6, 1e-3, 1.0]))
def test_rounding_error_is_that_of_the_dense_change(terms: list[Factors], dtype: torch.dtype, size: float) -> None:
    whole = total(terms)
    # The smallest are below what float16 can hold.
    whole = Factors(whole.down * size, whole.up * size, -0.7)
    rounded = whole._replace(down=whole.down.to(dtype), up=whole.up.to(dtype))
    expected = float((dense(whole) - dense(rounded)).norm())
    # Terms that cancel each other cancel in the Gram matrices to half of the digits only.
    noise = 1e-8 * size_of([term._replace(scale=term.scale * size**2) for term in terms])
    assert rounding_error(whole, dtype) == pytest.approx(expected, rel=1e-6, abs=noise)
    if dtype == torch.float32:
        assert rounding_error(whole, dtype) == 0


def test_rounding_error_of_what_a_dtype_cannot_hold() -> None:
    large = Factors(torch.full((1, 3), 1e5), torch.zeros(2, 1))
    assert rounding_error(large, torch.float16) == math.inf
    assert rounding_error(large, torch.bfloat16) == 0


@settings(max_examples=60, deadline=None)
@given(sums(), st.floats(0.05, 1.0))
def test_energy_is_held_by_as_few_components_as_can_be(terms: list[Factors], share: float) -> None:
    whole = total(terms)
    kept, size, error = truncate(whole, ByEnergy(share))
    if size <= 1e-6 * size_of(terms):
        return
    assert error**2 <= (1 - share + 1e-9) * size**2
    squares = torch.linalg.svdvals(dense(whole)).square()
    if kept.rank > 1:
        assert float(squares[: kept.rank - 1].sum()) < (share + 1e-9) * float(squares.sum())


def test_result_is_balanced_and_has_no_empty_components() -> None:
    rng = torch.Generator().manual_seed(0)
    one = random_factors(rng, 20, 30, 6, -0.5)
    kept = truncate(total([one, one, one._replace(scale=2.0)]), AtRank(18)).factors
    assert kept.rank == 6
    assert torch.allclose(kept.down.norm(dim=1), kept.up.norm(dim=0), rtol=1e-5)


def test_what_cancels_leaves_a_zero_of_rank_one() -> None:
    one = random_factors(torch.Generator().manual_seed(0), 20, 30, 6, 0.7)
    for terms in ([one, one._replace(scale=-0.7)], [one._replace(scale=0.0)]):
        kept, _, error = truncate(total(terms), AtRank(4))
        assert kept.rank == 1
        assert error <= 1e-7 * norm(one)
        assert not dense(kept).any()
        assert truncate(total(terms), ByEnergy(0.9)).factors.rank == 1


def test_energy_rank_of_nothing_is_zero() -> None:
    assert energy_rank(torch.zeros(3).double(), 0.9) == 0
    assert energy_rank(torch.tensor([2.0, 1.0, 1.0]).double(), 1.0) == 3


def falling(out: int, width: int, decay: float, seed: int = 0) -> Tensor:
    """Returns a matrix whose singular values fall by a factor."""
    rng = torch.Generator().manual_seed(seed)
    side = min(out, width)
    left = torch.linalg.qr(torch.randn(out, side, generator=rng)).Q
    right = torch.linalg.qr(torch.randn(width, side, generator=rng)).Q
    return (left * decay ** torch.arange(side)) @ right.T


@pytest.mark.parametrize(("out", "width", "kernel"), [(40, 90, 3), (90, 40, 0), (500, 600, 0), (600, 90 * 9, 3)])
@pytest.mark.parametrize("rule", [AtRank(8), ByEnergy(0.95)])
def test_dense_matrix_is_cut_with_nearly_the_least_error(out: int, width: int, kernel: int, rule: AtRank) -> None:
    matrix = falling(out, width, 0.97)
    change = matrix.reshape(out, -1, kernel, kernel) if kernel else matrix
    kept, size, error = truncate_dense(change, rule, torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(matrix.double())
    assert kept.down.shape[1:] == change.shape[1:]
    assert kept.up.shape == (out, kept.rank, *([1, 1] if kernel else []))
    assert kept.rank == (8 if isinstance(rule, AtRank) else energy_rank(singular, 0.95))
    assert size == pytest.approx(float(singular.norm()), rel=1e-6)
    best = float(singular[kept.rank :].norm())
    # Where singular values fall as slowly as here, the sketch stays a little above the best.
    assert best * (1 - 1e-5) <= error <= best * (1 + 5e-4)
    assert error == pytest.approx(float((dense(kept) - matrix.double()).norm()), rel=1e-5)


def test_sketch_grows_until_it_holds_the_energy() -> None:
    matrix = torch.randn(420, 450, generator=torch.Generator().manual_seed(0))
    kept, size, error = truncate_dense(matrix, ByEnergy(0.9, first_guess=4), torch.Generator().manual_seed(0))
    assert math.sqrt(1 - (error / size) ** 2) >= math.sqrt(0.9) - 1e-6
    assert kept.rank < 420


def test_dense_sketch_is_seeded() -> None:
    matrix = falling(500, 500, 0.99)
    first, second = (truncate_dense(matrix, AtRank(4), torch.Generator().manual_seed(3)).factors for _ in range(2))
    assert torch.equal(first.down, second.down)
