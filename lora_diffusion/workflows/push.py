"""Adapters to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_diffusion.core.errors import ConfigError, RunError
from lora_diffusion.workflows import model_card

_CARD = "README.md"


@dataclass(frozen=True)
class Publication:
    """What was, or would be, uploaded."""

    repo: str
    files: dict[str, int]
    """Name on the hub -> bytes."""
    card: str
    url: str | None
    """Address of the commit; None after a dry run."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"repo": self.repo, "files": self.files, "card": self.card, "url": self.url}

    def text(self) -> str:
        """Returns lines for people."""
        lines = [f"  {name} ({num_bytes:,} bytes)" for name, num_bytes in self.files.items()]
        if self.url:
            return "\n".join([f"Uploaded to {self.url}:", *lines])
        announcement = f"Nothing was uploaded: this was a dry run. The card ({_CARD}) would be:"
        return "\n".join([f"To {self.repo} would go:", *lines, announcement, "", self.card])


class Hub(Protocol):
    """What of `huggingface_hub.HfApi` is used."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Makes a repository, unless it is there."""

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str) -> Any:
        """Uploads files."""


def push(
    source: Path, repo: str, *, private: bool = False, dry_run: bool = False, hub: Hub | None = None
) -> Publication:
    """Uploads an adapter with its card and images. The token is that of the hub's own login or environment.

    Args:
        source: run folder, adapter file or PEFT folder.
        repo: USER/NAME.
        private: a repository that is made is seen by its owner only; one that is there stays as it is.
        dry_run: only say what would be uploaded; needs no network.
        hub: where to; the hub itself without one.

    Raises:
        ConfigError: no such name can be.
        InputError: the source cannot be used.
        RunError: the hub refuses, or cannot be reached.
    """
    _check_name(repo)
    package = model_card.collect(source)
    card = model_card.write(package, repo)
    sizes = {name: path.stat().st_size for name, path in package.files.items()} | {_CARD: len(card.encode())}
    url = None if dry_run else _upload(hub, repo, private, package, card)
    return Publication(repo, sizes, card, url)


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--repo {repo}: {error}") from error
    if repo.count("/") != 1:
        raise ConfigError(f"--repo {repo}: write USER/NAME, say maria/blorp-style.")


def _upload(hub: Hub | None, repo: str, private: bool, package: model_card.Package, card: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # The error of whichever HTTP library the hub's client was built on: no route, no name, no answer in time.
    transport_error: Any = HfHubHTTPError.__bases__[0]
    api: Hub = hub or HfApi()  # type: ignore[assignment]
    operations = [CommitOperationAdd(name, path) for name, path in package.files.items()]
    operations.append(CommitOperationAdd(_CARD, card.encode()))
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message="Upload adapter with lora-diffusion")
    except (OSError, transport_error) as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"{repo} was not uploaded: {reason}. Log in with 'hf auth login', or set HF_TOKEN to one that may write."
        ) from error
    return str(commit.commit_url)
