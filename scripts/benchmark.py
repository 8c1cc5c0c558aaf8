"""Measures what the program costs: training steps, their memory, work on adapter files and on whole bases, scoring.

All but the first are in files of their own, benchmark_files.py and so on. A training step is compared with the plain
diffusers and PEFT loop and with the floor.

    python scripts/benchmark.py train                          # Stable Diffusion 1.5, bf16 weights, 512 pixels, rank 16
    python scripts/benchmark.py train --size small --dtype fp32

Three arms, each in a process of its own, take a step in turns, so that other work on the machine hits all alike:

    ours    our injection, loss and trainer
    plain   the loop of diffusers' examples/text_to_image/train_text_to_image_lora.py, latents and text cached
    floor   forward and backward pass of the frozen network to its input: what any adapter training must pay

The networks have random weights: they cost what trained ones do.

More arms tell what our step would cost otherwise (`--arms ours contiguous plain-attention frozen`):

    contiguous       convolution weights in torch's own layout instead of channels_last
    plain-attention  attention as two products and a softmax instead of the fused kernel
    compiled         the network under torch.compile
    frozen           our step's own network without adapter: what faster adapter arithmetic could save at most
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

_CROSS = "CrossAttnDownBlock2D"
_UP_CROSS = "CrossAttnUpBlock2D"
SIZES: dict[str, dict[str, Any]] = {
    # stable-diffusion-v1-5, unet/config.json
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "down_block_types": (_CROSS, _CROSS, _CROSS, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", _UP_CROSS, _UP_CROSS, _UP_CROSS),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    # builtin/emoji-sd, unet/config.json
    "small": {
        "sample_size": 16,
        "block_out_channels": (64, 128, 160),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", _CROSS, _CROSS),
        "up_block_types": (_UP_CROSS, _UP_CROSS, "UpBlock2D"),
        "attention_head_dim": (2, 4, 5),
        "cross_attention_dim": 160,
        "norm_num_groups": 16,
    },
}
_TEXT_LENGTH = 77
_RANK = 16
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_LEARNING_RATE = 1e-4
TARGETS = {"ours / plain": 1.00, "ours / floor": 1.08}
_MEMORY_TARGET_BYTES = 4.5e9


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    size: str
    dtype: str
    batch_size: int
    threads: str


@dataclass(frozen=True)
class Cost:
    """What one arm took."""

    wall_s: Sequence[float]
    cpu_s: Sequence[float]
    peak_bytes: int


def build_unet(setting: Setting) -> Any:
    """Returns the frozen network with random weights."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging

    from scripts.full_size import fill

    logging.set_verbosity_error()
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SIZES[setting.size])
    return fill(unet, torch.Generator(_device()).manual_seed(0), _dtype(setting))


def _dtype(setting: Setting) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[setting.dtype]


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _autocast(setting: Setting) -> Any:
    import torch

    return torch.autocast(_device().type, torch.bfloat16, enabled=setting.dtype == "bf16")


def ours(setting: Setting, change: Callable[[Any], None] | None = None) -> Callable[[int], None]:
    """Prepares a step as `lora-diffusion train` makes it; `change` may alter the network in place."""
    import torch

    from lora_diffusion.adapters.inject import inject
    from lora_diffusion.adapters.plan import plan
    from lora_diffusion.adapters.variants import find
    from lora_diffusion.config.schema import AdapterConfig, TrainConfig
    from lora_diffusion.core.base_model import BaseInfo, Loaded
    from lora_diffusion.core.samples import Batch
    from lora_diffusion.diffusion.noise import NoiseSchedule
    from lora_diffusion.diffusion.prediction import find_prediction
    from lora_diffusion.families.sd1 import FAMILY, SD1Options
    from lora_diffusion.runtime.autotune import use_channels_last
    from lora_diffusion.training.trainer import Trainer

    unet = build_unet(setting)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    modules = {
        "schedule": NoiseSchedule(torch.linspace(0.999, 0.005, 1000)),
        "prediction": find_prediction("epsilon"),
        "scaling_factor": 0.18215,
    }
    info = BaseInfo(side * 8, 64, "stable-diffusion-v1", "epsilon", "random")
    loaded = Loaded({"unet": unet}, modules, SD1Options(path="random"), _device(), info)
    use_channels_last(loaded.parts.values(), _device())
    settings = AdapterConfig(rank=_RANK)
    params = inject(loaded, plan(loaded.parts, FAMILY.parts, settings), find("lora"), 0.0, seed=0)
    config = TrainConfig(learning_rate=_LEARNING_RATE, precision=setting.dtype, threads=setting.threads)
    if change:
        change(unet)
    run_path = Path(tempfile.mkdtemp())
    trainer = Trainer(config, params, partial(FAMILY.loss, loaded), run_path)
    text = torch.randn(setting.batch_size, 1, _TEXT_LENGTH, width)
    batch = Batch(
        keys=tuple(str(index) for index in range(setting.batch_size)),
        tensors={
            "moments": torch.randn(setting.batch_size, 1, 8, side, side),
            "text": text,
            "num_captions": torch.ones(setting.batch_size, dtype=torch.long),
            "text_empty": text[:, 0],
            "has_prior": torch.zeros(setting.batch_size, dtype=torch.bool),
            "text_prior": text[:, 0],
        },
    )
    return lambda step: trainer.take_step(step, (batch,)) and None


def plain(setting: Setting) -> Callable[[int], None]:
    """Prepares a step of the diffusers example: PEFT in the network, adapter in fp32, autocast, clipping, AdamW."""
    import torch
    from diffusers import DDPMScheduler
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet = build_unet(setting)
    unet.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, init_lora_weights="gaussian", target_modules=list(_TARGETS)))
    cast_training_params(unet, dtype=torch.float32)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    latents, text = _inputs(unet, setting)
    unet.train()

    def step(index: int) -> None:
        del index
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (setting.batch_size,), device=latents.device)
        with _autocast(setting):
            noisy = scheduler.add_noise(latents, noise, timesteps)
            predicted = unet(noisy, timesteps, text, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def contiguous(unet: Any) -> None:
    """Lays the weights out as torch does by itself."""
    import torch

    unet.to(memory_format=torch.contiguous_format)


def plain_attention(unet: Any) -> None:
    """Computes attention without a fused kernel."""
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())


def compiled(unet: Any) -> None:
    """Compiles the network."""
    unet.compile()


def frozen(setting: Setting) -> Callable[[int], None]:
    """Prepares the floor in the layout that our step has."""
    from lora_diffusion.runtime.autotune import use_channels_last

    return floor(setting, lambda unet: use_channels_last([unet], _device()))


def floor(setting: Setting, change: Callable[[Any], None] | None = None) -> Callable[[int], None]:
    """Prepares forward and backward pass of the frozen network alone."""
    import torch

    unet = build_unet(setting)
    if change:
        change(unet)
    latents, text = _inputs(unet, setting)
    latents.requires_grad_()

    def step(index: int) -> None:
        del index
        with _autocast(setting):
            predicted = unet(latents, torch.tensor([500], device=latents.device), text, return_dict=False)[0]
        predicted.float().square().mean().backward()
        latents.grad = None

    return step


def _inputs(unet: Any, setting: Setting) -> tuple[Any, Any]:
    import torch

    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    shapes = (setting.batch_size, 4, side, side), (setting.batch_size, _TEXT_LENGTH, width)
    return tuple(torch.randn(shape).to(_device(), unet.dtype) for shape in shapes)  # type: ignore[return-value]


ARMS: dict[str, Callable[[Setting], Callable[[int], None]]] = {
    "ours": ours,
    "plain": plain,
    "floor": floor,
    "contiguous": partial(ours, change=contiguous),
    "plain-attention": partial(ours, change=plain_attention),
    "compiled": partial(ours, change=compiled),
    "frozen": frozen,
}
_DEFAULT_ARMS = ("ours", "plain", "floor")


def _serve(arm: str, setting: Setting, connection: Any) -> None:
    """Makes one step for each number that arrives and answers with wall and CPU seconds and the peak memory."""
    import torch

    if setting.threads != "auto":
        torch.set_num_threads(int(setting.threads))
    step = ARMS[arm](setting)
    connection.send("ready")
    while (index := connection.recv()) is not None:
        started, cpu_started = time.perf_counter(), time.process_time()
        step(index)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent = time.perf_counter() - started, time.process_time() - cpu_started
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_bytes()
        connection.send((*spent, peak))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(setting: Setting, arms: Sequence[str], repeats: int) -> dict[str, Cost]:
    """Returns the cost of each arm: one step to warm up, then `repeats` rounds in which the arms take turns."""
    context = multiprocessing.get_context("spawn")
    connections, workers = {}, []
    for arm in arms:
        connections[arm], other = context.Pipe()
        workers.append(context.Process(target=_serve, args=(arm, setting, other), daemon=True))
        workers[-1].start()
        other.close()
        connections[arm].recv()
    answers: dict[str, list[tuple[float, float, int]]] = {arm: [] for arm in arms}
    for index in range(repeats + 1):
        for arm in arms:
            connections[arm].send(index + 1)
            answers[arm].append(connections[arm].recv())
    for connection, worker in zip(connections.values(), workers, strict=True):
        connection.send(None)
        worker.join()
    costs = {}
    for arm, rows in answers.items():
        wall, cpu, peak = zip(*rows[1:], strict=True)
        costs[arm] = Cost(wall, cpu, max(peak))
    return costs


def report(setting: Setting, costs: dict[str, Cost]) -> dict[str, Any]:
    """Returns medians, peaks and ratios as plain values."""
    medians = {
        arm: {
            "wall_s": statistics.median(cost.wall_s),
            "cpu_s": statistics.median(cost.cpu_s),
            "peak_bytes": cost.peak_bytes,
        }
        for arm, cost in costs.items()
    }
    ratios = {}
    for other in medians:
        if other != "ours" and "ours" in medians:
            ratios[f"ours / {other}"] = {
                name: round(medians["ours"][name] / medians[other][name], 3) for name in medians["ours"]
            }
    return {"setting": vars(setting), "arms": medians, "ratios": ratios}


def print_report(result: dict[str, Any]) -> None:
    """Prints the table for people."""
    print(" ".join(f"{name}={value}" for name, value in result["setting"].items()))
    print(f"{'':24}{'wall s':>10}{'CPU s':>10}{'peak GB':>10}")
    for arm, values in result["arms"].items():
        print(f"{arm:24}{values['wall_s']:10.3f}{values['cpu_s']:10.3f}{values['peak_bytes'] / 1e9:10.2f}")
    for pair, values in result["ratios"].items():
        row = f"{pair:24}{values['wall_s']:10.3f}{values['cpu_s']:10.3f}{values['peak_bytes']:10.3f}"
        print(f"{row}   time at most {TARGETS[pair]:.2f}" if pair in TARGETS else row)


def run_train(arguments: argparse.Namespace) -> None:
    """Measures and prints a training step."""
    setting = Setting(arguments.size, arguments.dtype, arguments.batch_size, arguments.threads)
    result = report(setting, measure(setting, arguments.arms, arguments.repeats))
    print(json.dumps(result, indent=2)) if arguments.json else print_report(result)


def main() -> None:
    """Runs the benchmark that the command line names."""
    # Run as a file, Python finds what lies beside it but not the folder that it lies in.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts import (
        benchmark_checkpoints,
        benchmark_evaluate,
        benchmark_files,
        benchmark_memory,
        benchmark_writers,
    )

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="one training step")
    train.add_argument("--size", choices=SIZES, default="sd15")
    train.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="frozen weights, and autocast if bf16")
    train.add_argument("--batch-size", type=int, default=1)
    train.add_argument("--repeats", type=int, default=3)
    train.add_argument("--threads", default="auto", help="a number, or auto for torch's own and our choice")
    train.add_argument("--arms", nargs="+", choices=ARMS, default=list(_DEFAULT_ARMS))
    train.add_argument("--json", action="store_true")
    train.set_defaults(run=run_train)
    benchmark_checkpoints.add_parser(commands)
    benchmark_evaluate.add_parser(commands)
    benchmark_files.add_parser(commands)
    benchmark_memory.add_parser(commands)
    benchmark_writers.add_parser(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
