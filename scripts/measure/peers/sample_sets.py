"""The sample sets that are compared on, and the prompts that ask for what was learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_diffusion.core.files import shipped_path
from lora_diffusion.evaluation.results import Case
from lora_diffusion.evaluation.suites import control_prompts, read_cases

_LEAK = (
    "an emoji of a cat face, noto style",
    "an emoji of a red apple, twemoji style",
    "an emoji of a rose, fluent style",
    "an emoji of a frog, flat style",
)
"""Other things, in styles that the base knows."""
_NUM_PRIOR = 4


@dataclass(frozen=True)
class SampleSet:
    """What is trained, and how it is called."""

    name: str
    """Folder in `datasets/`."""
    config: str
    """Name of the shipped config."""
    trigger: str
    noun: str = ""
    """Of a concept: its class, in a word that the base knows."""
    subject: str = ""
    """Of a concept: its name, which the base does not know but the scorer does."""

    @property
    def kind(self) -> str:
        """Style or concept: sets of one kind are averaged."""
        return "concept" if self.subject else "style"

    @property
    def training(self) -> Path:
        """Folder of captioned pictures."""
        return shipped_path("datasets") / self.name / "train"

    @property
    def references(self) -> Path:
        """Folder of captioned pictures that are not trained on."""
        return shipped_path("datasets") / self.name / "references"

    @property
    def class_prompt(self) -> str:
        """The one prompt of the pictures that DreamBooth preserves."""
        return f"an emoji of {'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"

    @property
    def instance_prompt(self) -> str:
        """The one prompt of the training pictures in DreamBooth."""
        return f"an emoji of a {self.trigger} {self.noun}"

    def cases(self, num_prompts: int | None = None) -> list[Case]:
        """Returns what is generated: at most so many prompts of what was learnt, and as many others."""
        cases = [*self._asked()[:num_prompts], *self._others()[:num_prompts]]
        return [replace(case, index=index) for index, case in enumerate(cases)]

    def _asked(self) -> Sequence[Case]:
        if self.subject:
            suite = read_cases("emoji-subject", [self.trigger], [self.subject])
            return [case for case in suite if not case.is_control]
        captions = [path.read_text("utf-8").strip() for path in sorted(self.references.glob("*.txt"))]
        pairs = zip(captions, control_prompts(captions, self.trigger), strict=True)
        return [Case(0, caption, plain, plain, "style", "peers") for caption, plain in pairs]

    def _others(self) -> list[Case]:
        if self.subject:
            prior = [f"{self.class_prompt}, {style} style" for style in ("noto", "twemoji", "fluent", "flat")]
        else:
            prior = [case.control_prompt for case in self._asked()][:_NUM_PRIOR]
        groups = {"prior": prior, "leak": _LEAK}
        return [Case(0, text, text, text, group, "peers") for group, texts in groups.items() for text in texts]


SAMPLE_SETS = {
    one.name: one
    for one in (
        SampleSet("blob-style", "sd1/style", "blob style"),
        SampleSet("quendle-style", "sd1/style", "quendle style"),
        SampleSet("mavrok-style", "sd1/style", "mavrok style"),
        SampleSet("octopus", "sd1/concept", "zwx", "animal", "octopus"),
        SampleSet("guitar", "sd1/concept", "nimzo", "object", "guitar"),
        SampleSet("cupcake", "sd1/concept", "drimbo", "food", "cupcake"),
    )
}
