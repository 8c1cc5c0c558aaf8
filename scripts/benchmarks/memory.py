"""Measures what training needs in memory, and how well `lora-diffusion estimate` foresees it.

    python -m scripts.benchmarks memory                      # full size: needs 12 GB and half an hour on two cores
    python -m scripts.benchmarks memory --cases sd1-nf4 sd1-bf16

Networks have the published sizes and random weights. Each case runs in a process of its own, one after the other, at
small images, so that weights weigh most. The peak is that of the process while it makes two steps, less what it took
before the networks were built; the C library is told to give freed memory back at once, as the memory of a GPU is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scripts.benchmarks import processes, published_networks

_TEXT_LENGTH = 77
LARGEST_SHARE_OF_FULL, LARGEST_SHARE_OF_BF16, LARGEST_ERROR = 1 / 3, 0.30, 0.15


@dataclass(frozen=True)
class Case:
    """One training setting."""

    family: str
    quantization: str = "none"
    gradient_checkpointing: bool = False
    trains_text: bool = False
    is_full: bool = False
    """Every weight of the UNet is trained instead of an adapter."""


CASES: Mapping[str, Case] = {
    "sd1-bf16": Case("sd1"),
    "sd1-bf16-text-checkpointed": Case("sd1", gradient_checkpointing=True, trains_text=True),
    "sd1-8bit": Case("sd1", "8bit"),
    "sd1-nf4-checkpointed": Case("sd1", "nf4", gradient_checkpointing=True),
    "sdxl-bf16-checkpointed": Case("sdxl", gradient_checkpointing=True),
    "sdxl-nf4-text": Case("sdxl", "nf4", trains_text=True),
}
_FULL = "sd1-full"


def config_of(case: Case, pixels: int) -> Any:
    """Returns the config that the case stands for: rank 16 on attention, AdamW, bf16."""
    from lora_diffusion.config.load import load

    parts = ["unet", *published_networks.text_encoder_configs(case.family)] if case.trains_text else ["unet"]
    values = {
        "model.family": case.family,
        "model.path": "random",
        "model.quantization": case.quantization,
        "model.dtype": "bf16",
        "data.path": "random",
        "data.resolution": pixels,
        "adapter.parts": f"[{','.join(parts)}]",
        "train.precision": "bf16",
        "train.gradient_checkpointing": str(case.gradient_checkpointing).lower(),
        "output.path": "unused",
    }
    return load(None, [f"{key}={value}" for key, value in values.items()])


def info_of(family: str) -> Any:
    """Returns what would be known of the base."""
    from lora_diffusion.core.base_model import BaseInfo

    return BaseInfo(512, 64 if family == "sd1" else 32, "random", "epsilon", "random")


def estimated(case: Case, pixels: int) -> dict[str, int]:
    """Returns what `lora-diffusion estimate` would say."""
    from lora_diffusion.adapters.plan import plan
    from lora_diffusion.core import registry
    from lora_diffusion.core.base_model import Example
    from lora_diffusion.families.stable_diffusion import sampling
    from lora_diffusion.workflows.estimate import step_memory

    config, family = config_of(case, pixels), registry.find("families", case.family)
    meta_modules, info = published_networks.networks(case.family), info_of(case.family)

    def example(options: Any, trained: frozenset[str], batch_size: int, size: tuple[int, int]) -> Any:
        return Example(sampling.example(meta_modules, info, options, trained, batch_size, size))

    adapter_plan = plan(meta_modules, family.parts, config.adapter)
    memory = step_memory(config, SimpleNamespace(example=example), info, meta_modules, adapter_plan, (pixels, pixels))  # type: ignore[arg-type]
    return {**memory.parts(), "total": memory.total_bytes}


def measured(case: Case, pixels: int) -> dict[str, int]:
    """Returns the peak of two steps and the bytes of the UNet's frozen weights."""
    from lora_diffusion.runtime.autotune import use_channels_last
    from lora_diffusion.training.trainer import Trainer

    _warm_up()
    before = processes.resident_bytes()
    config = config_of(case, pixels)
    loaded = _load(case, config)
    weights = sum(_bytes(tensor) for tensor in _tensors(loaded.parts["unet"]))
    use_channels_last(loaded.parts.values(), loaded.device)
    params, loss = _trained(case, config, loaded)
    trainer = Trainer(config.train, params, loss, Path(tempfile.mkdtemp()))
    batch = _batch(case, loaded, pixels // 8)
    processes.reset_peak()
    for step in (1, 2):
        trainer.take_step(step, (batch,))
    return {"peak": processes.peak_bytes() - before, "weights": weights}


def _warm_up() -> None:
    """Loads what every case loads, and the thread pools."""
    import bitsandbytes
    import torch

    del bitsandbytes
    x = torch.randn(256, 256, requires_grad=True)
    (x @ x).sum().backward()


def _load(case: Case, config: Any) -> Any:
    import torch

    from lora_diffusion.core.base_model import Loaded
    from lora_diffusion.diffusion.prediction import find_prediction
    from lora_diffusion.diffusion.schedule import NoiseSchedule
    from lora_diffusion.quantize import quantize

    device, rng = torch.device("cpu"), torch.Generator().manual_seed(0)
    networks = published_networks.networks(case.family)
    parts = {name: network for name, network in networks.items() if name in config.adapter.parts}
    for network in parts.values():
        published_networks.fill(network, rng)
        for name, buffer in network.named_buffers():
            buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape) if "ids" in name else torch.zeros(()))
        quantize(network, config.model.quantization, device)
    modules = {
        "schedule": NoiseSchedule(torch.linspace(0.999, 0.005, 1000)),
        "prediction": find_prediction("epsilon"),
        "scaling_factor": 0.18215,
    }
    return Loaded(parts, modules, config.model, device, info_of(case.family))


def _trained(case: Case, config: Any, loaded: Any) -> tuple[Any, Any]:
    from lora_diffusion.adapters import variants
    from lora_diffusion.adapters.inject import inject
    from lora_diffusion.adapters.plan import plan
    from lora_diffusion.core import registry
    from lora_diffusion.core.protocols.family import step_loss
    from lora_diffusion.training import memory

    family = registry.find("families", case.family)
    if case.is_full:
        unet = loaded.parts["unet"].requires_grad_()
        return {"unet": dict(unet.named_parameters())}, step_loss(family, loaded)
    variant = variants.find("lora", case.quantization)
    adapter_plan = plan(published_networks.networks(case.family), family.parts, config.adapter)
    params = inject(loaded, adapter_plan, variant, 0.0, 0)
    if case.gradient_checkpointing:
        memory.checkpoint_activations(loaded.parts)
    return params, step_loss(family, loaded)


def _batch(case: Case, loaded: Any, side: int) -> Any:
    import torch

    from lora_diffusion.core.samples import Prepared
    from lora_diffusion.families.stable_diffusion import training_loss

    del loaded
    columns: dict[str, Any] = {}
    if case.family == "sdxl":
        columns = {
            "text_2": torch.randn(1, _TEXT_LENGTH, 1280),
            "summary": torch.randn(1, 1280),
            "shown": torch.ones(1),
        }
    columns = {"text": torch.randn(1, _TEXT_LENGTH, 768), **columns}
    if case.trains_text:
        ids = torch.full((1, _TEXT_LENGTH), 49407)
        columns = {
            name: ids if name.startswith("text") else value for name, value in columns.items() if name != "summary"
        }
    tensors = {"moments": torch.randn(1, 8, side, side), **columns}
    tensors |= {f"{name}_empty": value for name, value in columns.items()}
    if case.family == "sdxl":
        tensors["time_ids"] = torch.ones(1, 6)
    return training_loss.collate([Prepared("random", tensors, "")])


def _tensors(network: Any) -> list[Any]:
    tensors = list(network.parameters())
    for module in network.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
    return tensors


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def measure(names: list[str], pixels: int) -> dict[str, Any]:
    """Returns measured and estimated bytes of each case; what the machine has no memory for is null."""
    rows = {}
    for name in names:
        case = replace(CASES["sd1-bf16"], is_full=True) if name == _FULL else CASES[name]
        estimate = None if case.is_full else processes.call_like_gpu(estimated, case, pixels)
        rows[name] = {"measured": processes.call_like_gpu(measured, case, pixels), "estimated": estimate}
        print(name, rows[name], file=sys.stderr, flush=True)
    return {"pixels": pixels, "cases": rows}


def print_report(result: dict[str, Any]) -> None:
    """Prints the table for people."""
    print(
        f"pixels={result['pixels']}\n\n| case | measured GB | estimated GB | estimated / measured |\n|---|---|---|---|"
    )
    for name, row in result["cases"].items():
        peak, estimate = row["measured"] and row["measured"]["peak"], row["estimated"] and row["estimated"]["total"]
        ratio = f"{estimate / peak:.2f}" if estimate and peak else ""
        print(f"| {name} | {_gb(peak)} | {_gb(estimate)} | {ratio} |")
    full, lora = (result["cases"].get(name, {}).get("measured") for name in (_FULL, "sd1-bf16"))
    nf4 = result["cases"].get("sd1-nf4-checkpointed", {}).get("measured")
    if full and lora:
        print(f"\nLoRA / full fine-tuning: {lora['peak'] / full['peak']:.3f}   at most {LARGEST_SHARE_OF_FULL:.3f}")
    if nf4 and lora:
        print(f"UNet in NF4 / bf16: {nf4['weights'] / lora['weights']:.3f}   at most {LARGEST_SHARE_OF_BF16:.3f}")


def _gb(count: int | None) -> str:
    return f"{count / 1e9:.2f}" if count else ""


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    result = measure(arguments.cases, arguments.pixels)
    print(json.dumps(result, indent=2)) if arguments.json else print_report(result)


def add_parser(commands: Any) -> None:
    """Adds the command `memory`."""
    parser = commands.add_parser("memory", help="peak memory of training, measured and estimated")
    names = [*CASES, _FULL]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--pixels", type=int, default=256, help="side of the images")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)
