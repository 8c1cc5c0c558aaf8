"""What keeps the trained look to its trigger words."""

from dataclasses import replace

import pytest
import torch

from lora_diffusion.core.rng import derive
from lora_diffusion.core.types import Batch, Loaded
from tests.families.test_contract import Setup, _set_up


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return _set_up("sd1", tmp_path_factory.mktemp("prior"))


def losses(setup: Setup, batch: Batch, loaded: Loaded, weight: float) -> torch.Tensor:
    loaded.options = replace(loaded.options, prior_weight=weight)
    with torch.no_grad():
        return setup.family.loss(loaded, batch, derive(0, "loss")).per_sample


def test_adapter_that_changes_nothing_pays_nothing(setup: Setup) -> None:
    loaded = setup.family.load(setup.options(), torch.device("cpu"))
    batch = setup.batch(loaded)
    assert batch.tensors["has_prior"].all()
    setup.inject(loaded)
    torch.testing.assert_close(losses(setup, batch, loaded, 1.0), losses(setup, batch, loaded, 0.0))


def test_adapter_pays_for_what_it_changes_without_the_words(setup: Setup) -> None:
    loaded = setup.family.load(setup.options(), torch.device("cpu"))
    batch = setup.batch(loaded)
    setup.inject(loaded, seed=1)
    without, once, thrice = (losses(setup, batch, loaded, weight) for weight in (0.0, 1.0, 3.0))
    assert (once > without).all()
    torch.testing.assert_close(thrice - without, 3 * (once - without), rtol=1e-4, atol=1e-6)
    only_last = torch.tensor([False, False, True])
    some = replace(batch, tensors={**batch.tensors, "has_prior": only_last})
    torch.testing.assert_close(losses(setup, some, loaded, 1.0)[:2], without[:2])
    assert losses(setup, some, loaded, 1.0)[2] > without[2]
