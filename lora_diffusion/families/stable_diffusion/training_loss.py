"""How the Stable Diffusion families train: prepared tensors, what is drawn from them, and the loss.

Tensors of a prepared item are of two sorts. A view tensor has a row for each view of the image ("moments", and
"time_ids" where the base asks for sizes). A text column NAME has a row for each caption; NAME_empty holds the empty
caption and NAME_prior, where the base is asked for them, the captions that must keep their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_diffusion.core import registry
from lora_diffusion.core.base_model import Loaded, LossOutput
from lora_diffusion.core.samples import Batch, ImageText, Prepared
from lora_diffusion.families.stable_diffusion import sampling
from lora_diffusion.families.stable_diffusion.text_encoding import Condition, Rows

_EMPTY_SHARE_OF_PRIORS, _CUT_SHARE_OF_PRIORS = 0.2, 0.4
"""Of the draws without trigger words: the empty caption, and the own caption cut; the others name other things."""
_VIEWS = ("moments", "time_ids")

Encode = Callable[[Rows], Condition]
"""Turns drawn rows into what the UNet takes besides latents; encodes token ids, with gradient."""


@dataclass(frozen=True)
class Drawn:
    """All that is random of a training step, on the CPU."""

    latents: Tensor
    """[batch, channels, height, width], scaled for the UNet."""
    timesteps: Tensor
    """[batch] int64."""
    noise: Tensor
    """Shaped like the latents."""
    rows: Rows
    """One view and one caption of each sample."""
    prior_indices: Tensor = field(default_factory=lambda: torch.zeros(0).long())
    """[pairs] int64, those samples that are shown a second time, without their trigger words."""
    prior_rows: Rows = field(default_factory=dict)
    """Their view, and the caption of the second time."""


def prepare(
    loaded: Loaded,
    samples: Sequence[ImageText],
    describe: Callable[[Sequence[str]], Mapping[str, Tensor]],
    complete: Callable[[ImageText, Mapping[str, Tensor]], Mapping[str, Tensor]],
    pieces: frozenset[str],
) -> list[Prepared]:
    """Gives latent moments [views, 2 * channels, height, width] and the text columns of every caption.

    Args:
        loaded: its VAE is used.
        samples: with pixels where views are asked for.
        describe: prompts -> text columns with one row for each prompt, on the CPU.
        complete: sample and its tensors -> what the base needs besides.
        pieces: which of the two.
    """
    views = [_moments(loaded, sample) if "views" in pieces else {} for sample in samples]
    texts = _text_columns(loaded, samples, describe) if "texts" in pieces else [{} for _ in samples]
    items = []
    for sample, view, text in zip(samples, views, texts, strict=True):
        tensors = {**view, **text}
        tensors |= complete(sample, tensors)
        items.append(Prepared(sample.key, tensors, f"{sample.size[0]}x{sample.size[1]}", sample.num_repeats))
    return items


def _moments(loaded: Loaded, sample: ImageText) -> dict[str, Tensor]:
    assert sample.pixels is not None, f"{sample.key} has no pixels"
    return {"moments": sampling.encode_moments(loaded.modules["vae"], sample.pixels)}


def _text_columns(
    loaded: Loaded, samples: Sequence[ImageText], describe: Callable[[Sequence[str]], Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    has_priors = loaded.options.prior_weight > 0
    texts = [(*sample.captions, *(sample.prior_captions if has_priors else ())) for sample in samples]
    prompts = list(dict.fromkeys(["", *chain.from_iterable(texts)]))
    columns = describe(prompts)

    def rows(suffix: str, *wanted: str) -> dict[str, Tensor]:
        indices = [prompts.index(prompt) for prompt in wanted]
        return {name + suffix: column[indices] for name, column in columns.items()}

    return [
        rows("", *sample.captions)
        | rows("_empty", "")
        | (rows("_prior", *sample.prior_captions) if has_priors and sample.prior_captions else {})
        for sample in samples
    ]


def collate(items: Sequence[Prepared]) -> Batch:
    """Stacks items; captions and priors are padded with zeros to the largest number of them."""
    columns = _columns(items[0].tensors)
    tensors = {name: torch.stack([item.tensors[name] for item in items]) for name in _VIEWS if name in items[0].tensors}
    tensors["num_captions"] = torch.tensor([len(item.tensors[columns[0]]) for item in items])
    tensors["num_priors"] = torch.tensor([len(item.tensors.get(f"{columns[0]}_prior", ())) for item in items])
    for name in columns:
        empty, prior = f"{name}_empty", f"{name}_prior"
        tensors[name] = pad_sequence([item.tensors[name] for item in items], batch_first=True)
        tensors[empty] = torch.cat([item.tensors[empty] for item in items])
        rows = [item.tensors.get(prior, item.tensors[empty]) for item in items]
        tensors[prior] = pad_sequence(rows, batch_first=True)
    return Batch(tuple(item.key for item in items), tensors)


def draw(loaded: Loaded, batch: Batch, rng: torch.Generator) -> Drawn:
    """Draws a view, latents, timestep, noise and caption of each sample.

    With `prior_weight` each image that has trigger words is also shown without them or with others in their place, at
    the same noise. Only the words differ between the two, so the gradient of the pair says what belongs to the words;
    draws of their own would bury that under the noise's.
    """
    options, schedule = loaded.options, loaded.modules["schedule"]
    views = _draw_views(batch, rng)
    latents = sampling.draw_latents(views["moments"], loaded.modules["scaling_factor"], rng)
    timesteps = _row(options, "timesteps").draw(len(batch), schedule.num_timesteps, rng)
    noise = _row(options, "noises").draw(latents.shape, rng)
    drawn = Drawn(latents, timesteps, noise, {**views, **_draw_captions(batch, options.caption_dropout, rng)})
    pairs = batch.tensors["num_priors"].nonzero().flatten() if options.prior_weight else drawn.prior_indices
    if not len(pairs):
        return drawn
    prior_rows = {**{name: values[pairs] for name, values in views.items()}, **_draw_priors(batch, pairs, rng)}
    return replace(drawn, prior_indices=pairs, prior_rows=prior_rows)


def _row(options: Any, group: str) -> Any:
    """Returns the object that the options choose from a table of `lora_diffusion.diffusion`."""
    name, settings = options.rows()[group]
    return _row_type(group, name)(**settings)


@cache
def _row_type(group: str, name: str) -> Callable[..., Any]:
    row: Callable[..., Any] = registry.find(group, name)
    return row


def loss(loaded: Loaded, drawn: Drawn, encode: Encode) -> LossOutput:
    """Distance of the prediction from its target over each sample's latents, weighted by its timestep.

    Where a sample is shown a second time its loss grows by the distance to what the base predicts there, times
    `prior_weight`.
    """
    options, schedule, device = loaded.options, loaded.modules["schedule"], loaded.device
    prediction = loaded.modules["prediction"]
    latents, timesteps, noise = (
        drawn_tensor.to(device) for drawn_tensor in (drawn.latents, drawn.timesteps, drawn.noise)
    )
    noisy, rows = schedule.add_noise(latents, noise, timesteps), drawn.rows
    target = prediction.target(schedule, latents, noise, timesteps)
    weights = _row(options, "weightings").weights(schedule.snr(timesteps), prediction)
    pairs = drawn.prior_indices.to(device)
    if len(pairs):
        rows = {name: torch.cat([values, drawn.prior_rows[name]]) for name, values in rows.items()}
        base = _base_prediction(loaded, noisy[pairs], timesteps[pairs], drawn.prior_rows, encode)
        noisy, target = torch.cat([noisy, noisy[pairs]]), torch.cat([target, base])
        # What must not change is kept at every noise level; the look of an image is settled at the highest.
        weights = torch.cat([weights, weights.new_full((len(pairs),), options.prior_weight)])
    times = torch.cat([timesteps, timesteps[pairs]])
    predicted = sampling.call_unet(loaded.parts["unet"], noisy, times, encode(rows))
    errors = weights * _row(options, "losses")(predicted, target)
    num = len(timesteps)
    return LossOutput(errors[:num].index_add(0, pairs, errors[num:]), noise_levels=timesteps / schedule.num_timesteps)


def _columns(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in tensors if f"{name}_empty" in tensors]


def _draw_views(batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
    """Draws one view of each image."""
    views = {name: batch.tensors[name] for name in _VIEWS if name in batch.tensors}
    moments = views["moments"]
    picks = sampling.draw_indices(moments.new_full((len(batch),), moments.shape[1]).long(), rng)
    return {name: table[torch.arange(len(batch)), picks] for name, table in views.items()}


def _draw_captions(batch: Batch, dropout: float, rng: torch.Generator) -> dict[str, Tensor]:
    """Draws one caption of each sample, or the empty one."""
    tensors = batch.tensors
    picks = sampling.draw_indices(tensors["num_captions"], rng)
    is_empty = torch.rand(len(batch), generator=rng) < dropout
    rows = {name: tensors[name][torch.arange(len(batch)), picks] for name in _columns(tensors)}
    return {name: _with_empty(text, tensors[f"{name}_empty"], is_empty) for name, text in rows.items()}


def _draw_priors(batch: Batch, chosen: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    """Draws what must keep its meaning: one of the sample's priors, or the empty caption, which guidance needs."""
    tensors = batch.tensors
    last = tensors["num_priors"][chosen] - 1
    others = torch.minimum(1 + sampling.draw_indices(last.clamp(min=1), rng), last)
    shares = torch.rand(len(chosen), generator=rng)
    is_empty = shares < _EMPTY_SHARE_OF_PRIORS
    picks = torch.where(shares < _EMPTY_SHARE_OF_PRIORS + _CUT_SHARE_OF_PRIORS, 0, others)
    return {
        name: _with_empty(tensors[f"{name}_prior"][chosen, picks], tensors[f"{name}_empty"][chosen], is_empty)
        for name in _columns(tensors)
    }


def _with_empty(text: Tensor, empty: Tensor, is_empty: Tensor) -> Tensor:
    return torch.where(is_empty.view(-1, *[1] * (text.dim() - 1)), empty, text)


def _base_prediction(loaded: Loaded, noisy: Tensor, timesteps: Tensor, rows: Rows, encode: Encode) -> Tensor:
    """Returns what the base predicts without any adapter, float32."""
    assert loaded.adapters is not None, "prior samples need an injected adapter"
    with torch.no_grad(), loaded.adapters.disabled():
        return sampling.call_unet(loaded.parts["unet"], noisy, timesteps, encode(rows)).float()
