"""What A1111 does with a file: its own network code on layers of the shapes of its own, on the CPU."""

from __future__ import annotations

import ast
import importlib
import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.core.adapter_state import ModuleKey
from scripts.apps.weights import Outcome, Place, refused, weight

_NUM_HEADS = 20
_TYPES = ("lora.Lora", "hada.Hada", "ia3.Ia3", "lokr.Lokr", "full.Full", "norm.Norm", "glora.GLora", "oft.OFT")
"""Files and classes of its kinds of adapter, in the order in which it tries them."""
_OWN = (
    "convert_",
    "load_network",
    "allowed_layer",
    "store_weights",
    "restore_weights",
    "network_restore",
    "network_apply",
)


class A1111:
    """A1111 with a base of which only names and shapes are there."""

    name = "a1111"

    def __init__(
        self, path: Path, shapes: dict[str, tuple[int, ...]], places: dict[str, ModuleKey], family: str
    ) -> None:
        """Loads the program's code, without the parts of it that draw a page.

        Args:
            path: checkout of stable-diffusion-webui, or a folder with its `extensions-builtin/Lora`.
            shapes: parameter -> shape, as ComfyUI calls them.
            places: module of ComfyUI -> module.
            family: sd1 or sdxl.
        """
        folder = path / "extensions-builtin" / "Lora"
        sys.path.insert(0, str(folder))
        stub_modules()
        network = importlib.import_module("network")
        types = []
        for name in _TYPES:
            file, _, tensor_name = name.partition(".")
            types.append(getattr(importlib.import_module(f"network_{file}"), f"ModuleType{tensor_name}")())
        sys.path.remove(str(folder))
        self._layers, self._keys = _layers(shapes, places, family)
        self._model = SimpleNamespace(network_layer_mapping=self._layers)
        self._own: dict[str, Any] = {
            "network": network,
            "module_types": types,
            "torch": torch,
            "re": re,
            "logging": logging,
            "os": importlib.import_module("os"),
            "modules": sys.modules["modules"],
            "loaded_networks": [],
            "re_digits": re.compile(r"\d+"),
            "re_x_proj": re.compile(r"(.*)_([qkv]_proj)$"),
            "re_compiled": {},
            "shared": SimpleNamespace(sd_model=self._model),
            "devices": sys.modules["modules.devices"],
            "sd_models": SimpleNamespace(read_state_dict=_read),
            "extra_network_lora": SimpleNamespace(errors={}),
            "textual_inversion": SimpleNamespace(create_embedding_from_data=_embedding),
        }
        _define(folder / "networks.py", self._own)

    def load(self, path: Path) -> Outcome:
        """Returns what it makes of a file: its network, applied to the layers that it names."""
        disk = SimpleNamespace(filename=str(path), name=path.stem)
        try:
            net = self._own["load_network"](path.stem, disk)
            net.te_multiplier, net.unet_multiplier, net.dyn_dim = 1.0, 1.0, None
            self._own["loaded_networks"][:] = [net]
            changes: dict[Place, Tensor] = {}
            for name in dict.fromkeys(map(_layer_of, net.modules)):
                if name in self._layers:
                    changes |= self._apply(name)
        except Exception as error:  # noqa: BLE001 - any error of the program counts
            return refused(error)
        num_used = sum(self._is_known(name) for name in _read(str(path)))
        return Outcome(changes, len(_read(str(path))) - num_used)

    def _is_known(self, name: str) -> bool:
        stem = name.partition(".")[0]
        key = self._own["convert_diffusers_name_to_compvis"](stem, False)
        tries = [key, stem.replace("lora_unet", "diffusion_model")]
        tries += [stem.replace("lora_te1_text_model", f"{start}transformer_text_model") for start in ("0_", "")]
        known = [other for other in tries if _layer_of(other) in self._layers or other in self._layers]
        return stem == "bundle_emb" or bool(known)

    def _apply(self, name: str) -> dict[Place, Tensor]:
        layer: Any = _real(self._layers[name])
        layer.network_layer_name = name
        before = {parameter: tensor.detach().clone() for parameter, tensor in layer.named_parameters()}
        self._own["network_apply_weights"](layer)
        after = dict(layer.named_parameters())
        changes: dict[Place, Tensor] = {}
        for parameter, tensor in after.items():
            change = tensor.detach() - before.get(parameter, 0)
            if not change.any():
                continue
            if parameter == "in_proj_weight":
                rows = change.chunk(3)
                changes |= {
                    Place(self._keys[f"{name}_{n}_proj"], "weight"): r for n, r in zip("qkv", rows, strict=True)
                }
            elif parameter.startswith("out_proj."):
                changes[Place(self._keys[f"{name}_out_proj"], parameter.removeprefix("out_proj."))] = change
            else:
                changes[Place(self._keys[name], parameter)] = change
        return changes


def _layer_of(name: str) -> str:
    return re.sub(r"(resblocks_\d+_attn)_(q|k|v|out)_proj$", r"\1", name)


def _real(layer: nn.Module) -> nn.Module:
    """Returns a layer of the meta device with weights."""
    if isinstance(layer, nn.MultiheadAttention):
        real: nn.Module = nn.MultiheadAttention(layer.embed_dim, _NUM_HEADS)
    else:
        real = type(layer).__new__(type(layer))
        real.__dict__.update({name: value for name, value in layer.__dict__.items() if name != "_parameters"})
        real._parameters = {}
        for name, parameter in layer._parameters.items():
            real._parameters[name] = None if parameter is None else nn.Parameter(torch.empty(parameter.shape))
    for parameter in real.parameters():
        parameter.requires_grad_(False).copy_(weight(tuple(parameter.shape)))
    return real


def _layers(
    shapes: dict[str, tuple[int, ...]], places: dict[str, ModuleKey], family: str
) -> tuple[dict[str, nn.Module], dict[str, ModuleKey]]:
    layers: dict[str, nn.Module] = {}
    keys: dict[str, ModuleKey] = {}
    for module, key in places.items():
        if f"{module}.weight" not in shapes:
            continue
        name = _name(module, family)
        keys[name] = key
        with torch.device("meta"):
            if re.search(r"resblocks_\d+_attn_", name):
                layers[_layer_of(name)] = nn.MultiheadAttention(shapes[f"{module}.weight"][0], _NUM_HEADS)
            elif not name.endswith("text_projection"):
                layers[name] = _layer(module, shapes)
    for name, layer in list(layers.items()):
        if isinstance(layer, nn.MultiheadAttention):
            layers[f"{name}_out_proj"] = layer.out_proj
    return layers, keys


def _layer(module: str, shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    shape, has_bias = shapes[f"{module}.weight"], f"{module}.bias" in shapes
    if module.endswith("_embedding"):
        return nn.Embedding(shape[0], shape[1])
    if len(shape) == 1:
        return nn.LayerNorm(shape[0])
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=has_bias)
    return nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), padding=shape[2] // 2, bias=has_bias)


def _name(module: str, family: str) -> str:
    """Returns what A1111 calls a module of ComfyUI."""
    if module.startswith("diffusion_model."):
        return module.replace(".", "_")
    bare = re.sub(r"^clip_[lg]\.", "", module)
    if module.startswith("clip_l."):
        return ("0_" if family == "sdxl" else "") + bare.replace(".", "_")
    for old, new in (
        (r"transformer\.text_model\.encoder\.layers\.(\d+)\.", r"model.transformer.resblocks.\1."),
        (r"self_attn", "attn"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"layer_norm(\d)", r"ln_\1"),
        (r"^transformer\.text_model\.(embeddings\.)?", "model."),
    ):
        bare = re.sub(old, new, bare)
    return "1_" + bare.replace(".", "_")


def _read(path: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _embedding(data: dict[str, Any], name: str, filename: str) -> SimpleNamespace:
    """Takes a bundled embedding as its `create_embedding_from_data` does: one tensor, or SDXL's two.

    Raises:
        ValueError: it is neither.
    """
    if "string_to_param" not in data and not {"clip_g", "clip_l"} <= data.keys() and len(data) != 1:
        raise ValueError(f"{filename}: {name} is no embedding")
    return SimpleNamespace(loaded=None, shorthash="")


def stub_modules() -> None:
    """Gives the names that its files import from the rest of the program, which do nothing here."""
    modules = ModuleType("modules")
    for name in ("sd_models", "cache", "errors", "hashes", "shared", "devices"):
        module = ModuleType(f"modules.{name}")
        setattr(modules, name, module)
        sys.modules[f"modules.{name}"] = module
    devices: Any = sys.modules["modules.devices"]
    devices.cpu, devices.device, devices.dtype = torch.device("cpu"), torch.device("cpu"), torch.float32
    mmdit: Any = ModuleType("modules.models.sd3.mmdit")
    mmdit.QkvLinear = type("QkvLinear", (nn.Linear,), {})
    for name, value in {"models": {"sd3": {"mmdit": mmdit}}}.items():
        sd3 = SimpleNamespace(mmdit=value["sd3"]["mmdit"])
        setattr(modules, name, SimpleNamespace(sd3=sd3))
    sys.modules |= {"modules": modules, "modules.models": ModuleType("models"), "modules.models.sd3": ModuleType("sd3")}
    sys.modules["modules.models.sd3.mmdit"] = mmdit


def _define(source: Path, namespace: dict[str, Any]) -> None:
    """Defines the functions of its networks.py that read and apply files, and the table that they use."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef) and node.name.startswith(_OWN) and node.name != "load_networks")
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "suffix_conversion")
    ]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
    exec(compile(tree, str(source), "exec"), namespace)

    class Network:
        """The part of its class that holds what is read, without a file's metadata."""

        def __init__(self, name: str, disk: Any) -> None:
            self.name, self.network_on_disk = name, disk
            self.modules: dict[str, Any] = {}

    namespace["network"].Network = Network
