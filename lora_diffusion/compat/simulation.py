"""One app reading one file: which modules it applies, by how much, and what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_diffusion.compat.app_rules import HIDDEN, LOST, WRONG, App, Consequence
from lora_diffusion.compat.matched_file import PAIRS, SHARED, Base, MatchedFile, MatchedModule
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


def taken(app: App, module: MatchedModule) -> list[str]:
    """Returns the kinds that an app takes a module for, the one that it applies to the weight first."""
    wanted = _TRIGGERS if app.by_trigger else _WHOLE
    styles = module.styles
    applied = []
    for style in app.order:
        roles = styles.get(style, {}).keys() | (module.roles.keys() & SHARED)
        if style in styles and any(choice <= roles for choice in wanted.get(style, ())):
            applied.append(style)
    return applied


def choose(app: App, module: MatchedModule) -> MatchedModule:
    """Returns a module as an app takes it, with the style that it applies in front."""
    styles = taken(app, module)
    return module.as_style(styles[0]) if styles else module


def unused(app: App, module: MatchedModule) -> dict[str, str]:
    """Returns the tensors of a module that an app does not read, by role, with their style."""
    styles = module.styles
    read = taken(app, module)
    left = {role: style for style, roles in styles.items() for role in roles if not _reads(app, style, role, read)}
    left |= {role: "" for role in module.roles if role in SHARED and not _reads_shared(app, role, read)}
    return {role: style for role, style in left.items() if role != "mid" or "kohya" not in read or not app.reads_mid}


def _reads(app: App, style: str, role: str, read: Iterable[str]) -> bool:
    if app.by_trigger and style == "lokr" and "lokr" in app.order:
        return True  # every one of its tensors is marked as read by itself
    if style == "full" and role in app.biases:
        return True
    applied = read if app.by_trigger else list(read)[:1]
    return style in applied and role != "mid"


def _reads_shared(app: App, role: str, read: list[str]) -> bool:
    if role == "reshape":
        return app.reads_reshape and bool(read) and any(style in PAIRS for style in read)
    if role == "scale":
        return app.reads_scale
    if role == "magnitude":
        return app.dora == "own"
    return role == "alpha" or app.dora != "ignored"


_ORDER = (LOST, WRONG, HIDDEN)


@dataclass(frozen=True)
class Problem:
    """One thing that an app gets wrong."""

    error: str
    """What it is, in a word or two that do not change."""
    severity: str
    """lost, wrong or hidden."""
    text: str
    remedy: str
    modules: tuple[str, ...] = ()
    """Names in the file; empty where the file as a whole is meant."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        values = {"severity": self.severity, "text": self.text, "remedy": self.remedy, "modules": list(self.modules)}
        return {"kind": self.error, **values}

    def lines(self) -> list[str]:
        """Returns lines for people."""
        names = f": {shown(name_some(list(self.modules)), 400)}" if self.modules else ""
        return [f"  {self.severity:<7}{self.text}{names}", f"         {self.remedy}"]


@dataclass(frozen=True)
class AppResult:
    """What becomes of a file in an app."""

    app: str
    title: str
    num_modules: int
    num_applied: int
    largest_difference: float | None
    """Frobenius norm of the difference of a module's change from ours, as a share of ours: 1 for a lost module,
    infinity where numbers overflow. None where it depends on the base's weights."""
    problems: tuple[Problem, ...]
    factors: Mapping[str, float | None] = field(default_factory=dict, repr=False)
    """Module -> what is applied as a multiple of our change, see `Simulation`."""

    @property
    def is_sound(self) -> bool:
        """Says whether all is applied as we would."""
        return all(problem.severity == HIDDEN for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; infinity, which JSON lacks, becomes the text "inf"."""
        difference = self.largest_difference
        return {
            "client": self.app,
            "sound": self.is_sound,
            "num_modules": self.num_modules,
            "num_applied": self.num_applied,
            "largest_difference": "inf" if difference == math.inf else difference,
            "problems": [problem.to_json() for problem in self.problems],
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
class Simulation:
    """Collects what an app does; every check adds to it."""

    app: App
    file: MatchedFile
    factors: dict[str, float | None] = field(default_factory=dict)
    """Module -> what the app applies as a multiple of our change: 0 where it is lost, infinity where it overflows,
    None where it depends on the base."""
    moved: dict[str, float] = field(default_factory=dict)
    """Module -> what its change is off by besides, as a share of it."""
    problems: dict[str, Problem] = field(default_factory=dict)
    """By error."""
    modules: list[MatchedModule] = field(default_factory=list)
    """As the app takes them: with the style in front that it applies."""
    is_lost: bool = False
    """Nothing of the file is applied, so that no more need be looked for."""

    def __post_init__(self) -> None:
        """Begins with every module applied as we would."""
        self.modules = [choose(self.app, module) for module in self.file.modules]
        self.factors = {module.name: 1.0 for module in self.file.modules}

    @property
    def base(self) -> Base:
        """The base that the file is used with."""
        return self.file.base

    def applied(self) -> list[MatchedModule]:
        """Returns the modules that are not lost so far."""
        return [module for module in self.modules if self.factors[module.name] != 0]

    def report(self, error: str, severity: str, text: str, remedy: str, modules: Iterable[str] = ()) -> None:
        """Adds a problem, or its modules to that of the same error."""
        names = tuple(modules)
        known = self.problems.get(error)
        self.problems[error] = Problem(error, severity, text, remedy, (*known.modules, *names) if known else names)

    def fail(self, error: str, consequence: Consequence, what: str, remedy: str, names: Iterable[str]) -> None:
        """Lets a consequence befall modules, or the file because of them."""
        names = list(names)
        if not names:
            return
        text = f"{len(names)} {what}; {self.app.title} {consequence.text}"
        self.report(error, consequence.severity, text, remedy, names)
        if consequence.scope == "file":
            self.lose_all()
        else:
            self.scale(dict.fromkeys(names, 0.0 if consequence.severity == LOST else None))

    def scale(self, factors: Mapping[str, float | None]) -> None:
        """Says what modules are applied by; what is lost or unknown stays so."""
        for name, factor in factors.items():
            known = self.factors.get(name, 0.0)
            if known is not None and known != 0:
                self.factors[name] = None if factor is None else known * factor

    def lose_all(self) -> None:
        """Lets nothing of the file be applied."""
        self.factors = dict.fromkeys(self.factors, 0.0)
        self.is_lost = True

    def result(self) -> AppResult:
        """Sums up."""
        off = [self._difference(name) for name in self.factors]
        known = [difference for difference in off if difference is not None]
        largest = max(known, default=0.0) if len(known) == len(off) else None
        problems = sorted(self.problems.values(), key=lambda problem: _ORDER.index(problem.severity))
        return AppResult(
            self.app.name,
            self.app.title,
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
