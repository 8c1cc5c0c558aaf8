"""YAML and overrides become a typed config, or one error that lists every fault."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

from lora_diffusion.config.describe import differences
from lora_diffusion.config.docs import field_docs
from lora_diffusion.config.load import load, to_values, to_yaml
from lora_diffusion.config.rules import RANGES
from lora_diffusion.config.schema import Config
from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError

NEEDED = ("model.path=base", "data.path=pictures", "output.path=run")


def _faults(*overrides: str, path: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        load(path, [*NEEDED, *overrides])
    return error.value.faults or (str(error.value),)


def _value(override: str) -> object:
    section, key = override.split("=", 1)[0].split(".")
    return getattr(getattr(load(None, [*NEEDED, override]), section), key)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.max_steps=500", 500),
        ("train.max_steps=null", None),
        ("train.learning_rate=1e-3", 1e-3),
        ("train.learning_rate=1", 1.0),
        ("adapter.alpha=8", 8.0),
        ("train.gradient_checkpointing=true", True),
        ("train.threads=4", "4"),
        ("adapter.targets=[attn, ff]", ("attn", "ff")),
        ("adapter.targets=attn", ("attn",)),
        ("adapter.targets=re:.*attn1.to_(q|k)", ("re:.*attn1.to_(q|k)",)),
        ("adapter.targets=['re:a, b', ff]", ("re:a, b", "ff")),
        ("adapter.module_ranks=attn=8", ("attn=8",)),
        ("adapter.module_ranks=[attn=8, unet/ff=32]", ("attn=8", "unet/ff=32")),
        ("adapter.module_ranks=re:.*(?=to_[qk]{1,2}).*=8", ("re:.*(?=to_[qk]{1,2}).*=8",)),
        ('adapter.module_alphas=["re:.*to_[qk]{1,2}=0.5", ff=2]', ("re:.*to_[qk]{1,2}=0.5", "ff=2")),
        ("train.module_learning_rates=unet/attn=1e-4", ("unet/attn=1e-4",)),
        ("data.path=/a/b = c", "/a/b = c"),
        ("data.path=/a #1/b", "/a #1/b"),
        ("data.path=[a]", "[a]"),
        ("data.trigger=sks: a dog", "sks: a dog"),
        ("data.trigger=", ""),
        ('data.trigger=""', ""),
        ("data.trigger='  a '", "  a "),
        ("data.trigger=no", "no"),
        ("data.trigger=007", "007"),
        ("data.trigger=1e3", "1e3"),
        ("data.trigger=null", "null"),
        ("data.trigger=ä 猫 😀", "ä 猫 😀"),
        ("output.name=null", None),
        ("output.name=2024-01-01", "2024-01-01"),
    ],
)
def test_overrides(override: str, value: object) -> None:
    found = _value(override)
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win_and_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  max_steps: 5\n  seed: 9\nadapter:\n  targets: [attn, ff]\n")
    config = load(path, [*NEEDED, "train.max_steps=6", "train.max_steps=7", "adapter.targets=conv"])
    assert (config.train.max_steps, config.train.seed, config.adapter.targets) == (7, 9, ("conv",))


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("train.max_steps=1.5", "must be a whole number or null"),
        ("train.max_steps=true", "must be a whole number or null"),
        ("train.max_steps={a: 1}", "must be a whole number or null"),
        ("train.learning_rate=fast", "must be a number"),
        ("data.flip=perhaps", "must be true or false"),
        ("preview.seeds=[a]", "must be a list, each a whole number"),
        ("preview.prompts=null", "must be a list, each a text"),
        ("adapter.targets=[[a]]", "must be a list, each a text"),
        ("adapter.module_ranks={attn: 8}", "must be TARGET=VALUE"),
        ("adapter.module_ranks=8", "'8' must be TARGET=VALUE, the value a whole number greater than 0, as in attn=8"),
        ("adapter.module_ranks=[attn=8, ff]", "'ff' must be TARGET=VALUE, the value a whole"),
        ("adapter.module_ranks==8", "'=8' must be TARGET"),
        ("adapter.module_ranks=attn=8.5", "'attn=8.5' must be TARGET=VALUE, the value a whole"),
        ("adapter.module_ranks=attn=0", "greater than 0"),
        (
            "adapter.module_alphas=attn=big",
            "'attn=big' must be TARGET=VALUE, the value a number greater than 0, as in attn=4",
        ),
        ("adapter.module_alphas=attn=-1", "greater than 0"),
        ("adapter.module_alphas=attn=inf", "greater than 0"),
        ("train.module_learning_rates=attn=", "'attn=' must be TARGET=VALUE, the value a number"),
        ("train.module_learning_rates=attn=nan", "as in attn=1e-4"),
        ("train.part_learning_rates=unet=fast", "a rate, as in unet=1e-4"),
        ("train=5", "train: is a section"),
        ("oops.seed=5", "oops: there is no such section"),
        ("trian.seed=5", 'trian: there is no such section (did you mean "train"'),
        ("seed=5", 'did you mean "train.seed"'),
        ("model.pth=x", 'did you mean "model.path"'),
        ("data.rank=4", 'did you mean "adapter.rank"'),
        ("train.learningrate=1", 'did you mean "train.learning_rate"'),
    ],
)
def test_faults(override: str, fault: str) -> None:
    (found,) = _faults(override)
    assert found.startswith(override.split("=")[0].split(".")[0])
    assert fault in found


@pytest.mark.parametrize("override", ["", "train.seed", "=5", "train..seed=5", ".seed=5", "--seed=5", "train.seed=[1"])
def test_what_is_no_override(override: str) -> None:
    (found,) = _faults(override)
    assert override in found


def test_all_faults_at_once_with_the_file_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  sed: 1\n  seed: x\nextra: 3\ndata:\n  trigger: no\n")
    with pytest.raises(ConfigError) as error:
        load(path)
    text = str(error.value)
    assert str(path) in text
    for name in ("train.sed", "train.seed", "extra", "data.trigger", "model.path", "data.path", "output.path"):
        assert any(fault.startswith(name) for fault in error.value.faults), name
    assert "put the text in quotes" in text
    assert len(error.value.faults) == 7


@pytest.mark.parametrize("content", ["model: [", "- a\n- b\n", "words", "a: 1\na: 2\n", "\ta: 1", "a: ${b}\n"])
def test_what_is_no_config_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert _faults(path=path)


def test_empty_file_is_a_config_without_settings(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# nothing yet\n")
    assert load(path, NEEDED) == load(None, NEEDED)


@pytest.mark.parametrize(
    "override",
    [
        *("train.seed=-1", "train.max_steps=0", "train.epochs=0", "train.batch_size=0", "train.learning_rate=0"),
        *("train.learning_rate=.nan", "train.learning_rate=.inf", "train.weight_decay=-1", "train.threads=many"),
        *("train.threads=0", "train.schedule=cosinus", "train.precision=fp8", "train.optimizer=sgd"),
        *("adapter.rank=0", "adapter.alpha=0", "adapter.dropout=1", "adapter.parts=[]", "adapter.targets=[]"),
        *("data.resolution=8", "data.captions=maybe", "data.path=", "output.formats=[]", "output.formats=[kohia]"),
        *("output.dtype=fp8", "preview.seeds=[]", "preview.seeds=[-1]", "preview.seeds=[9223372036854775808]"),
        *("preview.guidance=0", "model.dtype=int8", "model.quantization=4bit", "model.prior_weight=-1"),
        *("model.caption_dropout=-0.1", "model.noise_offset=2", "model.min_snr_gamma=0", "model.prediction=x"),
    ],
)
def test_values_out_of_range(override: str) -> None:
    (found,) = _faults(override)
    assert found.startswith(override.split("=")[0])
    assert "must" in found


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.max_steps=5", "train.epochs=2"),
        ("train.max_steps=5", "train.warmup_steps=5"),
        ("train.text_encoder_learning_rate=1e-4",),
        ("preview.prompts=[a cat]",),
        ("data.default_caption=a cat",),
        ("output.name=a/b",),
        ("output.name=.hidden",),
    ],
)
def test_values_that_do_not_go_together(overrides: tuple[str, ...]) -> None:
    assert len(_faults(*overrides)) == 1


def test_every_range_is_of_a_key() -> None:
    values = to_values(load(None, NEEDED))
    assert [name for name in RANGES if name.split(".")[1] not in values[name.split(".")[0]]] == []


@pytest.mark.parametrize("family", registry.available("families"))
def test_every_key_says_what_it_means(family: str) -> None:
    config = load(None, [*NEEDED, f"model.family={family}"])
    assert config.model.family == family
    for section in dataclasses.fields(Config):
        section_type = type(getattr(config, section.name))
        docs = field_docs(section_type)
        for field in dataclasses.fields(section_type):
            assert len(docs.get(field.name, "")) > 5, f"{section.name}.{field.name} has no explanation"


def test_sections_are_read_only() -> None:
    config = load(None, NEEDED)
    for section in typing.cast(typing.Any, dataclasses.fields(config)):
        part = getattr(config, section.name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, "x")


@pytest.mark.parametrize(
    "text",
    [
        *("a", "", " a ", "a: b", "a #b", "#", "- a", "[a]", "{a}", "007", "1e3", "1_000", "true", "no", "null", "~"),
        *(
            "'",
            '"',
            "a\nb",
            "ä 猫 😀",
            "\\",
            "!x",
            "&x",
            "*x",
            "%x",
            "@x",
            "`",
            "|",
            ">",
            "?",
            "2024-01-01",
            "12:30",
            "=",
        ),
        *("a: 'b' \"c\"", "<<", "\t", "a, b", "0x1f", ".5", "-1", "???x"),
        *("a ${5} cat", "${", "\\${a}", "a\\\\${b.c}"),
    ],
)
def test_texts_survive_the_saved_config(tmp_path: Path, text: str) -> None:
    config = load(None, NEEDED)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, trigger=text),
        train=dataclasses.replace(config.train, preview_every_steps=5),
        preview=dataclasses.replace(config.preview, prompts=(text, "b")),
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(path) == config
    assert differences(load(path), config) == []


def test_a_reference_to_no_key_says_how_to_write_the_characters() -> None:
    with pytest.raises(ConfigError, match=r"preview.prompts\[0\].*\$\{output.name\}; write \\\$\{"):
        load(None, [*NEEDED, 'preview.prompts=["a ${5} cat"]'])


def test_differences_name_key_and_both_values() -> None:
    one, other = load(None, NEEDED), load(None, [*NEEDED, "train.seed=4", "model.prior_weight=0.5"])
    assert differences(one, other) == ["model.prior_weight: 0.0 -> 0.5", "train.seed: 0 -> 4"]
