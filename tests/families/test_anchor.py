"""What stands beside the trigger is left to the base, at the noise levels where it is settled."""

from dataclasses import replace

import pytest
import torch

from lora_diffusion.config.load import load
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.protocols.family import step_loss
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import Batch
from lora_diffusion.families.stable_diffusion.training_loss import Kept
from tests.families.test_contract import Setup, _set_up


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return _set_up(request.param, tmp_path_factory.mktemp("anchor"))


def loaded_with(setup: Setup, **options: object) -> Loaded:
    return setup.family.load(replace(setup.options(), **options), torch.device("cpu"))


def losses(setup: Setup, batch: Batch, loaded: Loaded, **options: object) -> torch.Tensor:
    loaded.options = replace(loaded.options, **options)
    with torch.no_grad():
        return step_loss(setup.family, loaded)(batch, derive(0, "loss")).per_sample


def kept(setup: Setup, loaded: Loaded, batch: Batch, draws: int) -> list[Kept]:
    rng = derive(0, "loss")
    return [one for _ in range(draws) for one in setup.family.draw(loaded, batch, rng).kept]


def test_the_base_reads_other_words_than_the_adapter(setup: Setup) -> None:
    loaded = loaded_with(setup, anchor_weight=1.0, anchor_share=1.0)
    batch = setup.batch(loaded, frozenset({"text_encoder"}))
    assert batch.tensors["num_anchors"].all()
    (one,) = kept(setup, loaded, batch, 1)
    ids = [name for name in one.rows if not one.rows[name].is_floating_point()]
    assert ids and all(not torch.equal(one.rows[name], one.base_rows[name]) for name in ids)


@pytest.mark.parametrize(("anchor", "low", "high"), [("content", 0.7, 1.0), ("look", 0.0, 0.7)])
def test_noise_levels_are_those_of_what_is_anchored(setup: Setup, anchor: str, low: float, high: float) -> None:
    loaded = loaded_with(setup, anchor_weight=1.0, anchor=anchor, anchor_from=0.7, anchor_share=1.0)
    levels = torch.cat([one.timesteps for one in kept(setup, loaded, setup.batch(loaded), 100)]) / 1000
    assert low <= levels.min() < low + 0.05 and high - 0.05 < levels.max() < high


def test_shares_are_kept_on_average(setup: Setup) -> None:
    loaded = loaded_with(setup, prior_weight=1.0, prior_share=0.4, anchor_weight=1.0, anchor_share=0.1)
    batch = setup.batch(loaded)
    drawn = [setup.family.draw(loaded, batch, derive(seed, "loss")) for seed in range(400)]
    priors = sum(len(one.indices) for step in drawn for one in step.kept if one.rows is one.base_rows)
    anchors = sum(len(one.indices) for step in drawn for one in step.kept if one.rows is not one.base_rows)
    assert priors / (400 * len(batch)) == pytest.approx(0.4, abs=0.05)
    assert anchors / (400 * len(batch)) == pytest.approx(0.1, abs=0.03)


def test_adapter_pays_for_what_it_changes_beside_the_trigger(setup: Setup) -> None:
    loaded = loaded_with(setup, anchor_weight=1.0)
    batch = setup.batch(loaded)
    setup.inject(loaded, seed=1)
    without, once, thrice = (losses(setup, batch, loaded, anchor_weight=w, anchor_share=1.0) for w in (0.0, 1.0, 3.0))
    assert (once > without).all()
    torch.testing.assert_close(thrice - without, 3 * (once - without), rtol=1e-4, atol=1e-6)


def test_without_a_trigger_nothing_is_drawn_for_it(setup: Setup) -> None:
    loaded = loaded_with(setup, anchor_weight=1.0, prior_weight=1.0, prior_share=0.5)
    batch = setup.batch(loaded)
    none = {name: torch.zeros_like(batch.tensors[name]) for name in ("num_priors", "num_anchors")}
    batch = replace(batch, tensors={**batch.tensors, **none})
    setup.inject(loaded, seed=1)
    plain = losses(setup, batch, loaded, anchor_weight=0.0, prior_weight=0.0, prior_share=None)
    assert torch.equal(losses(setup, batch, loaded, anchor_weight=1.0, prior_weight=1.0, prior_share=0.5), plain)


def test_anchors_are_prepared_only_where_they_count(setup: Setup) -> None:
    options = setup.options()
    assert not setup.batch(loaded_with(setup)).tensors["num_anchors"].any()
    settings = [{}, {"anchor_weight": 1.0}, {"anchor_weight": 0.5}, {"anchor_weight": 1.0, "anchor": "look"}]
    keys = [setup.family.cache_key(replace(options, **one), frozenset()) for one in settings]
    assert keys[1] == keys[2] and len(set(keys)) == 3


@pytest.mark.parametrize(
    ("setting", "weight"),
    [
        ("prior_share=0.5", "prior_weight"),
        ("anchor=look", "anchor_weight"),
        ("anchor_from=0.5", "anchor_weight"),
        ("anchor_share=0.5", "anchor_weight"),
    ],
)
def test_a_setting_without_its_weight_is_an_error(setting: str, weight: str) -> None:
    paths = ["model.path=x", "data.path=x", "output.path=x"]
    with pytest.raises(ConfigError) as caught:
        load(None, [*paths, f"model.{setting}"])
    assert f"model.{setting.split('=')[0]} is not used without model.{weight}" in str(caught.value)
    assert getattr(load(None, [*paths, f"model.{setting}", f"model.{weight}=1"]).model, weight) == 1
