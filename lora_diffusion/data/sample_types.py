"""The types of samples that a run can be trained on: all that differs between them, one object each.

A family names the class of its samples (`sample_type`); `find` gives the object. Importing this file imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lora_diffusion.config.schema import (
    ChatDataConfig,
    DataConfig,
    ImageDataConfig,
    PreviewConfig,
    RecordingDataConfig,
)
from lora_diffusion.core.base_model import BaseInfo, ChatInfo, SpeechInfo
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import write_text
from lora_diffusion.core.logs import logger
from lora_diffusion.core.samples import AudioText, Chat, ImageText, Output, Request, Sample
from lora_diffusion.core.text import shown, suggestion
from lora_diffusion.data import chats, image_folder, images, speech_folder
from lora_diffusion.data.folder import content_digest

_NUM_PREVIEWS = 4


class Report(Protocol):
    """Facts about a data set: a dataclass of plain values."""

    def lines(self) -> list[str]:
        """Returns the report as lines of plain text."""


class SampleType(ABC):
    """One type of sample. Every question whose answer depends on the type is a member here."""

    noun: ClassVar[str]
    """What messages call the samples, say "images"."""
    task: ClassVar[str]
    """What messages say that bases do with them, say "generate images"."""
    section: ClassVar[type[DataConfig]]
    """The class of the `data:` section, which names the class of the samples."""
    metrics: ClassVar[tuple[str, ...]]
    """Scores of what the bases give, best first; the first one decides where none is named."""
    makes_images: ClassVar[bool] = False
    """Whether the bases give images; else texts."""

    @abstractmethod
    def read(self, config: Any, info: Any) -> Sequence[Sample]:
        """Returns the samples of `data.path`, sorted, at least one; reads all files once, so that nothing fails later.

        Raises:
            ConfigError: a setting of `data` that this base cannot use.
            DataError: the data cannot be used; all errors are listed at once.
        """

    def identity(self, sample: Any, config: Any) -> list[Any]:
        """Returns JSON values that name all of a sample that a prepared item depends on: bytes, texts, settings.

        Names and repeats are not part of it.
        """
        return [*self.view_identity(sample, config), *self.text_identity(sample)]

    @abstractmethod
    def view_identity(self, sample: Any, config: Any) -> list[Any]:
        """Returns JSON values that name what the views of a sample depend on: its bytes, and how they are opened."""

    @abstractmethod
    def text_identity(self, sample: Any) -> list[Any]:
        """Returns JSON values that name what the texts of a sample depend on."""

    @abstractmethod
    def open(self, sample: Any, config: Any) -> Sample:
        """Returns the sample with its views, as the family's `prepare` wants it."""

    @abstractmethod
    def group(self, sample: Any) -> str:
        """Returns what the `group` of the prepared item will be; samples of one group are prepared together."""

    @abstractmethod
    def num_at_once(self, sample: Any, config: Any) -> int:
        """Returns how many samples of this one's group are opened and prepared at once."""

    @abstractmethod
    def describe(self, samples: Sequence[Any]) -> Report:
        """Returns the facts of samples that `read` returned, for a dry run."""

    @abstractmethod
    def largest(self, samples: Sequence[Any]) -> tuple[int, int]:
        """Returns the size of the sample that needs most memory, as the family's `example` takes it."""

    def assumed_size(self, config: Any, info: BaseInfo) -> tuple[int, int] | None:
        """Returns the size that config and base alone decide, as `largest` gives it; None where the data decides."""
        del config, info
        return None

    def warn(self, samples: Sequence[Any], model: Any) -> None:
        """Warns of settings in `model:` that do nothing with these samples."""
        del samples, model

    def explain(self, samples: Sequence[Any], model: Any) -> list[str]:
        """Returns lines that say which texts of these samples the `model:` section shows, how often, and what for."""
        del samples, model
        return []

    @abstractmethod
    def previews(self, samples: Sequence[Any], config: PreviewConfig) -> list[Request]:
        """Returns the requests that previews answer while the model is trained.

        Raises:
            ConfigError: `preview.prompts` names what the samples do not have.
        """

    def save(self, outputs: Sequence[Output], config: PreviewConfig, path: Path) -> None:
        """Writes the answers to the requests of `previews` to a path, which gets an ending: a table of texts."""
        del config
        answers = [(output.request.sample, output) for output in outputs]
        lines = [f"{one.key if one else ''}\t{output.request.prompt}\t{output.text}\n" for one, output in answers]
        write_text(path.with_suffix(".tsv"), "".join(lines))

    @abstractmethod
    def metadata(self, samples: Sequence[Any], config: Any) -> dict[str, Any]:
        """Returns what an adapter file says of its data besides texts, by kohya's names without ss_."""

    def headline(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Returns the `resolution` and the `trigger` that `formats.metadata.build` takes, where there are any."""
        del samples
        return {}

    def published_texts(self, sample: Any) -> tuple[str, ...]:
        """Returns the texts whose words `output.publish_tags` counts; none where they are what people said."""
        del sample
        return ()


class Images(SampleType):
    """Images with captions: `ImageText`."""

    noun = "images"
    task = "generate images"
    section = ImageDataConfig
    metrics = ("clip_text", "clip_image")
    makes_images = True

    _BATCH_PIXELS = 1024**2
    _BATCH_SAMPLES = 16

    def read(self, config: ImageDataConfig, info: BaseInfo) -> list[ImageText]:
        """Returns the images of a folder with their captions."""
        return image_folder.read(config, info)

    def view_identity(self, sample: ImageText, config: ImageDataConfig) -> list[Any]:
        """Names the image by its bytes, and how it is scaled and cropped."""
        return [content_digest(sample), sample.size, sample.original_size, sample.crop, config.flip]

    def text_identity(self, sample: ImageText) -> list[Any]:
        """Names the captions."""
        return [sample.captions, sample.prior_captions]

    def open(self, sample: ImageText, config: ImageDataConfig) -> ImageText:
        """Decodes the image, scaled and cropped to its bucket."""
        content = sample.read_bytes and sample.read_bytes()
        return replace(sample, pixels=images.load_pixels(sample.path, sample.size, config.flip, content))

    def group(self, sample: ImageText) -> str:
        """Names the bucket."""
        return f"{sample.size[0]}x{sample.size[1]}"

    def num_at_once(self, sample: ImageText, config: ImageDataConfig) -> int:
        """Limits the pixels of all views together."""
        width, height = sample.size
        return min(max(self._BATCH_PIXELS // (width * height * (1 + config.flip)), 1), self._BATCH_SAMPLES)

    def describe(self, samples: Sequence[ImageText]) -> image_folder.ImageReport:
        """Compares the images with each other."""
        return image_folder.describe(samples)

    def largest(self, samples: Sequence[ImageText]) -> tuple[int, int]:
        """Gives width and height in pixels."""
        return max((sample.size for sample in samples), key=lambda size: size[0] * size[1])

    def assumed_size(self, config: ImageDataConfig, info: BaseInfo) -> tuple[int, int]:
        """Gives a square of the resolution."""
        side = config.resolution or info.resolution
        return side, side

    def warn(self, samples: Sequence[ImageText], model: Any) -> None:
        """Warns of losses that need a trigger where there is none."""
        needed = {"prior_weight": "prior_captions", "anchor_weight": "anchors"}
        for key, attribute in needed.items():
            weight = getattr(model, key, 0)
            if weight and not any(getattr(sample, attribute) for sample in samples):
                logger.warning(
                    "model.%s=%g does nothing, since no trigger words were found: give all captions the same made-up "
                    "words, or name them with data.trigger, so that the rest of the base stays as it is.",
                    key,
                    weight,
                )

    def explain(self, samples: Sequence[ImageText], model: Any) -> list[str]:
        """Shows a caption, what it is without the trigger, and one that has something else beside the trigger."""
        first = next((sample for sample in samples if sample.prior_captions), None)
        if first is None:
            return []
        lines = []
        if getattr(model, "prior_weight", 0):
            without, other = (f'"{shown(text)}"' for text in first.prior_captions[:2])
            lines.append(
                f"Prior:        {model.priors_again:.0%} of the images again with {without} or {other}, which must "
                f"give what the base gives (model.prior_weight={model.prior_weight:g})"
            )
        if getattr(model, "anchor_weight", 0) and first.anchors:
            what, low, high = model.anchored
            caption, of_base = (f'"{shown(text)}"' for text in first.anchors(what)[0])
            lines.append(
                f"Anchor:       {model.anchors_again:.0%} of the images again with {caption}, which must give what the "
                f"base gives for {of_base} at noise levels {low:g} to {high:g}: the trigger leaves the {what} to the "
                f"base (model.anchor_weight={model.anchor_weight:g})"
            )
        return lines

    def previews(self, samples: Sequence[ImageText], config: PreviewConfig) -> list[Request]:
        """Asks for the prompts, or for the first captions, with each seed."""
        prompts = config.prompts or tuple(dict.fromkeys(sample.captions[0] for sample in samples))[:_NUM_PREVIEWS]
        return [
            Request(prompt, seed, config.negative, config.num_steps, config.guidance)
            for prompt in prompts
            for seed in config.seeds
        ]

    def save(self, outputs: Sequence[Output], config: PreviewConfig, path: Path) -> None:
        """Writes one image: a row for each prompt, a column for each seed."""
        images.save_image(images.output_grid(outputs, config.seeds), path.with_suffix(".png"))

    def metadata(self, samples: Sequence[ImageText], config: ImageDataConfig) -> dict[str, Any]:
        """Gives size, mirroring and buckets."""
        width, height = samples[0].size
        return {
            "flip_aug": config.flip,
            **dict.fromkeys(("color_aug", "random_crop", "shuffle_caption"), False),
            "num_reg_images": 0,
            "enable_bucket": config.buckets,
            "bucket_info": self._buckets(samples) if config.buckets else None,
            "resolution": f"({width}, {height})",
        }

    def _buckets(self, samples: Sequence[ImageText]) -> dict[str, Any]:
        """Returns kohya's record: the images of each size, repeats counted, and the mean error of their shapes."""
        counts: Counter[tuple[int, int]] = Counter()
        errors = []
        for sample in samples:
            counts[sample.size] += sample.num_repeats
            (width, height), (original_width, original_height) = sample.size, sample.original_size
            errors.append(abs(original_width / original_height - width / height))
        sizes = sorted(counts)
        buckets = {str(index): {"resolution": list(size), "count": counts[size]} for index, size in enumerate(sizes)}
        return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors)}

    def headline(self, samples: Sequence[ImageText]) -> dict[str, Any]:
        """Gives the size of the first image, and the trigger words."""
        return {"resolution": samples[0].size, "trigger": samples[0].trigger}

    def published_texts(self, sample: ImageText) -> tuple[str, ...]:
        """Gives the captions."""
        return sample.captions


class Recordings(SampleType):
    """Recordings with transcripts: `AudioText`."""

    noun = "recordings"
    task = "listen to recordings"
    section = RecordingDataConfig
    metrics = ("wer", "cer")

    _VIEWS_AT_ONCE = 8

    def read(self, config: RecordingDataConfig, info: SpeechInfo) -> list[AudioText]:
        """Returns the recordings of a folder, or of a data set of rows."""
        return speech_folder.read(config, info)

    def view_identity(self, sample: AudioText, config: RecordingDataConfig) -> list[Any]:
        """Names the sound by its bytes, and the views of it."""
        place = [sample.start_s, sample.duration_s, sample.sampling_rate, config.speeds, config.noise_db]
        return [content_digest(sample), *place]

    def text_identity(self, sample: AudioText) -> list[Any]:
        """Names the transcript, its language and the task."""
        return [sample.transcript, sample.language, sample.task]

    def open(self, sample: AudioText, config: RecordingDataConfig) -> AudioText:
        """Decodes the recording at each speed, clean and with each noise."""
        return speech_folder.open_sample(sample, config)

    def group(self, sample: AudioText) -> str:
        """Names none: the base pads every recording to the same length."""
        del sample
        return ""

    def num_at_once(self, sample: AudioText, config: RecordingDataConfig) -> int:
        """Limits the views of all samples together."""
        del sample
        return max(self._VIEWS_AT_ONCE // (len(config.speeds) * (1 + len(config.noise_db))), 1)

    def describe(self, samples: Sequence[AudioText]) -> speech_folder.RecordingReport:
        """Counts seconds, words and languages."""
        return speech_folder.describe(samples)

    def largest(self, samples: Sequence[AudioText]) -> tuple[int, int]:
        """Gives the longest recording in samples, and the longest transcript in tokens."""
        longest_s = max(sample.duration_s for sample in samples)
        return round(longest_s * samples[0].sampling_rate), max(sample.num_tokens for sample in samples)

    def previews(self, samples: Sequence[AudioText], config: PreviewConfig) -> list[Request]:
        """Asks for the recordings that `preview.prompts` names by their keys, or for the first."""
        named = {sample.key: sample for sample in samples}
        unknown = [key for key in config.prompts if key not in named]
        if unknown:
            raise ConfigError(
                f"preview.prompts: the data has no recording {', '.join(unknown)}{suggestion(unknown[0], named)}; name "
                "those to transcribe as they are called below data.path."
            )
        chosen = [named[key] for key in config.prompts] or list(samples[:_NUM_PREVIEWS])
        return [Request("", 0, sample=self.open(sample, RecordingDataConfig())) for sample in chosen]

    def metadata(self, samples: Sequence[AudioText], config: RecordingDataConfig) -> dict[str, Any]:
        """Gives the seconds of sound and the views of it."""
        seconds = round(sum(sample.duration_s for sample in samples), 1)
        return {"audio_seconds": seconds, "audio_speeds": config.speeds, "audio_noise_db": config.noise_db or None}


class Chats(SampleType):
    """Conversations about images, or about none: `Chat`."""

    noun = "conversations"
    task = "talk about images"
    section = ChatDataConfig
    metrics = ("exact_match", "token_f1")

    _VIEWS_AT_ONCE = 8

    def read(self, config: ChatDataConfig, info: ChatInfo) -> list[Chat]:
        """Returns the conversations of files, or of a data set of rows."""
        return chats.read(config, info)

    def identity(self, sample: Chat, config: ChatDataConfig) -> list[Any]:
        """Names the images by their bytes and the views of them, and the turns."""
        names = [*self.view_identity(sample, config), chats.roles_and_texts(sample)]
        if chats.shows_one_at_first(sample):  # as older runs name it
            return names
        return [*names, [turn.num_images for turn in sample.turns]]

    def view_identity(self, sample: Chat, config: ChatDataConfig) -> list[Any]:
        """Names the images by their bytes, and the views of them."""
        digests = [content_digest(image) for image in sample.images]
        return [digests[0] if chats.shows_one_at_first(sample) else digests, config.zooms]

    def text_identity(self, sample: Chat) -> list[Any]:
        """Names the turns, and the sizes of the images, which decide how many tokens they take."""
        sizes = [image.size for image in sample.images]
        return [chats.roles_and_texts(sample), sizes, [turn.num_images for turn in sample.turns]]

    def open(self, sample: Chat, config: ChatDataConfig) -> Chat:
        """Decodes the images at each zoom."""
        return chats.open_sample(sample, config)

    def group(self, sample: Chat) -> str:
        """Names the length, rounded up by at most a half."""
        return sample.group

    def num_at_once(self, sample: Chat, config: ChatDataConfig) -> int:
        """Limits the views of all samples together."""
        del sample
        return max(self._VIEWS_AT_ONCE // len(config.zooms), 1)

    def describe(self, samples: Sequence[Chat]) -> chats.ChatReport:
        """Counts answers and tokens."""
        return chats.describe(samples)

    def largest(self, samples: Sequence[Chat]) -> tuple[int, int]:
        """Gives the tokens of the longest conversation, and the most images of one."""
        return max(sample.num_tokens for sample in samples), max(1, *(len(sample.images) for sample in samples))

    def previews(self, samples: Sequence[Chat], config: PreviewConfig) -> list[Request]:
        """Asks about the first images: the prompts, or the first question of the data."""
        about = [sample for sample in samples if sample.images] or samples
        first = list({sample.path: sample for sample in reversed(about)}.values())[::-1][:_NUM_PREVIEWS]
        opened = [self.open(sample, ChatDataConfig()) for sample in first]
        return [
            Request(prompt, seed, sample=sample)
            for sample in opened
            for prompt in map(chats.without_marks, config.prompts or (sample.first_question().text,))
            for seed in config.seeds
        ]

    def metadata(self, samples: Sequence[Chat], config: ChatDataConfig) -> dict[str, Any]:
        """Gives the number of answers and the views of an image."""
        return {"num_answers": sum(map(chats.num_answers, samples)), "picture_zooms": config.zooms}


IMAGES, RECORDINGS, CHATS = Images(), Recordings(), Chats()
_TYPES: Mapping[type[Sample], SampleType] = {one.section.sample_type: one for one in (IMAGES, RECORDINGS, CHATS)}


def find(sample_type: type[Sample]) -> SampleType:
    """Returns the object of a class of samples, as a family names it."""
    return _TYPES[sample_type]
