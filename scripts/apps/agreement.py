"""Whether what `verify` says of a file is what a program did with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lora_diffusion.adapters.merge import delta_weight
from lora_diffusion.compat.app_rules import HIDDEN
from lora_diffusion.compat.matched_file import MatchedFile, MatchedModule
from lora_diffusion.compat.simulation import AppResult
from lora_diffusion.core.adapter_state import ModuleAdapter
from lora_diffusion.core.errors import AdapterFileError
from scripts.apps.weights import Outcome, Place

_ABOUT_CONTENT = {"too large", "not finite", "whole numbers", "float16 overflow", "float16 underflow"}
"""Problems of the numbers themselves, which no loading code looks at."""


@dataclass(frozen=True)
class Agreement:
    """What was compared, and what differs."""

    num_modules: int
    other_modules: Sequence[str]
    other_file: str = ""

    @property
    def is_whole(self) -> bool:
        """Says whether all is as `verify` says."""
        return not self.other_modules and not self.other_file

    def text(self) -> str:
        """Returns one line."""
        return "; ".join([*([self.other_file] if self.other_file else []), *self.other_modules[:6]])


def compare(file: MatchedFile, result: AppResult, outcome: Outcome) -> Agreement:
    """Compares module by module, and whether all of the file is applied as it is meant.

    A module that `verify` calls lost must not change, one that it calls applied must change, and where the file alone
    tells the change, by the factor that `verify` tells.
    """
    modules = [module for module in file.modules if module.key]
    others = [text for module in modules if (text := _differs(module, result, outcome, modules))]
    return Agreement(len(modules), others, _file_differs(result, outcome, modules))


def _file_differs(result: AppResult, outcome: Outcome, modules: Sequence[MatchedModule]) -> str:
    said = {problem.error for problem in result.problems if problem.severity != HIDDEN} - _ABOUT_CONTENT
    whole = not outcome.error and not outcome.num_unmatched and all(map(_is_applied(outcome), modules))
    if not said and not whole:
        return f"said to be sound, but {outcome.error or f'{outcome.num_unmatched} tensors did not match'}"
    if outcome.error and result.num_applied:
        return f"refused ({outcome.error}), but {result.num_applied} modules were said to be applied"
    return "" if said or whole else "said to be sound"


def _is_applied(outcome: Outcome):  # type: ignore[no-untyped-def]
    return lambda module: bool(_changes(module, outcome))


def _changes(module: MatchedModule, outcome: Outcome) -> Mapping[Place, Tensor]:
    return {place: change for place, change in outcome.changes.items() if place.key == module.key and change.any()}


def _differs(module: MatchedModule, result: AppResult, outcome: Outcome, all_modules: Sequence[MatchedModule]) -> str:
    factor, changes = result.factors[module.name], _changes(module, outcome)
    if sum(other.key == module.key for other in all_modules) > 1:
        return ""  # only one of two names is applied, and each program takes another
    if factor == 0 and changes:
        return f"{module.name} said to be lost, but changes {sorted(place.kind for place in changes)}"
    if factor != 0 and not changes:
        return f"{module.name} said to be applied, but nothing changes"
    expected = _change(module) if factor and math.isfinite(factor) else None
    if factor and expected is not None and changes:
        assert module.key
        real = changes.get(Place(module.key, "weight"))
        if real is None or not _close(real.float().flatten(), factor * expected.flatten()):
            return f"{module.name} said to be applied {factor:.4g} times, but is otherwise"
    return ""


def _change(module: MatchedModule) -> Tensor | None:
    """Returns the change of weight that a file alone tells; None where it takes the base, or has several kinds."""
    if module.beside or module.is_dora or not module.is_whole or module.variant not in _TOLD:
        return None
    roles = {role: tensor.float() for role, tensor in module.roles.items()}
    if module.variant == "full":
        return roles.get("diff")
    if module.variant == "norm":
        return roles.get("w_norm")
    adapter = ModuleAdapter(module.variant.replace("tucker", "lora"), roles, module.scale * module.rank)
    try:
        return delta_weight(adapter)
    except (AdapterFileError, RuntimeError):
        return None


_TOLD = ("lora", "tucker", "loha", "lokr", "full", "norm")


# Some programs multiply in the dtype of the file, so that bfloat16 rounds by up to 2^-8.
def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool((first - second).norm() <= 1e-2 * second.norm() + 1e-6)
