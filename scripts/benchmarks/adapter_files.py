"""Measures work on adapter files of Stable Diffusion XL.

    python -m scripts.benchmarks files          # one module of each shape, scaled by counts
    python -m scripts.benchmarks files --all     # all 794 modules: an hour or two

The modules are those that kohya trains in the UNet (722) and in the first text encoder (72), with random factors whose
size falls like that of trained ones. Ours works on the factors. The other side does what common tools do: it adds up
the weight changes, decomposes them with `torch.linalg.svd(change, full_matrices=False)` and keeps the leading
components. Both compute in float32 and one thread, and take turns; processor time is compared, since it hardly depends
on what else the machine does. Errors are measured against the sum in float64.

Converting and inspecting are timed as whole processes, start of Python included.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks.processes import measured, run_command

_RANK = 32
_TARGETS = {"merge of 2": 100.0, "resize": 100.0, "merge of 8": 20.0}
_SECONDS = 2.0
_KOHYA_UNET = re.compile(r".*(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_(in|out))")
_KOHYA_TEXT = re.compile(r".*(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")

Shape = tuple[int, int]


@dataclass(frozen=True)
class Job:
    """One kind of work on the factors of a module."""

    num_adapters: int
    weights: tuple[float, ...]
    rank: int


JOBS = {
    "resize": Job(1, (1.0,), _RANK // 2),
    "merge of 2": Job(2, (0.8, 0.6), _RANK),
    "merge of 2, exact": Job(2, (0.8, 0.6), 2 * _RANK),
    "merge of 8": Job(8, (0.8, 0.6, 0.5, 0.4, 0.3, -0.3, 0.2, 0.1), _RANK),
}


def module_shapes() -> dict[Any, Shape]:
    """Returns module -> (out, in) of the 794 modules."""
    from lora_diffusion.architectures import DIFFUSION
    from lora_diffusion.architectures.modules import published_shapes

    patterns = {"unet": _KOHYA_UNET, "text_encoder": _KOHYA_TEXT}
    shapes = {
        key: shape
        for key, shape in published_shapes(DIFFUSION["sdxl"]).items()
        if key.part in patterns and patterns[key.part].fullmatch(key.path)
    }
    assert len(shapes) == 794 and all(len(shape) == 2 for shape in shapes.values())
    return shapes  # type: ignore[return-value]


def random_factors(shape: Shape, job: Job, seed: int) -> list[Any]:
    """Returns weighted rank-32 adapters of a module; the i-th term has 1/sqrt(i) of the size of the first."""
    import torch

    from lora_diffusion.algebra.lowrank import Factors

    rng = torch.Generator().manual_seed(seed)
    sizes = torch.arange(1, _RANK + 1) ** -0.25
    return [
        Factors(
            0.02 * torch.randn(_RANK, shape[1], generator=rng) * sizes[:, None],
            0.02 * torch.randn(shape[0], _RANK, generator=rng) * sizes,
            weight,
        )
        for weight in job.weights
    ]


def ours(terms: Sequence[Any], rank: int) -> tuple[Any, Any]:
    """Returns down and up of the nearest adapter, from the factors."""
    from lora_diffusion.algebra.lowrank import AtRank, total, truncate

    kept = truncate(total(terms), AtRank(rank)).factors
    return kept.down, kept.up


def dense(terms: Sequence[Any], rank: int) -> tuple[Any, Any]:
    """Returns down and up of the nearest adapter, from the whole weight change."""
    import torch

    change = sum(term.scale * (term.up @ term.down) for term in terms)
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    return right[:rank], left[:, :rank] * values[:rank]


def measure(job: Job, shapes: Sequence[Shape], *, every: bool) -> dict[str, float]:
    """Returns CPU seconds for all modules by each way, and the largest relative errors.

    Args:
        job: the work.
        shapes: of all modules.
        every: whether to work on all modules, not on one of each shape.
    """
    counts = {shape: shapes.count(shape) for shape in shapes}
    result = {"ours_s": 0.0, "dense_s": 0.0, "ours_error": 0.0, "dense_error": 0.0, "excess": -1.0}
    for shape, count in counts.items():
        num = count if every else 1
        for index in range(num):
            terms = random_factors(shape, job, index)
            # Ours takes milliseconds: once to warm up, and the median of three.
            factors, *repeated = [measured(ours, terms, job.rank) for _ in range(4)]
            result["ours_s"] += count / num * statistics.median(cost.cpu_s for _, cost in repeated)
            theirs, cost = measured(dense, terms, job.rank)
            result["dense_s"] += count / num * cost.cpu_s
            errors = _errors(terms, (factors[0], theirs))
            result["ours_error"] = max(result["ours_error"], errors[0])
            result["dense_error"] = max(result["dense_error"], errors[1])
            result["excess"] = max(result["excess"], errors[0] - errors[1])
    return {**result, "ratio": result["dense_s"] / result["ours_s"]}


def _errors(terms: Sequence[Any], factors: Sequence[tuple[Any, Any]]) -> list[float]:
    """Returns the relative Frobenius error of each result against the sum in float64."""
    change = sum(term.scale * (term.up.double() @ term.down.double()) for term in terms)
    return [float((up.double() @ down.double() - change).norm() / change.norm()) for down, up in factors]


def time_commands(shapes: Mapping[Any, Shape], repeats: int = 3) -> dict[str, dict[str, float]]:
    """Returns wall and CPU seconds of whole processes, medians: `inspect` and `convert` on a file of all modules.

    What Python takes to import torch, without which neither can do anything, stands beside them.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, other = Path(folder) / "xl.safetensors", Path(folder) / "converted.safetensors"
        write_adapter(shapes, path)
        program = ["-m", "lora_diffusion.cli.main"]
        commands = {
            "inspect": [*program, "inspect", str(path), "--json"],
            "convert": [*program, "convert", str(path), str(other), "--to", "diffusers", "--overwrite", "--json"],
            "import torch": ["-c", "import torch"],
        }
        python = sys.executable
        costs = {name: [run_command([python, *runs]) for _ in range(repeats)] for name, runs in commands.items()}
        size = path.stat().st_size
    return {
        name: {
            "wall_s": statistics.median(cost.wall_s for cost in runs),
            "cpu_s": statistics.median(cost.cpu_s for cost in runs),
            "file_bytes": size,
        }
        for name, runs in costs.items()
    }


def write_adapter(shapes: Mapping[Any, Shape], path: Path) -> None:
    """Writes a random adapter of rank 32 in fp16, in kohya's format."""
    import torch

    from lora_diffusion.core import registry
    from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter

    modules = {}
    for key, shape in shapes.items():
        (factors,) = random_factors(shape, JOBS["resize"], 0)
        modules[key] = ModuleAdapter("lora", {"down": factors.down, "up": factors.up}, float(_RANK))
    family, format_ = registry.find("families", "sdxl"), registry.find("formats", "kohya")
    format_.write(AdapterState(modules), family.key_map("kohya", None), path, torch.float16)


def add_parser(commands: Any) -> None:
    """Adds `files` to the command line of the benchmark."""
    parser = commands.add_parser("files", help="merging, resizing, converting and inspecting adapter files")
    parser.add_argument("--all", action="store_true", help="work on every module, not on one of each shape")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: Any) -> None:
    """Measures and prints."""
    import torch

    torch.set_num_threads(1)
    modules = module_shapes()
    shapes = list(modules.values())
    result = {
        "modules": len(shapes),
        "jobs": {name: measure(job, shapes, every=arguments.all) for name, job in JOBS.items()},
        "commands": time_commands(modules),
    }
    print(json.dumps(result, indent=2)) if arguments.json else print_report(result)


def print_report(result: Mapping[str, Any]) -> None:
    """Prints the tables for people."""
    print(f"{result['modules']} modules of rank {_RANK}; CPU seconds for all; largest relative errors")
    print(f"{'':20}{'ours':>10}{'dense SVD':>12}{'ratio':>8}{'error':>11}{'dense':>11}{'excess':>11}")
    for name, row in result["jobs"].items():
        errors = "".join(f"{row[name]:11.2g}" for name in ("ours_error", "dense_error", "excess"))
        target = f"   at least {_TARGETS[name]:g}" if name in _TARGETS else ""
        print(f"{name:20}{row['ours_s']:10.2f}{row['dense_s']:12.1f}{row['ratio']:8.0f}{errors}{target}")
    print(f"{'whole process':20}{'wall s':>10}{'CPU s':>12}")
    for name, row in result["commands"].items():
        target = "" if name == "import torch" else f"   less than {_SECONDS:g} on an idle machine"
        print(f"{name:20}{row['wall_s']:10.2f}{row['cpu_s']:12.2f}{target}")
