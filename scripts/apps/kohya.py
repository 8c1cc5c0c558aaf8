"""What sd-scripts does with a file: its own network, made from the file for its own models, on the CPU."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_diffusion.core.adapter_state import ModuleKey
from scripts.apps.weights import Outcome, Place, refused, without_memory

_WIDTHS = {"sd1": ((768, 3072, 12),), "sdxl": ((768, 3072, 12), (1280, 5120, 32))}


class Kohya:
    """sd-scripts with a base whose weights take no memory."""

    name = "kohya"

    def __init__(self, path: Path, family: str, places: dict[str, ModuleKey]) -> None:
        """Loads the program's code and builds the base.

        Args:
            path: checkout of sd-scripts.
            family: sd1 or sdxl.
            places: module of the program -> module.
        """
        sys.path.insert(0, str(path))
        from networks import lora  # type: ignore[import-not-found]

        logging.disable(logging.WARNING)
        self._lora = lora
        with torch.device("meta"):
            self._unet = _unet(family)
            self._texts = [_text_encoder(*sizes) for sizes in _WIDTHS[family]]
        for network in (self._unet, *self._texts):
            without_memory(network)
        self._places = places

    def load(self, path: Path) -> Outcome:
        """Returns what it makes of a file: the changes of the modules that its network has."""
        try:
            with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                texts: Any = self._texts if len(self._texts) > 1 else self._texts[0]
                network, tensors = self._lora.create_network_from_weights(
                    1.0, str(path), None, texts, self._unet, for_inference=True
                )
                network.apply_to(texts, self._unet)
                info = network.load_state_dict(tensors, False)
                changes = {
                    Place(self._places[module.lora_name], "weight"): module.get_weight().detach().float()
                    for module in (*network.text_encoder_loras, *network.unet_loras)
                }
        except Exception as error:  # noqa: BLE001 - any error of the program counts
            return refused(error)
        finally:
            for module in (self._unet, *self._texts):
                for child in module.modules():
                    child.__dict__.pop("forward", None)
        zero = {name.split(".")[0] for name in info.missing_keys if name.endswith("lora_up.weight")}
        lost = {self._places[name] for name in zero}
        return Outcome(
            {place: change for place, change in changes.items() if place.key not in lost}, len(info.unexpected_keys)
        )


def _unet(family: str) -> nn.Module:
    if family == "sd1":
        from library.original_unet import UNet2DConditionModel  # type: ignore[import-not-found]

        return UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=768)  # type: ignore[no-any-return]
    from library.sdxl_original_unet import SdxlUNet2DConditionModel  # type: ignore[import-not-found]

    return SdxlUNet2DConditionModel()  # type: ignore[no-any-return]


class _WithLevel(nn.Module):
    """A text encoder as transformers before 5.6 nested it, for which sd-scripts was written."""

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model


def _text_encoder(width: int, inner: int, num_layers: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=num_layers, num_attention_heads=width // 64
    )
    model = CLIPTextModel(config)
    return model if hasattr(model, "text_model") else _WithLevel(model)
