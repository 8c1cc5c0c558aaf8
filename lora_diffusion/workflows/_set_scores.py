"""Scores of text outputs on one or more data sets, as `ask --score` and `transcribe --score` give them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from lora_diffusion.core.files import write_csv


class _Scores(Protocol):
    def to_json(self) -> dict[str, Any]: ...

    def lines(self) -> list[str]: ...


Scores = TypeVar("Scores", bound=_Scores)


@dataclass(frozen=True)
class SetScores(Generic[Scores]):
    """The scores of each data set."""

    paths: tuple[Path, ...]
    scores: tuple[Scores, ...]
    """In the order of the paths."""
    records: str
    """The attribute of the scores that holds one record for each output."""

    def to_json(self) -> dict[str, Any]:
        """Returns path -> scores."""
        return {name: scores.to_json() for name, scores in self._named().items()}

    def text(self) -> str:
        """Returns lines for people."""
        return "\n".join(line for name, scores in self._named().items() for line in (f"{name}:", *scores.lines()))

    def write_table(self, path: Path) -> None:
        """Writes a line for each output."""
        named = self._named().items()
        write_csv(path, [{"set": name, **vars(one)} for name, own in named for one in getattr(own, self.records)])

    def _named(self) -> dict[str, Scores]:
        return dict(zip(map(str, self.paths), self.scores, strict=True))
