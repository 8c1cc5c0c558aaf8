"""Prompt suites: those that come along, and the errors of own ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.evaluation.results import CONTROL_GROUPS
from lora_diffusion.evaluation.suites import read_cases, shipped_suites

TRIGGERS, CLASSES = ("sks", "blob style"), ("octopus", "dog")


@pytest.mark.parametrize("name", shipped_suites())
class TestShipped:
    def test_reads(self, name: str) -> None:
        cases = read_cases(name, TRIGGERS, CLASSES)
        assert [case.index for case in cases] == list(range(len(cases)))
        assert len({case.prompt for case in cases if case.group not in CONTROL_GROUPS}) >= 8
        assert any(case.group in CONTROL_GROUPS for case in cases)
        for case in cases:
            assert (case.prompt != case.control_prompt) == (case.group not in CONTROL_GROUPS)
            assert not any(word in case.scoring_caption + case.control_prompt for word in TRIGGERS)
            assert "{" not in case.prompt + case.control_prompt + case.scoring_caption
            assert " a octopus" not in f" {case.prompt} {case.control_prompt}"

    def test_says_how_it_is_run(self, name: str) -> None:
        first, second = shipped_suites()[name].read_text("utf-8").splitlines()[:2]
        assert len(first) > 20
        assert second.startswith(f"# lora-diffusion evaluate --prompts {name} ")


@pytest.mark.parametrize("name", ["dreambooth-object", "dreambooth-live"])
def test_dreambooth_has_its_25_prompts(name: str) -> None:
    cases = [case for case in read_cases(name, ["sks"], ["dog"]) if case.group == "subject"]
    assert len({case.prompt for case in cases}) == 25
    assert cases[0].prompt == "a sks dog in the jungle"
    assert cases[-1].prompt == "a cube shaped sks dog"
    assert cases[-1].control_prompt == cases[-1].scoring_caption == "a cube shaped dog"


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_own_file(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "mine.yaml",
        """
subject:
  - a {trigger} {class}
  - {prompt: "{trigger} at night", plain: "a {class} at night", meaning: "a dark {class}"}
leak: [a unicorn]
""",
    )
    first, second, third = read_cases(path, ["zwx"], ["otter"])
    assert (first.prompt, first.control_prompt, first.scoring_caption) == ("a zwx otter", "an otter", "an otter")
    assert (second.prompt, second.control_prompt, second.scoring_caption) == (
        "zwx at night",
        "an otter at night",
        "a dark otter",
    )
    assert (third.prompt, third.group, third.suite) == ("a unicorn", "leak", "mine")


def test_equal_prompts_of_a_kind_are_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With one class word for two, templates that differ can give one prompt."""
    path = _write(
        tmp_path / "mine.yaml",
        "subject: ['a {trigger} {class}', 'a red {trigger}', 'a {trigger} dog', 'a {trigger} at night']\n"
        "leak: ['a {class}', 'a dog']\nprior: ['a dog']",
    )
    with caplog.at_level("WARNING", logger="lora_diffusion"):
        cases = read_cases(path, ["zwx"], ["dog"])
    assert [(case.index, case.prompt, case.group) for case in cases] == [
        (0, "a zwx dog", "subject"),
        (1, "a red zwx", "subject"),
        (2, "a zwx at night", "subject"),
        (3, "a dog", "leak"),
        (4, "a dog", "prior"),
    ]
    assert "repeats 2 prompt(s), which count once: a zwx dog, a dog" in caplog.text


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("subject: ['a {trigger2}', 'a {class}']", ["the 2. --trigger", "give --class"]),
        ("subject: ['a {name}', 'a {class']", ["{name} is no placeholder", "{ is no placeholder"]),
        ("subject: []\nStyle: [a]\nall: [b]", ["subject: must be a list", "Style: a group is", "all: a group is"]),
        ("subject: [3, {plain: a}, {prompt: a, meening: b}]", ["3 is no prompt", "is no prompt", 'mean "meaning"']),
        ("- a\n- b", ["must map groups"]),
        ("", ["must map groups"]),
        ("subject: [", ["is not a YAML file"]),
        ("subject: " + "[" * 5000 + "]" * 5000, ["is not a YAML file", "nest"]),
        ("subject: " + "9" * 5000, ["subject: must be a list"]),
        ("subject: [007, no, ~, '']", ["7 is no prompt", "False is no prompt", "None is no prompt", "in quotes"]),
        ("subject: ['" + "x" * 30_000 + "']", ["is no prompt", "at most 20000 characters"]),
        ("subject: ['" + "{" * 15_000 + "']", ["{ is no placeholder"]),
        ("a: &a [x]\nb: &b [*a, *a]\n", ["b: ['x'] is no prompt"]),
        ("subject: [!env HOME]", ["the tag !env is not read"]),
        ("subject:\n\t- a", ["indent with spaces, not tabs"]),
        ("subject: [a]\nsubject: [b]", ["line 2: subject stands there twice"]),
        ("subject: [{prompt: a, prompt: b}]", ["line 1: prompt stands there twice"]),
    ],
)
def test_all_faults_at_once(tmp_path: Path, text: str, reasons: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read_cases(_write(tmp_path / "mine.yaml", text), ["zwx"])
    assert all(reason in str(error.value) for reason in reasons), str(error.value)


def test_unknown_suite() -> None:
    with pytest.raises(ConfigError, match='did you mean "dreambooth-live"'):
        read_cases("dreamboth-live")


def test_references_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "hf_SECRET")
    path = _write(tmp_path / "mine.yaml", "style: ['${oc.env:TOKEN} {trigger}', 'costs ${5', '${trigger}']")
    prompts = [case.prompt for case in read_cases(path, ["zwx"])]
    assert prompts == ["${oc.env:TOKEN} zwx", "costs ${5", "${trigger}"]
