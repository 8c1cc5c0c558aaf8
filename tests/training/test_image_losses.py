from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lora_diffusion.core.base_model import LossOutput
from lora_diffusion.core.samples import Batch, ImageText, Prepared
from lora_diffusion.training.image_losses import (
    Budget,
    budget,
    measure,
    usual_losses,
    with_one_caption,
    without_caption,
)


def samples(num: int) -> list[ImageText]:
    return [ImageText(f"{i}.png", Path(f"{i}.png"), captions=(f"a cat {i}", "more")) for i in range(num)]


def prepared(num: int) -> list[Prepared]:
    """Items whose loss is (1 + index) * level with the first caption, 0.5 more without any, and 9 with the others."""
    return [
        Prepared(f"{i}.png", {"text": torch.tensor([1.0 + i, 9.0]), "text_empty": torch.tensor([1.5 + i])}, "8x8")
        for i in range(num)
    ]


def collate(items: Sequence[Prepared]) -> Batch:
    tensors = {name: torch.stack([item.tensors[name] for item in items]) for name in items[0].tensors}
    tensors["text_empty"] = tensors["text_empty"][:, 0]
    counts = {"num_captions": torch.full((len(items),), 2), "num_priors": torch.full((len(items),), 3)}
    return Batch(tuple(item.key for item in items), {**tensors, **counts})


def losses(batch: Batch, rng: torch.Generator) -> LossOutput:
    levels = torch.rand(len(batch), generator=rng)
    assert not batch.tensors["num_priors"].any()
    values = batch.tensors["text"][torch.arange(len(batch)), batch.tensors["num_captions"] - 1]
    return LossOutput(values * (0.01 + levels**4), noise_levels=levels)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_noise_levels_do_not_decide(batch_size: int) -> None:
    actual = measure(losses, collate, samples(3), prepared(3), num_draws=400, batch_size=batch_size, seed=0)
    assert [each.loss for each in actual] == pytest.approx([0.5, 1.0, 1.5], rel=1e-5)
    assert [each.caption_help for each in actual] == pytest.approx([0.25] * 3, rel=1e-5)
    assert [each.caption for each in actual] == ["a cat 0", "a cat 1", "a cat 2"]


def test_all_images_get_the_same_draws() -> None:
    seen = []

    def spy(batch: Batch, rng: torch.Generator) -> LossOutput:
        seen.append((len(batch), rng.initial_seed()))
        return losses(batch, rng)

    measure(spy, collate, samples(2), prepared(2), num_draws=5, batch_size=2, seed=0)
    assert [size for size, _ in seen] == [2, 2, 1] * 4
    assert seen[:3] == seen[3:6] == seen[6:9]
    assert len({seed for _, seed in seen}) == 3


def test_usual_loss_is_the_mean_at_a_level() -> None:
    values = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    levels = torch.tensor([[0.05, 1.0], [0.1, 0.9]])
    assert torch.equal(usual_losses(values, levels), torch.tensor([[2.0, 20.0], [2.0, 20.0]]))


def test_measured_batches_have_one_caption_and_no_prior() -> None:
    batch = collate(prepared(2))
    for view, first in ((with_one_caption, [1.0, 2.0]), (without_caption, [1.5, 2.5])):
        tensors = view(batch).tensors
        assert tensors["num_captions"].tolist() == [1, 1] and tensors["num_priors"].tolist() == [0, 0]
        assert tensors["text"][:, 0].tolist() == first
    assert batch.tensors["num_captions"].tolist() == [2, 2]


def test_budget_is_3_percent_of_the_passes_of_training() -> None:
    numbers = itertools.product([1, 2, 7, 20, 500, 3000], [100, 133, 134, 300, 1000, 5000, 10**6], [1, 2, 3, 4, 16])
    for num_images, num_passes, batch_size in numbers:
        chosen = budget(num_images, num_passes, batch_size)
        if chosen.num_images:
            assert min(2, num_images) <= chosen.num_images <= min(num_images, 500) and 2 <= chosen.num_draws <= 8
        else:
            assert num_passes < 270
        assert 2 * chosen.num_images * math.ceil(chosen.num_draws / batch_size) <= 0.03 * num_passes
        assert 2 * chosen.num_images * chosen.num_draws <= 0.03 * num_passes * batch_size


def test_fewer_draws_come_before_fewer_images() -> None:
    assert budget(20, 10**4, 4) == Budget(20, 8)
    assert budget(20, 1500, 4) == Budget(20, 4)
    assert budget(20, 1000, 1) == Budget(7, 2)
    assert budget(1, 10**4, 4) == Budget(1, 8)
    assert budget(20, 100, 1) == Budget()
