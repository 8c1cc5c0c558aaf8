"""What becomes of an adapter file in the programs that people load it into.

The rules are data in `app_rules`; the checks that all apps share are in `shared_checks`, and app-specific rules in
`app_checks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_diffusion.compat import app_rules as rules
from lora_diffusion.compat.app_checks import CHECKS
from lora_diffusion.compat.app_rules import APPS, LOST, App
from lora_diffusion.compat.matched_file import MatchedFile, MatchedModule
from lora_diffusion.compat.simulation import AppResult, Simulation
from lora_diffusion.core.errors import AdapterFileError, ConfigError
from lora_diffusion.core.text import shown, suggestion

_MEANT_FOR = {"kohya": tuple(APPS), "diffusers": ("diffusers",), "peft": ("diffusers",)}
"""Format -> the apps that read it; none is known of a format that another package brings."""


def verify(file: MatchedFile, app_names: Sequence[str] = ()) -> list[AppResult]:
    """Returns what each app makes of a file or PEFT folder; all apps without `app_names`.

    Raises:
        ConfigError: there is no such app.
    """
    for name in app_names:
        if name not in APPS:
            hint = suggestion(name, APPS)
            raise ConfigError(f"There is no app {name!r}{hint}. Known: {', '.join(APPS)}.")
    return [_simulate(_rules_for(name, file), file) for name in dict.fromkeys(app_names or APPS)]


def check_fit(file: MatchedFile) -> None:
    """Checks that a base that was guessed is the right one.

    Raises:
        AdapterFileError: most sizes are not those of this base.
    """
    shapes = file.base.shapes
    pairs = [(module, shapes[module.key]) for module in file.modules if module.key and "down" in module.roles]
    fitting = [shape for module, shape in pairs if tuple(module.roles["down"].shape[1:2]) == shape[1:2]]
    if 2 * len(fitting) < len(pairs):
        base_name = file.metadata.get("ss_sd_model_name", "")
        raise AdapterFileError(
            f"{file.parsed.path} is not made for the published {file.base.architecture.name}: "
            f"{len(pairs) - len(fitting)} of {len(pairs)} modules have other sizes. Name its base with "
            f"--base{f', say --base {shown(base_name)}' if base_name else ''}."
        )


def default_apps(format_name: str, file: MatchedFile) -> list[str]:
    """Returns the apps that a written file is meant for: of those that read its format, those that read its variant."""
    names = _MEANT_FOR.get(format_name, ())
    return [name for name in names if _reads_variants(_rules_for(name, file), file.modules)]


def _reads_variants(app: App, modules: Iterable[MatchedModule]) -> bool:
    return all(module.variant in app.variants and not (module.is_dora and app.dora == "ignored") for module in modules)


def _rules_for(name: str, file: MatchedFile) -> App:
    """Returns the rules by which an app takes a file; diffusers looks at all names first."""
    if name != "diffusers":
        return APPS[name]
    if file.parsed.is_folder:
        return rules.PEFT_FOLDER
    names = [name for name in file.names if "dora_scale" not in name]
    is_kohya = all(name.startswith(rules.DIFFUSERS_KOHYA_STARTS) for name in names)
    return rules.DIFFUSERS if is_kohya else rules.DIFFUSERS_DOTTED


def _simulate(app: App, file: MatchedFile) -> AppResult:
    simulation = Simulation(app, file)
    if file.parsed.is_folder and not app.reads_folders:
        remedy = "write it as a file: lora-diffusion convert FOLDER NEW --to kohya"
        simulation.report("folder", LOST, f"{app.title} reads single files, not PEFT's folders", remedy)
        simulation.lose_all()
        return simulation.result()
    for check in CHECKS[app]:
        if not simulation.is_lost:
            check(simulation)
    return simulation.result()
