"""Every public function that takes or returns a tensor says its shape."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_diffusion

PACKAGE = Path(lora_diffusion.__file__).parent
_TENSOR = re.compile(r"\b(Tensor|NDArray|Array)\b")
_SHAPE = re.compile(
    r"\[[\w*/+ -]+(, ?[\w*/+ -]+)*(, ?\.\.\.)?\]|\b(any|equal|same|its) shapes?\b|\bscalar\b|\bof every shape\b", re.I
)
"""[rank, in], or words where a tensor may have any shape or none."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(tree: ast.Module | ast.ClassDef) -> Iterator[Function]:
    """Yields the public functions of a module and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)
        elif isinstance(node, Function) and not node.name.startswith("_"):
            yield node


def handles_tensors(function: Function) -> bool:
    """Says whether an annotation of the arguments or of the result names a tensor."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotations = [function.returns, *(argument.annotation for argument in arguments)]
    return any(_TENSOR.search(ast.unparse(annotation)) for annotation in annotations if annotation)


def without_shapes(source: str) -> list[str]:
    """Names the public functions of a source that take or return a tensor and do not say its shape."""
    found = [function for function in public_functions(ast.parse(source)) if handles_tensors(function)]
    return [function.name for function in found if not _SHAPE.search(ast.get_docstring(function) or "")]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_shapes_are_told(path: Path) -> None:
    assert without_shapes(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("docstring", "is_told"),
    [
        ("Adds a tensor.", False),
        ("Adds a tensor of [batch, width].", True),
        ("Adds two tensors of any shape.", True),
        ("Adds what stands in (brackets).", False),
    ],
)
def test_a_missing_shape_is_found(docstring: str, is_told: bool) -> None:
    source = f'def add(x: Mapping[str, Tensor]) -> int:\n    """{docstring}"""\n\ndef _private(x: Tensor): ...\n'
    assert without_shapes(source) == ([] if is_told else ["add"])
