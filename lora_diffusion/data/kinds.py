"""The kinds of samples that a run can be trained on, found by the `sample_type` of the family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lora_diffusion.config.schema import PreviewConfig
from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.samples import AudioText, Chat, ImageText, Request, Sample
from lora_diffusion.data import chats, pictures, recordings


class Report(Protocol):
    """Facts about a data set: a dataclass of plain values."""

    def lines(self) -> list[str]:
        """Returns the report as lines of plain text."""


class Kind(Protocol):
    """A kind of samples. One object KIND in `data/<noun>.py`, whose import must not import torch."""

    noun: str
    """What messages call the samples, say "pictures"."""

    def read(self, config: Any, info: BaseInfo) -> Sequence[Sample]:
        """Returns the samples of `data.path`, sorted, at least one; reads all files once, so that nothing fails later.

        Raises:
            ConfigError: a setting of `data` that this base cannot use.
            DataError: the data cannot be used; all faults are listed at once.
        """

    def identity(self, sample: Any, config: Any) -> list[Any]:
        """Returns JSON values that name all of a sample that a prepared item depends on: bytes, texts, settings.

        Names and repeats are not part of it.
        """

    def view_identity(self, sample: Any, config: Any) -> list[Any]:
        """Returns JSON values that name what the views of a sample depend on: its bytes, and how they are seen."""

    def text_identity(self, sample: Any) -> list[Any]:
        """Returns JSON values that name what is made of the texts of a sample."""

    def open(self, sample: Any, config: Any) -> Sample:
        """Returns the sample with its raw input, as the family's `prepare` wants it."""

    def group(self, sample: Any) -> str:
        """Returns what the `group` of the prepared item will be; samples of one group are prepared together."""

    def num_at_once(self, sample: Any, config: Any) -> int:
        """Returns how many samples of this one's group are opened and prepared at once."""

    def describe(self, samples: Sequence[Any]) -> Report:
        """Looks at samples that `read` returned, for a dry run."""

    def largest(self, samples: Sequence[Any]) -> tuple[int, int]:
        """Returns the size of the sample that needs most memory, as the family's `example` takes it."""

    def previews(self, samples: Sequence[Any], config: PreviewConfig) -> list[Request]:
        """Returns what is asked of the model while it is trained.

        Raises:
            ConfigError: `preview.prompts` cannot be asked of this kind.
        """

    def metadata(self, samples: Sequence[Any], config: Any) -> dict[str, Any]:
        """Returns what an adapter file tells of its data besides texts, by kohya's names without ss_."""

    def headline(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Returns the `resolution` and the `trigger` that `formats.metadata.build` takes, where there are any."""

    def texts(self, sample: Any) -> tuple[str, ...]:
        """Returns the texts of a sample, whose words `output.publish_tags` counts in the file."""


KINDS: Mapping[type[Sample], Kind] = {
    ImageText: pictures.KIND,
    AudioText: recordings.KIND,
    Chat: chats.KIND,
}
"""A family's `sample_type` -> its kind; `config.schema.DATA_SECTIONS` holds the settings of each."""
