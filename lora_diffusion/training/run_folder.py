"""The folder of a training run: who may write into it, and what is where."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_diffusion.config.describe import fixed_differences
from lora_diffusion.config.load import load, to_yaml
from lora_diffusion.config.schema import PATHS, Config, ImageDataConfig
from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import check_writable, remove_leftovers, user_path, write_text
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import suggestion
from lora_diffusion.training import run_files

_LONGEST_NAME = 200
"""Bytes; file systems allow 255, of which endings and temporary files need some."""


@dataclass(frozen=True)
class RunFolder:
    """Paths below `output.path`."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The resolved config; a folder that has it is a run."""
        return self.path / "config.yaml"

    @property
    def plan_path(self) -> Path:
        """The injection plan."""
        return self.path / "plan.json"

    @property
    def previews_path(self) -> Path:
        """Images generated while training."""
        return self.path / "previews"

    def name(self, config: Config) -> str:
        """Returns the name of the adapter: `output.name`, else that of the folder, or what that was called before."""
        here, before = self.path.resolve().name, Path(config.output.path).name
        if config.output.name:
            return config.output.name
        is_renamed = bool(before) and not self._has_adapter(config, here) and self._has_adapter(config, before)
        return before if is_renamed else here

    def _has_adapter(self, config: Config, name: str) -> bool:
        return any((self.path / file).exists() for file in _file_names(config, name))

    def adapter_path(self, config: Config, format_name: str) -> Path:
        """Returns where the adapter goes: `<name>.safetensors` for kohya, `<name>.<format>` with or without ending."""
        return self.path / _file_name(self.name(config), format_name)

    def adapter_names(self, config: Config, count: int | None = None) -> list[str]:
        """Returns the names of the adapter in all formats that are asked for.

        Those of one that is written during the training end in a number of steps or epochs, in six digits.
        """
        name = self.name(config)
        return _file_names(config, name if count is None else f"{name}-{count:06d}")

    def best_names(self, config: Config) -> list[str]:
        """Returns the names of the adapter of the best step, where that is not the last, in all formats."""
        return _file_names(config, f"{self.name(config)}-best")

    def find_adapter(self, config: Config) -> Path:
        """Returns the finished adapter, in whichever format was written.

        Raises:
            ConfigError: the run has not finished.
        """
        for name in self.adapter_names(config):
            if (self.path / name).exists():
                return self.path / name
        raise ConfigError(
            f"The run in {self.path} has no finished adapter; finish it with 'lora-diffusion train --resume'."
        )

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """Returns the config that the run was made with, with paths that lead to the same from any working directory.

        Args:
            overrides: "section.key=value" that count instead; their paths are those of the working directory.

        Raises:
            ConfigError: this is no run folder, or an override is wrong.
        """
        if not self.config_path.is_file():
            near = self.path.parent.iterdir() if self.path.parent.is_dir() else ()
            names = [entry.name for entry in near if (entry / "config.yaml").is_file()]
            raise ConfigError(
                f"{self.path} is not a run folder: it holds no config.yaml{suggestion(self.path.name, names)}"
            )
        stored = self._load()
        config = self._load(overrides) if overrides else stored
        places = [*self._places(stored)]
        return replace(
            config,
            **{
                section: replace(getattr(config, section), **_located(section, config, stored, places))
                for section in {name.split(".")[0] for name in PATHS}
            },
        )

    def _load(self, overrides: Sequence[str] = ()) -> Config:
        config = load(self.config_path, overrides)
        # Runs from before this setting took each line of a caption file for a caption of its own.
        is_older = "caption_lines:" not in self.config_path.read_text(encoding="utf-8")
        return _with_lines(config, "each") if is_older else config

    def find(self, text: str) -> str:
        """Returns a path that was relative to where the run was started so that it is found from here.

        Raises:
            ConfigError: this is no run folder.
        """
        return _find(text, [*self._places(load(self.config_path))], Path.exists)

    def _places(self, stored: Config) -> Iterator[Path]:
        """Yields folders below which relative paths of the stored config may lie, the likeliest first."""
        if (started_in := run_files.started_in(self.path)) is not None:
            yield started_in
        output = user_path(stored.output.path, "output.path")
        if not output.is_absolute():
            # Runs of older versions do not tell it. A project that was moved as a whole is found like this, too.
            yield self.path.resolve() / os.path.relpath(".", output)


def _located(section: str, config: Config, stored: Config, places: Sequence[Path]) -> dict[str, Any]:
    """Returns the paths of a section that were stored, so that they are found from here."""
    paths = {}
    for key in [name.split(".")[1] for name in PATHS if name.startswith(f"{section}.")]:
        value = getattr(getattr(config, section), key, None)
        if isinstance(value, str) and value == getattr(getattr(stored, section), key):
            # A suite may also be called by its name, which a folder can have by chance.
            paths[key] = _find(value, places, Path.is_file if key == "prompts" else Path.exists)
    return paths


def _find(text: str, places: Sequence[Path], is_there: Callable[[Path], bool]) -> str:
    path = Path(text)
    if path.is_absolute() or text.startswith("~"):
        return text
    there = next((place / path for place in places if is_there(place / path)), path)
    return text if there.resolve() == path.resolve() else str(there.resolve())


def _file_names(config: Config, name: str) -> list[str]:
    return [_file_name(name, format_name) for format_name in config.output.formats]


def _file_name(name: str, format_name: str) -> str:
    stem = name if format_name == "kohya" else f"{name}.{format_name}"
    return stem if registry.find("formats", format_name).is_folder else f"{stem}.safetensors"


def as_started(config: Config) -> Config:
    """Returns the config of a run that may be continued, with its lines of captions taken as when it began.

    Another value than the default has to be right.
    """
    run = RunFolder(user_path(config.output.path, "output.path"))
    is_default = getattr(config.data, "caption_lines", None) == ImageDataConfig.caption_lines
    then = getattr(run.config().data, "caption_lines", None) if is_default and run.config_path.is_file() else None
    if then in (None, ImageDataConfig.caption_lines):
        return config
    logger.info("The run was started with data.caption_lines=%s and goes on with it.", then)
    return _with_lines(config, then)


def _with_lines(config: Config, rule: str) -> Config:
    if not isinstance(config.data, ImageDataConfig):
        return config
    return replace(config, data=replace(config.data, caption_lines=rule))


def check(config: Config, *, resume: bool, overwrite: bool) -> RunFolder:
    """Says whether a run may use its output folder; changes nothing.

    Raises:
        ConfigError: the folder holds another run or other files, cannot be written, or lies inside the data.
    """
    run = RunFolder(user_path(config.output.path, "output.path"))
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite deletes it; give one of the two.")
    check_writable(run.path, "output.path")
    if len(name := run.name(config).encode()) > _LONGEST_NAME:
        raise ConfigError(
            f"output.name: the adapter's name has {len(name)} bytes; give one of at most {_LONGEST_NAME}, or, without "
            "output.name, a shorter folder name in output.path."
        )
    if user_path(config.data.path, "data.path").resolve() in (run.path.resolve(), *run.path.resolve().parents):
        raise ConfigError(
            f"output.path={run.path} lies inside data.path={config.data.path}, so that images which the run "
            "generates would become training images; name a folder outside."
        )
    if run.config_path.is_file():
        if resume:
            _check_equal(run, config)
        elif not overwrite:
            raise ConfigError(
                f"output.path={run.path} holds a run already. Continue it with --resume, replace it with --overwrite, "
                "or give another output.path."
            )
        _check_adapters(run, config)
    elif run.path.is_dir() and any(not entry.name.startswith(".") for entry in run.path.iterdir()):
        raise ConfigError(f"output.path={run.path} holds other files; give a new or empty folder.")
    return run


@contextmanager
def alone(run: RunFolder) -> Iterator[None]:
    """Keeps other processes out of a run folder until the block ends or this process is killed.

    Raises:
        ConfigError: another process is training into it, or it cannot be written.
    """
    lock = FileLock(run.path / ".lock")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"output.path={run.path}: another process is training into it; wait for it, or name another folder."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"output.path={run.path} cannot be written ({error.strerror}); name another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def prepare(run: RunFolder, config: Config, *, overwrite: bool) -> None:
    """Removes a run that is replaced, but no file that it did not make, and writes the resolved config.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        is_run = run.config_path.is_file()
        adapters = run.adapter_names(run.config()) if is_run else []
        if overwrite and is_run:
            logger.info("Replacing the run in %s", run.path)
            run_files.remove_all(run.path, adapters)
            adapters = []
        for folder in (run.path, run.previews_path):
            remove_leftovers(folder)
        # Only then the record: without a config, what is in a folder is nobody's run.
        write_text(run.config_path, to_yaml(config))
        run_files.begin(run.path, [*adapters, *run.adapter_names(config)])
    except OSError as error:
        raise ConfigError(
            f"output.path={run.path} cannot be written ({error.strerror}); free some space, correct the access "
            "rights or name another folder."
        ) from error


def go_on(run: RunFolder) -> None:
    """Takes the marks of the best checkpoint away, since the run that it was chosen from gets longer."""
    chosen = {
        name for name in run_files.written(run.path) if name in run_files.CHOICE or run_files.CHOSEN.fullmatch(name)
    }
    if any((run.path / name).exists() for name in chosen):
        logger.warning(
            "The run goes on, so the choice of its best checkpoint is dropped; select again when it is done."
        )
        run_files.discard(run.path, chosen)


def _check_equal(run: RunFolder, config: Config) -> None:
    if changed := fixed_differences(run.config(), config):
        raise ConfigError(
            f"The run in {run.path} was started with other settings and cannot be continued with these; "
            "set them back, or start a new run in another output.path.",
            changed,
        )


def _check_adapters(run: RunFolder, config: Config) -> None:
    """Checks that the adapters will not be written over files that are not of the run in the folder."""
    names = run.adapter_names(config)
    if config.train.save_adapter_every_steps or config.train.save_adapter_every_epochs:
        endings = [name.removeprefix(run.name(config)) for name in names]
        numbered = re.compile(rf"{re.escape(run.name(config))}-\d{{6,}}({'|'.join(map(re.escape, endings))})")
        names += [path.name for path in run.path.iterdir() if numbered.fullmatch(path.name)]
    known = run.config()
    # A run of an older version kept no record of its adapters.
    run_files.check_free(run.path, {*names} - {*run.adapter_names(known)}, f"output.path={run.path}")
