from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lora_diffusion.core.types import Batch, ImageText, LossOutput, Prepared
from lora_diffusion.training.picture_losses import measure, usual_losses, with_one_caption, without_caption


def samples(num: int) -> list[ImageText]:
    return [ImageText(f"{i}.png", Path(f"{i}.png"), captions=(f"a cat {i}", "more")) for i in range(num)]


def prepared(num: int, gain: float) -> list[Prepared]:
    """Items whose loss is (1 + index) * level, less what the caption gains."""
    return [Prepared(f"{i}.png", {"own": torch.tensor([1.0 + i - gain])}, "8x8") for i in range(num)]


def collate(items: Sequence[Prepared]) -> Batch:
    return Batch(tuple(item.key for item in items), {"own": torch.stack([item.tensors["own"] for item in items])})


def losses(batch: Batch, rng: torch.Generator) -> LossOutput:
    levels = torch.rand(len(batch), generator=rng)
    return LossOutput(batch.tensors["own"][:, 0] * (0.01 + levels**4), noise_levels=levels)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_noise_levels_do_not_decide(batch_size: int) -> None:
    items, blanks = prepared(3, 0.0), prepared(3, -0.5)
    found = measure(losses, collate, samples(3), items, blanks, num_draws=400, batch_size=batch_size, seed=0)
    assert [own.loss for own in found] == pytest.approx([0.5, 1.0, 1.5], rel=1e-5)
    assert [own.caption_help for own in found] == pytest.approx([0.25] * 3, rel=1e-5)
    assert [own.caption for own in found] == ["a cat 0", "a cat 1", "a cat 2"]


def test_all_pictures_get_the_same_draws() -> None:
    seen = []

    def spy(batch: Batch, rng: torch.Generator) -> LossOutput:
        seen.append((len(batch), rng.initial_seed()))
        return losses(batch, rng)

    measure(spy, collate, samples(2), prepared(2, 0), prepared(2, 1), num_draws=5, batch_size=2, seed=0)
    assert [size for size, _ in seen] == [2, 2, 1] * 4
    assert seen[:3] == seen[3:6] == seen[6:9]
    assert len({seed for _, seed in seen}) == 3


def test_usual_loss_is_the_mean_at_a_level() -> None:
    values = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    levels = torch.tensor([[0.05, 1.0], [0.1, 0.9]])
    assert torch.equal(usual_losses(values, levels), torch.tensor([[2.0, 20.0], [2.0, 20.0]]))


def test_measured_samples_have_one_caption_and_no_prior() -> None:
    sample = ImageText("0.png", Path("0.png"), captions=("a zwx cat", "zwx"), prior_captions=("a cat", "a house"))
    assert (with_one_caption(sample).captions, with_one_caption(sample).prior_captions) == (("a zwx cat",), ())
    assert (without_caption(sample).captions, without_caption(sample).prior_captions) == (("",), ())
