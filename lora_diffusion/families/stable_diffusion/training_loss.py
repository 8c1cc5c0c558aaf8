"""How the Stable Diffusion families train: prepared tensors, what is drawn from them, and the loss.

Tensors of a prepared item are of two sorts. A view tensor has a row for each view of the image ("moments", and
"time_ids" where the base asks for sizes). A text column NAME has a row for each caption; NAME_empty holds the empty
caption. Where the base is asked for them NAME_prior holds the captions that must keep their meaning, and NAME_anchor
those whose other words must, with what the base reads instead in NAME_base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from lora_diffusion.families.stable_diffusion.options import StableDiffusionOptions
from lora_diffusion.families.stable_diffusion.text_encoding import Condition, Rows

_SHARES_OF_PRIORS, _SHARES_OF_FEW_PRIORS = (0.2, 0.4), (0.3, 0.4)
"""Of the draws without trigger words: the empty caption, and the own caption cut; the others name other things.
Guidance multiplies what differs from the empty caption, so it comes first where few images are shown again."""
_VIEWS = ("moments", "time_ids")

Encode = Callable[[Rows], Condition]
"""Turns drawn rows into what the UNet takes besides latents; encodes token ids, with gradient."""


@dataclass(frozen=True)
class Kept:
    """Images of a step that are shown again, where the adapter must predict what the base predicts."""

    indices: Tensor
    """[pairs] int64, the samples whose latents and noise are taken."""
    timesteps: Tensor
    """[pairs] int64."""
    rows: Rows
    """Their view, and the caption that the adapter reads."""
    base_rows: Rows
    """The same with the caption that the base reads."""
    weights: Tensor
    """[pairs] float32, of their losses."""


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
    kept: tuple[Kept, ...] = ()
    """What is shown again."""


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
    texts = [_texts(sample, loaded.options) for sample in samples]
    prompts = list(dict.fromkeys(["", *chain.from_iterable(chain.from_iterable(one.values()) for one in texts)]))
    columns = describe(prompts)

    def rows(suffix: str, *wanted: str) -> dict[str, Tensor]:
        indices = [prompts.index(prompt) for prompt in wanted]
        return {name + suffix: column[indices] for name, column in columns.items()}

    return [
        {name: column for suffix, wanted in of_one.items() for name, column in rows(suffix, *wanted).items()}
        for of_one in texts
    ]


def _texts(sample: ImageText, options: StableDiffusionOptions) -> dict[str, tuple[str, ...]]:
    """Returns suffix of the text columns -> what their rows hold."""
    texts = {"": sample.captions, "_empty": ("",)}
    if options.prior_weight and sample.prior_captions:
        texts["_prior"] = sample.prior_captions
    if options.anchor_weight and sample.anchors:
        texts["_anchor"], texts["_base"] = zip(*sample.anchors(options.anchored.what), strict=True)
    return texts


def collate(items: Sequence[Prepared]) -> Batch:
    """Stacks items; captions and priors are padded with zeros to the largest number of them."""
    columns = _columns(items[0].tensors)
    tensors = {name: torch.stack([item.tensors[name] for item in items]) for name in _VIEWS if name in items[0].tensors}
    tensors["num_captions"] = torch.tensor([len(item.tensors[columns[0]]) for item in items])
    tensors["num_priors"] = _num_rows(items, f"{columns[0]}_prior")
    tensors["num_anchors"] = _num_rows(items, f"{columns[0]}_anchor")
    for name in columns:
        empty = f"{name}_empty"
        tensors[name] = pad_sequence([item.tensors[name] for item in items], batch_first=True)
        tensors[empty] = torch.cat([item.tensors[empty] for item in items])
        for ending in ("_prior", "_anchor", "_base"):
            rows = [item.tensors.get(name + ending, item.tensors[empty]) for item in items]
            tensors[name + ending] = pad_sequence(rows, batch_first=True)
    return Batch(tuple(item.key for item in items), tensors)


def _num_rows(items: Sequence[Prepared], column: str) -> Tensor:
    return torch.tensor([len(item.tensors.get(column, ())) for item in items])


def draw(loaded: Loaded, batch: Batch, rng: torch.Generator) -> Drawn:
    """Draws a view, latents, timestep, noise and caption of each sample.

    With `prior_weight` images that have trigger words are also shown without them or with others in their place, at the
    same noise. Only the words differ between the two, so the gradient of the pair says what belongs to the words; draws
    of their own would bury that under the noise's. With `anchor_weight` images are also shown under captions that name
    other things or looks beside the trigger, at a noise level where these are settled.
    """
    options, schedule = loaded.options, loaded.modules["schedule"]
    views = _draw_views(batch, rng)
    latents = sampling.draw_latents(views["moments"], loaded.modules["scaling_factor"], rng)
    timesteps = _row(options, "timesteps").draw(len(batch), schedule.num_timesteps, rng)
    noise = _row(options, "noises").draw(latents.shape, rng)
    rows = {**views, **_draw_captions(batch, options.caption_dropout, rng)}
    kept = []
    if options.prior_weight and batch.tensors["num_priors"].any():
        kept.append(_draw_priors(batch, options, views, timesteps, rng))
    if options.anchor_weight and batch.tensors["num_anchors"].any():
        kept.append(_draw_anchors(batch, options, views, schedule.num_timesteps, rng))
    return Drawn(latents, timesteps, noise, rows, tuple(one for one in kept if len(one.indices)))


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
    indices, times = torch.arange(len(timesteps), device=device), timesteps
    if drawn.kept:
        kept = _joined(drawn.kept, device)
        again = schedule.add_noise(latents[kept.indices], noise[kept.indices], kept.timesteps)
        base = _base_prediction(loaded, again, kept.timesteps, kept.base_rows, encode)
        rows = {name: torch.cat([values, kept.rows[name]]) for name, values in rows.items()}
        noisy, target = torch.cat([noisy, again]), torch.cat([target, base])
        # What must not change is kept at every noise level; the look of an image is settled at the highest.
        weights = torch.cat([weights, kept.weights])
        indices, times = torch.cat([indices, kept.indices]), torch.cat([times, kept.timesteps])
    predicted = sampling.call_unet(loaded.parts["unet"], noisy, times, encode(rows))
    errors = weights * _row(options, "losses")(predicted, target)
    num = len(timesteps)
    return LossOutput(
        errors[:num].index_add(0, indices[num:], errors[num:]), noise_levels=timesteps / schedule.num_timesteps
    )


def _joined(kept: Sequence[Kept], device: torch.device) -> Kept:
    """Returns all that is shown again as one; numbers on the device, rows where they were."""
    rows = {name: torch.cat([one.rows[name] for one in kept]) for name in kept[0].rows}
    base_rows = {name: torch.cat([one.base_rows[name] for one in kept]) for name in kept[0].rows}
    indices = torch.cat([one.indices for one in kept]).to(device)
    timesteps = torch.cat([one.timesteps for one in kept]).to(device)
    return Kept(indices, timesteps, rows, base_rows, torch.cat([one.weights for one in kept]).to(device))


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


def _draw_part(indices: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Draws a share of indices [num], in their order; where it is no whole number, one more as often as is due."""
    if share == 1:
        return indices
    num = int(len(indices) * share + torch.rand(1, generator=rng).item())
    return indices[torch.randperm(len(indices), generator=rng)[:num].sort().values]


def _draw_priors(
    batch: Batch, options: StableDiffusionOptions, views: Rows, timesteps: Tensor, rng: torch.Generator
) -> Kept:
    """Draws what must keep its meaning: one of the sample's priors, or the empty caption, which guidance needs."""
    tensors = batch.tensors
    chosen = _draw_part(tensors["num_priors"].nonzero().flatten(), options.priors_again, rng)
    last = tensors["num_priors"][chosen] - 1
    others = torch.minimum(1 + sampling.draw_indices(last.clamp(min=1), rng), last)
    shares = torch.rand(len(chosen), generator=rng)
    empty_share, cut_share = _SHARES_OF_PRIORS if options.prior_share is None else _SHARES_OF_FEW_PRIORS
    is_empty = shares < empty_share
    picks = torch.where(shares < empty_share + cut_share, 0, others)
    texts = {
        name: _with_empty(tensors[f"{name}_prior"][chosen, picks], tensors[f"{name}_empty"][chosen], is_empty)
        for name in _columns(tensors)
    }
    rows = {**{name: values[chosen] for name, values in views.items()}, **texts}
    return Kept(
        chosen, timesteps[chosen], rows, rows, torch.full((len(chosen),), options.prior_weight / options.priors_again)
    )


def _draw_anchors(
    batch: Batch, options: StableDiffusionOptions, views: Rows, num_timesteps: int, rng: torch.Generator
) -> Kept:
    """Draws captions that name something beside the trigger, and timesteps at which that must stay the base's."""
    tensors = batch.tensors
    chosen = _draw_part(tensors["num_anchors"].nonzero().flatten(), options.anchors_again, rng)
    picks = sampling.draw_indices(tensors["num_anchors"][chosen], rng)
    anchored = options.anchored
    levels = anchored.low + (anchored.high - anchored.low) * torch.rand(len(chosen), generator=rng)
    timesteps = (levels * num_timesteps).long().clamp(max=num_timesteps - 1)
    shown = {name: values[chosen] for name, values in views.items()}
    rows, base_rows = (
        {**shown, **{name: tensors[name + ending][chosen, picks] for name in _columns(tensors)}}
        for ending in ("_anchor", "_base")
    )
    return Kept(
        chosen, timesteps, rows, base_rows, torch.full((len(chosen),), options.anchor_weight / options.anchors_again)
    )


def _with_empty(text: Tensor, empty: Tensor, is_empty: Tensor) -> Tensor:
    return torch.where(is_empty.view(-1, *[1] * (text.dim() - 1)), empty, text)


def _base_prediction(loaded: Loaded, noisy: Tensor, timesteps: Tensor, rows: Rows, encode: Encode) -> Tensor:
    """Returns what the base predicts without any adapter, float32."""
    assert loaded.adapters is not None, "prior samples need an injected adapter"
    with torch.no_grad(), loaded.adapters.disabled():
        return sampling.call_unet(loaded.parts["unet"], noisy, timesteps, encode(rows)).float()
