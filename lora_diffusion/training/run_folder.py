"""The folder of a training run: who may write into it, and what is where."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from lora_diffusion.config.describe import differences
from lora_diffusion.config.load import load, to_yaml
from lora_diffusion.config.schema import Config, PictureDataConfig
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import check_writable, remove_leftovers, user_path, write_text
from lora_diffusion.core.keymap import suggestion
from lora_diffusion.core.logs import logger

_LONGEST_NAME = 200
"""Bytes; file systems allow 255, of which endings and temporary files need some."""
_FREE = ("output.", "cache.", "preview.", "train.threads", "train.save_every_steps", "train.keep_checkpoints")
_FREE += ("evaluate.", "train.preview_every_steps", "train.tracker", "train.max_steps", "train.epochs")

_CHOICE = ("selection.json", "best.safetensors")
"""What `select` writes, besides the file that it chose."""
_OWN = ("plan.json", "metrics.jsonl", "progress.json", "picture_losses.json", "machine.json", "checkpoints", "previews")
_OWN += ("tensorboard", "evaluation", "report.html", "report.json", "report.csv")
"""What a run writes besides its config and adapters."""


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
        """Pictures drawn while training."""
        return self.path / "previews"

    def name(self, config: Config) -> str:
        """Returns the name of the adapter: `output.name`, else that of the folder."""
        return config.output.name or self.path.resolve().name

    def adapter_path(self, config: Config, format_name: str, is_folder: bool) -> Path:
        """Returns where the adapter goes: `<name>.safetensors` for kohya, `<name>.<format>` with or without ending."""
        stem = self.name(config) if format_name == "kohya" else f"{self.name(config)}.{format_name}"
        return self.path / (stem if is_folder else f"{stem}.safetensors")

    def find_adapter(self, config: Config) -> Path:
        """Returns the finished adapter, in whichever format was written.

        Raises:
            ConfigError: the run has not finished.
        """
        for format_name in config.output.formats:
            for is_folder in (False, True):
                path = self.adapter_path(config, format_name, is_folder)
                if path.exists():
                    return path
        raise ConfigError(
            f"The run in {self.path} has no finished adapter; finish it with 'lora-diffusion train --resume'."
        )

    def config(self) -> Config:
        """Returns the config that the run was made with.

        Raises:
            ConfigError: this is no run folder.
        """
        if not self.config_path.is_file():
            near = self.path.parent.iterdir() if self.path.parent.is_dir() else ()
            names = [entry.name for entry in near if (entry / "config.yaml").is_file()]
            raise ConfigError(
                f"{self.path} is not a run folder: it holds no config.yaml{suggestion(self.path.name, names)}"
            )
        config = load(self.config_path)
        # Runs from before this setting took each line of a caption file for a caption of its own.
        is_older = "caption_lines:" not in self.config_path.read_text(encoding="utf-8")
        return _with_lines(config, "each") if is_older else config


def as_started(config: Config) -> Config:
    """Returns the config of a run that may be continued, with its lines of captions taken as when it began.

    Another value than the default has to be right.
    """
    run = RunFolder(user_path(config.output.path, "output.path"))
    is_default = getattr(config.data, "caption_lines", None) == PictureDataConfig.caption_lines
    then = getattr(run.config().data, "caption_lines", None) if is_default and run.config_path.is_file() else None
    if then in (None, PictureDataConfig.caption_lines):
        return config
    logger.info("The run was started with data.caption_lines=%s and goes on with it.", then)
    return _with_lines(config, then)


def _with_lines(config: Config, rule: str) -> Config:
    if not isinstance(config.data, PictureDataConfig):
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
            f"output.path={run.path} lies inside data.path={config.data.path}, so that pictures made by the run would "
            "become training pictures; name a folder outside."
        )
    if run.config_path.is_file():
        if resume:
            _check_equal(run, config)
        elif not overwrite:
            raise ConfigError(
                f"output.path={run.path} holds a run already. Continue it with --resume, replace it with --overwrite, "
                "or give another output.path."
            )
        else:
            run.config()
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
        if overwrite and run.config_path.is_file():
            logger.info("Replacing the run in %s", run.path)
            _remove(run)
        for folder in (run.path, run.previews_path):
            remove_leftovers(folder)
        write_text(run.config_path, to_yaml(config))
    except OSError as error:
        raise ConfigError(
            f"output.path={run.path} cannot be written ({error.strerror}); make room, correct the access rights or "
            "name another folder."
        ) from error


def go_on(run: RunFolder, config: Config) -> None:
    """Takes the marks of the best checkpoint away, since the run that it was chosen from gets longer."""
    if any((run.path / name).exists() for name in _CHOICE):
        logger.warning(
            "The run goes on, so the choice of its best checkpoint is dropped; select again when it is done."
        )
        _drop_choice(run, config)


def _drop_choice(run: RunFolder, config: Config) -> None:
    chosen = run.path.glob(f"{glob.escape(run.name(config))}-step-*.safetensors")
    for path in (*chosen, *(run.path / name for name in _CHOICE)):
        path.unlink(missing_ok=True)


def _remove(run: RunFolder) -> None:
    config = run.config()
    formats = config.output.formats
    _drop_choice(run, config)
    adapters = [run.adapter_path(config, name, is_folder) for name in formats for is_folder in (False, True)]
    # The config goes last: until then the folder is known as a run.
    for path in (*(run.path / name for name in _OWN), *adapters, run.config_path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_equal(run: RunFolder, config: Config) -> None:
    changed = [line for line in differences(run.config(), config) if not line.startswith(_FREE)]
    if changed:
        raise ConfigError(
            f"The run in {run.path} was started with other settings and cannot be continued with these; "
            "set them back, or start a new run in another output.path.",
            changed,
        )
