"""Who may name a family: their own rooms, and files with a reason. All others ask its object."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lora_diffusion

PACKAGE = Path(lora_diffusion.__file__).parent
HOMES = ("architectures", "families", "configs", "builtin", "datasets")
DIFFUSION = re.compile(r"\b(sd1|sd2|sdxl)\b")
TEXT_OUTPUT = ("whisper", "llava")

MAY_NAME = {
    "api.py": "the functions for one sample type have a default family, and examples in docstrings",
    "cli/ask.py": "the command is for one sample type, and its default family is one of these",
    "cli/transcribe.py": "the command is for one sample type, and its default family is one of these",
    "cli/verify.py": "examples in a help text",
    "config/importers/other_files.py": "the name of a shipped config in a message",
    "config/importers/other_trainers.py": "words of other trainers",
    "config/load.py": "examples of names of shipped configs",
    "config/schema.py": "the default of model.family",
    "quickstart/__init__.py": "names of the quickstarts",
    "quickstart/llava.py": "runs a shipped config",
    "quickstart/style.py": "runs a shipped config",
    "quickstart/whisper.py": "runs a shipped config",
}
"""File -> why it names one."""
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in HOMES)


def families_named(source: str) -> set[str]:
    """Returns names of diffusion families anywhere in a source, and of others where they are a whole text."""
    constants = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    return set(DIFFUSION.findall(source)) | {name for name in TEXT_OUTPUT if name in constants}


def test_names_of_families_stay_at_home() -> None:
    named = {path.relative_to(PACKAGE).as_posix() for path in FILES if families_named(path.read_text("utf-8"))}
    assert sorted(named - MAY_NAME.keys()) == []


def test_files_with_a_reason_are_those_that_name_one() -> None:
    sources = {path: (PACKAGE / path).read_text("utf-8") for path in MAY_NAME}
    words = re.compile(rf"\b(sd1|sd2|sdxl|{'|'.join(TEXT_OUTPUT)})\b")
    assert [path for path, source in sources.items() if not words.search(source)] == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("if family == 'sdxl': pass", {"sdxl"}),
        ("TABLE = {'whisper': 1}", {"whisper"}),
        ("from lora_diffusion.families.sd1 import FAMILY", {"sd1"}),
        ("version.startswith('sdxl_'); 'transformers.models.whisper'", set()),
    ],
)
def test_planted_names_are_found(source: str, names: set[str]) -> None:
    assert families_named(source) == names
