from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from lora_diffusion.config.load import load
from lora_diffusion.core.errors import ConfigError, ModelError
from lora_diffusion.diffusion.noise import Gaussian, Offset
from lora_diffusion.diffusion.prediction import find_prediction
from lora_diffusion.diffusion.schedule import NoiseSchedule
from lora_diffusion.diffusion.timesteps import Stratified
from lora_diffusion.diffusion.weighting import WEIGHTINGS, MinSnr
from lora_diffusion.families.sd1 import SD1Options

SCHEDULER = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULE = NoiseSchedule(SCHEDULER.alphas_cumprod)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noising_and_velocity_are_those_of_diffusers() -> None:
    latents, noise = torch.randn(2, 5, 4, 3, 3, generator=rng()).unbind()
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    expected = SCHEDULER.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(SCHEDULE.add_noise(latents, noise, timesteps), expected)
    velocity = find_prediction("v_prediction").target(SCHEDULE, latents, noise, timesteps)
    torch.testing.assert_close(velocity, SCHEDULER.get_velocity(latents, noise, timesteps))
    assert find_prediction("epsilon").target(SCHEDULE, latents, noise, timesteps) is noise


def test_unknown_prediction_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'sample'.*epsilon, v_prediction"):
        find_prediction("sample")


@pytest.mark.parametrize(("kind", "divisor"), [("epsilon", lambda snr: snr), ("v_prediction", lambda snr: snr + 1)])
def test_min_snr_weight_is_the_formula(kind: str, divisor) -> None:
    snr = SCHEDULE.snr(torch.arange(1000))
    weight = MinSnr(5.0).weights(snr, find_prediction(kind))
    torch.testing.assert_close(weight, torch.minimum(snr, torch.tensor(5.0)) / divisor(snr))
    assert (weight > 0).all()


def test_min_snr_weight_has_its_limit_where_the_snr_is_zero() -> None:
    zero = torch.zeros(1)
    assert MinSnr(5.0).weights(zero, find_prediction("epsilon")).item() == 1
    assert MinSnr(5.0).weights(zero, find_prediction("v_prediction")).item() == 0


def test_uniform_weighting_counts_all_alike() -> None:
    weights = WEIGHTINGS["uniform"]().weights(SCHEDULE.snr(torch.arange(1000)), find_prediction("epsilon"))
    assert torch.equal(weights, torch.ones(1000))


def test_timesteps_are_uniform_and_cover_the_range_in_each_batch() -> None:
    draws = torch.stack([Stratified().draw(8, 1000, rng(seed)) for seed in range(500)])
    assert draws.min() >= 0
    assert draws.max() <= 999
    assert torch.equal((draws.sort(dim=1).values // 125).unique(dim=0), torch.arange(8)[None])
    # The standard error of the mean of 4,000 uniform draws is 4.6.
    assert abs(draws.float().mean() - 499.5) < 20
    assert draws[:, 0].float().std() > 250


def test_noise_offset_shifts_whole_channels() -> None:
    shape = torch.Size((64, 4, 16, 16))
    means = Offset(1.0).draw(shape, rng()).mean(dim=(2, 3))
    assert means.std() == pytest.approx(1.0, abs=0.2)
    assert torch.equal(Gaussian().draw(shape, rng()), torch.randn(shape, generator=rng()))


def test_a_loss_weighting_is_chosen_by_its_name() -> None:
    assert SD1Options(path="x", loss_weighting="min_snr").rows()["weightings"] == ("min_snr", {})
    assert SD1Options(path="x", min_snr_gamma=3.0).rows()["weightings"] == ("min_snr", {"gamma": 3.0})
    assert SD1Options(path="x").rows()["weightings"] == ("uniform", {})
    settings = ["model.path=x", "data.path=x", "output.path=x", "model.min_snr_gamma=5"]
    with pytest.raises(ConfigError, match=r"is not used with model\.loss_weighting=uniform"):
        load(None, [*settings, "model.loss_weighting=uniform"])
    with pytest.raises(ConfigError, match="min_snr, uniform"):
        load(None, [*settings, "model.loss_weighting=max_snr"])
