"""What a Stable Diffusion pipeline consists of, and what its component configs say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.base import DiffusionArchitecture
from lora_diffusion.core.base_model import BaseInfo, Loaded
from lora_diffusion.core.errors import ModelError, UntrainableError
from lora_diffusion.families.model_files import missing

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora_diffusion.diffusion.schedule import NoiseSchedule

Configs = Mapping[str, Mapping[str, Any]]
"""Component -> its config; "scheduler" is among them."""
_OPEN_CLIP_WIDTH = 1024
"""Width of the text that only a UNet with OpenCLIP's text encoder takes."""


def check_family(
    architecture: DiffusionArchitecture, unet: Mapping[str, Any], text: Mapping[str, Any], path: str
) -> None:
    """Checks that a base is of the family that was asked for.

    Args:
        architecture: of `model.family`.
        unet: config of the UNet.
        text: config of the first text encoder; may be empty where a folder lacks it.
        path: names the base in messages.

    Raises:
        ModelError: it is of another family, which the message names.
    """
    if not _fits(architecture, unet, text):
        raise other_family(architecture, next(other for other in DIFFUSION.values() if _fits(other, unet, text)), path)


def other_family(architecture: DiffusionArchitecture, match: DiffusionArchitecture, path: str) -> ModelError:
    """Returns the error that a base is of another family than `model.family` says."""
    return ModelError(
        f"The base {path} is {match.title}, not {architecture.title}; set model.family={match.name}, or give another "
        "model.path."
    )


def _fits(architecture: DiffusionArchitecture, unet: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    first = architecture.text_encoders[0]
    if unet.get("addition_embed_type") or architecture.unet.added:
        return bool(unet.get("addition_embed_type")) == bool(architecture.unet.added)
    # OpenCLIP's text encoders use the exact GELU, CLIP's own a fast approximation of it.
    is_open_clip = text.get("hidden_act") == "gelu" or unet.get("cross_attention_dim") == _OPEN_CLIP_WIDTH
    return first.is_open_clip == is_open_clip


def describe(configs: Configs, architecture: DiffusionArchitecture, options: Any) -> BaseInfo:
    """Returns what the component configs say of a base.

    Raises:
        ModelError: it is of another family, or its components or the options do not fit together.
    """
    unet, vae = configs["unet"], configs["vae"]
    check_family(architecture, unet, configs["text_encoder"], options.path)
    _check_fit(configs, architecture, options)
    scheduler = configs["scheduler"]
    prediction = options.prediction
    if prediction == "auto":
        prediction = scheduler.get("prediction_type", "epsilon")
    is_zero = {"always": True, "never": False}.get(
        options.zero_terminal_snr, bool(scheduler.get("rescale_betas_zero_snr"))
    )
    if is_zero and prediction == "epsilon":
        raise ModelError(
            f"The base {options.path} cannot predict the noise where there is nothing else (zero terminal SNR); set "
            "model.prediction=v_prediction or model.zero_terminal_snr=never."
        )
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    resolution = int(unet["sample_size"]) * factor
    return BaseInfo(
        resolution=resolution,
        size_step=factor * 2 ** (len(unet["block_out_channels"]) - 1),
        architecture=architecture.modelspec[prediction],
        prediction=prediction,
        source=options.path,
        # What suits the published bases drives small ones past the colours they know.
        guidance=_GUIDANCE if resolution >= _SMALLEST_PUBLISHED else _GUIDANCE_OF_SMALL,
        zero_terminal_snr=is_zero,
        unread=_unread(configs, architecture, options.clip_skip or architecture.usual_clip_skip),
    )


def _unread(configs: Configs, architecture: DiffusionArchitecture, skip: int) -> dict[str, tuple[str, ...]]:
    """Returns patterns of the layers behind the one that is read; pooled embeds are made of the last."""
    patterns: dict[str, tuple[str, ...]] = {}
    for encoder in architecture.text_encoders:
        depth = configs[encoder.part].get("num_hidden_layers", 12)
        layers = "|".join(map(str, range(depth - skip + 1, depth)))
        if layers and not encoder.projection:
            patterns[encoder.part] = (rf"(text_model\.)?encoder\.layers\.({layers})\..*",)
    return patterns


_GUIDANCE, _GUIDANCE_OF_SMALL, _SMALLEST_PUBLISHED = 7.0, 3.0, 256


def _check_fit(configs: Configs, architecture: DiffusionArchitecture, options: Any) -> None:
    unet, vae = configs["unet"], configs["vae"]
    texts = [configs[encoder.part] for encoder in architecture.text_encoders]
    if unet.get("in_channels", 4) != vae.get("latent_channels", 4):
        raise UntrainableError(
            f"The UNet of {options.path} takes {unet.get('in_channels')} channels: bases for inpainting, depth or "
            "editing cannot be trained, only merged into."
        )
    if vae.get("latents_mean") or vae.get("shift_factor"):
        raise UntrainableError(
            f"The VAE of {options.path} shifts its latents, which {architecture.title} does not; take its own."
        )
    width = sum(text.get("hidden_size", 0) for text in texts)
    if unet.get("cross_attention_dim") != width:
        raise ModelError(
            f"The base {options.path} does not fit together: the UNet expects text of width "
            f"{unet.get('cross_attention_dim')}, the text encoders give {width}."
        )
    depth = min(text.get("num_hidden_layers", 12) for text in texts)
    if options.clip_skip is not None and options.clip_skip > depth:
        raise ModelError(
            f"model.clip_skip={options.clip_skip}: the text encoders of {options.path} have {depth} layers; "
            f"give a number from 1 to {depth}."
        )


def meta_modules(configs: Configs, architecture: DiffusionArchitecture) -> dict[str, nn.Module]:
    """Returns UNet and those text encoders that have a config, on the meta device, with the layers that are loaded."""
    import torch

    from lora_diffusion.families.stable_diffusion import plain_networks

    with torch.device("meta"):
        unet = plain_networks.unet(configs["unet"]) or _unet_of_library(configs["unet"])
        encoders = {
            encoder.part: plain_networks.text_encoder(configs[encoder.part], encoder.model_class)
            or _text_encoder_of_library(configs[encoder.part], encoder.model_class)
            for encoder in architecture.text_encoders
            if encoder.part in configs
        }
        return {"unet": unet, **encoders}


def _text_encoder_of_library(config: Mapping[str, Any], model_class: str) -> nn.Module:
    import transformers

    network: nn.Module = getattr(transformers, model_class)(transformers.CLIPTextConfig.from_dict(dict(config)))
    return network


def _unet_of_library(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    network: nn.Module = UNet2DConditionModel.from_config(dict(config))
    return network


def shared_meta_modules(configs: Configs, architecture: DiffusionArchitecture) -> Mapping[str, nn.Module]:
    """Returns the same networks each time, made once for these configs: to look at names and shapes, not to change."""
    used = {name: dict(configs[name]) for name in architecture.networks if name in configs and name != "vae"}
    return _shared(architecture, json.dumps(used, sort_keys=True))


@cache
def _shared(architecture: DiffusionArchitecture, configs: str) -> Mapping[str, nn.Module]:
    return meta_modules(json.loads(configs), architecture)


def load_dtypes(
    options: Any, configs: Configs, architecture: DiffusionArchitecture, device: torch.device
) -> dict[str, torch.dtype]:
    """Returns the dtype of each component; a VAE that overflows in fp16 stays in fp32."""
    import torch

    from lora_diffusion.runtime.device import frozen_dtype

    dtype = frozen_dtype(options.dtype, device)
    overflows = dtype == torch.float16 and configs["vae"].get("force_upcast", architecture.is_vae_upcast)
    return {"default": dtype, "vae": torch.float32 if overflows else dtype}


def as_loaded(
    pipeline: Any, architecture: DiffusionArchitecture, options: Any, device: torch.device, info: BaseInfo
) -> Loaded:
    """Freezes a pipeline's networks and sorts its components into parts and modules."""
    from lora_diffusion.diffusion.prediction import find_prediction
    from lora_diffusion.quantize import quantize

    encoders = architecture.text_encoders
    parts = {name: getattr(pipeline, name) for name in ("unet", *(encoder.part for encoder in encoders))}
    for network in (*parts.values(), pipeline.vae):
        network.requires_grad_(False).eval()
    for network in parts.values():
        quantize(network, options.quantization, device)
    pipeline.vae.to(device)
    modules = {
        "vae": pipeline.vae,
        "scheduler": _sampler(pipeline.scheduler, info),
        "schedule": _schedule(pipeline.scheduler, info),
        "prediction": find_prediction(info.prediction),
        "scaling_factor": float(pipeline.vae.config.scaling_factor),
        "zero_empty_prompt": bool(pipeline.config.get("force_zeros_for_empty_prompt", False)),
        **{encoder.tokenizer: getattr(pipeline, encoder.tokenizer) for encoder in encoders},
    }
    return Loaded(
        parts=parts,
        modules=modules,
        options=options,
        device=device,
        info=info,
        encoders=frozenset({*(encoder.part for encoder in encoders), "vae"}),
        decoders=frozenset({"vae"}),
    )


def _schedule(scheduler: Any, info: BaseInfo) -> NoiseSchedule:
    from diffusers import DDPMScheduler

    from lora_diffusion.diffusion.schedule import NoiseSchedule, rescale_to_zero_snr

    if not hasattr(scheduler, "alphas_cumprod"):
        raise ModelError(
            f"The scheduler of {info.source}, {type(scheduler).__name__}, has no discrete noise levels; such bases "
            "cannot be trained."
        )
    plain = DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=False).alphas_cumprod.float()
    return NoiseSchedule(rescale_to_zero_snr(plain) if info.zero_terminal_snr else plain)


def _sampler(scheduler: Any, info: BaseInfo) -> Any:
    """Returns the base's own sampler, or DDIM where that one cannot start from noise without signal."""
    from diffusers import DDIMScheduler

    scheduler.register_to_config(prediction_type=info.prediction)
    if info.zero_terminal_snr == bool(scheduler.config.get("rescale_betas_zero_snr")):
        return scheduler
    if not info.zero_terminal_snr:
        return type(scheduler).from_config(scheduler.config, rescale_betas_zero_snr=False)
    scheduler_class = type(scheduler) if "rescale_betas_zero_snr" in scheduler.config else DDIMScheduler
    # The last timestep must be among those sampled (Lin et al. 2023, arXiv 2305.08891, section 3.3).
    return scheduler_class.from_config(scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")


def missing_of_vae(config: Mapping[str, Any], files: Sequence[Path]) -> list[str]:
    """Returns the same for the VAE of this config, which no meta modules have."""
    return missing(_names_of_vae(json.dumps(dict(config), sort_keys=True)), files)


@cache
def _names_of_vae(config_text: str) -> frozenset[str]:
    import torch

    from lora_diffusion.families.stable_diffusion import plain_networks

    config = json.loads(config_text)
    with torch.device("meta"):
        return frozenset((plain_networks.vae(config) or _vae_of_library(config)).state_dict())


def _vae_of_library(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    network: nn.Module = AutoencoderKL.from_config(dict(config))
    return network
