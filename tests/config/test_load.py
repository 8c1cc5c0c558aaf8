"""YAML and overrides become a typed config, or one exception that lists every error."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diffusion.config.describe import differences, explained_yaml
from lora_diffusion.config.load import load, shipped, to_values, to_yaml
from lora_diffusion.config.schema import Config, field_docs
from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError

NEEDED = ("model.path=base", "data.path=images", "output.path=run")


def _errors(*overrides: str, path: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(path, [*NEEDED, *overrides])
    return caught.value.errors or (str(caught.value),)


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
    result = _value(override)
    assert result == value
    assert type(result) is type(value)


def test_later_overrides_win_and_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  max_steps: 5\n  seed: 9\nadapter:\n  targets: [attn, ff]\n")
    config = load(path, [*NEEDED, "train.max_steps=6", "train.max_steps=7", "adapter.targets=conv"])
    assert (config.train.max_steps, config.train.seed, config.adapter.targets) == (7, 9, ("conv",))


@pytest.mark.parametrize(
    ("override", "error"),
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
def test_errors(override: str, error: str) -> None:
    (result,) = _errors(override)
    assert result.startswith(override.split("=")[0].split(".")[0])
    assert error in result


@pytest.mark.parametrize("override", ["", "train.seed", "=5", "train..seed=5", ".seed=5", "--seed=5", "train.seed=[1"])
def test_what_is_no_override(override: str) -> None:
    (result,) = _errors(override)
    assert override in result


def test_all_errors_at_once_with_the_file_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  sed: 1\n  seed: x\nextra: 3\ndata:\n  trigger: no\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    text = str(caught.value)
    assert str(path) in text
    for name in ("train.sed", "train.seed", "extra", "data.trigger", "model.path", "data.path", "output.path"):
        assert any(error.startswith(name) for error in caught.value.errors), name
    assert "put the text in quotes" in text
    assert len(caught.value.errors) == 7


@pytest.mark.parametrize("content", ["model: [", "- a\n- b\n", "words", "a: 1\na: 2\n", "\ta: 1", "a: ${b}\n"])
def test_what_is_no_config_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert _errors(path=path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("train: {seed: 1}\nmodel: {path: x}\ntrain: {seed: 2}\n", "line 3: train stands there twice"),
        ('train:\n  seed: 1\n  "seed": 2\n', "line 3: seed stands there twice"),
    ],
)
def test_a_key_that_stands_twice(tmp_path: Path, content: str, error: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=error):
        load(path, NEEDED)


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
    (result,) = _errors(override)
    assert result.startswith(override.split("=")[0])
    assert "must" in result


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
    assert len(_errors(*overrides)) == 1


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


REFERENCES = ("${oc.env:HF_TOKEN}", "${output.name}", "${", "a ${5} cat", "${oc.decode:${oc.env:X}}", "\\${x}", "$HOME")


@pytest.mark.parametrize("text", REFERENCES)
def test_references_are_text(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file, bare and in quotes, on the command line, in lists, and in what is saved and shown."""
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    path = tmp_path / "c.yaml"
    quoted = text.replace("'", "''")
    path.write_text(
        f"output: {{description: '{quoted}'}}\ndata:\n  trigger: {text}\n"
        f"train: {{preview_every_steps: 5}}\npreview:\n  prompts:\n  - {text}\n"
    )
    config = load(path, [*NEEDED, f"output.author={text}", f"output.title='{quoted}'", f"evaluate.prompts={text}"])
    assert config.data.trigger == config.output.description == config.output.author == config.output.title == text
    assert config.preview.prompts == (text,)
    for number, saved in enumerate((to_yaml(config), explained_yaml(config), json.dumps(to_values(config)))):
        assert "hf_SECRET" not in saved
        again = tmp_path / f"{number}.yaml"
        again.write_text(saved, encoding="utf-8")
        assert load(again) == config


def test_a_config_that_an_older_version_resolved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It put a backslash before references and doubled those that stood there, as OmegaConf 2.3 reads them."""
    config = load(None, [*NEEDED, "data.trigger=a ${5} cat", "output.title=\\\\${x}", "output.author=a\\b"])
    lines = to_yaml(config).splitlines()[1:]
    old = "\n".join(lines).replace("a ${5}", "a \\${5}").replace("\\\\${x}", "\\" * 5 + "${x}")
    path = tmp_path / "config.yaml"
    path.write_text(old)
    assert load(path) == config
    assert caplog.text == ""


def test_a_backslash_that_is_not_needed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("output: {title: '\\${x}'}")
    assert load(path, NEEDED).output.title == "\\${x}"
    assert "the backslash before ${ is kept" in caplog.text


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("train: {seed: 010}", None),
        ("data: {trigger: 007}", None),
        ("output: {title: 1.10}", None),
        ("train: {max_steps: 1:30}", "train.max_steps='1:30': must be a whole number"),
        ("train.max_steps: 5", "in a file, write 'train:' and below it, indented, 'max_steps: ...'"),
        ("train: {max_steps: %s}" % ("9" * 5000), "must be a whole number"),
        (
            "train: {max_steps: %s}" % ("9" * 30),
            "train.max_steps=99999999999999999999... (30 characters): must be less",
        ),
        ("train: {learning_rate: 1e999}", "train.learning_rate=inf: must be a finite number"),
        ("train: {threads: '%s'}" % ("9" * 5000), "must be auto or a number of threads"),
        ("adapter: {module_ranks: ['attn=%s']}" % ("9" * 5000), "must be TARGET=VALUE"),
        (
            "output: {title: %s}" % ("x" * 30_000),
            "output.title='xxxxxxxxxxxxxxxxxxxx... (30000 characters)': must have",
        ),
        ("train: [1]", "train: is a section"),
        ("train:", "train: is a section"),
        ("%s: 1" % ("x" * 900), "there is no such section"),
    ],
)
def test_odd_values_in_a_file(tmp_path: Path, content: str, error: str | None) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    if error:
        (result,) = _errors(path=path)
        assert error in result
        assert len(result) < 400
    else:
        config = load(path, NEEDED)
        assert (config.train.seed, config.data.trigger, config.output.title) in [
            (10, "auto", None),
            (0, "007", None),
            (0, "auto", "1.10"),
        ]


def test_a_text_bomb(tmp_path: Path) -> None:
    lines = ["a0: " + "x" * 100, *(f"a{n}: '{f'${{a{n - 1}}}' * 10}'" for n in range(1, 9)), "model: {path: '${a8}'}"]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml", ["data.path=y", "output.path=z"])
    assert len(caught.value.errors) == 9


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_configs_give_a_config_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(data.draw(st.sampled_from([path.read_bytes() for path, _ in shipped().values()])))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        piece = data.draw(st.sampled_from(PIECES) | st.binary(max_size=4))
        content[place : place + data.draw(st.integers(0, 8))] = piece
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_bytes(bytes(content))
    try:
        config = load(path, data.draw(st.sampled_from(OVERRIDES)))
    except ConfigError as error:
        assert len(str(error)) < 20_000
    else:
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load(path) == config


PIECES = [
    *(
        b"${oc.env:HOME}",
        b"${",
        b"}",
        b"[",
        b"{",
        b"[[[[",
        b"&a ",
        b"*a",
        b"!!int ",
        b"!x ",
        b"<<: ",
        b"\t",
        b"\0",
        b"---\n",
    ),
    *(
        b"9" * 5000,
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\xbd",
        b"null",
        b"~",
        b"yes",
        b".nan",
        b"1e999",
        b"0o7",
        b"|\n",
        b"? ",
    ),
    *(
        b"'",
        b'"',
        b"\\",
        b"#",
        b": ",
        b"- ",
        b"train:\n",
        b"train.max_steps: 5\n",
        b"x" * 30_000,
        "\u2028".encode(),
        b"%",
    ),
]
OVERRIDES: list[list[str]] = [
    *([], ["train.epochs=3"], ["train.max_steps=3"], ["adapter.parts=[unet]"], ["model.family=whisper"], ["a=${b}"]),
    *(
        ["train={seed: 1}"],
        ["train.seed=[[["],
        ["data.trigger=${x"],
        ["output.title='"],
        ["train.seed=*a"],
        ["x.y.z=1"],
    ),
    ["train.seed=" + "9" * 5000],
]


def test_differences_name_key_and_both_values() -> None:
    one, other = load(None, NEEDED), load(None, [*NEEDED, "train.seed=4", "model.prior_weight=0.5"])
    assert differences(one, other) == ["model.prior_weight: 0.0 -> 0.5", "train.seed: 0 -> 4"]
