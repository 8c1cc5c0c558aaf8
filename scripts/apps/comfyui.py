"""What ComfyUI does with a file: its own loading code on its own models, on the CPU."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.core.adapter_state import ModuleKey
from scripts.apps.places import ldm_places
from scripts.apps.weights import Outcome, Place, refused, weight

UNETS: Mapping[str, Mapping[str, Any]] = {
    "sd1": {
        "adm_in_channels": None,
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "channel_mult": [1, 2, 4, 4],
        "use_linear_in_transformer": False,
        "context_dim": 768,
        "num_heads": 8,
    },
    "sdxl": {
        "num_classes": "sequential",
        "adm_in_channels": 2816,
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "channel_mult": [1, 2, 4],
        "use_linear_in_transformer": True,
        "context_dim": 2048,
        "num_head_channels": 64,
    },
}
"""Family -> settings of the UNet, as its model detection calls them."""


class ComfyUI:
    """ComfyUI with a base of the meta device."""

    name = "comfyui"

    def __init__(self, path: Path, family: str) -> None:
        """Loads the program's code and builds the base.

        Args:
            path: checkout of ComfyUI.
            family: sd1 or sdxl.
        """
        sys.path.insert(0, str(path))
        sys.argv = [sys.argv[0], "--cpu"]
        import comfy.options  # type: ignore[import-not-found]

        comfy.options.enable_args_parsing()
        import comfy.lora  # type: ignore[import-not-found]
        import comfy.lora_convert  # type: ignore[import-not-found]
        import comfy.model_detection  # type: ignore[import-not-found]
        import comfy.model_patcher  # type: ignore[import-not-found]
        import comfy.sd1_clip  # type: ignore[import-not-found]
        import comfy.sdxl_clip  # type: ignore[import-not-found]
        import comfy.utils  # type: ignore[import-not-found]

        self._comfy = comfy
        common = {
            "use_checkpoint": False,
            "image_size": 32,
            "out_channels": 4,
            "in_channels": 4,
            "legacy": False,
            "use_spatial_transformer": True,
            "model_channels": 320,
            "use_temporal_attention": False,
            "dtype": torch.float32,
        }
        config = comfy.model_detection.model_config_from_unet_config({**common, **UNETS[family]})
        config.set_inference_dtype(torch.float32, None)
        meta = torch.device("meta")
        self._unet = config.get_model({}, "", device=meta)
        clips = {"sd1": comfy.sd1_clip.SD1ClipModel, "sdxl": comfy.sdxl_clip.SDXLClipModel}
        self._clip = clips[family](device=meta, dtype=torch.float32)
        self._parts = [
            (comfy.lora.model_lora_keys_unet, comfy.model_patcher.ModelPatcher(self._unet, meta, meta)),
            (comfy.lora.model_lora_keys_clip, comfy.model_patcher.ModelPatcher(self._clip, meta, meta)),
        ]
        self.places = ldm_places(family, comfy.utils.unet_to_diffusers(self._unet.model_config.unet_config))
        self._key_map: dict[str, Any] = {}
        for keys, patcher in self._parts:
            self._key_map = keys(patcher.model, self._key_map)
        self._shapes = self.shapes()
        logging.getLogger().setLevel(logging.CRITICAL)

    def load(self, path: Path) -> Outcome:
        """Returns what it makes of a file: as `load_lora_for_models`, then each patch on its weight."""
        try:
            tensors = self._comfy.utils.load_torch_file(str(path), safe_load=True)
            return self._patched(self._comfy.lora_convert.convert_lora(tensors))
        except Exception as error:  # noqa: BLE001 - any error of the program counts
            return refused(error)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns parameter -> shape of the UNet and the text encoders."""
        models = (self._unet, self._clip)
        return {name: tuple(tensor.shape) for model in models for name, tensor in model.state_dict().items()}

    def unet_settings(self) -> dict[str, Any]:
        """Returns the settings of the UNet."""
        return dict(self._unet.model_config.unet_config)

    def _patched(self, tensors: dict[str, Any]) -> Outcome:
        used: set[str] = set()
        patches = _load(self._comfy.lora, tensors, dict(self._key_map), used)
        changes = {}
        for _, patcher in self._parts:
            clone = patcher.clone()
            clone.patches = {}
            for name in clone.add_patches(patches, 1.0):
                before = weight(self._shapes[name])
                after = self._comfy.lora.calculate_weight(clone.patches[name], before.clone(), name)
                changes[self._place(name)] = after - before if after.shape == before.shape else after
        not_applied = [name for name in patches if name not in self._shapes]
        return Outcome(changes, len(tensors.keys() - used) + len(not_applied))

    def _place(self, name: str) -> Place:
        module, _, tensor_name = name.rpartition(".")
        return Place(self.places.get(module, ModuleKey("?", module)), tensor_name)


def _load(lora: Any, tensors: dict[str, Any], key_map: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """Returns the patches, and notes the tensors that the program says it does not use."""
    lost: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lost.append(record.getMessage())  # type: ignore[method-assign]
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    try:
        patches: dict[str, Any] = lora.load_lora(tensors, key_map)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    start = "lora key not loaded: "
    used |= tensors.keys() - {text.removeprefix(start) for text in lost if text.startswith(start)}
    return patches
