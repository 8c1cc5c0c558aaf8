"""The rooms of the package and who may import whom. A new arrow is an edit of ARROWS, and is reviewed."""

from __future__ import annotations

import ast
import inspect
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lora_diffusion
from lora_diffusion.core.protocols.family import Family

PACKAGE = Path(lora_diffusion.__file__).parent
REPOSITORY = PACKAGE.parent

ARROWS: dict[str, set[str]] = {
    "core": set(),
    "algebra": {"core"},
    "runtime": {"core"},
    "tensorfile": {"core"},
    "diffusion": {"core"},
    "architectures": {"core"},
    "config": {"core"},
    "formats": {"core", "algebra", "tensorfile", "architectures"},
    "compat": {"core", "algebra", "tensorfile", "architectures", "formats"},
    "quantize": {"core", "config", "runtime"},
    "adapters": {"core", "algebra", "runtime", "config"},
    "data": {"core", "runtime", "architectures", "config"},
    "families": {"core", "runtime", "diffusion", "architectures", "config", "quantize"},
    "training": {"core", "runtime", "config", "formats", "adapters", "data"},
    "compose": {"core", "algebra", "runtime", "tensorfile", "config", "formats", "adapters"},
    "scoring": {"core", "runtime", "architectures", "config", "data"},
    "evaluation": {"core", "runtime", "config", "data", "scoring"},
    "report": {"core", "data", "evaluation"},
    "workflows": {
        *("core", "algebra", "runtime", "tensorfile", "architectures", "config", "formats", "compat", "quantize"),
        *("adapters", "data", "training", "compose", "scoring", "evaluation", "report"),
    },
    "quickstart": {"core", "config", "data", "evaluation", "report", "workflows"},
    "api": {"core", "compat", "config", "evaluation", "workflows"},
    "cli": {"core", "config", "compose", "workflows", "quickstart"},
    "__main__": {"cli"},
}
"""Room -> rooms that it may import; families, formats and metrics are otherwise reached through core.registry."""


def imports(source: str) -> Iterator[str]:
    """Yields every module of ours that a source imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lora_diffusion":
            if node.module == "lora_diffusion":
                yield from (f"lora_diffusion.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lora_diffusion")


def imported_files(source: str, files: Mapping[str, Path]) -> Iterator[str]:
    """Yields the modules that a source imports, where a name may be a module of a package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in files else node.module for name in names if node.module in files)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)


def forbidden(room: str, source: str) -> list[str]:
    """Returns the imports that the table does not allow."""
    allowed = ARROWS[room] | {room}
    return [name for name in imports(source) if name.split(".")[1:2] and name.split(".")[1] not in allowed]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) != "__init__")


def test_table_has_no_cycle() -> None:
    assert len(list(TopologicalSorter(ARROWS).static_order())) == len(ARROWS)


def modules() -> dict[str, Path]:
    """Returns every module of the package, by its dotted name."""
    found = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def test_no_two_files_import_each_other() -> None:
    files = modules()
    graph = {name: set(imported_files(path.read_text("utf-8"), files)) - {name} for name, path in files.items()}
    TopologicalSorter(graph).prepare()


def test_every_file_is_in_a_room() -> None:
    assert len(SOURCES) > 40
    assert {room_of(path) for path in SOURCES} == set(ARROWS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    assert forbidden(room_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("core", "from lora_diffusion.config.schema import Config"),
        ("families", "def f():\n    from lora_diffusion.adapters import inject"),
        ("formats", "import lora_diffusion.training.trainer"),
        ("cli", "from lora_diffusion import adapters"),
    ],
)
def test_planted_imports_are_found(room: str, source: str) -> None:
    assert len(forbidden(room, source)) == 1


def test_only_adapters_touches_peft() -> None:
    found = {
        room_of(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "peft" for alias in node.names))
    }
    assert found == {"adapters"}


def test_files_and_functions_stay_small() -> None:
    too_long = []
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        if source.count("\n") > 600:
            too_long.append(path.name)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                too_long.append(f"{path.name}:{node.name}")
    assert too_long == []


def lonely(files: Mapping[str, Path], tested: Collection[str]) -> list[str]:
    """Returns the private modules that fewer than two files import, and that no test file is named after."""
    importers = Counter(
        name for other, path in files.items() for name in {*imported_files(path.read_text("utf-8"), files)} - {other}
    )
    private = [name for name in files if name.rpartition(".")[2].startswith("_") and "__" not in name]
    return [name for name in private if importers[name] < 2 and name.rpartition("._")[2] not in tested]


def test_private_files_have_two_importers_or_a_test_file() -> None:
    tested = {path.stem.removeprefix("test_") for path in (REPOSITORY / "tests").rglob("test_*.py")}
    assert lonely(modules(), tested) == []


def test_a_private_file_of_one_importer_is_found(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.py" for name in ("room.public", "room._once")}
    files["room.public"].write_text("from room import _once", encoding="utf-8")
    files["room._once"].write_text("", encoding="utf-8")
    assert lonely(files, ()) == ["room._once"]
    assert lonely(files, ("once",)) == []


def test_family_protocol_has_at_most_15_members() -> None:
    members = [name for name in vars(Family) if not name.startswith("_")]
    members += [name for name in inspect.get_annotations(Family) if name not in members]
    assert 10 < len(members) <= 15


def test_built_package_lists_every_room() -> None:
    listed = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in PACKAGE.rglob("__init__.py")}
    assert found | {"lora_diffusion.builtin", "lora_diffusion.configs", "lora_diffusion.datasets"} == listed
