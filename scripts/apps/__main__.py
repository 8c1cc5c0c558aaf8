"""Compares `verify` with ComfyUI, Forge, A1111, sd-scripts and diffusers on hundreds of mutated files.

    python -m scripts.apps --comfyui DIR --forge DIR --a1111 DIR --sd-scripts DIR --files 300

Each option names a checkout of the program, whose own code is run; what it imports must be installed beside torch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_diffusion.compat.matched_file import Base, match_file
from lora_diffusion.compat.verify import verify
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.workflows.verify import published_base
from scripts.apps.agreement import Agreement, compare
from scripts.apps.diffusers_loader import Diffusers, full_size
from scripts.apps.mutations import draw

_METADATA = {
    "sd1": {"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"},
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
}


def programs(family: str, arguments: argparse.Namespace, base: Base) -> Iterable[Any]:
    """Yields the programs whose checkouts are named; Forge and A1111 need that of ComfyUI for the shapes."""
    yield Diffusers(partial(full_size, family))
    if not arguments.comfyui:
        return
    from scripts.apps.comfyui import ComfyUI

    comfyui = ComfyUI(arguments.comfyui, family)
    yield comfyui
    if arguments.forge:
        from scripts.apps.forge import Forge

        yield Forge(arguments.forge, comfyui.shapes(), comfyui.unet_settings(), family)
    if arguments.a1111:
        from scripts.apps.a1111 import A1111

        yield A1111(arguments.a1111, comfyui.shapes(), comfyui.places, family)
    if arguments.sd_scripts:
        from scripts.apps.kohya import Kohya

        names = {name: key for key, spelled in base.names[0].all_names().items() for name in spelled}
        yield Kohya(arguments.sd_scripts, family, names)


def main() -> None:
    """Prints the files that differ and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--comfyui", "--forge", "--a1111", "--sd-scripts"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=("sd1", "sdxl"))
    parser.add_argument("--only", help="a program")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[Agreement]] = {}
    for family in [arguments.family] if arguments.family else ["sd1", "sdxl"]:
        base = published_base(family)
        chosen = [program for program in programs(family, arguments, base) if arguments.only in (None, program.name)]
        seeds = range(arguments.seed, arguments.seed + arguments.files // (1 if arguments.family else 2))
        with tempfile.TemporaryDirectory() as folder:
            for seed in seeds:
                _compare_file(base, seed, Path(folder) / "a.safetensors", chosen, results)
    _print_sums(results)


def _compare_file(base: Base, seed: int, path: Path, chosen: list[Any], results: dict[str, list[Agreement]]) -> None:
    tensors, label = draw(base, seed)
    if not tensors:
        return
    save_file(tensors, path, _METADATA[base.architecture.name])
    file = match_file(parse_file(path), base)
    expected = verify(match_file(parse_file(path), base), [program.name for program in chosen])
    for program, result in zip(chosen, expected, strict=True):
        agreement = compare(file, result, program.load(path))
        results.setdefault(program.name, []).append(agreement)
        if not agreement.is_whole:
            print(f"{base.architecture.name} {seed} [{label}] {program.name}: {agreement.text()}", flush=True)


def _print_sums(results: dict[str, list[Agreement]]) -> None:
    total = Counter[str]()
    for name, agreements in results.items():
        sums = Counter(
            files=len(agreements),
            agree=sum(agreement.is_whole for agreement in agreements),
            modules=sum(agreement.num_modules for agreement in agreements),
            modules_agree=sum(agreement.num_modules - len(agreement.other_modules) for agreement in agreements),
        )
        total += sums
        print(name, dict(sums))
    print("all", dict(total))
    if total["files"]:
        files, modules = total["agree"] / total["files"], total["modules_agree"] / max(1, total["modules"])
        print(f"{100 * files:.2f} % of files, {100 * modules:.3f} % of modules agree")


if __name__ == "__main__":
    main()
