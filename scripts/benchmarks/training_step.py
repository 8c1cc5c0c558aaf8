"""Measures a training step against the plain diffusers and PEFT loop, and against the floor.

    python -m scripts.benchmarks train                         # Stable Diffusion 1.5, bf16 weights, 512 pixels, rank 16
    python -m scripts.benchmarks train --size small --dtype fp32

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
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_diffusion.core.files import builtin_path
from scripts.benchmarks.processes import Cost, Worker, measured
from scripts.benchmarks.published_networks import fill, unet_config

SIZES: dict[str, dict[str, Any]] = {
    "sd15": unet_config("sd1"),
    "small": json.loads((builtin_path("emoji-sd") / "unet" / "config.json").read_text("utf-8")),
}
"""Name -> config.json of the UNet."""
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


def build_unet(setting: Setting) -> Any:
    """Returns the frozen network with random weights."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SIZES[setting.size])
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
    from lora_diffusion.core import registry
    from lora_diffusion.core.base_model import BaseInfo, Loaded
    from lora_diffusion.core.protocols.family import Family, step_loss
    from lora_diffusion.core.samples import Batch
    from lora_diffusion.diffusion.prediction import find_prediction
    from lora_diffusion.diffusion.schedule import NoiseSchedule
    from lora_diffusion.families.sd1 import SD1Options
    from lora_diffusion.runtime.autotune import use_channels_last
    from lora_diffusion.training.trainer import Trainer

    family: Family = registry.find("families", "sd1")
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
    params = inject(loaded, plan(loaded.parts, family.parts, settings), find("lora"), 0.0, seed=0)
    config = TrainConfig(learning_rate=_LEARNING_RATE, precision=setting.dtype, threads=setting.threads)
    if change:
        change(unet)
    run_path = Path(tempfile.mkdtemp())
    trainer = Trainer(config, params, step_loss(family, loaded), run_path)
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

    def take_step(step: int) -> None:
        trainer.take_step(step, (batch,))

    return take_step


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
    scheduler: Any = DDPMScheduler(num_train_timesteps=1000)
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


def _prepare(arm: str, setting: Setting) -> Callable[[int], Cost]:
    """Returns what makes one step of an arm, given its number, and says what it took."""
    import torch

    if setting.threads != "auto":
        torch.set_num_threads(int(setting.threads))
    step = ARMS[arm](setting)

    def make_step(index: int) -> None:
        step(index)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def costly_step(index: int) -> Cost:
        _, cost = measured(make_step, index)
        is_on_gpu = torch.cuda.is_available()
        return replace(cost, peak_bytes=torch.cuda.max_memory_allocated()) if is_on_gpu else cost

    return costly_step


def measure(setting: Setting, arms: Sequence[str], repeats: int) -> dict[str, list[Cost]]:
    """Returns the costs of each arm: one step to warm up, then `repeats` rounds in which the arms take turns."""
    workers = {arm: Worker(_prepare, arm, setting) for arm in arms}
    rounds = [{arm: worker.ask(index + 1) for arm, worker in workers.items()} for index in range(repeats + 1)]
    for worker in workers.values():
        worker.close()
    return {arm: [costs[arm] for costs in rounds[1:]] for arm in arms}


def report(setting: Setting, costs: Mapping[str, Sequence[Cost]]) -> dict[str, Any]:
    """Returns medians, peaks and ratios as plain values."""
    medians = {
        arm: {
            "wall_s": statistics.median(cost.wall_s for cost in steps),
            "cpu_s": statistics.median(cost.cpu_s for cost in steps),
            "peak_bytes": max(cost.peak_bytes for cost in steps),
        }
        for arm, steps in costs.items()
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


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    setting = Setting(arguments.size, arguments.dtype, arguments.batch_size, arguments.threads)
    result = report(setting, measure(setting, arguments.arms, arguments.repeats))
    print(json.dumps(result, indent=2)) if arguments.json else print_report(result)


def add_parser(commands: Any) -> None:
    """Adds the command `train`."""
    parser = commands.add_parser("train", help="one training step")
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of weights; autocast if bf16")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", default="auto", help="a number, or auto for torch's own and our choice")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(_DEFAULT_ARMS))
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)
