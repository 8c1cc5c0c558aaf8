"""What Forge does with a file: its own loading code on models of the shapes of its own, on the CPU."""

from __future__ import annotations

import ast
import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lora_diffusion.core.adapter_state import ModuleKey
from scripts.apps.places import ldm_places
from scripts.apps.weights import Outcome, Place, refused, weight


class Forge:
    """Forge with a base of which only names and shapes are there."""

    name = "forge"

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], unet: dict[str, Any], family: str) -> None:
        """Loads the program's code.

        Args:
            path: checkout of Forge.
            shapes: parameter -> shape of the UNet and the text encoders, which it calls as ComfyUI does.
            unet: settings of the UNet.
            family: sd1 or sdxl.
        """
        sys.path.insert(0, str(path))
        sys.path += [str(path / "packages_3rdparty")]
        arguments, sys.argv = sys.argv, [sys.argv[0], "--always-cpu"]
        import backend.patcher.lora as lora  # type: ignore[import-not-found]
        import packages_3rdparty.comfyui_lora_collection.utils as utils  # type: ignore[import-not-found]

        sys.argv = arguments
        self._lora = lora
        source = path / "extensions-builtin" / "sd_forge_lora" / "networks.py"
        names = ("model_lora_keys_clip", "model_lora_keys_unet", "load_lora")
        self._shapes = shapes
        self._places = ldm_places(family, utils.unet_to_diffusers(unet))
        self._parts = [
            {name: shape for name, shape in shapes.items() if name.startswith("diffusion_model.") == is_unet}
            for is_unet in (True, False)
        ]
        self._unet = _Model(self._parts[0], unet)
        self._clip = _Model(self._parts[1], unet)
        maps = {name: getattr(lora, name) for name in names}
        key_maps = {name: maps[name](model, {}) for name, model in zip(names, (self._clip, self._unet), strict=False)}
        maps |= {name: lambda _, key_map=key_map: dict(key_map) for name, key_map in key_maps.items()}
        self._load = function_of(source, "load_lora_for_models", maps)

    def load(self, path: Path) -> Outcome:
        """Returns what it makes of a file: as its extension loads it, then each patch merged into its weight."""
        from safetensors.torch import load_file

        model, clip = _Patcher(self._unet), _Patcher(self._clip)
        printed = io.StringIO()
        try:
            tensors = load_file(path)
            with contextlib.redirect_stdout(printed):
                new, new_clip = self._load(model, clip, tensors, 1.0, 1.0)
                patches = {**(new.patches if new else {}), **(new_clip.patches if new_clip else {})}
                changes = {}
                for name, patch in patches.items():
                    before = weight(self._shapes[name])
                    after = self._lora.merge_lora_to_weight([(1.0, patch, 1.0, None, None)], before, name)
                    changes[self._place(name)] = after - before if after.shape == before.shape else after
        except Exception as error:  # noqa: BLE001 - any error of the program counts
            return refused(error)
        text = printed.getvalue()
        if "version mismatch" in text:
            return Outcome({}, len(tensors), "more than twelve tensors do not match")
        return Outcome(changes, int("unmatched keys" in text or ("skipped" in text and "skipped 0" not in text)))

    def _place(self, name: str) -> Place:
        module, _, tensor_name = name.rpartition(".")
        return Place(self._places.get(module, ModuleKey("?", module)), tensor_name)


class _Model:
    """The parts of a model that its loading code looks at."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], unet: dict[str, Any]) -> None:
        self._state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        self.diffusion_model = SimpleNamespace(config=unet)
        self.config = SimpleNamespace(huggingface_repo="stable-diffusion")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._state


class _Patcher:
    """Takes patches as Forge's own ModelPatcher does: those of parameters that the model has."""

    def __init__(self, model: _Model) -> None:
        self.model = self.cond_stage_model = model
        self.patches: dict[str, Any] = {}

    def clone(self) -> _Patcher:
        return _Patcher(self.model)

    def add_patches(self, *, patches: dict[str, Any], **_: Any) -> set[str]:
        self.patches = {name: patch for name, patch in patches.items() if name in self.model.state_dict()}
        return set(self.patches)


def function_of(source: Path, name: str, names: dict[str, Any]) -> Any:
    """Returns one function of a file whose imports are not to be followed; `names` is what it uses of them."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    namespace = dict(names)
    exec(compile(tree, str(source), "exec"), namespace)
    return namespace[name]
