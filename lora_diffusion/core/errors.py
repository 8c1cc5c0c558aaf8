"""Every error that a user can cause.

LoraDiffusionError
├── InputError             what was given is wrong; exit code 2
│   ├── ConfigError        config file, override or command-line value
│   │   └── TargetError    a target names no module of the base
│   ├── DataError          images, captions, folders
│   ├── ModelError         the base model cannot be what was asked for
│   │   ├── MissingModelError  there is nothing of that name
│   │   └── UntrainableError   it cannot be trained or run, but adapters can be merged into it
│   ├── AdapterFileError   an adapter file is damaged or of another architecture
│   └── UnsupportedError   each part is right, the combination cannot work
└── RunError               the input was right and the run failed; exit code 1
    ├── CheckpointError    a checkpoint cannot be written or does not fit the run
    ├── NonFiniteError     a loss or a weight became NaN or infinite
    │   └── NumberRangeError   numbers are larger than the dtype of a file can hold
    ├── VerificationError  a file read back differs from what was written
    └── GateError          an evaluation does not meet a condition of --assert
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class LoraDiffusionError(Exception):
    """Base of everything below; its text is shown to the user as it stands."""

    exit_code = 1

    def __init__(self, message: str, errors: Sequence[str] = ()) -> None:
        """Keeps the message and, where several things are wrong at once, one line for each."""
        self.errors = tuple(errors)
        super().__init__("\n".join([message, *(f"  - {error}" for error in self.errors)]))


class InputError(LoraDiffusionError):
    """What the user gave is wrong, and nothing was trained or written."""

    exit_code = 2


class ConfigError(InputError):
    """A config file, an override or a command-line value is wrong."""


class TargetError(ConfigError):
    """A target, of `adapter.targets` or of a setting of single modules, matches no module that it could act on."""


class DataError(InputError):
    """Images, captions or their folder are wrong."""


class ModelError(InputError):
    """The base model is missing, incomplete or of another architecture."""


class MissingModelError(ModelError):
    """There is no folder, file or hub id of the name of the base."""

    def __init__(self, message: str, remedy: str) -> None:
        """Keeps what is missing apart from what a family would take instead."""
        self.message = message
        super().__init__(f"{message} {remedy}")


class UntrainableError(ModelError):
    """A base cannot be trained or run here, but its weights can be changed."""

    def __init__(self, message: str, path: Path = Path()) -> None:
        """Keeps where the base lies on this machine."""
        self.path = path
        super().__init__(message)


class AdapterFileError(InputError):
    """An adapter file is damaged, unknown or made for another architecture."""


class UnsupportedError(InputError):
    """Each value is right by itself, but they cannot work together."""


class RunError(LoraDiffusionError):
    """The input was right, but the run failed."""


class CheckpointError(RunError):
    """A checkpoint cannot be written, or does not fit the run that wants it."""


class NonFiniteError(RunError):
    """A loss or a weight became NaN or infinite."""


class NumberRangeError(NonFiniteError):
    """Numbers are larger than the dtype of a file can hold."""

    def __init__(self, message: str) -> None:
        """Keeps what does not fit apart from the setting that chooses the dtype."""
        self.message = message
        super().__init__(f"{message}; write the file with output.dtype=bf16 or fp32.")


class VerificationError(RunError):
    """A file that was read back differs from what was written."""


class GateError(RunError):
    """An evaluation does not meet the conditions that were asked of it."""
