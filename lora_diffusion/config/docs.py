"""The string under each config field, read from the source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any


def field_docs(section_type: type[Any]) -> Mapping[str, str]:
    """Returns field name -> the string under it, those of base classes included."""
    docs: dict[str, str] = {}
    for owner in reversed(section_type.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_text(following):
                docs[line.target.id] = " ".join(following.value.value.split())  # type: ignore[attr-defined]
    return docs


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
