"""Measures `merge` and `extract` on whole checkpoints of published size.

    python -m scripts.benchmarks checkpoints               # needs 20 GB of disk and some minutes on two cores
    python -m scripts.benchmarks checkpoints --bases sdxl --commands merge

Stable Diffusion 1.5 in one file with LDM names and as a diffusers folder in shards, Stable Diffusion XL as a folder,
in float16 with random weights, and a random adapter of rank 16 on every layer that extract looks at, those of the text
encoders included. Each command runs in a process of its own. Its memory is the peak of the process less what it took
once the libraries were imported; the largest file of the base is what that is compared with. The error of a layer is
that of the extracted change against the change of the adapter.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_diffusion.architectures import DIFFUSION
from scripts.benchmarks.processes import call, measured, peak_bytes, resident_bytes

_RANK = 16
_FACTOR_SIZE = 0.016
"""Standard deviation of the factors; the change of a weight is then 1e-3, as in trained adapters."""
_COMMANDS = ("merge", "extract")
_BASES = {"sd1": ("sd1", ""), "sd1-shards": ("sd1", "500MB"), "sdxl": ("sdxl", "100GB")}
"""Base -> family and largest file of a diffusers folder; "" for one file with LDM names."""
_LARGEST_SHARE = 1.5
"""What `merge` may take in memory, as a multiple of the largest file."""
_VAE: dict[str, Any] = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
_VAE |= {
    "down_block_types": ["DownEncoderBlock2D"] * len(_VAE["block_out_channels"]),
    "up_block_types": ["UpDecoderBlock2D"] * len(_VAE["block_out_channels"]),
}


def write_base(base: str, folder: Path) -> Path:
    """Writes a base of _BASES."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler

    from scripts.benchmarks.published_networks import fill, networks

    rng, (family, shard_size) = torch.Generator().manual_seed(0), _BASES[base]
    with torch.device("meta"):
        vae: Any = AutoencoderKL(**_VAE)
    parts = {**networks(family), "vae": vae}
    if not shard_size:
        # The whole table of names is in the tests, where it checks the program's own.
        from tests.families.ldm import save_single_file

        whole = SimpleNamespace(**{name: fill(network, rng, torch.float16) for name, network in parts.items()})
        return save_single_file(whole, folder / f"{base}.safetensors")
    path = folder / base
    for name in list(parts):
        network: Any = fill(parts.pop(name), rng, torch.float16)
        network.save_pretrained(path / name, max_shard_size=shard_size)
    scheduler: Any = EulerDiscreteScheduler()
    scheduler.save_pretrained(path / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        (path / name).mkdir()
        (path / name / "vocab.json").write_text("{}")  # must be there; nothing here reads it
    (path / "model_index.json").write_text(json.dumps({"_class_name": DIFFUSION[family].pipeline}))
    return path


def write_adapter(family_name: str, path: Path) -> None:
    """Writes a random adapter in kohya's format, in float16, on all layers that extract looks at."""
    import torch

    from lora_diffusion.adapters.plan import plan
    from lora_diffusion.config.schema import AdapterConfig
    from lora_diffusion.core import registry
    from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter
    from scripts.benchmarks.published_networks import shared_networks

    family, rng = registry.find("families", family_name), torch.Generator().manual_seed(1)
    groups = dict.fromkeys(group for part in family.parts.values() for group in part.groups)
    config = AdapterConfig(rank=_RANK, parts=tuple(family.parts), targets=tuple(groups))
    modules = {
        module.key: ModuleAdapter(
            "lora",
            {name: _FACTOR_SIZE * torch.randn(shape, generator=rng) for name, shape in module.tensors.items()},
            float(_RANK),
        )
        for module in plan(shared_networks(family_name), family.parts, config).modules
    }
    registry.find("formats", "kohya").write(AdapterState(modules), family.key_map("kohya", None), path, torch.float16)


def run_command(arguments: Sequence[str]) -> dict[str, float]:
    """Runs one command of the program in a process of its own; returns wall and CPU seconds and its peak in bytes.

    Raises:
        SystemExit: it failed.
    """
    cost, whole = measured(call, _command_cost, arguments)
    if cost is None:
        sys.exit(f"lora-diffusion {' '.join(arguments)} failed")
    return {"wall_s": whole.wall_s, **cost}


def _command_cost(arguments: Sequence[str]) -> dict[str, float]:
    """Runs a command; returns the CPU seconds and the peak of this process, less what all that is imported takes."""
    import diffusers
    import transformers

    from lora_diffusion.cli.main import main
    from lora_diffusion.workflows import merge

    imported = diffusers.UNet2DConditionModel, transformers.CLIPTextModelWithProjection, merge
    del imported
    before = resident_bytes()
    with redirect_stdout(io.StringIO()):
        code = main([*arguments, "--json"])
    if code:
        sys.exit(code)
    return {"cpu_s": time.process_time(), "peak_bytes": peak_bytes() - before}


def layer_errors(wanted_path: Path, extracted_path: Path) -> list[float]:
    """Returns the relative error of each layer of an extracted adapter; 1 for a layer that is missing."""
    from lora_diffusion.algebra.lowrank import Factors, norm, total
    from lora_diffusion.formats.parsed_file import parse_file
    from lora_diffusion.workflows._adapter_files import read_alone

    (_, wanted), (_, extracted) = read_alone(parse_file(wanted_path)), read_alone(parse_file(extracted_path))
    errors = []
    for key, adapter in wanted:
        factors = Factors(adapter.tensors["down"], adapter.tensors["up"], adapter.scale)
        other = extracted.modules.get(key)
        terms = (
            [factors] if other is None else [factors, Factors(other.tensors["down"], other.tensors["up"], -other.scale)]
        )
        errors.append(norm(total(terms)) / norm(factors))
    return errors


def measure(name: str, folder: Path, commands: Sequence[str]) -> dict[str, Any]:
    """Returns the costs of merge, and of extract if it is among the commands, and the errors of the layers."""
    base, adapter, back = write_base(name, folder), folder / "adapter.safetensors", folder / "back.safetensors"
    write_adapter(_BASES[name][0], adapter)
    tuned = base.with_name(f"tuned-{base.name}")
    files = [base] if base.is_file() else list(base.rglob("*.safetensors"))
    rows = {"merge": run_command(["merge", "--model", str(base), "--adapter", str(adapter), "--output", str(tuned)])}
    errors = []
    if "extract" in commands:
        rows["extract"] = run_command(["extract", str(base), str(tuned), str(back), "--rank", str(_RANK)])
        errors = layer_errors(adapter, back)
    return {
        "largest_file_bytes": max(file.stat().st_size for file in files),
        "bytes": sum(file.stat().st_size for file in files),
        **({"median_error": statistics.median(errors), "largest_error": max(errors)} if errors else {}),
        **rows,
    }


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    result = {}
    for family in arguments.bases:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            result[family] = measure(family, Path(folder), arguments.commands)
    print(json.dumps(result, indent=2)) if arguments.json else print_report(result)


def print_report(result: Mapping[str, Any]) -> None:
    """Prints the table for people."""
    print("| base, GB | command | wall s | CPU s | peak GB | peak / largest file | error, median | largest |")
    print("|---|---|---|---|---|---|---|---|")
    for family, row in result.items():
        for name in filter(row.get, _COMMANDS):
            cost, share = row[name], row[name]["peak_bytes"] / row["largest_file_bytes"]
            errors = f"{row['median_error']:.1e} | {row['largest_error']:.1e}" if name == "extract" else " | "
            print(
                f"| {family}, {row['bytes'] / 1e9:.1f} | {name} | {cost['wall_s']:.0f} | {cost['cpu_s']:.0f} | "
                f"{cost['peak_bytes'] / 1e9:.2f} | {share:.2f} | {errors} |"
            )
    worst = max(row["merge"]["peak_bytes"] / row["largest_file_bytes"] for row in result.values())
    print(f"\nlargest peak of merge / largest file: {worst:.2f}   less than {_LARGEST_SHARE:g}")


def add_parser(commands: Any) -> None:
    """Adds `checkpoints` to the command line of the benchmark."""
    parser = commands.add_parser("checkpoints", help="merge and extract on whole checkpoints of published size")
    parser.add_argument("--bases", nargs="+", choices=_BASES, default=list(_BASES))
    parser.add_argument("--commands", nargs="+", choices=_COMMANDS, default=_COMMANDS, help="merge is always measured")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints, which are then deleted")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)
