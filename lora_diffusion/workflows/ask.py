"""Answers of a base, with or without adapters, to questions about images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.config.schema import ChatDataConfig, ModelOptions
from lora_diffusion.core.base_model import ChatInfo
from lora_diffusion.core.errors import DataError, ModelError
from lora_diffusion.core.files import write_csv
from lora_diffusion.core.samples import Chat, Request, Turn
from lora_diffusion.core.text import name_some
from lora_diffusion.data import chats, preflight
from lora_diffusion.data.images import ImageError
from lora_diffusion.data.sample_types import CHATS
from lora_diffusion.data.sources import ALL_SPLITS
from lora_diffusion.evaluation.texts import AnswerEvaluation, SetScores, evaluate_answers
from lora_diffusion.scoring.scorers import Scorers
from lora_diffusion.workflows.load import CheckedModel, Model, check_model

Adapters = Sequence[tuple[Path, float]]
_EVERYTHING = ChatDataConfig(split=ALL_SPLITS)
"""To score on, all of a folder is taken, since its user chose it for that."""


@dataclass(frozen=True)
class ImageAnswers:
    """The answers to one question about several images."""

    question: str
    answers: Mapping[Path, str]
    """Image -> answer."""

    def to_json(self) -> dict[str, Any]:
        """Returns image -> answer."""
        return {str(path): answer for path, answer in self.answers.items()}

    def text(self) -> str:
        """Returns one line for each image."""
        return "\n".join(f"{path}\t{answer}" for path, answer in self.to_json().items())

    def write_table(self, path: Path) -> None:
        """Writes one line for each image."""
        rows = self.to_json().items()
        write_csv(path, [{"picture": name, "question": self.question, "answer": answer} for name, answer in rows])


def ask(model: ModelOptions | Model, paths: Sequence[Path], question: str, adapters: Adapters = ()) -> ImageAnswers:
    """Returns the answer to a question about each image.

    Args:
        model: a base of visual question answering.
        paths: images, and folders of them.
        question: the same for each.
        adapters: files or folders with their weights; all are applied at once.

    Raises:
        InputError: the base, an adapter or an image cannot be used; all errors of images are listed at once.
    """
    answerer = Answerer(model, adapters)
    files = [file for path in paths for file in _images(path)]
    requests, errors = [], []
    for file in files:
        try:
            requests.append(chats.ask(file, question))
        except ImageError as error:
            errors.append(str(error))
    if errors:
        raise DataError(f"{len(errors)} of {len(files)} images cannot be read; correct or leave them out.", errors)
    return ImageAnswers(question, dict(zip(files, answerer.answer(requests), strict=True)))


def _images(path: Path) -> Sequence[Path]:
    return preflight.list_images(str(path), "PATH").files if path.is_dir() else (path,)


def score_answers(
    model: ModelOptions | Model,
    data_paths: Sequence[Path],
    adapters: Adapters = (),
    clip: str | None = None,
    data: ChatDataConfig = _EVERYTHING,
) -> SetScores[AnswerEvaluation]:
    """Compares the answers to the first question of each conversation with those that are right.

    Args:
        model: a base of visual question answering.
        data_paths: files and folders, as `data.path` takes them; one result for each.
        adapters: files or folders with their weights; all are applied at once.
        clip: CLIP that scores the answers as captions, such as builtin:emoji-clip; none leaves that out.
        data: how they are read, all but their path.

    Raises:
        InputError: the base, an adapter or the data cannot be used.
    """
    answerer, scorers = Answerer(model, adapters), Scorers({"clip": clip}) if clip else None
    sets = [CHATS.read(replace(data, path=str(path)), answerer.info) for path in data_paths]
    if clip and (blind := [sample.key for samples in sets for sample in samples if not _has_image(sample)]):
        raise DataError(
            f"--clip scores answers as captions, but {len(blind)} first questions show no image "
            f"({name_some(blind)}); leave those out, or --clip."
        )
    scores = tuple(compare(answerer.answer, samples, scorers) for samples in sets)
    return SetScores(tuple(data_paths), scores)


def compare(
    answer: Callable[[Sequence[Request]], Sequence[str]],
    samples: Sequence[Chat],
    scorers: Scorers | None = None,
) -> AnswerEvaluation:
    """Compares the answers to the first question of each conversation with those that are right."""
    pairs = chats.questions(samples)
    answers = answer([request for request, _ in pairs])
    prompts = [request.prompt for request, _ in pairs]
    keys, targets = [sample.key for sample in samples], [target for _, target in pairs]
    questioned = [request.sample for request, _ in pairs if isinstance(request.sample, Chat)]
    images = [chat.views[0][0] for chat in questioned] if scorers else []
    names = [str(sample.images[0].path) if _has_image(sample) else "" for sample in samples]
    return evaluate_answers(keys, prompts, targets, answers, images, scorers, names)


def _has_image(sample: Chat) -> bool:
    return sample.first_question().num_images > 0


class Answerer:
    """A base of visual question answering; it is checked at once, and loaded with the first question."""

    def __init__(self, model: ModelOptions | Model, adapters: Adapters = ()) -> None:
        """Checks base and adapters.

        Raises:
            InputError: one of them cannot be used.
        """
        self._model = check_model(model, adapters, CHATS)
        info = self._model.info
        assert isinstance(info, ChatInfo), "a family of conversations describes its base so"
        self.info = info

    def answer(self, requests: Sequence[Request]) -> list[str]:
        """Returns the answers.

        Raises:
            ModelError: the chat template of the base cannot render a question; raised before the base is loaded.
        """
        if isinstance(self._model, CheckedModel):
            self._check(requests[:1])
            self._model = self._model.load()
        return [output.text for output in self._model.answer(requests)]

    def _check(self, requests: Sequence[Request]) -> None:
        assert self.info.count_tokens is not None, "a base of visual question answering counts tokens"
        conversations = []
        for request in requests:
            assert isinstance(request.sample, Chat), "its requests hold a conversation"
            count = request.sample.first_question().num_images
            turns = (Turn("user", request.prompt, count), Turn("assistant", ""))
            conversations.append(replace(request.sample, turns=turns, images=request.sample.images[:count]))
        for error in self.info.count_tokens(conversations):
            if isinstance(error, str):
                raise ModelError(f"{self.info.source} cannot be asked {requests[0].prompt!r}: {error}")
