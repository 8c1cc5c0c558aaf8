"""What README.md, CONTRIBUTING.md and docs/ say: commands parse, settings exist, links lead somewhere.

Commands are looked for in fenced blocks of shell and in spans of code that begin with `lora-diffusion`. A config that
a command names is one that comes along (sd1/style or configs/sd1/style.yaml), or a user's own: another .yaml file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
import yaml

import lora_diffusion
from lora_diffusion.cli.main import _parse, build_parser
from lora_diffusion.config.load import load, to_values
from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError

PACKAGE = Path(lora_diffusion.__file__).parent
REPOSITORY = PACKAGE.parent
README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
DOCUMENTS = sorted([README, REPOSITORY / "CONTRIBUTING.md", *DOCS.glob("*.md")])
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
SHELL = frozenset({"", "sh", "bash", "shell", "console"})
"""Languages of fenced blocks whose lines are commands."""
OURS = (
    ["lora-diffusion"],
    ["python", "-m", "lora_diffusion"],
    ["accelerate", "launch", "-m", "lora_diffusion.cli.main"],
)
OTHERS = frozenset({"cd", "export", "git", "hf", "pip", "pytest"})
"""Programs of others, whose options are their affair."""
FILES = frozenset({"json", "jsonl", "py", "safetensors", "yaml"})
"""What follows the dot in names of files, which are no settings."""
WORDS = re.compile(
    r"\b(number types?|spellings?|rehears\w*|stand-ins?|habits?|strays?|verdicts?|mends?|anew|faults?|rooms?|pictures?|"
    r"towers?|clients?|kinds?|judging|skeletons?)\b",
    re.IGNORECASE,
)
"""Words that have another one in this project, outside of code."""

Problems = Iterator[str]
"""Each what is wrong, and where."""


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yields language and content of each fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def prose(text: str) -> str:
    """Returns the text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Returns the spans of code outside of blocks."""
    return [span.replace(r"\|", "|") for span in re.findall(r"`([^`\n]+)`", prose(text))]


def commands(block: str) -> Iterator[list[str]]:
    """Yields the words of each command, without comments and redirections, its shell variables put in."""
    variables: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        known = re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], match[0]), line)
        lexer = shlex.shlex(known, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        for is_operator, words in groupby(lexer, key=lambda word: set(word) <= set("();|&")):
            command = list(words)
            while command and (assignment := re.fullmatch(r"(\w+)=(.*)", command[0])):
                variables[assignment[1]] = assignment[2]
                command.pop(0)
            if command and not is_operator:
                end = next((index for index, word in enumerate(command) if set(word) <= set("<>&")), None)
                yield command[:end]


def shell_problems(text: str) -> Problems:
    for language, block in blocks(text):
        if language in SHELL:
            for command in commands(block):
                yield from (f"{shlex.join(command)}: {problem}" for problem in command_problems(command))
        elif re.search(r"^\s*lora-diffusion ", block, re.MULTILINE):
            yield f"a command stands in a block of {language}; write ```sh"
    for span in spans(text):
        if span.startswith(("lora-diffusion ", "python ")) and not re.search(r"\.\.\.|[\[\]|]", span):
            yield from (f"`{span}`: {problem}" for problem in command_problems(shlex.split(span)))


def command_problems(command: list[str]) -> Problems:
    for program in OURS:
        if command[: len(program)] == program:
            yield from argument_problems(command[len(program) :])
            return
    if command[0] == "python" and len(command) > 1:
        module = command[2].replace(".", "/") if command[1] == "-m" else ""
        files = [f"{module}.py", f"{module}/__main__.py"] if module else [command[1]]
        if not any((REPOSITORY / file).is_file() for file in files):
            yield f"there is no {' or '.join(files)}"
    elif not (command[0] in OTHERS or (REPOSITORY / command[0]).is_file()):
        yield f"{command[0]} is no known program"


def argument_problems(arguments: list[str]) -> Problems:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            args = _parse(arguments)
    except SystemExit as stop:
        if stop.code != 0:
            yield said.getvalue().strip().splitlines()[-1]
        return
    given = [getattr(args, "folder", None) or "=", *getattr(args, "overrides", [])]
    yield from setting_problems(
        getattr(args, "config", None), [word for word in given if len(word) > 1 and "=" in word]
    )
    yield from (f"give {word} by --config" for word in given[1:] if "=" not in word)
    yield from name_problems(args)


def setting_problems(config: Path | None, overrides: list[str]) -> Problems:
    """Yields what is wrong with a config and the changes to it."""
    name = str(config or "")
    path: Path | None = REPOSITORY / "configs" / (name.removeprefix("configs/").removesuffix(".yaml") + ".yaml")
    if config and (name.startswith("configs/") or config.suffix not in (".yaml", ".yml")):
        families: list[list[str]] = [[]]
        if not (path and path.is_file()):
            yield f"no config {name} comes along"
            return
    else:  # of a user's own config, or without any, it may be any family
        path, families = None, [[f"model.family={family}"] for family in registry.available("families")]
    errors = []
    for family in families:
        try:
            load(path, [*family, *overrides], required=False)
            return
        except ConfigError as error:
            errors.append(str(error))
    yield errors[0]


def name_problems(args: argparse.Namespace) -> Problems:
    if args.command == "config" and args.action == "copy":
        yield from setting_problems(Path(args.name), [])
    if args.command == "evaluate":
        suite = REPOSITORY / "configs" / "evaluate" / f"{args.prompts}.yaml"
        if not (args.prompts.endswith(".yaml") or suite.is_file()):
            yield f"no prompts {args.prompts} come along"


@cache
def keys() -> Mapping[str, frozenset[str]]:
    """Returns section -> its keys, those of all families together."""
    known: dict[str, set[str]] = {}
    for family in registry.available("families"):
        for section, values in to_values(load(None, [f"model.family={family}"], required=False)).items():
            known.setdefault(section, set()).update(values)
    return {section: frozenset(values) for section, values in known.items()}


def key_problems(text: str) -> Problems:
    """Yields the settings in spans of code and in blocks of YAML that do not exist."""
    named = [match.groups() for span in spans(text) if (match := re.match(r"(\w+)\.(\w+)(?:[=:].*)?$", span))]
    for language, block in blocks(text):
        if language == "yaml":
            named += [(section, key) for section, values in yaml.safe_load(block).items() for key in values]
    for section, key in named:
        if section in keys() and key not in keys()[section] | FILES:
            yield f"there is no setting {section}.{key}"


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives to the headings."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} (.*)$", prose(text), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).strip().replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def link_problems(text: str, path: Path) -> Problems:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", prose(text))):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.is_relative_to(REPOSITORY.resolve()) or not file.exists():
            yield f"{target} leads nowhere"
        elif anchor and (file.suffix != ".md" or anchor not in anchors(text if file == path else read(file))):
            yield f"{target} has no such heading"


def word_problems(text: str) -> Problems:
    plain = re.sub(r"`[^`\n]+`|\]\([^)]*\)", "", prose(text))
    yield from (f"the word {match[0]!r}" for match in WORDS.finditer(plain))


def problems(path: Path, text: str) -> list[str]:
    return [*shell_problems(text), *key_problems(text), *link_problems(text, path.resolve()), *word_problems(text)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_tell_the_truth(path: Path) -> None:
    assert problems(path, read(path)) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_commands_in_configs_parse(path: Path) -> None:
    block = "".join(
        line.removeprefix("# ") for line in read(path).splitlines(keepends=True) if " lora-diffusion " in line
    )
    assert block
    assert list(shell_problems(f"```sh\n{block}```\n")) == []


def test_documents_are_there() -> None:
    names = "architecture extending training data adapter_files composition evaluation whisper llava memory benchmarks"
    assert {path.name for path in DOCUMENTS} >= {
        "README.md",
        "CONTRIBUTING.md",
        *(f"{name}.md" for name in names.split()),
    }
    linked = re.findall(r"\]\((docs/\w+\.md)", read(README))
    assert set(linked) == {path.relative_to(REPOSITORY).as_posix() for path in DOCUMENTS if path.parent == DOCS}


def test_readme_is_short_and_sets_all_up_in_its_first_two_commands() -> None:
    text = read(README)
    assert len(text.splitlines()) <= 150
    first = next(block for language, block in blocks(text) if language in SHELL)
    assert [command[0] for command in commands(first)] == ["pip", "lora-diffusion", "pip", "pytest"]
    assert len(first.splitlines()) == 2


def test_readme_lists_every_command() -> None:
    rows = re.findall(r"^\| `([a-z]+)[ `]", read(README), re.MULTILINE)
    actions = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert set(rows) == set(actions[0].choices)


def folders_on_map(path: Path) -> set[str]:
    """Returns the folders in the first cells of a document's tables."""
    cells = re.findall(r"^\| ([^|]+) \|", read(path), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([a-z]+)/`", cell)}


def test_maps_show_every_package() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert packages <= folders_on_map(README)
    assert packages - {"builtin"} <= folders_on_map(DOCS / "architecture.md")


def test_commands_are_read_as_a_shell_reads_them() -> None:
    block = (
        "# a comment\nBASE=model.safetensors\n"
        "A=1 lora-diffusion merge --model $BASE \\\n    --adapter 'a b':0.8 > log.txt  # and another\n"
        'pip install x && lora-diffusion push ${BASE} --assert "a>=1" | cat\n'
    )
    assert list(commands(block)) == [
        ["lora-diffusion", "merge", "--model", "model.safetensors", "--adapter", "a b:0.8"],
        ["pip", "install", "x"],
        ["lora-diffusion", "push", "model.safetensors", "--assert", "a>=1"],
        ["cat"],
    ]


def _shell(line: str) -> str:
    return f"Text.\n\n```sh\n{line}\n```\n"


PLANTED: Mapping[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "command": (
        _shell,
        (
            "lora-diffusion tran --config sd1/style",
            "lora-diffusion train --config sd1/style --no-such-option",
            "lora-diffusion train --config sd1/stile",
            "lora-diffusion train --config configs/sd1/stile.yaml",
            "lora-diffusion train --config sd1/style data.longest=1",
            "lora-diffusion train --config sd1/style train.max_steps=many",
            "lora-diffusion train --config mine.yaml \\\n    train.max_step=3",
            "lora-diffusion train mine.yaml train.max_steps=3",
            "lora-diffusion config copy sd1/stile",
            "lora-diffusion inspect",
            "pip install -e . && lora-diffusion quickstart images",
            "accelerate launch -m lora_diffusion.cli.main evaluate --model x",
            "lora-diffusion evaluate --model x --prompts no-such-suite --output y",
            "lora-difusion quickstart",
            "python scripts/no_such_script.py",
            "python -m scripts.no_such_folder train",
        ),
    ),
    "text": (
        str,
        (
            "`lora-diffusion config shou` prints it.",
            "```text\nlora-diffusion quickstart\n```\n",
            "The key `train.max_step` and so on.",
            "Give `data.longest=1`.",
            "```yaml\ntrain:\n  max_step: 3\n```\n",
            "See [there](docs/nowhere.md).",
            "See [there](docs/training.md#no-such-heading).",
            "See [below](#no-such-heading).",
            "See [outside](../../etc).",
            "A folder of pictures.",
        ),
    ),
}


@pytest.mark.parametrize("bad", [make(line) for make, lines in PLANTED.values() for line in lines])
def test_planted_errors_are_found(bad: str) -> None:
    assert len(problems(README, bad)) == 1


@pytest.mark.parametrize(
    "good",
    [
        _shell("lora-diffusion train --config mine.yaml data.path=photos data.speeds=[0.9,1.1]  # of recordings"),
        _shell("lora-diffusion data check --config sd1/style data.path=photos"),
        _shell("MODEL=builtin:digits\nlora-diffusion transcribe --model $MODEL talk.mp3"),
        "# Two words, *one* heading\n\n[here](#two-words-one-heading) and [there](https://example.org/#x)",
        "The key `train.max_steps=3`, the file `data.json`, the option `--client`.",
    ],
)
def test_what_is_right_passes(good: str) -> None:
    assert problems(README, good) == []
