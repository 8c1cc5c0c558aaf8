"""What PEFT does with a folder, and folders with errors, drawn at random."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_diffusion.compat.matched_file import Base
from lora_diffusion.core.adapter_state import ModuleKey
from scripts.apps.weights import Outcome, Place, refused


class Peft:
    """PEFT with a UNet."""

    name = "diffusers"

    def __init__(self, make: Callable[[], Any]) -> None:
        """Takes what makes a UNet, which is used for all folders until one of them breaks it."""
        self._make = make
        self._unet = make()

    def load(self, path: Path) -> Outcome:
        """Returns what `PeftModel.from_pretrained` makes of the folder of the UNet."""
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(self._unet, path / "unet")
        except Exception as error:  # noqa: BLE001 - any error of the program counts
            self._unet = self._make()
            return refused(error)
        modules = model.get_base_model().named_modules()
        layers: dict[str, Any] = {name: module for name, module in modules if isinstance(module, LoraLayer)}
        changes = {
            Place(ModuleKey("unet", name), "weight"): layer.get_delta_weight("default").detach().float()
            for name, layer in layers.items()
        }
        self._unet = model.unload()
        return Outcome(changes, 0)


def draw_folder(base: Base, seed: int, path: Path) -> str:
    """Writes a folder of PEFT's with up to two errors in its tensors or its record, and returns what was done."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    keys = [key for key, shape in base.shapes.items() if key.part == "unet" and len(shape) > 1]
    keys = rng.sample([key for key in keys if re.search(r"attn|ff\.|conv\d|proj", key.path)], 6)
    tensors = {}
    for key in keys:
        shape, stem = base.shapes[key], f"base_model.model.{key.path}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(2, *shape[1:], generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], 2, *(1,) * len(shape[2:]), generator=generator)
    paths = [key.path for key in keys]
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": list(paths)}
    config["alpha_pattern"] = {paths[0]: 3}
    done = rng.sample(_FAULTS, rng.randint(0, 2))
    for error in done:
        error(rng, tensors, config, base)
    (path / "unet").mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "unet" / "adapter_model.safetensors"
    )
    (path / "unet" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return ", ".join(error.__name__.strip("_") for error in done)


_Tensors = dict[str, torch.Tensor]


def _drop(rng: random.Random, tensors: _Tensors, *_: Any) -> None:
    del tensors[rng.choice(list(tensors))]


def _rename(rng: random.Random, tensors: _Tensors, *_: Any) -> None:
    name = rng.choice(list(tensors))
    tensors[name.replace(".lora_", "x.lora_")] = tensors.pop(name)


def _without_prefix(rng: random.Random, tensors: _Tensors, *_: Any) -> None:
    for name in rng.sample(list(tensors), 4):
        tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)


def _other_size(rng: random.Random, tensors: _Tensors, *_: Any) -> None:
    name = rng.choice(list(tensors))
    tensors[name] = tensors[name][:, 1:] if rng.random() < 0.5 else tensors[name][1:]


def _other_rank(rng: random.Random, tensors: _Tensors, config: dict[str, Any], _: Base) -> None:
    config["r"] = rng.choice((1, 3))
    del tensors


def _magnitudes(rng: random.Random, tensors: _Tensors, config: dict[str, Any], base: Base) -> None:
    """Some modules get a magnitude, whatever the record says of it."""
    config["use_dora"] = rng.random() < 0.7
    stems = sorted({name.split(".lora_")[0] for name in tensors})
    for stem in rng.sample(stems, rng.randint(1, len(stems))):
        key = ModuleKey("unet", stem.removeprefix("base_model.model."))
        if key in base.shapes:
            tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(base.shapes[key][0]) + 1


def _fewer_targets(rng: random.Random, tensors: _Tensors, config: dict[str, Any], _: Base) -> None:
    config["target_modules"] = config["target_modules"][: rng.randint(1, 5)]
    del tensors


def _stray(rng: random.Random, tensors: _Tensors, *_: Any) -> None:
    tensors[rng.choice(("noise", "base_model.model.x.alpha", "base_model.model.conv_in.lora_C.weight"))] = torch.ones(1)


_FAULTS: list[Callable[..., None]] = [
    *(_drop, _rename, _without_prefix, _other_size, _other_rank, _magnitudes, _fewer_targets, _stray),
]
