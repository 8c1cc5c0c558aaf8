"""Stable Diffusion 1.x: one CLIP text encoder, a UNet on VAE latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core.types import BaseInfo, Batch, ImageText, Loaded, LossOutput, Output, Part, Prepared, Request

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_diffusion.core.keymap import KeyMap

_MAX_BATCH = 16
"""Pictures generated at once; more do not get faster on any device and need memory."""
_EMPTY_SHARE_OF_PRIORS = 0.2


@dataclass(frozen=True)
class SD1Options(ModelOptions):
    """A Stable Diffusion 1.x base and its training objective."""

    family: str = "sd1"
    """Kind of base model."""
    prediction: str = "auto"
    """What the UNet predicts: epsilon or v_prediction; auto takes what the base's scheduler says."""
    min_snr_gamma: float | None = None
    """Caps the loss weight of timesteps with little noise (5 in the paper); null weighs all alike."""
    noise_offset: float = 0.0
    """Adds a constant of this size to each channel's noise, for very dark or bright pictures."""
    caption_dropout: float = 0.0
    """Share of draws with the empty caption, which keeps guidance working in long runs."""
    prior_share: float = 0.0
    """Share of draws in which the caption without trigger words must give what the base gives, so that the trained
    look stays with its trigger words."""

    ranges: ClassVar[Mapping[str, Any]] = {
        "prediction": (lambda v: v in ("auto", "epsilon", "v_prediction"), "must be auto, epsilon or v_prediction"),
        "min_snr_gamma": (lambda v: v > 0, "must be greater than 0"),
        "noise_offset": (lambda v: 0 <= v <= 1, "must be between 0 and 1"),
        "caption_dropout": (lambda v: 0 <= v < 1, "must be at least 0 and less than 1"),
        "prior_share": (lambda v: 0 <= v < 1, "must be at least 0 and less than 1"),
    }


class StableDiffusion1:
    """The family object; see core.protocols.Family for what each method must do."""

    name = "sd1"
    options_type = SD1Options
    sample_type = ImageText
    metrics = ("clip_text", "clip_image")
    parts: Mapping[str, Part] = {
        "unet": Part(
            groups={
                "attn": (r".*\.attn[12]\.to_(q|k|v|out\.0)",),
                "ff": (r".*\.ff\.net\.(0\.proj|2)",),
                "proj": (r".*\.proj_(in|out)",),
                "conv": (r".*\.resnets\.\d+\.conv(1|2|_shortcut)", r".*\.(down|up)samplers\.\d+\.conv"),
                "all-linear": (r".*\.attn[12]\.to_(q|k|v|out\.0)", r".*\.ff\.net\.(0\.proj|2)", r".*\.time_emb_proj"),
            }
        ),
        "text_encoder": Part(
            groups={
                "attn": (r".*\.self_attn\.(q|k|v|out)_proj",),
                "ff": (r".*\.mlp\.fc[12]",),
                "all-linear": (r".*\.self_attn\.(q|k|v|out)_proj", r".*\.mlp\.fc[12]"),
            }
        ),
    }

    def check(self, options: SD1Options) -> BaseInfo:
        """Reads the configs of the base."""
        from lora_diffusion.families import _sources

        return _sources.find(options).info(options)

    def skeleton(self, options: SD1Options) -> dict[str, nn.Module]:
        """Builds UNet and text encoder on the meta device."""
        from lora_diffusion.families import _sources

        return _sources.find(options).skeleton()

    def key_map(self, format_name: str, options: SD1Options | None) -> KeyMap:
        """Maps linear and convolution layers to file names; text encoder names always hold `text_model`."""
        from lora_diffusion.families import _names

        return _names.key_map(format_name, None if options is None else self.skeleton(options), self.name)

    def load(self, options: SD1Options, device: torch.device) -> Loaded:
        """Loads the pipeline's networks, tokenizer and scheduler."""
        from lora_diffusion.families import _sources

        return _sources.find(options).load(options, device)

    def cache_key(self, options: SD1Options, trained: frozenset[str]) -> str:
        """Names the VAE and, unless it is trained, the text encoder by the hash of their weights."""
        from lora_diffusion.families import _sources

        frozen = ["vae", "tokenizer"] + ([] if "text_encoder" in trained else ["text_encoder"])
        return f"{self.name} {_sources.find(options).fingerprint(frozen)} {options.dtype}"

    def prepare(self, loaded: Loaded, samples: Sequence[ImageText], trained: frozenset[str]) -> list[Prepared]:
        """Gives latent moments, and text embeddings (token ids if the text encoder is trained) of every caption.

        Tensors of an item: "moments" [views, 2 * channels, height, width]; "text", "text_empty" and, where the
        sample has one, "text_prior", each [captions, length(, dim)].
        """
        from lora_diffusion.families import _latent

        priors = [sample.prior_caption for sample in samples if sample.prior_caption is not None]
        prompts = list(dict.fromkeys(["", *(caption for sample in samples for caption in sample.captions), *priors]))
        rows = _prepare_text(loaded, prompts, is_trained="text_encoder" in trained)

        def text(*wanted: str) -> Tensor:
            return rows[[prompts.index(prompt) for prompt in wanted]]

        items = []
        for sample in samples:
            assert sample.pixels is not None, f"{sample.key} has no pixels"
            tensors = {
                "moments": _latent.encode_moments(loaded.modules["vae"], sample.pixels),
                "text": text(*sample.captions),
                "text_empty": text(""),
            }
            if sample.prior_caption is not None:
                tensors["text_prior"] = text(sample.prior_caption)
            items.append(Prepared(sample.key, tensors, f"{sample.size[0]}x{sample.size[1]}", sample.num_repeats))
        return items

    def collate(self, items: Sequence[Prepared]) -> Batch:
        """Stacks items; captions are padded with zeros to the largest number of them."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        tensors = {
            "moments": torch.stack([item.tensors["moments"] for item in items]),
            "text": pad_sequence([item.tensors["text"] for item in items], batch_first=True),
            "num_captions": torch.tensor([len(item.tensors["text"]) for item in items]),
            "text_empty": torch.cat([item.tensors["text_empty"] for item in items]),
            "has_prior": torch.tensor(["text_prior" in item.tensors for item in items]),
            "text_prior": torch.cat([item.tensors.get("text_prior", item.tensors["text_empty"]) for item in items]),
        }
        return Batch(tuple(item.key for item in items), tensors)

    def loss(self, loaded: Loaded, batch: Batch, rng: torch.Generator) -> LossOutput:
        """Mean squared error of the prediction over each sample's latents, weighted by min-SNR if asked."""
        from lora_diffusion.diffusion import noise as noises
        from lora_diffusion.diffusion.weighting import min_snr_weight
        from lora_diffusion.families import _latent

        options, schedule = loaded.options, loaded.modules["schedule"]
        prediction = loaded.modules["prediction"]
        tensors, device = batch.tensors, loaded.device
        views = tensors["moments"]
        moments = _latent.draw_rows(views, views.new_full((len(batch),), views.shape[1]).long(), rng)
        latents = _latent.draw_latents(moments, loaded.modules["scaling_factor"], rng).to(device)
        timesteps = noises.draw_timesteps(len(batch), schedule.num_timesteps, rng).to(device)
        noise = noises.draw_noise(latents.shape, options.noise_offset, rng).to(device)
        text, is_prior = _draw_text(batch, options, rng)
        context = _context(loaded, text)

        noisy = schedule.add_noise(latents, noise, timesteps)
        target = prediction.target(schedule, latents, noise, timesteps)
        if is_prior.any():
            rows = is_prior.to(device)
            target[rows] = _base_prediction(loaded, noisy[rows], timesteps[rows], text[is_prior])
        predicted = loaded.parts["unet"](noisy.to(context.dtype), timesteps, encoder_hidden_states=context).sample
        per_sample = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        if options.min_snr_gamma is not None:
            weight = min_snr_weight(schedule.snr(timesteps), options.min_snr_gamma, prediction)
            # What must not change is kept at every noise level; the look of a picture is settled at the highest.
            per_sample = per_sample * weight.where(~is_prior.to(device), weight.new_ones(()))
        return LossOutput(per_sample)

    def example(
        self, options: SD1Options, trained: frozenset[str], batch_size: int, size: tuple[int, int]
    ) -> dict[str, dict[str, Any]]:
        """Gives latents, timesteps and text for the UNet, and token ids for a trained text encoder."""
        import torch

        configs: Any = {name: part.config for name, part in self.skeleton(options).items()}
        unet, text = configs["unet"], configs["text_encoder"]
        factor = self.check(options).size_step // 2 ** (len(unet.block_out_channels) - 1)
        length = text.max_position_embeddings
        with torch.device("meta"):
            example = {
                "unet": {
                    "sample": torch.empty(batch_size, unet.in_channels, size[1] // factor, size[0] // factor),
                    "timestep": torch.empty(batch_size),
                    "encoder_hidden_states": torch.empty(batch_size, length, text.hidden_size),
                },
                "text_encoder": {"input_ids": torch.zeros(batch_size, length, dtype=torch.int64)},
            }
        return {name: inputs for name, inputs in example.items() if name == "unet" or name in trained}

    def generate(self, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        """Draws pictures in batches of requests that differ in prompt and seed only."""
        outputs: dict[int, Output] = {}
        order = sorted(range(len(requests)), key=lambda i: repr(_settings(requests[i])))
        for settings, group in groupby(order, key=lambda i: repr(_settings(requests[i]))):
            del settings
            indices = list(group)
            for start in range(0, len(indices), _MAX_BATCH):
                chunk = indices[start : start + _MAX_BATCH]
                images = _generate_alike(loaded, [requests[i] for i in chunk])
                outputs.update({i: Output(requests[i], image) for i, image in zip(chunk, images, strict=True)})
        return [outputs[i] for i in range(len(requests))]


def _prepare_text(loaded: Loaded, prompts: Sequence[str], *, is_trained: bool) -> Tensor:
    """Returns token ids [num_prompts, length] if the text encoder is trained, else embeddings on the CPU."""
    import torch

    from lora_diffusion.families import _text

    ids = _text.tokenize(loaded.modules["tokenizer"], prompts)
    if is_trained:
        return ids
    with torch.no_grad():
        return torch.cat([_text.encode(loaded.parts["text_encoder"], rows) for rows in ids.split(32)]).float().cpu()


def _settings(request: Request) -> tuple[Any, ...]:
    weights = None if request.weights is None else sorted(request.weights.items())
    return request.num_steps, request.guidance, request.size, weights


def _draw_text(batch: Batch, options: SD1Options, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws each sample's caption: one of its own, none, or what must keep its meaning.

    Kept are captions without the trigger words, and sometimes the empty one, which guidance steers away from.

    Returns:
        The text [batch, length(, dim)] and which samples must give what the base gives, [batch] bool.
    """
    import torch

    from lora_diffusion.families import _latent

    tensors = batch.tensors
    text = _latent.draw_rows(tensors["text"], tensors["num_captions"], rng).clone()
    drops, priors, empties = torch.rand(3, len(batch), generator=rng)
    is_prior = (priors < options.prior_share) & tensors["has_prior"]
    is_empty = torch.where(is_prior, empties < _EMPTY_SHARE_OF_PRIORS, drops < options.caption_dropout)
    text[is_prior] = tensors["text_prior"][is_prior]
    text[is_empty] = tensors["text_empty"][is_empty]
    return text, is_prior


def _context(loaded: Loaded, text: Tensor) -> Tensor:
    """Returns embeddings on the device; token ids are encoded, with gradient."""
    from lora_diffusion.families import _text

    unet_dtype = loaded.parts["unet"].dtype
    if text.is_floating_point():
        return text.to(loaded.device, unet_dtype)  # type: ignore[arg-type]
    return _text.encode(loaded.parts["text_encoder"], text).to(unet_dtype)  # type: ignore[arg-type]


def _base_prediction(loaded: Loaded, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """Returns what the base predicts without any adapter, float32."""
    import torch

    assert loaded.adapters is not None, "prior samples need an injected adapter"
    with torch.no_grad(), loaded.adapters.disabled():
        context = _context(loaded, text)
        return loaded.parts["unet"](noisy.to(context.dtype), timesteps, encoder_hidden_states=context).sample.float()  # type: ignore[no-any-return]


def _generate_alike(loaded: Loaded, requests: Sequence[Request]) -> list[Any]:
    """Generates one batch of requests that share steps, guidance, size and adapter weights."""
    import torch

    from lora_diffusion.families import _latent, _text

    first, unet, vae = requests[0], loaded.parts["unet"], loaded.modules["vae"]
    if first.weights is not None:
        assert loaded.adapters is not None, "a request gives adapter weights, but no adapter was loaded"
        loaded.adapters.set_weights(first.weights)

    def embed(prompts: list[str]) -> Tensor:
        return _text.encode_prompts(loaded, prompts).to(loaded.device, unet.dtype)  # type: ignore[arg-type]

    width, height = first.size or (loaded.info.resolution, loaded.info.resolution)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (unet.config.in_channels, height // factor, width // factor)  # type: ignore[union-attr]
    noise = _latent.initial_noise(requests, shape, unet.dtype).to(loaded.device)  # type: ignore[arg-type]
    with torch.no_grad():
        denoise = _latent.guided(
            unet, embed([r.prompt for r in requests]), embed([r.negative for r in requests]), first.guidance
        )
        scheduler = type(loaded.modules["scheduler"]).from_config(loaded.modules["scheduler"].config)
        latents = _latent.sample(denoise, scheduler, noise, first.num_steps)
        return _latent.decode(vae, latents / loaded.modules["scaling_factor"])


FAMILY = StableDiffusion1()
