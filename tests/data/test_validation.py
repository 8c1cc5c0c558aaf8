"""Which samples are held out: a matter of their content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.samples import AudioText, Chat, ChatImage
from lora_diffusion.data.validation import split


def recordings(count: int, first: int = 0) -> list[AudioText]:
    return [
        AudioText(f"{index}.wav", Path(f"{index}.wav"), read_bytes=lambda index=index: f"sound {index}".encode())
        for index in range(first, first + count)
    ]


def keys(samples: list[AudioText]) -> set[str]:
    return {sample.key for sample in samples}


def test_a_share_is_held_out_and_nothing_is_lost() -> None:
    samples = recordings(40)
    trained, held_out = split(samples, 0.1)
    assert len(held_out) == 4
    assert keys(trained) | keys(held_out) == keys(samples)
    assert not keys(trained) & keys(held_out)


def test_neither_order_nor_names_decide() -> None:
    samples = recordings(40)
    renamed = [replace(sample, key=f"other/{sample.key}") for sample in reversed(samples)]
    assert {key.removeprefix("other/") for key in keys(split(renamed, 0.1)[1])} == keys(split(samples, 0.1)[1])


def test_samples_of_equal_files_are_on_one_side() -> None:
    samples = recordings(10)
    copies = [replace(sample, key=f"copy of {sample.key}") for sample in samples]
    trained, held_out = split([*samples, *copies], 0.3)
    assert {key.removeprefix("copy of ") for key in keys(held_out)} == keys(held_out) & keys(samples)
    assert len(trained) == 2 * len(samples) - len(held_out)


def test_conversations_about_one_image_are_on_one_side() -> None:
    image = ChatImage(Path("a.png"), read_bytes=lambda: b"an image")
    about = [Chat(f"a{index}", Path("chats.json"), images=(image,)) for index in range(3)]
    texts = [Chat(f"text {index}", Path("chats.json")) for index in range(3)]
    for share in (0.25, 0.5):
        held_out = split([*about, *texts], share)[1]
        assert len({sample.key for sample in held_out} & {sample.key for sample in about}) in (0, 3)


def test_one_sample_always_stays_to_train_on() -> None:
    assert [len(side) for side in split(recordings(2), 0.01)] == [1, 1]
    with pytest.raises(ConfigError, match="nothing can be held out"):
        split(recordings(1), 0.5)
