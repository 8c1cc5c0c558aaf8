"""The record of what a run wrote into its folder: only that is ever deleted, and nothing else written over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import read_json, remove_leftovers, write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some
from lora_diffusion.training import checkpoint

RECORD_NAME = "files.json"
CHOICE = ("selection.json", "best.safetensors")
"""What `select` writes, besides the file that it chose."""
CHOSEN = re.compile(r".+-step-\d{6,}\.safetensors")
"""Name of a file that `select` chose, unless that is the finished adapter."""
_ALWAYS: tuple[str, ...] = ("config.yaml", RECORD_NAME, "plan.json", "metadata.json", "metrics.jsonl", "progress.json")
_ALWAYS += ("picture_losses.json", "machine.json", "selection.json", "tensorboard", "evaluation")
"""What every run may write, under names that are only a run's."""
_PREVIEW = re.compile(r"step-\d{6,}\.(png|tsv)")
_INNER = re.compile(
    r"(adapter|optimizer|adapter_model)\.safetensors|(state|adapter_config|evaluation|machine)\.json|scores\.csv"
    r"|events\.out\.tfevents\..+|[0-9a-f]{64}\.png"
)
"""What the program writes into the folders of checkpoints, PEFT, TensorBoard and evaluations."""


def begin(run_path: Path, adapters: Iterable[str]) -> None:
    """Records what a run that starts, or goes on, will write; a run of an older version gets its record now.

    Args:
        run_path: run folder, which holds a config.yaml.
        adapters: names of the adapters that it ends with.
    """
    _write(run_path, {*written(run_path), *_ALWAYS, *adapters}, Path.cwd())


def add(run_path: Path, names: Iterable[str]) -> None:
    """Records files or folders, by their paths in the run folder, before they are written: a kill leaves none unknown.

    Nothing is recorded where there is no run, or one of an older version, which `begin` gives its record.
    """
    known = read(run_path)
    if known is not None and not {*names} <= known:
        _write(run_path, {*known, *names}, started_in(run_path))


def forget_pruned(run_path: Path) -> None:
    """Takes checkpoints that are gone out of the record: what is put under their names is not the run's."""
    known = read(run_path) or ()
    _forget(run_path, {name for name in known if name.startswith("checkpoints/") and not (run_path / name).exists()})


def discard(run_path: Path, names: Iterable[str]) -> None:
    """Deletes files of a run that goes on, and takes them out of its record; see `remove`."""
    names = {*names}
    remove(run_path, names)
    _forget(run_path, names)


def _forget(run_path: Path, names: set[str]) -> None:
    known = read(run_path)
    if known is not None and known & names:
        _write(run_path, known - names, started_in(run_path))


def claim(run_path: Path, names: Iterable[str], setting: str) -> None:
    """Records files before they are written, unless others of their names are there.

    Raises:
        ConfigError: a file is not of this run; `setting` names what asked for it.
    """
    names = [*names]
    check_free(run_path, names, setting)
    add(run_path, names)


def check_free(run_path: Path, names: Iterable[str], setting: str) -> None:
    """Checks that no file of somebody else stands under a name that a run is to write; raises as `claim`."""
    known = written(run_path)
    taken = [name for name in names if name not in known and _is_there(run_path / name)]
    if taken:
        raise ConfigError(
            f"{setting}: {run_path} holds {name_some(taken)}, which this run did not write and would write over; "
            "move that elsewhere, or give another output.name or output.path."
        )


def written(run_path: Path) -> set[str]:
    """Returns the files and folders that a run wrote, by their paths in its folder; may name more than are there.

    Of a run of an older version, which kept no record, those are meant whose names no one else gives.
    """
    known = read(run_path)
    return {*_present(run_path)} if known is None else known


def foreign_steps(run_path: Path) -> set[int]:
    """Returns the steps of checkpoints that somebody put into the folder; none where no record is kept."""
    known = read(run_path)
    saved = checkpoint.saved_steps(run_path)
    return set() if known is None else {step for step, path in saved.items() if f"checkpoints/{path.name}" not in known}


def remove(run_path: Path, names: Iterable[str]) -> None:
    """Deletes files, and of folders what the program writes there; a folder that holds anything else stays with it."""
    for name in names:
        path = run_path / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            _remove_folder(path)


def remove_all(run_path: Path, adapters: Iterable[str]) -> None:
    """Deletes what a run wrote, its record and its config last, and logs what stays.

    Args:
        run_path: run folder.
        adapters: names of those that the run ends with.
    """
    last = (RECORD_NAME, "config.yaml")
    remove(run_path, sorted({*written(run_path), *adapters} - {*last}))
    for folder in (run_path / "checkpoints", run_path / "previews"):
        remove_leftovers(folder)
        _remove_if_empty(folder)
    # Until the config goes, the folder is known as a run.
    remove(run_path, last)
    kept = sorted(path.name for path in run_path.iterdir() if not path.name.startswith("."))
    if kept:
        logger.info("Kept in %s, since the run did not write it: %s", run_path, name_some(kept))


def started_in(run_path: Path) -> Path | None:
    """Returns the working directory in which the run was started or resumed last; None where it is not known."""
    started = _read(run_path).get("started_in")
    return Path(started) if isinstance(started, str) and "\0" not in started else None


def read(run_path: Path) -> set[str] | None:
    """Returns the files of the record; None where there is none, or, with a warning, where it is damaged."""
    names = _read(run_path).get("files")
    if isinstance(names, list) and all(map(_is_inside, names)):
        return {*names}
    if (path := run_path / RECORD_NAME).is_file():
        logger.warning("%s is damaged; only files whose names no one else gives are taken for those of the run.", path)
    return None


def _read(run_path: Path) -> dict[str, Any]:
    path = run_path / RECORD_NAME
    try:
        values = read_json(path) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(run_path: Path, names: Iterable[str], started_in: Path | None) -> None:
    values = {"started_in": None if started_in is None else str(started_in), "files": sorted(names)}
    write_json(run_path / RECORD_NAME, values)


def _is_inside(name: Any) -> bool:
    """Says whether a name leads to something in the folder, whoever wrote the record."""
    return isinstance(name, str) and bool(name) and not {"..", "/"} & {*Path(name).parts} and "\0" not in name


def _present(run_path: Path) -> Iterator[str]:
    """Yields what is surely of a run that kept no record."""
    yield from (name for name in _ALWAYS if (run_path / name).exists())
    yield from (f"checkpoints/{path.name}" for path in checkpoint.saved_steps(run_path).values())
    previews = run_path / "previews"
    yield from (f"previews/{path.name}" for path in previews.glob("step-*") if _PREVIEW.fullmatch(path.name))
    choice, best = (run_path / name for name in CHOICE)
    if choice.is_file() or best.is_symlink():
        yield best.name
    try:
        chosen = read_json(choice)["file"]
    except (OSError, ValueError, TypeError, LookupError):
        return
    if _is_inside(chosen) and CHOSEN.fullmatch(chosen):
        yield chosen


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _remove_folder(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            _remove_folder(entry)
        elif _INNER.fullmatch(entry.name):
            entry.unlink()
    _remove_if_empty(path)


def _remove_if_empty(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
