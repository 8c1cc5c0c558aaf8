"""One client reading one file: which modules it applies, by how much, and what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_diffusion.compat.adapter_file import PAIRS, SHARED, AdapterFile, Base, FileModule
from lora_diffusion.compat.app_rules import HIDDEN, LOST, WRONG, Client, Fate
from lora_diffusion.core.text import name_some, shown

_TRIGGERS: Mapping[str, tuple[frozenset[str], ...]] = {
    **dict.fromkeys(PAIRS, (frozenset({"up"}),)),
    "loha": (frozenset({"w1_a"}),),
    "lokr": tuple(frozenset({role}) for role in ("w1", "w2", "w1_a", "w2_a")),
    "glora": (frozenset({"a1"}),),
    "oft": (frozenset({"oft_blocks"}),),
    "norm": (frozenset({"w_norm"}),),
    "full": (frozenset({"diff"}),),
    "set": (frozenset({"set_weight"}),),
}
"""Kind -> the tensors of which one makes ComfyUI and Forge take a module for it, whatever else is there."""
_WHOLE: Mapping[str, tuple[frozenset[str], ...]] = {
    **dict.fromkeys(PAIRS, (frozenset({"down", "up"}),)),
    "loha": (frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),),
    "ia3": (frozenset({"weight"}),),
    "lokr": tuple(
        frozenset({*first, *second}) for first in (("w1",), ("w1_a", "w1_b")) for second in (("w2",), ("w2_a", "w2_b"))
    ),
    "full": (frozenset({"diff"}),),
    "norm": (frozenset({"w_norm", "b_norm"}),),
    "glora": (frozenset({"a1", "a2", "b1", "b2", "alpha"}),),
    "oft": (frozenset({"oft_blocks"}),),
}
"""Kind -> the tensors without which A1111 does not take a module for it."""


def taken(client: Client, module: FileModule) -> list[str]:
    """Returns the kinds that a client takes a module for, the one that it applies to the weight first."""
    wanted = _TRIGGERS if client.by_trigger else _WHOLE
    kinds = module.kinds
    found = []
    for style in client.order:
        roles = kinds.get(style, {}).keys() | (module.roles.keys() & SHARED)
        if style in kinds and any(choice <= roles for choice in wanted.get(style, ())):
            found.append(style)
    return found


def choose(client: Client, module: FileModule) -> FileModule:
    """Returns a module as a client takes it, with the kind that it applies in front."""
    found = taken(client, module)
    return module.as_style(found[0]) if found else module


def unused(client: Client, module: FileModule) -> dict[str, str]:
    """Returns the tensors of a module that a client does not read, by role, with their style."""
    kinds = module.kinds
    read = taken(client, module)
    left = {role: style for style, roles in kinds.items() for role in roles if not _reads(client, style, role, read)}
    left |= {role: "" for role in module.roles if role in SHARED and not _reads_shared(client, role, read)}
    return {role: style for role, style in left.items() if role != "mid" or "kohya" not in read or not client.reads_mid}


def _reads(client: Client, style: str, role: str, read: Iterable[str]) -> bool:
    if client.by_trigger and style == "lokr" and "lokr" in client.order:
        return True  # every one of its tensors is marked as read by itself
    if style == "full" and role in client.biases:
        return True
    applied = read if client.by_trigger else list(read)[:1]
    return style in applied and role != "mid"


def _reads_shared(client: Client, role: str, read: list[str]) -> bool:
    if role == "reshape":
        return client.reads_reshape and bool(read) and any(style in PAIRS for style in read)
    if role == "scale":
        return client.reads_scale
    if role == "magnitude":
        return client.dora == "own"
    return role == "alpha" or client.dora != "ignored"


_ORDER = (LOST, WRONG, HIDDEN)


@dataclass(frozen=True)
class Problem:
    """One thing that a client gets wrong."""

    kind: str
    severity: str
    """lost, wrong or hidden."""
    text: str
    remedy: str
    modules: tuple[str, ...] = ()
    """Names as the file spells them; empty where the file as a whole is meant."""

    def lines(self) -> list[str]:
        """Returns lines for people."""
        names = f": {shown(name_some(list(self.modules)), 400)}" if self.modules else ""
        return [f"  {self.severity:<7}{self.text}{names}", f"         {self.remedy}"]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a file in a client."""

    client: str
    title: str
    num_modules: int
    num_applied: int
    largest_difference: float | None
    """Frobenius norm of the difference of a module's change from ours, as a share of ours: 1 for a lost module,
    infinity where numbers overflow. None where it depends on the base's weights."""
    problems: tuple[Problem, ...]
    factors: Mapping[str, float | None] = field(default_factory=dict, repr=False)
    """Module -> what is applied as a multiple of our change, see `Trial`."""

    @property
    def is_sound(self) -> bool:
        """Says whether all is applied as we would."""
        return all(problem.severity == HIDDEN for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; infinity, which JSON lacks, becomes the text "inf"."""
        difference = self.largest_difference
        return {
            "client": self.client,
            "sound": self.is_sound,
            "num_modules": self.num_modules,
            "num_applied": self.num_applied,
            "largest_difference": "inf" if difference == math.inf else difference,
            "problems": [{**vars(problem), "modules": list(problem.modules)} for problem in self.problems],
        }

    def lines(self) -> list[str]:
        """Returns lines for people."""
        applied = f"{self.title} applies {self.num_applied} of {self.num_modules} modules"
        lines = [f"{applied}; largest difference of a change: {_share(self.largest_difference)}"]
        return lines + [line for problem in self.problems for line in problem.lines()]


def _share(difference: float | None) -> str:
    if difference is None:
        return "depends on the base"
    return "numbers overflow" if difference == math.inf else f"{100 * difference:.2g} %"


@dataclass
class Trial:
    """Collects what a client does; every check adds to it."""

    client: Client
    file: AdapterFile
    base: Base
    factors: dict[str, float | None] = field(default_factory=dict)
    """Module -> what the client applies as a multiple of our change: 0 where it is lost, infinity where it overflows,
    None where it depends on the base."""
    moved: dict[str, float] = field(default_factory=dict)
    """Module -> what its change is off by besides, as a share of it."""
    problems: dict[str, Problem] = field(default_factory=dict)
    """By kind."""
    modules: list[FileModule] = field(default_factory=list)
    """As the client takes them: with the kind in front that it applies."""
    is_lost: bool = False
    """Nothing of the file is applied, so that no more need be looked for."""

    def __post_init__(self) -> None:
        """Begins with every module applied as we would."""
        self.modules = [choose(self.client, module) for module in self.file.modules]
        self.factors = {module.name: 1.0 for module in self.file.modules}

    def applied(self) -> list[FileModule]:
        """Returns the modules that are not lost so far."""
        return [module for module in self.modules if self.factors[module.name] != 0]

    def report(self, kind: str, severity: str, text: str, remedy: str, modules: Iterable[str] = ()) -> None:
        """Adds a problem, or its modules to the one of that kind."""
        names = tuple(modules)
        known = self.problems.get(kind)
        self.problems[kind] = Problem(kind, severity, text, remedy, (*known.modules, *names) if known else names)

    def suffer(self, kind: str, fate: Fate, what: str, remedy: str, names: Iterable[str]) -> None:
        """Lets a fate befall modules, or the file because of them."""
        names = list(names)
        if not names:
            return
        text = f"{len(names)} {what}; {self.client.title} {fate.text}"
        self.report(kind, fate.severity, text, remedy, names)
        if fate.scope == "file":
            self.lose_all()
        else:
            self.scale(dict.fromkeys(names, 0.0 if fate.severity == LOST else None))

    def scale(self, factors: Mapping[str, float | None]) -> None:
        """Says what modules are applied by; what is lost or unknown stays so."""
        for name, factor in factors.items():
            own = self.factors.get(name, 0.0)
            if own is not None and own != 0:
                self.factors[name] = None if factor is None else own * factor

    def lose_all(self) -> None:
        """Lets nothing of the file be applied."""
        self.factors = dict.fromkeys(self.factors, 0.0)
        self.is_lost = True

    def verdict(self) -> Verdict:
        """Sums up."""
        off = [self._difference(name) for name in self.factors]
        known = [difference for difference in off if difference is not None]
        largest = max(known, default=0.0) if len(known) == len(off) else None
        problems = sorted(self.problems.values(), key=lambda problem: _ORDER.index(problem.severity))
        return Verdict(
            self.client.name,
            self.client.title,
            len(self.factors),
            sum(factor != 0 for factor in self.factors.values()),
            largest,
            tuple(problems),
            dict(self.factors),
        )

    def _difference(self, name: str) -> float | None:
        factor = self.factors[name]
        if factor is None:
            return None
        if math.isnan(factor):
            return math.inf
        return max(abs(factor - 1), self.moved.get(name, 0.0) if factor else 0.0)
