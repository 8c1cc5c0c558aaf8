"""What the command line says wins over a file, with a line that tells it; equals that contradict are an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_diffusion.config.load import load, to_values, to_yaml
from lora_diffusion.config.schema import Config
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.workflows._run_checks import settle_length, settle_variant

GIVING_WAY: list[tuple[str, list[str], str, Any]] = [
    ("sd1/style", ["train.epochs=10"], "train.max_steps", None),
    ("whisper/tiny", ["train.max_steps=100"], "train.epochs", None),
    ("sd1/sd15_style", ["train.max_steps=10"], "train.warmup_steps", 0),
    ("sd1/style", ["adapter.parts=[unet]"], "train.text_encoder_learning_rate", None),
    ("llava/emoji", ["adapter.parts=[language_model]"], "train.part_learning_rates", ()),
    ("llava/emoji", ["adapter.parts=[language_model]"], "adapter.full", ()),
]


def _value(config: Config, dotted: str) -> Any:
    section, key = dotted.split(".")
    return getattr(getattr(config, section), key)


@pytest.mark.parametrize(("name", "overrides", "key", "value"), GIVING_WAY)
def test_a_shipped_config_gives_way(
    name: str, overrides: list[str], key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = _value(load(Path(name)), key)
    config = load(Path(name), overrides)
    assert before != value == _value(config, key)
    assert f"{key}=" in caplog.text
    assert f"of {name} gives way to {overrides[0].partition('=')[0]}=" in caplog.text
    assert to_values(config)[key.split(".")[0]][key.split(".")[1]] == (list(value) if value == () else value)


def test_a_config_that_fits_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    load(Path("sd1/style"), ["train.max_steps=100", "adapter.parts=[text_encoder]", "train.warmup_steps=5"])
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("content", "override", "key", "value"),
    [
        ("train: {max_steps: 50}", "train.epochs=3", "train.max_steps", None),
        ("train: {epochs: 3}", "train.max_steps=50", "train.epochs", None),
        (
            "preview: {prompts: [a]}\ntrain: {preview_every_steps: 5}",
            "train.preview_every_steps=0",
            "preview.prompts",
            (),
        ),
        ("preview: {negative: dark}", "preview.guidance=1", "preview.negative", ""),
        ("preview: {guidance: 1}", "preview.negative=dark", "preview.guidance", None),
        ("data: {captions: optional, default_caption: a}", "data.captions=required", "data.default_caption", ""),
        ("evaluate: {every_steps: 5, patience: 3, references: r}", "evaluate.every_steps=0", "evaluate.patience", 0),
        (
            "evaluate: {after_training: yes, references: r}",
            "evaluate.references=null",
            "evaluate.after_training",
            False,
        ),
        (
            "output: {thumbnail: preview}\ntrain: {preview_every_steps: 5}",
            "train.preview_every_steps=0",
            "output.thumbnail",
            None,
        ),
        ("adapter: {parts: [unet, text_encoder], full: [unet]}", "adapter.parts=[text_encoder]", "adapter.full", ()),
        ("train: {warmup_steps: 1000, max_steps: 2000}", "train.max_steps=null", "train.warmup_steps", 0),
    ],
)
def test_a_file_of_the_users_gives_way_too(
    tmp_path: Path, content: str, override: str, key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    config = load(path, ["model.path=x", "data.path=y", "output.path=z", override])
    assert _value(config, key) == value
    assert f"{key}=" in caplog.text
    assert "gives way to" in caplog.text
    # What is left can be fed back, and then nothing needs to give way.
    caplog.clear()
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "resolved.yaml") == config
    assert caplog.text == ""


@pytest.mark.parametrize(
    "pair",
    [
        ("train.max_steps=5", "train.epochs=2"),
        ("train.max_steps=5", "train.warmup_steps=5"),
        ("adapter.parts=[unet]", "train.text_encoder_learning_rate=1e-4"),
    ],
)
def test_equals_that_contradict_are_an_error(tmp_path: Path, pair: tuple[str, str]) -> None:
    needed = ["model.path=x", "data.path=y", "output.path=z"]
    with pytest.raises(ConfigError) as caught:
        load(None, [*needed, *pair])
    assert len(caught.value.errors) == 1
    with pytest.raises(ConfigError):
        load(Path("sd1/style"), pair)
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(f"{one.split('.')[0]}: {{{one.split('.')[1].replace('=', ': ')}}}" for one in pair))
    if pair[0].split(".")[0] != pair[1].split(".")[0]:
        with pytest.raises(ConfigError):
            load(path, needed)


def test_a_longer_warmup_than_the_files_run_is_an_error() -> None:
    """To drop the length instead would train three times as long as the file says."""
    with pytest.raises(ConfigError, match=r"train.warmup_steps=700: must be less than train.max_steps=600"):
        load(Path("sd1/style"), ["train.warmup_steps=700"])


def test_what_the_variant_lacks_gives_way(caplog: pytest.LogCaptureFixture) -> None:
    config = settle_variant(load(Path("whisper/tiny"), ["adapter.variant=loha"]))
    assert config.adapter.dropout == 0
    assert "adapter.dropout=0.05 of the config gives way to adapter.variant=loha; it is 0.0 now" in caplog.text
    assert settle_variant(load(Path("llava/emoji"), ["adapter.variant=dora"])).adapter.full == ()
    loaded = load(Path("whisper/tiny"), ["adapter.variant=loha", "adapter.dropout=0.1"])
    assert settle_variant(loaded) == loaded


@pytest.mark.parametrize("override", ["train.epochs=1", "data.path=few", "train.batch_size=64"])
def test_a_warmup_that_is_longer_than_the_data_gives_way(override: str) -> None:
    config = load(Path("whisper/tiny"), [override])
    assert settle_length(config, 6).train.warmup_steps == 0
    assert settle_length(config, 60) == config
    loaded = load(Path("whisper/tiny"), [override, "train.warmup_steps=50"])
    assert settle_length(loaded, 6) == loaded
    assert settle_length(load(Path("whisper/tiny")), 6).train.warmup_steps == 50
