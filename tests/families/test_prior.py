"""What keeps the trained look to its trigger words."""

from dataclasses import replace

import pytest
import torch

from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.protocols.family import step_loss
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import Batch
from tests.families.test_contract import Setup, _set_up


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return _set_up("sd1", tmp_path_factory.mktemp("prior"))


def losses(setup: Setup, batch: Batch, loaded: Loaded, weight: float) -> torch.Tensor:
    loaded.options = replace(loaded.options, prior_weight=weight)
    with torch.no_grad():
        return step_loss(setup.family, loaded)(batch, derive(0, "loss")).per_sample


def test_adapter_that_changes_nothing_pays_nothing(setup: Setup) -> None:
    loaded = setup.family.load(replace(setup.options(), prior_weight=1.0), torch.device("cpu"))
    batch = setup.batch(loaded)
    assert batch.tensors["num_priors"].all()
    setup.inject(loaded)
    torch.testing.assert_close(losses(setup, batch, loaded, 1.0), losses(setup, batch, loaded, 0.0))


def test_adapter_pays_for_what_it_changes_without_the_words(setup: Setup) -> None:
    loaded = setup.family.load(replace(setup.options(), prior_weight=1.0), torch.device("cpu"))
    batch = setup.batch(loaded)
    setup.inject(loaded, seed=1)
    without, once, thrice = (losses(setup, batch, loaded, weight) for weight in (0.0, 1.0, 3.0))
    assert (once > without).all()
    torch.testing.assert_close(thrice - without, 3 * (once - without), rtol=1e-4, atol=1e-6)
    only_last = torch.tensor([0, 0, 1]) * batch.tensors["num_priors"]
    some = replace(batch, tensors={**batch.tensors, "num_priors": only_last})
    torch.testing.assert_close(losses(setup, some, loaded, 1.0)[:2], without[:2])
    assert losses(setup, some, loaded, 1.0)[2] > without[2]


def test_other_words_are_drawn_too(setup: Setup) -> None:
    loaded = setup.family.load(replace(setup.options(), prior_weight=1.0), torch.device("cpu"))
    setup.inject(loaded, seed=1)
    batch = setup.batch(loaded)
    only_cut = replace(batch, tensors={**batch.tensors, "num_priors": torch.ones_like(batch.tensors["num_priors"])})
    assert (batch.tensors["num_priors"] > 1).all()
    assert not torch.equal(losses(setup, batch, loaded, 1.0), losses(setup, only_cut, loaded, 1.0))


def test_priors_are_prepared_only_where_they_count(setup: Setup) -> None:
    options = setup.options()
    assert options.prior_weight == 0
    loaded = setup.family.load(options, torch.device("cpu"))
    assert not setup.batch(loaded).tensors["num_priors"].any()
    keys = {setup.family.cache_key(replace(options, prior_weight=w), frozenset()) for w in (0.0, 0.5, 1.0)}
    assert len(keys) == 2
