"""A plain training loop around PEFT, set as the public text-to-image and DreamBooth LoRA examples of diffusers are.

LoRA on the attention of the UNet, Gaussian init, AdamW with weight decay 1e-2, a constant rate, uniform timesteps, no
average of the weights, no flips. Latents, and the text where its encoder is frozen, are made once, which the examples
do in each step: it costs this loop no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
_TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
_PRIOR_WEIGHT = 1.0
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Recipe:
    """What differs between the peers."""

    rank: int
    learning_rate: float
    dreambooth: bool = False
    """One prompt for all pictures, and the loss on pictures of the class beside theirs."""
    text_encoder: bool = False
    """Train the text encoder too."""


RECIPES: Mapping[str, Recipe] = {
    "text-to-image-r4-1e-4": Recipe(4, 1e-4),
    "text-to-image-r4-1e-3": Recipe(4, 1e-3),
    "text-to-image-r8-1e-4": Recipe(8, 1e-4),
    "text-to-image-r8-1e-3": Recipe(8, 1e-3),
    "dreambooth-r4-1e-4": Recipe(4, 1e-4, dreambooth=True),
    "dreambooth-r4-1e-3": Recipe(4, 1e-3, dreambooth=True),
    "dreambooth-r8-1e-4": Recipe(8, 1e-4, dreambooth=True),
    "dreambooth-r8-1e-3": Recipe(8, 1e-3, dreambooth=True),
    "dreambooth-text-r8-1e-3": Recipe(8, 1e-3, dreambooth=True, text_encoder=True),
}


@dataclass(frozen=True)
class Pictures:
    """Pictures and the prompt of each."""

    paths: Sequence[Path]
    prompts: Sequence[str]


class PlainLoop:
    """A training run that takes one step at a time."""

    def __init__(
        self, base: Path, recipe: Recipe, training: Pictures, of_class: Pictures | None, batch_size: int, seed: int
    ) -> None:
        """Loads the base, encodes the pictures and puts the adapter in.

        Args:
            base: diffusers folder.
            recipe: settings.
            training: what is learnt.
            of_class: what the base generated of its class; None without prior preservation.
            batch_size: training pictures in a step; those of the class come on top.
            seed: of the adapter's first weights and of all draws.
        """
        from diffusers import DDPMScheduler, StableDiffusionPipeline
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(seed)
        pipeline: Any = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        self._tokenizer, self._vae = pipeline.tokenizer, pipeline.vae
        self._unet, self._text_encoder = pipeline.unet, pipeline.text_encoder
        self._schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
        sides = self._unet.config.sample_size * pipeline.vae_scale_factor
        for network in (self._unet, self._text_encoder, self._vae):
            network.requires_grad_(False)
        self._recipe, self._batch_size = recipe, batch_size
        self._sources = [self._encoded(pictures, sides) for pictures in (training, of_class) if pictures]
        parts = {self._unet: _TARGETS, **({self._text_encoder: _TEXT_TARGETS} if recipe.text_encoder else {})}
        for network, targets in parts.items():
            rank = recipe.rank
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian")
            inject_adapter_in_model(config, network)
            network.train()
        self._params = [param for network in parts for param in network.parameters() if param.requires_grad]
        self._optimizer = torch.optim.AdamW(self._params, lr=recipe.learning_rate, weight_decay=1e-2)
        self._indices = _shuffled(max(len(moments) for moments, _ in self._sources))

    @torch.no_grad()
    def _encoded(self, pictures: Pictures, side: int) -> tuple[Tensor, Tensor]:
        """Returns mean and deviation of the latents, [num, 2, channels, side, side], and what the UNet reads.

        That is token ids [num, length] where the text encoder is trained, else text [num, length, width].
        """
        distribution = self._vae.encode(torch.stack([_pixels(path, side) for path in pictures.paths])).latent_dist
        moments = torch.stack([distribution.mean, distribution.std], dim=1)
        length = self._tokenizer.model_max_length
        ids = self._tokenizer(
            list(pictures.prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return moments, ids if self._recipe.text_encoder else self._text_encoder(ids)[0]

    def take_step(self) -> None:
        """Trains on one batch."""
        chosen = [next(self._indices) for _ in range(self._batch_size)]
        rows = [[index % len(moments) for index in chosen] for moments, _ in self._sources]
        pairs = list(zip(self._sources, rows, strict=True))
        moments = torch.cat([moments[row] for (moments, _), row in pairs])
        text = torch.cat([text[row] for (_, text), row in pairs])
        if self._recipe.text_encoder:
            text = self._text_encoder(text)[0]
        mean, deviation = moments.unbind(dim=1)
        latents = (mean + deviation * torch.randn_like(mean)) * self._vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(self._schedule.config.num_train_timesteps, (len(latents),))
        noisy = self._schedule.add_noise(latents, noise, timesteps)
        is_velocity = self._schedule.config.prediction_type == "v_prediction"
        target = self._schedule.get_velocity(latents, noise, timesteps) if is_velocity else noise
        error = (self._unet(noisy, timesteps, text).sample - target).square()
        loss = error[: self._batch_size].mean()
        if len(self._sources) > 1:
            loss = loss + _PRIOR_WEIGHT * error[self._batch_size :].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._params, _MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def save(self, path: Path) -> None:
        """Writes the adapter in the format of diffusers."""
        from diffusers import StableDiffusionPipeline
        from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        layers = {"unet_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(self._unet))}
        if self._recipe.text_encoder:
            state = get_peft_model_state_dict(self._text_encoder)
            layers["text_encoder_lora_layers"] = convert_state_dict_to_diffusers(state)
        StableDiffusionPipeline.save_lora_weights(path.parent, weight_name=path.name, **layers)


def _pixels(path: Path, side: int) -> Tensor:
    """Returns a picture as [3, side, side] in -1..1."""
    with Image.open(path) as opened:
        small = opened.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


def _shuffled(num: int) -> Iterator[int]:
    """Yields all numbers below `num` in random order, again and again."""
    while True:
        yield from torch.randperm(num).tolist()
