"""What becomes of an adapter file in the programs that people load it into.

The rules are data in `_client_rules`; the checks that all clients share are in `_client_checks`, and what only one of
them does is in `_client_habits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_diffusion.compat import app_rules as rules
from lora_diffusion.compat.adapter_file import AdapterFile, Base, FileModule, read_file
from lora_diffusion.compat.app_checks import CHECKS
from lora_diffusion.compat.app_rules import CLIENTS, HIDDEN, LOST, Client
from lora_diffusion.compat.identify import guess_family, refuse_other, sized_as, told_by_content
from lora_diffusion.compat.simulation import Problem, Trial, Verdict
from lora_diffusion.core.errors import AdapterFileError, ConfigError
from lora_diffusion.core.text import shown, suggestion

__all__ = [
    "CLIENTS",
    "HIDDEN",
    "Base",
    "Problem",
    "Verdict",
    "check_fit",
    "default_clients",
    "guess_family",
    "read_file",
    "refuse_other",
    "sized_as",
    "told_by_content",
    "verify",
]

_MEANT_FOR = {"diffusers": ("diffusers",), "peft": ("diffusers",)}


def verify(path: Path, base: Base, clients: Sequence[str] = ()) -> list[Verdict]:
    """Returns what each client makes of a file or PEFT folder; all clients without `clients`.

    Raises:
        AdapterFileError: it cannot be read at all.
        ConfigError: there is no such client.
    """
    for name in clients:
        if name not in CLIENTS:
            hint = suggestion(name, CLIENTS)
            raise ConfigError(f"There is no client {name!r}{hint}. Known: {', '.join(CLIENTS)}.")
    file = read_file(path, base)
    return [_judge(_rules_for(name, file), file, base) for name in dict.fromkeys(clients or CLIENTS)]


def check_fit(path: Path, base: Base) -> None:
    """Checks that a base that was guessed is the right one.

    Raises:
        AdapterFileError: most sizes are not those of this base.
    """
    file = read_file(path, base)
    found = [(module, base.shapes[module.key]) for module in file.modules if module.key and "down" in module.roles]
    fitting = [shape for module, shape in found if tuple(module.roles["down"].shape[1:2]) == shape[1:2]]
    if 2 * len(fitting) < len(found):
        told = file.metadata.get("ss_sd_model_name", "")
        raise AdapterFileError(
            f"{path} is not made for the published {base.family}: {len(found) - len(fitting)} of {len(found)} modules "
            f"have other sizes. Name its base with --base{f', say --base {shown(told)}' if told else ''}."
        )


def default_clients(format_name: str, path: Path, base: Base) -> list[str]:
    """Returns the clients that a written file is meant for: of those that read its spelling, those that read its kind.

    Raises:
        AdapterFileError: it cannot be read at all.
    """
    names = _MEANT_FOR.get(format_name, tuple(CLIENTS))
    file = read_file(path, base)
    return [name for name in names if _reads_kind(_rules_for(name, file), file.modules)]


def _reads_kind(client: Client, modules: Iterable[FileModule]) -> bool:
    return all(
        module.variant in client.variants and not (module.is_dora and client.dora == "ignored") for module in modules
    )


def _rules_for(name: str, file: AdapterFile) -> Client:
    """Returns the rules by which a client takes a file; diffusers looks at all names first."""
    if name != "diffusers":
        return CLIENTS[name]
    if file.is_folder:
        return rules.PEFT_FOLDER
    names = [name for name in file.names if "dora_scale" not in name]
    is_kohya = all(name.startswith(rules.DIFFUSERS_KOHYA_STARTS) for name in names)
    return rules.DIFFUSERS if is_kohya else rules.DIFFUSERS_DOTTED


def _judge(client: Client, file: AdapterFile, base: Base) -> Verdict:
    trial = Trial(client, file, base)
    if file.is_folder and not client.reads_folders:
        remedy = "write it as a file: lora-diffusion convert FOLDER NEW --to kohya"
        trial.report("folder", LOST, f"{client.title} reads single files, not PEFT's folders", remedy)
        trial.lose_all()
        return trial.verdict()
    for check in CHECKS[client]:
        if not trial.is_lost:
            check(trial)
    return trial.verdict()
