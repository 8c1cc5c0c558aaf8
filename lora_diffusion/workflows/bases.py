"""Bases as the user names them: which family takes one, and where its weights lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_diffusion.compose.checkpoint import Checkpoint, open_checkpoint
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core import registry
from lora_diffusion.core.errors import MissingModelError, ModelError, UntrainableError
from lora_diffusion.core.protocols.family import Family


def find_model(path: str, family: str | None = None) -> ModelOptions:
    """Returns the options of a base of the named family, or of the first that takes it.

    Raises:
        ModelError: no family takes it; says why for each.
    """
    return _find(path, family, lambda candidate, options: candidate.check(options))


def find_weights(path: str, family: str | None = None) -> ModelOptions:
    """Returns the options of a base as `find_model`, also of one that can be neither trained nor run.

    Such are bases for inpainting, UNets alone, and files without VAE or text encoders.

    Raises:
        ModelError: no family takes it; says why for each.
    """
    return _find(path, family, weights_path)


def weights_path(family: Family, options: ModelOptions) -> Path:
    """Returns where the weights of a base lie on this machine.

    Raises:
        ModelError: they are not of this family.
    """
    try:
        return family.check(options).path
    except UntrainableError as error:
        return error.path


def _find(path: str, family: str | None, check: Callable[[Family, ModelOptions], Any]) -> ModelOptions:
    errors: dict[str, list[str]] = {}
    for name in [family] if family else registry.available("families"):
        candidate: Family = registry.find("families", name)
        options: ModelOptions = candidate.options_type(family=name, path=path)
        try:
            check(candidate, options)
        except MissingModelError as error:
            errors.setdefault(str(error) if family else error.message, []).append(name)
        except UntrainableError as error:
            raise ModelError(str(error)) from error
        except ModelError as error:
            errors.setdefault(str(error), []).append(name)
        else:
            return options
    if len(errors) == 1:
        raise ModelError(next(iter(errors)))
    raise ModelError(
        f"{path} is no base of a known family.", [f"{', '.join(names)}: {text}" for text, names in errors.items()]
    )


def open_base(model: ModelOptions, *more: str) -> tuple[Family, Checkpoint]:
    """Opens the networks of a base that can hold adapters, and more of its folders."""
    family: Family = registry.find("families", model.family)
    path = weights_path(family, model)
    names = family.key_map("ldm" if path.is_file() else "peft", model)
    return family, open_checkpoint(path, [*family.parts, *more], names)
