"""What a target means: a group, the path of a module, or re:PATTERN, in every part or, as "part/...", in one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_diffusion.config.per_module import Entry, read_entry
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.base_model import Part
from lora_diffusion.core.errors import TargetError
from lora_diffusion.core.text import name_some, question, suggestion

if TYPE_CHECKING:
    from torch import nn

MAX_LISTED = 10


@dataclass(frozen=True)
class Scope:
    """The modules among which the targets of one setting are looked up."""

    key: str
    """The setting, for messages."""
    modules: Mapping[str, Mapping[str, nn.Module]]
    """Part -> path -> module."""
    declared: Mapping[str, Part]
    """Part -> its groups, for all parts of the base."""
    full: Sequence[str] = ()
    """Parts that are not looked at, as they are trained in full."""
    noun: str = "module"
    """What messages call one of the modules."""

    def find(self, target: str) -> list[ModuleKey]:
        """Returns the modules that a target names.

        Raises:
            TargetError: it names none, or a part that is not looked at, or is no regular expression.
        """
        parts, bare = self._split(target)
        matched = [ModuleKey(part, path) for part in parts for path in self._match(part, bare)]
        if not matched:
            words = [group for part in parts for group in self.declared[part].groups if self._match(part, group)]
            groups = dict.fromkeys(words)
            paths = dict.fromkeys(
                path for part in parts for path, module in self.modules[part].items() if layer_type(module)
            )
            near = self._near(parts, bare, paths) if bare.startswith("re:") else suggestion(bare, groups | paths)
            raise TargetError(
                f'{self.key}: "{target}" matches no {self.noun} of {", ".join(parts)}'
                f"{near}. Use a group ({', '.join(groups)}), the path of a Linear or Conv2d module, or re:PATTERN."
            )
        return matched

    def _near(self, parts: Sequence[str], bare: str, paths: Iterable[str]) -> str:
        """Suggests patterns that match: the given one for the end of a path, and those with one word corrected."""
        pattern = bare.removeprefix("re:")
        tries = [f".*{pattern}"]
        known = sorted({name for path in paths for name in path.split(".")})
        for word in re.finditer(r"(?<!\\)\b\w{2,}", pattern):
            for name in difflib.get_close_matches(word[0], known):
                tries.append(pattern[: word.start()] + name + pattern[word.end() :])
        return question([f"re:{text}" for text in tries if self._holds_adapters(parts, text)][:3])

    def _holds_adapters(self, parts: Sequence[str], pattern: str) -> bool:
        try:
            modules = [self.modules[part][path] for part in parts for path in self._match(part, f"re:{pattern}")]
        except TargetError:  # what was a pattern is none any more
            return False
        return bool(modules) and all(map(layer_type, modules))

    def _split(self, target: str) -> tuple[tuple[str, ...], str]:
        if target.startswith("re:") or "/" not in target:
            return tuple(self.modules), target
        part, bare = target.split("/", 1)
        if part not in self.declared:
            raise TargetError(
                f'{self.key}: "{target}" asks in part "{part}", which the base does not have'
                f"{suggestion(part, self.declared)}. Parts: {', '.join(self.declared)}."
            )
        if part in self.full:
            raise TargetError(
                f'{self.key}: "{target}" asks in part {part}, which adapter.full trains in full, without targets and '
                "ranks; drop one of the two."
            )
        if part not in self.modules:
            raise TargetError(f'{self.key}: "{target}" asks in part {part}; add {part} to adapter.parts.')
        return (part,), bare

    def _match(self, part: str, bare: str) -> list[str]:
        if bare.startswith("re:"):
            return self._fullmatch(part, (bare.removeprefix("re:"),), bare)
        if bare in self.declared[part].groups:
            return self._fullmatch(part, self.declared[part].groups[bare], bare)
        return [bare] if bare in self.modules[part] else []

    def _fullmatch(self, part: str, patterns: Sequence[str], bare: str) -> list[str]:
        try:
            compiled = [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise TargetError(f'{self.key}: "{bare}" is not a regular expression: {error}.') from error
        # Containers, activations and dropout have no weight of their own, so a pattern cannot mean them.
        weighty = (
            path for path, module in self.modules[part].items() if any(True for _ in module.parameters(recurse=False))
        )
        return [path for path in weighty if any(pattern.fullmatch(path) for pattern in compiled)]


def fit_for_adapters(scope: Scope, target: str, unread: Mapping[str, Sequence[str]]) -> list[ModuleKey]:
    """Returns the modules that a target names, all of which can hold an adapter.

    Raises:
        TargetError: one cannot, or the base reads the output of none.
    """
    matched = scope.find(target)
    if not any(read_ones({path: scope.modules[part][path]}, unread.get(part, ())) for part, path in matched):
        raise TargetError(
            f'{scope.key}: "{target}" matches only {name_some([f"{part}/{path}" for part, path in matched])}, whose '
            "output this base never reads, so that nothing could be learnt there. Name other layers."
        )
    unfit = [
        f"{part}/{path} is a {type(scope.modules[part][path]).__name__}"
        for part, path in matched
        if not layer_type(scope.modules[part][path])
    ]
    if unfit:
        raise TargetError(
            f'{scope.key}: "{target}" matches {len(unfit)} module(s) that cannot hold an adapter; only Linear and '
            "Conv2d (without groups) can. Name a narrower target.",
            unfit[:MAX_LISTED],
        )
    return matched


def read_ones(modules: Mapping[str, nn.Module], unread: Sequence[str]) -> dict[str, nn.Module]:
    """Returns the modules whose output the base reads."""
    patterns = [re.compile(pattern) for pattern in unread]
    return {
        path: module for path, module in modules.items() if not any(pattern.fullmatch(path) for pattern in patterns)
    }


def settle(texts: Sequence[str], scope: Scope) -> dict[ModuleKey, Entry]:
    """Returns module -> the last of the settings TARGET=VALUE that names it.

    Raises:
        TargetError: one of them names no module, or none that a later one does not name too.
        ConfigError: one of them has another form.
    """
    if texts and not scope.modules:
        raise TargetError(f"{scope.key} acts on no module, since adapter.full trains every part in full; drop it.")
    entries = [read_entry(scope.key, text) for text in texts]
    settled = {key: entry for entry in entries for key in scope.find(entry.target)}
    if idle := [str(entry) for entry in entries if entry not in settled.values()]:
        raise TargetError(
            f"{idle[0]} acts on no module, since the last entry that matches a module counts, and later ones match all "
            "that this one does. Drop it, or move it down."
        )
    return settled


def layer_type(module: nn.Module) -> str:
    """Returns linear or conv for a module that can hold an adapter, else ""."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return "linear"
    return "conv" if isinstance(module, nn.Conv2d) and module.groups == 1 else ""
