"""Stage 6: the denoiser, over several sittings, as single-thread processes that average gradients."""

import argparse
import math
import os
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from scripts.build_builtin.captions import GENERIC, GENERIC_SHARE, PLAIN, STYLED, STYLED_SHARE
from scripts.build_builtin.networks import UNET_CHANNELS, make_scheduler, make_unet
from scripts.build_builtin.storage import MovingAverage, load_checkpoint, save_checkpoint

PEAK_LEARNING_RATE = 1e-3
WARM_UP_STEPS = 200
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0
AVERAGE_DECAY = 0.998
CHECKPOINT_SECONDS = 240
LOG_STEPS = 50


@dataclass(frozen=True)
class Sitting:
    """What one start of the stage does; `until` and `cool_down` count samples."""

    work: Path
    name: str
    channels: tuple[int, ...]
    processes: int
    batch: int
    until: int
    cool_down: int
    minutes: float
    arithmetic: "Arithmetic"


@dataclass(frozen=True)
class Arithmetic:
    """How a processor computes: under bfloat16 autocast or in float32, and how pictures lie in memory."""

    autocast: bool
    layout: torch.memory_format

    def lay_out(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        """The same network in this layout; with plain attention, as the fused one has a slow backward on processors."""
        unet.set_attn_processor(AttnProcessor())
        return unet.to(memory_format=self.layout)  # type: ignore[call-overload,no-any-return]


class LatentBatches:
    """Draws noisy latents, targets and caption encodings from the files of stage 5."""

    def __init__(self, work: Path) -> None:
        latents, captions = load_checkpoint(work / "latents.pt"), load_checkpoint(work / "captions.pt")
        if latents is None or captions is None:
            raise FileNotFoundError(f"{work}: run the stage latents first.")
        self.means, self.logvars, self.rows = latents["means"], latents["logvars"], latents["rows"]
        self.hidden, self.caption_ids = captions["hidden"], captions["caption_ids"]
        self.alphas = make_scheduler().alphas_cumprod
        shares = [
            (STYLED, (1 - GENERIC_SHARE) * STYLED_SHARE),
            (PLAIN, (1 - GENERIC_SHARE) * (1 - STYLED_SHARE)),
            (GENERIC, GENERIC_SHARE),
        ]
        self.template_weights = torch.tensor([share / len(group) for group, share in shares for _ in group])

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        """noisy, target [count, 4, 16, 16], hidden [count, 24, 160]; timesteps, weights and chosen latents [count]."""
        chosen = torch.randint(len(self.means), (count,), generator=rng)
        deviation = torch.exp(0.5 * self.logvars[chosen].float())
        clean = self.means[chosen].float() + deviation * torch.randn(deviation.shape, generator=rng)
        noise = torch.randn(clean.shape, generator=rng)
        timesteps = torch.randint(len(self.alphas), (count,), generator=rng)
        alpha = self.alphas[timesteps][:, None, None, None]
        templates = torch.multinomial(self.template_weights, count, replacement=True, generator=rng)
        captions = self.caption_ids[self.rows[chosen], templates]
        captions[torch.rand(count, generator=rng) < CAPTION_DROPOUT] = 0
        snr = self.alphas[timesteps] / (1 - self.alphas[timesteps])
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        return {
            "noisy": noisy,
            "target": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
            "timesteps": timesteps,
            "hidden": self.hidden[captions].float(),
            # min-SNR for v-prediction, Hang et al. 2023, arXiv 2303.09556
            "weights": snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1),
            "chosen": chosen,
        }


def learning_rate(step: int, samples: int, sitting: Sitting) -> float:
    """Constant after the warm-up; over the last `cool_down` samples before `until`, linear to zero."""
    rate = PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS)
    if sitting.cool_down == 0:
        return rate
    return rate * min(1.0, max(0.0, (sitting.until - samples) / sitting.cool_down))


def average_gradients(parameters: Iterable[torch.nn.Parameter], processes: int) -> None:
    """Replace every gradient by its mean over the processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= processes
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


class Training:
    """Everything a checkpoint holds, plus one step."""

    def __init__(self, sitting: Sitting) -> None:
        torch.manual_seed(23)
        self.sitting = sitting
        self.path = sitting.work / f"{sitting.name}.pt"
        self.unet: UNet2DConditionModel = sitting.arithmetic.lay_out(make_unet(sitting.channels)).train()
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.average = MovingAverage(self.unet, AVERAGE_DECAY)
        self.step, self.samples, self.seconds = 0, 0, 0.0
        state = load_checkpoint(self.path)
        if state is not None:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        if tuple(state["channels"]) != self.sitting.channels:
            raise ValueError(
                f"{self.path} holds channels {state['channels']}, not {self.sitting.channels}; name another file."
            )
        self.unet.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]

    def save(self, path: Path | None = None) -> None:
        """Write the checkpoint; draws depend on the step number alone, so no other random state exists."""
        state = {
            "model": self.unet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
        }
        state.update(step=self.step, samples=self.samples, seconds=self.seconds, channels=list(self.sitting.channels))
        save_checkpoint(path or self.path, state)

    def run_step(self, data: LatentBatches, rank: int) -> float:
        """Update once; mean squared error of v, unweighted, of this process's batch."""
        sitting = self.sitting
        batch = data.draw(sitting.batch, torch.Generator().manual_seed((self.step * 64 + rank) * 7919 + 31))
        with torch.autocast("cpu", torch.bfloat16, enabled=sitting.arithmetic.autocast):
            noisy = batch["noisy"].contiguous(memory_format=sitting.arithmetic.layout)
            predicted = self.unet(noisy, batch["timesteps"], batch["hidden"]).sample
        errors = (predicted.float() - batch["target"]).pow(2).mean((1, 2, 3))
        self.optimizer.zero_grad(set_to_none=True)
        (errors * batch["weights"]).mean().backward()
        if sitting.processes > 1:
            average_gradients(self.unet.parameters(), sitting.processes)
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.samples, sitting)
        self.optimizer.step()
        self.step += 1
        self.samples += sitting.batch * sitting.processes
        if rank == 0:
            self.average.update(self.unet)
        return errors.mean().item()


class Stopwatch:
    """Says when a sitting ends: samples reached, minutes spent, or a signal; all processes agree."""

    def __init__(self, minutes: float, until: int, processes: int) -> None:
        self.minutes, self.until, self.processes = minutes, until, processes
        self.started = time.monotonic()
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def over(self, samples: int) -> bool:
        """True at the end of the sitting, in every process at the same step."""
        late = self.asked or time.monotonic() - self.started > self.minutes * 60
        if self.processes > 1:
            flag = torch.tensor(float(late))
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            late = bool(flag)
        return late or samples >= self.until


def fastest_arithmetic(channels: tuple[int, ...]) -> Arithmetic:
    """The way of computing in which a training step takes least time here, in this process's threads."""
    seconds = {}
    for autocast, layout in product((False, True), (torch.contiguous_format, torch.channels_last)):
        choice = Arithmetic(autocast, layout)
        unet = choice.lay_out(make_unet(channels))
        pictures = torch.randn(16, 4, 16, 16).contiguous(memory_format=layout)
        inputs = (pictures, torch.arange(16), torch.randn(16, 24, unet.config.cross_attention_dim))
        for _ in range(3):
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                answer = unet(*inputs).sample
            answer.float().mean().backward()
            seconds[choice] = min(seconds.get(choice, math.inf), time.perf_counter() - started)
    return min(seconds, key=seconds.__getitem__)


def work_process(rank: int, sitting: Sitting, port: int) -> None:
    """Body of one process."""
    torch.set_num_threads(1)
    if sitting.processes > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=sitting.processes)
    data, training = LatentBatches(sitting.work), Training(sitting)
    watch = Stopwatch(sitting.minutes, sitting.until, sitting.processes)
    saved = logged = time.monotonic()
    before = training.seconds
    errors: list[float] = []
    cool_from = sitting.until - sitting.cool_down
    cooling = sitting.cool_down == 0 or training.samples > cool_from
    while not watch.over(training.samples):
        if rank == 0 and not cooling and training.samples >= cool_from:
            training.save(training.path.with_suffix(".before-cool-down.pt"))
            cooling = True
        errors.append(training.run_step(data, rank))
        training.seconds = before + time.monotonic() - watch.started
        if rank == 0 and training.step % LOG_STEPS == 0:
            speed = LOG_STEPS * sitting.batch * sitting.processes / (time.monotonic() - logged)
            mean = sum(errors) / len(errors)
            print(f"step {training.step} samples {training.samples} v-mse {mean:.4f} samples/s {speed:.1f}", flush=True)
            logged, errors = time.monotonic(), []
        if rank == 0 and time.monotonic() - saved > CHECKPOINT_SECONDS:
            training.save()
            saved = time.monotonic()
    if rank == 0:
        training.save()
        print(f"stopped at {training.samples} samples", flush=True)
    if sitting.processes > 1:
        dist.destroy_process_group()


def run(sitting: Sitting) -> None:
    """Start the processes and wait for them; SIGTERM to this process ends the sitting with a checkpoint."""
    if sitting.processes == 1:
        work_process(0, sitting, 0)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.spawn(work_process, args=(sitting, port), nprocs=sitting.processes, join=False)

    def forward(number: int, _: object) -> None:
        for pid in context.pids():
            os.kill(pid, number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    while not context.join():
        pass


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--name", default="unet", help="checkpoint file without .pt")
    parser.add_argument("--channels", type=lambda text: tuple(map(int, text.split(","))), default=UNET_CHANNELS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=48, help="per process")
    parser.add_argument("--until", type=int, default=1_200_000, help="samples in total, over all sittings")
    parser.add_argument(
        "--cool-down", type=int, default=0, help="samples before --until over which the rate falls to zero"
    )
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="end this sitting after so long")
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    run(Sitting(**options, arithmetic=fastest_arithmetic(options["channels"])))


if __name__ == "__main__":
    main()
