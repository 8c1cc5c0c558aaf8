"""How LLaVA's processor writes a conversation: its template, token ids, and labels on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.files import user_path
from lora_diffusion.core.samples import Chat, Turn
from lora_diffusion.families.language.chat_template import chat_template
from lora_diffusion.families.language.loading import IGNORED
from lora_diffusion.families.model_files import explained, read_json


@cache
def read_processor(folder: Path, template: str | None) -> Any:
    """Returns the processor of a base; nobody may change it.

    Args:
        folder: the base.
        template: file that replaces the base's own template.

    Raises:
        ModelError: it is missing or damaged, has no chat template, or does not fit the model.
    """
    from transformers import AutoProcessor

    with explained(folder):
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config = read_json(folder / "config.json")
    if template:
        processor.chat_template = _read_template(template)
    errors = []
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(f"{folder} holds no processor with tokenizer and image processor; fetch its *.json files.")
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(processor.chat_template, dict):
        processor.chat_template = processor.chat_template.get("default")
    if not isinstance(processor.chat_template, str) or not processor.chat_template:
        errors.append(
            "its tokenizer has no chat template; put the chat_template.jinja of its hub page into the folder, or name "
            "a file with model.chat_template"
        )
    # Processors that were saved before transformers 4.46 lack these.
    processor.patch_size = processor.patch_size or config["vision_config"].get("patch_size")
    strategy = config.get("vision_feature_select_strategy", "default")
    if not processor.vision_feature_select_strategy:
        processor.vision_feature_select_strategy = strategy
        processor.num_additional_image_tokens = 1
    image_token = config.get("image_token_index", config.get("image_token_id"))
    if image_token is not None and image_token != processor.image_token_id:
        errors.append(
            f"its config says that token {image_token} stands for an image, its tokenizer {processor.image_token_id}"
        )
    if not processor.tokenizer.is_fast or processor.tokenizer.eos_token is None:
        errors.append(
            "its tokenizer is not a fast one (tokenizer.json) with an end token; convert it with transformers"
        )
    if errors:
        raise ModelError(f"The base {folder} cannot be used.", errors)
    return processor


def _read_template(name: str) -> str:
    file = user_path(name, "model.chat_template")
    if not file.is_file():
        raise ModelError(f"model.chat_template={name}: there is no such file; correct the path.")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"model.chat_template={name} is not UTF-8 ({error.reason}); save it so.") from error


def tokens_and_labels(processor: Any, sample: Chat) -> tuple[list[int], list[int]]:
    """Returns token ids of a conversation, and labels: those of the answers and of their end tokens, -100 elsewhere.

    A template that does not end an answer with the end token, as that of LLaVA-1.5 on the hub, gets one there, since
    without it nothing would teach the model to stop, and it was trained so itself.

    Raises:
        ValueError: the template cannot render these turns, or not one after the other.
    """
    pieces = [*_pieces(processor, sample.turns)]
    text = "".join(piece for piece, _ in pieces)
    ends = list(accumulate(len(piece) for piece, _ in pieces))
    answers = [(end - len(piece), end) for (piece, is_answer), end in zip(pieces, ends, strict=True) if is_answer]
    ids, offsets = tokenize(processor.tokenizer, text)
    is_answer = [any(start <= first and last <= end for start, end in answers) for first, last in offsets]
    labels = [
        token if wanted and last > first else IGNORED
        for token, wanted, (first, last) in zip(ids, is_answer, offsets, strict=True)
    ]
    return expand(processor, ids, labels, [image.size for image in sample.images])


def _pieces(processor: Any, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
    """Returns the rendered text in pieces, and whether each is an answer."""
    end = processor.tokenizer.eos_token
    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before, after = render(processor, turns[:index]), render(processor, turns[: index + 1], ask=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(
                "the chat template does not write one turn after the other, so answers cannot be told apart."
            )
        answer, mark, rest = after[len(before) :].partition(end)
        pieces += [(before[len(done) :], False), (answer if mark else answer.rstrip(), True), (end, True)]
        pieces += [(rest, False)] if rest else []
        done = after
    return pieces


def render(processor: Any, turns: Sequence[Turn], *, ask: bool = True) -> str:
    """Returns turns as the chat template writes them, with one image token for each image.

    Args:
        processor: holds the template.
        turns: what is said, and how many images each shows.
        ask: end with what calls for an answer.

    Raises:
        ValueError: the template refuses the turns, or writes another number of images.
    """
    messages = []
    for turn in turns:
        images = [{"type": "image"}] * turn.num_images
        messages.append({"role": turn.role, "content": [*images, {"type": "text", "text": turn.text}]})
    try:
        template = chat_template(processor.chat_template)
        text = template.render(messages, processor.tokenizer.special_tokens_map, ask=ask)
    except ValueError as error:
        raise ValueError(f"the chat template of the base cannot render it ({error}).") from error
    wanted = sum(turn.num_images for turn in turns)
    if (count := text.count(processor.image_token)) != wanted:
        number = {0: "no image", 1: "one image"}.get(wanted, f"{wanted} images")
        raise ValueError(
            f"the chat template of the base writes {count} times {processor.image_token} for {number}; set "
            "model.chat_template to one that fits."
        )
    return text


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns token ids and the characters of the text that each stands for, [start, end)."""
    # A template that writes the start token itself must not get a second one.
    is_started = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    # Without verbose=False it warns of long ones, which are encoded of where they are counted.
    encoded = tokenizer(text, add_special_tokens=not is_started, return_offsets_mapping=True, verbose=False)
    return encoded.input_ids, encoded.offset_mapping


def expand(
    processor: Any, ids: Sequence[int], labels: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Returns ids and labels with an image token for each feature of each image.

    Args:
        processor: tells how many features an image has.
        ids: with one image token for each image.
        labels: one for each token.
        sizes: width and height in pixels of the images.
    """
    if not sizes:
        return list(ids), list(labels)
    sizes_in_tokens = processor._get_num_multimodal_tokens(image_sizes=[size[::-1] for size in sizes])
    counts = iter(sizes_in_tokens.num_image_tokens)
    repeats = [next(counts) if token == processor.image_token_id else 1 for token in ids]
    return (
        [token for token, repeat in zip(ids, repeats, strict=True) for _ in range(repeat)],
        [label for label, repeat in zip(labels, repeats, strict=True) for _ in range(repeat)],
    )
