"""The options that scripts rely on, and what `config` does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import yaml

from lora_diffusion.cli.main import _parse, build_parser, main

OPTIONS = {
    "quickstart": "what --output --resume --overwrite",
    "train": "--config --resume --dry-run --overwrite overrides",
    "generate": "--config --model --adapter --prompt --negative --seed --steps --guidance --size --output",
    "evaluate": "--config --model --adapter --run --weights --prompts --trigger --class --references --concept "
    "--training --metrics --clip --scorer --seed --negative --steps --guidance --size --cache --assert --output",
    "estimate": "--config overrides",
    "select": "path --evaluation --max-copying --max-prior-drift --max-prompt-leak --likeness --text-weight overrides",
    "report": "paths --output",
    "transcribe": "--config --model --language --no-timestamps --beams --adapter --format --output --score --split "
    "--csv --overwrite recordings",
    "ask": "--config --model --adapter --question --score --clip --images --split --csv --overwrite paths",
    "data": "action",
    "data check": "folder --config overrides",
    "data caption": "folder --config --model --adapter --prompt --trigger --ending --overwrite",
    "export": "run_path --step --to --output --client --card --overwrite",
    "convert": "input output --to --dtype --family --model --from-pickle --embeddings --overwrite",
    "inspect": "path",
    "verify": "path --client --base",
    "push": "source --repo --private --dry-run",
    "metadata": "action",
    "metadata show": "path",
    "metadata edit": "path --set --unset --thumbnail --output --overwrite",
    "metadata strip": "path --keep --output --overwrite",
    "resize": "input output --rank --energy --dtype --model --embeddings --overwrite",
    "compose": "adapters --output --method --rank --energy --dtype --model --embeddings --overwrite",
    "extract": "base tuned output --rank --energy --parts --targets --to --dtype --family --overwrite",
    "merge": "--model --adapter --output --dtype --family --overwrite",
    "config": "action",
    "config list": "",
    "config copy": "name target",
    "config check": "--config overrides",
    "config show": "--config overrides",
}
EVERYWHERE = {"--json", "--debug"}


def _parsers(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    actual = {name: parser} if name else {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, child in action.choices.items():
                actual |= _parsers(child, f"{name} {word}".strip())
    return actual


def test_no_option_appears_or_goes_unseen() -> None:
    actual = {
        name: {(action.option_strings or [action.dest])[-1] for action in parser._actions} - {"--help"}
        for name, parser in _parsers(build_parser()).items()
    }
    assert actual == {name: {*options.split(), *EVERYWHERE} for name, options in OPTIONS.items()}


def test_every_option_is_explained() -> None:
    silent = [
        f"{name} {action.dest}"
        for name, parser in _parsers(build_parser()).items()
        for action in parser._actions
        if not action.help and action.dest not in ("action", "overrides")
    ]
    assert silent == []


def _out(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_overrides_stand_anywhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = ["model.path=/none", "data.path=y", "output.path=z"]
    config = tmp_path / "c.yaml"
    config.write_text("train:\n  seed: 3\n")
    for arguments in (
        [*paths, "--resume", "train.max_steps=3", "--config", config],
        ["--config", config, *paths, "--dry-run"],
        ["--dry-run", paths[0], "--config", config, *paths[1:]],
        [config, *paths],
    ):
        assert main(["train", *map(str, arguments)]) == 2
        assert "model.path=/none: there is no such folder" in " ".join(capsys.readouterr().err.split())
    assert main(["estimate", str(tmp_path / "d.yaml"), *paths]) == 2
    assert "d.yaml" in capsys.readouterr().err
    assert main(["generate", "--model", "", "--prompt", "a cat", "--output=~/pictures"]) == 2
    assert "--model names no base" in capsys.readouterr().err
    for unknown in ("--max-steps=3", "--oops"):
        with pytest.raises(SystemExit) as exit_:
            main(["train", *paths, unknown])
        assert exit_.value.code == 2
        assert unknown in capsys.readouterr().err


class TestConfig:
    def test_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        listed = json.loads(_out(capsys, "config", "list", "--json"))
        assert listed == json.loads(_out(capsys, "config", "--json", "list"))
        text = _out(capsys, "config", "list")
        for name, meaning in listed.items():
            assert name in text
            assert len(meaning) > 20

    def test_copy(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert json.loads(_out(capsys, "config", "copy", "sd1/style", "--json")) == {"file": "style.yaml"}
        _out(capsys, "config", "check", "style.yaml")
        (tmp_path / "style.yaml").write_text("mine")
        assert main(["config", "copy", "sd1/style"]) == 2
        assert (tmp_path / "style.yaml").read_text() == "mine"
        _out(capsys, "config", "copy", "sd1/style", "deep/new.yaml")
        assert (tmp_path / "deep" / "new.yaml").is_file()
        capsys.readouterr()
        assert main(["config", "copy", "sd1/stile"]) == 2
        assert 'did you mean "sd1/style"' in capsys.readouterr().err

    def test_check(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_text("model:\n  path: x\ndata:\n  path: y\noutput:\n  path: z\n")
        assert json.loads(_out(capsys, "config", "check", path, "--json")) == {"file": str(path), "ok": True}
        assert main(["config", "check", str(path), "train.seed=x", "oops.y=1"]) == 2
        error = capsys.readouterr().err
        assert "train.seed='x'" in error
        assert "oops" in error

    def test_show_explains_every_key_and_can_be_fed_back(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        overrides = ["model.path=x", "data.path=y", "output.path=z", "train.max_steps=7", "data.trigger=a: #b"]
        text = _out(capsys, "config", "show", *overrides)
        path = tmp_path / "shown.yaml"
        path.write_text(text, encoding="utf-8")
        values = json.loads(_out(capsys, "config", "show", path, "--json"))
        assert values == json.loads(_out(capsys, "config", "show", *overrides, "--json"))
        assert values == yaml.safe_load(text)
        assert values["train"]["max_steps"] == 7
        assert values["data"]["trigger"] == "a: #b"
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if line.startswith("  ") and not line.startswith("  #"):
                assert lines[number - 1].startswith("  #"), f"{line} has no explanation"


def test_home_folder_behind_an_equals_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    args = _parse(["export", "--output=~/x", "--to", "kohya", "~run"])
    assert args.output == tmp_path / "x"
    assert args.run_path == Path("~run")
