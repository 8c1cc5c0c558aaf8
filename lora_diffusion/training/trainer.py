"""The training loop: the only one, for every family, part and variant."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor

from lora_diffusion.config.schema import DEFAULT_STEPS, TrainConfig
from lora_diffusion.config.settings import may_change
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.base_model import LossOutput
from lora_diffusion.core.errors import ConfigError, NonFiniteError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.tracker import Tracker
from lora_diffusion.core.rng import derive, derive_seed
from lora_diffusion.core.samples import Batch
from lora_diffusion.core.text import name_some
from lora_diffusion.data.batches import Batches
from lora_diffusion.runtime.autotune import use_threads
from lora_diffusion.runtime.bf16_emulation import without_bf16_emulation
from lora_diffusion.runtime.device import compute_dtype
from lora_diffusion.training import checkpoint, optim, run_files, schedule
from lora_diffusion.training.hooks import Hook
from lora_diffusion.training.tracking import check_tracker, open_trackers

Loss = Callable[[Batch, torch.Generator], LossOutput]
"""Gives the loss of each sample of a batch, drawing only from the CPU generator that it is handed."""


@contextmanager
def forward_context(precision: str, device: torch.device) -> Iterator[None]:
    """Within the context a loss is computed as a step computes it.

    Args:
        precision: value of `train.precision`.
        device: of the base.
    """
    dtype = compute_dtype(precision, device)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    with without_bf16_emulation(device), autocast:
        yield


def without_gradient(loss: Loss, precision: str, device: torch.device) -> Loss:
    """Returns a loss that is computed as a step computes it, and records no gradient."""

    def compute(batch: Batch, rng: torch.Generator) -> LossOutput:
        with torch.no_grad(), forward_context(precision, device):
            return loss(batch, rng)

    return compute


class Trainer:
    """Trains adapter parameters against a loss. It never sees the base, the family or the files of the result."""

    def __init__(
        self,
        config: TrainConfig,
        params: optim.Params,
        loss: Loss,
        run_path: Path,
        hooks: Sequence[Hook] = (),
        fingerprint: Mapping[str, Any] | None = None,
        module_rates: Mapping[ModuleKey, float] | None = None,
    ) -> None:
        """Prepares the optimizer and the precision; `step` counts the optimizer steps done.

        Args:
            config: the `train:` section.
            params: part -> name -> trainable float32 parameter, all on one device; the trainer changes them in place.
            loss: gives the loss of each sample of a batch, drawing only from the CPU generator that it is handed.
            run_path: run folder, for metrics.jsonl and checkpoints.
            hooks: called between steps on the main process.
            fingerprint: setting -> JSON value, for all that changes the result besides `config` (model, adapter, data);
                a checkpoint is continued only if all are equal.
            module_rates: highest learning rates of modules that do not learn as their part does; the name of a
                parameter is that of its module, a dot, and one more word.

        Raises:
            ConfigError: a name in the config is unknown, or nothing is trainable.
        """
        schedule.find(config.schedule)
        check_tracker(config.tracker)
        self.config, self.params, self.loss, self.run_path = config, params, loss, run_path
        self.step = 0
        self.processes = PartialState()
        self._is_decided_by_hooks = any(hook.decides for hook in hooks)
        self.hooks = hooks if self.processes.is_main_process else ()
        self.optimizer = optim.build(config, params, module_rates or {})
        self._parameters = [parameter for _, parameter in optim.named(params)]
        self.device = self._parameters[0].device
        self._dtype = compute_dtype(config.precision, self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self._dtype == torch.float16)
        self._resumed_length: int | None = None
        settings = dataclasses.asdict(config) | {"precision": str(self._dtype).removeprefix("torch.")}
        self._fingerprint = dict(fingerprint or {}) | {
            f"train.{name}": value for name, value in settings.items() if not may_change(TrainConfig, name)
        }
        use_threads(config.threads, run_path / "machine.json")

    def fit(self, batches: Batches) -> None:
        """Makes the steps that are left, and writes a checkpoint at the end and every `save_every_steps`.

        It ends earlier if a hook says so; a run that ended so makes no step when it is resumed.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite; the parameters are those of the step before.
            CheckpointError: a checkpoint cannot be written.
        """
        num_steps = total_steps(self.config, batches.num_steps_per_epoch)
        self._warn_of_new_length(num_steps)
        for hook in self.hooks:
            hook.begin(self.step)
        if self._ask_hooks(self.step)[0]:
            logger.info("The run was ended early at step %d; without evaluate.patience it goes on.", self.step)
            return
        with self._open_trackers(num_steps) as trackers:
            started = time.perf_counter()
            for step, micro_batches in zip(range(self.step + 1, num_steps + 1), batches.steps(self.step), strict=False):
                factor = schedule.factor(self.config.schedule, step, num_steps, self.config.warmup_steps)
                rate = optim.set_learning_rate(self.optimizer, factor)
                metrics = self.take_step(step, micro_batches)
                epoch = (step - 1) // batches.num_steps_per_epoch + 1
                seconds = round(time.perf_counter() - started, 4)
                for tracker in trackers:
                    tracker.log({"epoch": epoch, **metrics, "lr": rate, "seconds": seconds}, step)
                # Before the checkpoint, so that a run killed in between draws and decides again instead of never.
                for hook in self.hooks:
                    hook.on_step(step)
                should_stop, is_kept = self._ask_hooks(step)
                is_last = step == num_steps or should_stop
                if is_last or is_kept or (self.config.save_every_steps and step % self.config.save_every_steps == 0):
                    self._save(num_steps)
                if is_last:
                    break
                started = time.perf_counter()

    def take_step(self, step: int, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Makes one optimizer step with the mean loss over all samples of its micro-batches, on all processes.

        Returns:
            loss, grad_norm (before clipping), samples, and what the loss adds.
        """
        # Dropout draws from torch's global generator.
        torch.manual_seed(derive_seed(self.config.seed, "step", step, self.processes.process_index))
        per_sample, weights, metrics = self._add_gradients(micro_batches)
        loss, num_samples = self._average_processes(per_sample, weights)
        self._check_finite("loss", loss, step, micro_batches, per_sample)
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm or math.inf).item()
        # An overflow in fp16 is no error: the scaler leaves the step out and tries a smaller scale.
        if not self._scaler.is_enabled() or self._scaler.get_scale() < 1.0:
            self._check_finite("gradient norm", norm, step, micro_batches, per_sample)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step = step
        return {"loss": loss, "grad_norm": norm, "samples": num_samples, **metrics}

    def resume(self, path: Path | None) -> int:
        """Restores a checkpoint, as `checkpoint.find_latest` gives it, and returns its step; 0 without one.

        Raises:
            ConfigError: it was made with other settings or data; the message names them.
            CheckpointError: it holds other parameters.
        """
        if path is None:
            return 0
        checkpoint.check_fingerprint(path, self._fingerprint)
        state = checkpoint.read_state(path)
        checkpoint.load_params(path, self.params)
        checkpoint.load_optimizer(path, self.params, self.optimizer)
        self._scaler.load_state_dict(dict(state.scaler))
        for hook in self.hooks:
            hook.load_state(state.hooks.get(hook.name, {}))
        self.step = state.step
        self._resumed_length = state.num_steps
        return self.step

    def _add_gradients(self, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Adds up the gradients of the weighted mean over this process's samples.

        Returns:
            each loss and each weight, [samples], and the mean metrics.
        """
        num_samples = sum(len(batch) for batch in micro_batches)
        weights = [torch.ones(len(batch)) if batch.weights is None else batch.weights for batch in micro_batches]
        each_weight = torch.cat([torch.zeros(0), *weights])
        total = each_weight.sum().item()
        per_sample = [torch.zeros(0, device=self.device)]  # a process may get no batch in the last step of an epoch
        metrics: defaultdict[str, float] = defaultdict(float)
        for batch, weight in zip(micro_batches, weights, strict=True):
            rng = derive(self.config.seed, "loss", *batch.position)
            with forward_context(self.config.precision, self.device):
                output = self.loss(batch, rng)
            weighted = (output.per_sample * weight.to(output.per_sample.device)).sum()
            torch.autograd.backward(self._scaler.scale(weighted / total))
            per_sample.append(output.per_sample.detach().float())
            for name, value in output.metrics.items():
                metrics[name] += value * len(batch) / num_samples
        return torch.cat(per_sample), each_weight.to(self.device), dict(metrics)

    def _average_processes(self, per_sample: Tensor, weights: Tensor) -> tuple[float, int]:
        """Makes gradients and loss the weighted means over all processes; returns loss and number of samples."""
        loss_sum, weight = (per_sample * weights).sum(), weights.sum()
        if self.processes.num_processes == 1:
            return (loss_sum / weight).item(), len(per_sample)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        flat = torch.cat([loss_sum[None], *(weight * gradient.flatten() for gradient in gradients)])
        totals = reduce(torch.stack([weight, torch.tensor(float(len(per_sample)), device=self.device)]), "sum")
        flat = reduce(flat, "sum") / totals[0]
        sizes = [gradient.numel() for gradient in gradients]
        for parameter, mean in zip(self._parameters, flat[1:].split(sizes), strict=True):
            parameter.grad = mean.view_as(parameter)
        return flat[0].item(), int(totals[1].item())

    def _check_finite(self, what: str, value: float, step: int, micro_batches: Sequence[Batch], each: Tensor) -> None:
        if math.isfinite(value):
            return
        names = [key for batch in micro_batches for key in batch.keys]
        bad = [name for name, loss in zip(names, each.tolist(), strict=True) if not math.isfinite(loss)]
        kept = [done for done in checkpoint.saved_steps(self.run_path) if done < step]
        raise NonFiniteError(
            f"Step {step}: the {what} became {value} with {name_some(bad or names)}. "
            + (f"The checkpoint of step {kept[-1]} is kept. " if kept else "No checkpoint had been written yet. ")
            + f"Look at what is named; lower train.learning_rate (now {self.config.learning_rate:g}) or set "
            "train.precision=fp32, then start again."
        )

    def _save(self, num_steps: int) -> None:
        if self.processes.is_main_process:
            state = checkpoint.TrainState(
                step=self.step,
                num_steps=num_steps,
                fingerprint=self._fingerprint,
                scaler=self._scaler.state_dict(),
                hooks={hook.name: hook.state() for hook in self.hooks if hook.state()},
                versions={"torch": torch.__version__, "lora_diffusion": version("lora-diffusion")},
            )
            run_files.add(self.run_path, [f"checkpoints/step-{self.step:06d}"])
            kept = {hook.kept_step for hook in self.hooks} | run_files.foreign_steps(self.run_path)
            keep = self.config.keep_checkpoints
            path = checkpoint.save(self.run_path, state, self.params, self.optimizer, keep, kept)
            run_files.forget_pruned(self.run_path)
            for hook in self.hooks:
                hook.on_checkpoint(path, self.step)
        self.processes.wait_for_everyone()

    def _ask_hooks(self, step: int) -> tuple[bool, bool]:
        """Says whether hooks of the main process end the run, and want this step's checkpoint; all processes agree."""
        wishes = [(any(hook.should_stop for hook in self.hooks), any(hook.kept_step == step for hook in self.hooks))]
        if self._is_decided_by_hooks and self.processes.num_processes > 1:
            broadcast_object_list(wishes)
        return wishes[0]

    def _open_trackers(self, num_steps: int) -> AbstractContextManager[list[Tracker]]:
        if not self.processes.is_main_process:
            return nullcontext([])
        return open_trackers(self.config.tracker, self.run_path, num_steps, self.step)

    def _warn_of_new_length(self, num_steps: int) -> None:
        if self._resumed_length not in (None, num_steps) and self.config.schedule != "constant":
            logger.warning(
                "The run was planned with %d steps and now has %d: from step %d on, the learning rate follows the %s "
                "schedule of the new length.",
                self._resumed_length,
                num_steps,
                self.step + 1,
                self.config.schedule,
            )


def total_steps(config: TrainConfig, num_steps_per_epoch: int) -> int:
    """Returns the number of optimizer steps of a run: max_steps, or epochs, or 1000 where neither is given.

    Raises:
        ConfigError: both are given.
    """
    if config.max_steps is not None and config.epochs is not None:
        raise ConfigError(f"train.max_steps={config.max_steps} and train.epochs={config.epochs}: give one of the two.")
    if config.epochs is not None:
        return config.epochs * num_steps_per_epoch
    return DEFAULT_STEPS if config.max_steps is None else config.max_steps
