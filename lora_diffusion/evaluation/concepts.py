"""The concepts that a composition is to show together, as users name them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.data.captions import phrase_pattern
from lora_diffusion.evaluation.results import Case, FileHash

_CONCEPT = re.compile(r"(subject|style):([^=]+)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class NamedConcept:
    """One concept, its references, and who shows it alone."""

    trigger: str
    """The words that ask for it in prompts."""
    is_style: bool
    folder: str
    """Of its references, as the user gave it."""
    references: Sequence[FileHash] = ()
    reference_captions: Sequence[str] = ()
    """As in Evidence."""
    alone: Sequence[str] = ()
    """Candidates that have its adapter and no other."""


def parse(text: str) -> NamedConcept:
    """Reads subject:TRIGGER=FOLDER or style:TRIGGER=FOLDER; the folder is not looked at.

    >>> parse("style:blob style=blobs").trigger
    'blob style'

    Raises:
        ConfigError: it has another form.
    """
    match = _CONCEPT.fullmatch(text)
    if not match or not match[2].strip():
        raise ConfigError(
            f"--concept {text}: is no concept; write subject:TRIGGER=FOLDER or style:TRIGGER=FOLDER, with the words "
            "that ask for it and the folder of its references, say 'style:blob style=blobs'."
        )
    return NamedConcept(match[2].strip(), match[1] == "style", match[3])


def check(concepts: Sequence[NamedConcept], cases: Sequence[Case]) -> list[str]:
    """Returns an error for each trigger that is there twice, and if no prompt asks for all concepts."""
    triggers = [concept.trigger for concept in concepts]
    twice = dict.fromkeys(trigger for trigger in triggers if triggers.count(trigger) > 1)
    errors = [f"--concept: {trigger!r} is there twice; give each concept once." for trigger in twice]
    prompts = [case.prompt for case in cases if not case.is_control]
    patterns = [phrase_pattern(trigger) for trigger in triggers]
    if concepts and prompts and not any(all(one.search(prompt) for one in patterns) for prompt in prompts):
        errors.append(
            f"--concept: no prompt holds the triggers of all concepts ({', '.join(triggers)}); give prompts that do, "
            "as the suites composition-style and composition-subjects have."
        )
    return errors


def file_paths(files: Sequence[FileHash]) -> list[Path]:
    """Returns where files are."""
    return [Path(file.path) for file in files]
