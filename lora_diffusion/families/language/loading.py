"""Bases that are one model of transformers: where they lie, whether they are whole, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.architectures.base import TextOutputArchitecture
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.files import content_hash
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.core.model_folder import check_model_folder
from lora_diffusion.core.text import shown
from lora_diffusion.families.model_files import damage, explained, find_local, read_json, silence_progress

if TYPE_CHECKING:
    import torch
    from torch import nn

_HUB_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
IGNORED = -100
"""What transformers puts for labels that have no loss."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def find(options: ModelOptions, builtins: Mapping[str, str], architecture: TextOutputArchitecture) -> Path:
    """Returns the folder that `model.path` means, with a model of this architecture and whole weights in it.

    Args:
        options: the `model:` section.
        builtins: name after "builtin:" -> folder that comes along.
        architecture: gives the types that `config.json` may name, and what messages call such a base.

    Raises:
        ModelError: it is no such folder.
        UnsupportedError: the frozen weights cannot be stored as asked.
    """
    if options.quantization != "none":
        from lora_diffusion.quantize import check

        check(options.quantization)
    folder = find_local(options.path, builtins, _HUB_PATTERNS, f"a folder of {architecture.title} or a hub id")
    if folder.is_file():
        raise ModelError(
            f"model.path={options.path} is a file; give a folder as save_pretrained of transformers makes it."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"The base {folder} holds no config.json; give a folder as save_pretrained makes it.")
    check_model_folder(folder, f"The base {folder}")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in architecture.model_classes:
        known = " or ".join(architecture.model_classes)
        raise ModelError(
            f"The base {folder} is of the type {shown(str(model_type))}, not {known}; set model.family to fit it or "
            "take another base."
        )
    with explained(folder):
        _check_weights(folder)
    return folder


def _check_weights(folder: Path) -> None:
    files = sorted(folder.glob("model*.safetensors"))
    if not files or not any((folder / name).is_file() for name in _WEIGHTS):
        pickled = "only pickled weights (.bin), which can run code" if list(folder.glob("*.bin")) else "no weights"
        raise ModelError(f"The base {folder} holds {pickled}; fetch its model.safetensors.")
    errors = [error for file in files if (error := damage(file))]
    if (folder / _WEIGHTS[1]).is_file():
        wanted = set(read_json(folder / _WEIGHTS[1]).get("weight_map", {}).values())
        errors += [f"{folder / name} is missing" for name in sorted(wanted - {file.name for file in files})]
    if errors:
        raise ModelError(f"The weights of the base {folder} cannot be read.", errors)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Returns the files that a checked folder is loaded from."""
    if (folder / _WEIGHTS[0]).is_file():
        return (folder / _WEIGHTS[0],)
    return tuple(folder / name for name in sorted(set(read_json(folder / _WEIGHTS[1])["weight_map"].values())))


def fingerprint(folder: Path, names: Sequence[str]) -> str:
    """Names those of the files that are there by their content."""
    files = [folder / name for name in names if (folder / name).is_file()]
    return " ".join(f"{file.name}={content_hash(file)}" for file in files)


def on_meta(folder: Path, build: Callable[[Any], nn.Module]) -> Any:
    """Returns the model of the folder's config on the meta device; `build` makes it from the config."""
    import torch
    from transformers import AutoConfig

    with explained(folder), torch.device("meta"):
        return build(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def load(folder: Path, model_class: Any, options: ModelOptions, device: torch.device) -> Any:
    """Returns the model on the CPU, frozen and in eval mode, in the dtype that its weights are kept in.

    Raises:
        ModelError: its weights lack tensors or do not fit its config.
    """
    from lora_diffusion.runtime.device import frozen_dtype

    silence_progress()
    with explained(folder):
        model, loading_info = model_class.from_pretrained(
            folder,
            dtype=frozen_dtype(options.dtype, device),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    errors = [f"{name} is missing" for name in sorted(loading_info["missing_keys"])]
    errors += [f"{name} has another shape" for name, *_ in loading_info.get("mismatched_keys", ())]
    if errors:
        raise ModelError(f"The weights of {folder} lack {len(errors)} tensors that its config announces.", errors[:10])
    return model.requires_grad_(False).eval()


def place(model: nn.Module, parts: Mapping[str, nn.Module], quantization: str, device: torch.device) -> None:
    """Quantizes the parts if asked, and moves the model."""
    if quantization != "none":
        from lora_diffusion.quantize import leave_file, quantize

        for part in parts.values():
            quantize(part, quantization, device)
        leave_file(model)
    model.to(device)


def peft_map(architecture: TextOutputArchitecture, parts: Mapping[str, nn.Module] | None) -> KeyMap:
    """Maps the modules of the parts to their paths in the whole model, those of older transformers as aliases.

    Args:
        architecture: says where a part stands in the model.
        parts: on the meta device; without them all modules are mapped that a base may have.
    """
    paths = architecture.paths if parts is None else layers(parts)
    keys = [ModuleKey(part, path) for part, part_paths in paths.items() for path in part_paths]
    prefixes = architecture.part_prefixes
    return KeyMap(
        ((key, prefixes[key.part][0] + key.path) for key in keys),
        ((key, prefix + key.path) for key in keys for prefix in prefixes[key.part][1:]),
    )


def layers(parts: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Returns the paths of all linear layers and two-dimensional convolutions of the parts."""
    from torch import nn

    return {
        part: [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for part, network in parts.items()
    }
