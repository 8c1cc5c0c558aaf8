"""What most metrics have in common."""

from __future__ import annotations

from lora_diffusion.core.evidence import Evidence


class Defaults:
    """A metric of the pictures that were asked for, with CLIP, higher is better, and no anchor."""

    higher_is_better = True
    judges = "asked"
    needs: frozenset[str] = frozenset()
    scorers: tuple[str, ...] = ("clip",)
    per_prompt = False

    def chance(self, evidence: Evidence) -> float | None:
        """Returns None: chance says nothing."""

    def real(self, evidence: Evidence) -> float | None:
        """Returns None: real pictures say nothing."""
