"""What a Stable Diffusion pipeline consists of, and what its component configs say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.base_model import BaseInfo, Loaded
from lora_diffusion.core.errors import ModelError, UntrainableError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora_diffusion.diffusion.noise import NoiseSchedule

Configs = Mapping[str, Mapping[str, Any]]
"""Component -> its config; "scheduler" is among them, and "index" holds what belongs to the pipeline as a whole."""

_WIDTH_OF_SD2 = 1024


@dataclass(frozen=True)
class Layout:
    """The components of one family."""

    family: str
    title: str
    """What people call it."""
    pipeline: str
    """Its class in diffusers."""
    towers: Mapping[str, str]
    """Text encoder -> its class in transformers."""
    unwanted: tuple[str, ...]
    """Components of the pipeline that neither training nor drawing needs."""
    usual_skip: int = 1
    """Layer of the text encoders that is read unless model.clip_skip says else, counted from the end."""

    @property
    def networks(self) -> tuple[str, ...]:
        """Returns the components that have weights."""
        return ("unet", "vae", *self.towers)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Returns the tokenizer of each text encoder."""
        return tuple(tower.replace("text_encoder", "tokenizer") for tower in self.towers)


_ONE_TOWER = {"text_encoder": "CLIPTextModel"}
_UNWANTED = ("feature_extractor", "image_encoder")
LAYOUTS: Mapping[str, Layout] = {
    layout.family: layout
    for layout in (
        Layout("sd1", "Stable Diffusion 1.x", "StableDiffusionPipeline", _ONE_TOWER, ("safety_checker", *_UNWANTED)),
        Layout("sd2", "Stable Diffusion 2.x", "StableDiffusionPipeline", _ONE_TOWER, ("safety_checker", *_UNWANTED)),
        Layout(
            "sdxl",
            "Stable Diffusion XL",
            "StableDiffusionXLPipeline",
            {**_ONE_TOWER, "text_encoder_2": "CLIPTextModelWithProjection"},
            _UNWANTED,
            usual_skip=2,
        ),
    )
}


def check_family(layout: Layout, unet: Mapping[str, Any], text: Mapping[str, Any], path: str) -> None:
    """Checks that a base is of the family that was asked for.

    Args:
        layout: of `model.family`.
        unet: config of the UNet.
        text: config of the first text encoder; may be empty where a folder lacks it.
        path: names the base in messages.

    Raises:
        ModelError: it is of another family, which the message names.
    """
    found = _family_of(unet, text)
    if found != layout.family:
        raise ModelError(
            f"The base {path} is {LAYOUTS[found].title}, not {layout.title}; set model.family={found}, or give another "
            "model.path."
        )


def _family_of(unet: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    if unet.get("addition_embed_type"):
        return "sdxl"
    # OpenCLIP's towers use the exact GELU, CLIP's own a fast approximation of it.
    is_open_clip = text.get("hidden_act") == "gelu" or unet.get("cross_attention_dim") == _WIDTH_OF_SD2
    return "sd2" if is_open_clip else "sd1"


def describe(configs: Configs, layout: Layout, options: Any) -> BaseInfo:
    """Returns what the component configs say of a base.

    Raises:
        ModelError: it is of another family, or its components or the options do not fit together.
    """
    unet, vae = configs["unet"], configs["vae"]
    check_family(layout, unet, configs["text_encoder"], options.path)
    _check_fit(configs, layout, options)
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
        architecture=_architecture(layout, prediction),
        prediction=prediction,
        source=options.path,
        # What suits the published bases drives small ones past the colours they know.
        guidance=_GUIDANCE if resolution >= _SMALLEST_PUBLISHED else _GUIDANCE_OF_SMALL,
        zero_terminal_snr=is_zero,
        unread=_unread(configs, layout, options.clip_skip or layout.usual_skip),
    )


def _unread(configs: Configs, layout: Layout, skip: int) -> dict[str, tuple[str, ...]]:
    """Returns patterns of the layers behind the one that is read; a summary of the prompt is made of the last."""
    patterns = {}
    for tower, kind in layout.towers.items():
        depth = configs[tower].get("num_hidden_layers", 12)
        layers = "|".join(map(str, range(depth - skip + 1, depth)))
        if layers and kind == "CLIPTextModel":
            patterns[tower] = (rf"(text_model\.)?encoder\.layers\.({layers})\..*",)
    return patterns


_GUIDANCE, _GUIDANCE_OF_SMALL, _SMALLEST_PUBLISHED = 7.0, 3.0, 256


def _architecture(layout: Layout, prediction: str) -> str:
    if layout.family == "sd2":
        return "stable-diffusion-v2-768-v" if prediction == "v_prediction" else "stable-diffusion-v2-512"
    return {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}[layout.family]


def _check_fit(configs: Configs, layout: Layout, options: Any) -> None:
    unet, vae = configs["unet"], configs["vae"]
    towers = {name: configs[name] for name in layout.towers}
    if unet.get("in_channels", 4) != vae.get("latent_channels", 4):
        raise UntrainableError(
            f"The UNet of {options.path} takes {unet.get('in_channels')} channels: bases for inpainting, depth or "
            "editing cannot be trained, only merged into."
        )
    if vae.get("latents_mean") or vae.get("shift_factor"):
        raise UntrainableError(
            f"The VAE of {options.path} shifts its latents, which {layout.title} does not; take its own."
        )
    width = sum(tower.get("hidden_size", 0) for tower in towers.values())
    if unet.get("cross_attention_dim") != width:
        raise ModelError(
            f"The base {options.path} does not fit together: the UNet expects text of width "
            f"{unet.get('cross_attention_dim')}, the text encoders give {width}."
        )
    depth = min(tower.get("num_hidden_layers", 12) for tower in towers.values())
    if options.clip_skip is not None and options.clip_skip > depth:
        raise ModelError(
            f"model.clip_skip={options.clip_skip}: the text encoders of {options.path} have {depth} layers; "
            f"give a number from 1 to {depth}."
        )


def build_skeleton(configs: Configs, layout: Layout) -> dict[str, nn.Module]:
    """Returns UNet and those text encoders that have a config, on the meta device, with the layers that are loaded."""
    import torch

    from lora_diffusion.families.stable_diffusion import plain_networks

    with torch.device("meta"):
        towers = {
            name: plain_networks.text_encoder(configs[name], kind=kind) or _text_encoder_of_library(configs[name], kind)
            for name, kind in layout.towers.items()
            if name in configs
        }
        return {"unet": plain_networks.unet(configs["unet"]) or _unet_of_library(configs["unet"]), **towers}


def _text_encoder_of_library(config: Mapping[str, Any], kind: str) -> nn.Module:
    import transformers

    made: nn.Module = getattr(transformers, kind)(transformers.CLIPTextConfig.from_dict(dict(config)))
    return made


def _unet_of_library(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    made: nn.Module = UNet2DConditionModel.from_config(dict(config))
    return made


def shared_skeleton(configs: Configs, layout: Layout) -> Mapping[str, nn.Module]:
    """Returns the same networks each time, made once for these configs: to look at names and shapes, not to change."""
    told = {name: dict(configs[name]) for name in ("unet", *layout.towers) if name in configs}
    return _shared(layout.family, json.dumps(told, sort_keys=True))


@cache
def _shared(family: str, configs: str) -> Mapping[str, nn.Module]:
    return build_skeleton(json.loads(configs), LAYOUTS[family])


def load_dtypes(options: Any, configs: Configs, device: torch.device) -> dict[str, torch.dtype]:
    """Returns the number type of each component; a VAE that overflows in fp16 stays in fp32.

    Where the VAE does not tell it, that of Stable Diffusion XL overflows and the others do not.
    """
    import torch

    from lora_diffusion.runtime.device import frozen_dtype

    dtype = frozen_dtype(options.dtype, device)
    is_sdxl = configs["unet"].get("addition_embed_type") == "text_time"
    overflows = dtype == torch.float16 and configs["vae"].get("force_upcast", is_sdxl)
    return {"default": dtype, "vae": torch.float32 if overflows else dtype}


def as_loaded(pipeline: Any, layout: Layout, options: Any, device: torch.device, info: BaseInfo) -> Loaded:
    """Freezes a pipeline's networks and sorts its components into parts and modules."""
    from lora_diffusion.diffusion.prediction import find_prediction
    from lora_diffusion.quantize import quantize

    parts = {name: getattr(pipeline, name) for name in ("unet", *layout.towers)}
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
        **{name: getattr(pipeline, name) for name in layout.tokenizers},
    }
    return Loaded(
        parts=parts,
        modules=modules,
        options=options,
        device=device,
        info=info,
        encoders=frozenset({*layout.towers, "vae"}),
        decoders=frozenset({"vae"}),
    )


def _schedule(scheduler: Any, info: BaseInfo) -> NoiseSchedule:
    from diffusers import DDPMScheduler

    from lora_diffusion.diffusion.noise import NoiseSchedule, rescale_to_zero_snr

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
    kind = type(scheduler) if "rescale_betas_zero_snr" in scheduler.config else DDIMScheduler
    # The last timestep must be among those sampled (Lin et al. 2023, arXiv 2305.08891, section 3.3).
    return kind.from_config(scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
