"""Trains each adapter once, and finds it again: files and what they cost lie in the folder of the comparison."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.config.load import find_shipped, load, to_yaml
from lora_diffusion.core.files import builtin_path, content_hash, read_json, write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.data.images import save_image
from lora_diffusion.workflows.bases import find_model
from lora_diffusion.workflows.load import check_model
from lora_diffusion.workflows.train import setup
from scripts.measure.peers.plain_loop import RECIPES, Pictures, PlainLoop
from scripts.measure.peers.sample_sets import SampleSet

OURS = "ours"
BASE_MODEL = "builtin:emoji"
_FIRST_CLASS_SEED = 10_000
"""Far from the seeds with which adapters are compared."""


@dataclass(frozen=True)
class Arm:
    """One adapter of a set."""

    method: str
    """Ours, or the name of a recipe."""
    budget: str
    """"steps": as many as ours, "time": as many as fit into the processor time of ours."""
    seed: int

    @property
    def label(self) -> str:
        """What rows of tables are called; seeds are averaged."""
        return self.method if self.method == OURS else f"{self.method}, equal {self.budget}"


@dataclass(frozen=True)
class Trained:
    """An adapter file and what it cost."""

    arm: Arm
    path: Path
    num_steps: int
    cpu_s: float
    """Processor time of the steps alone."""
    batch_size: int


@dataclass(frozen=True)
class Trainings:
    """All adapters of a comparison."""

    output: Path
    num_steps: int | None = None
    """Of ours; None takes those of the shipped config."""
    changes: Sequence[str] = ()
    """Overrides of the shipped configs."""
    num_class_images: int = 50

    def of_set(self, one: SampleSet, methods: Sequence[str], seeds: Sequence[int]) -> list[Trained]:
        """Returns the adapters of a set, and trains those that are missing; ours are always among them."""
        adapters = []
        for seed in seeds:
            ours = self.ours(one, seed)
            adapters.append(ours)
            for method in methods:
                if method != OURS and not (RECIPES[method].dreambooth and one.kind == "style"):
                    adapters += self._peers(one, method, ours)
        return adapters

    def ours(self, one: SampleSet, seed: int) -> Trained:
        """Returns the adapter that the shipped config trains."""
        config = load(find_shipped(one.config), self._overrides(one, seed))
        made_with = {"base": _base_hash(), "config": to_yaml(config)}
        arm = Arm(OURS, "steps", seed)
        if found := self._find(one, arm, made_with):
            return found
        with setup(config, overwrite=True) as run:
            started = time.process_time()
            run.fit()
            cpu_s = time.process_time() - started
            result = run.export()
        shutil.copyfile(result.files[0], self._path(one, arm))
        return self._record(one, arm, made_with, result.num_steps, cpu_s, config.train.batch_size)

    def _overrides(self, one: SampleSet, seed: int) -> list[str]:
        words = [f"data.trigger={one.trigger}"] if one.subject else []
        steps = [] if self.num_steps is None else [f"train.max_steps={self.num_steps}"]
        folder = self.output / one.name / f"run-seed{seed}"
        paths = [f"data.path={one.training}", f"output.path={folder}"]
        # Checkpoints are written within the steps, and would be counted.
        return [
            *paths,
            *words,
            f"train.seed={seed}",
            "train.threads=1",
            "train.save_every_steps=0",
            *steps,
            *self.changes,
        ]

    def _peers(self, one: SampleSet, method: str, ours: Trained) -> list[Trained]:
        """Returns what a recipe makes of the steps of ours, and of their time: both are states of one run."""
        recipe, arms = RECIPES[method], [Arm(method, budget, ours.arm.seed) for budget in ("steps", "time")]
        budgets = {"steps": ours.num_steps, "cpu_s": ours.cpu_s}
        made_with = {"base": _base_hash(), "recipe": repr(recipe), "class images": self.num_class_images, **budgets}
        found = [self._find(one, arm, made_with) for arm in arms]
        if all(found):
            return [trained for trained in found if trained]
        torch.set_num_threads(1)
        of_class = self._class_images(one) if recipe.dreambooth else None
        loop = PlainLoop(
            builtin_path("emoji-sd"),
            recipe,
            _training(one, recipe.dreambooth),
            of_class,
            ours.batch_size,
            ours.arm.seed,
        )
        trained: dict[Arm, Trained] = {}
        num_steps, cpu_s = 0, 0.0
        while len(trained) < len(arms):
            started = time.process_time()
            loop.take_step()
            cpu_s += time.process_time() - started
            num_steps += 1
            is_full = {"steps": num_steps == ours.num_steps, "time": cpu_s >= ours.cpu_s}
            for arm in arms:
                if is_full[arm.budget] and arm not in trained:
                    loop.save(self._path(one, arm))
                    trained[arm] = self._record(one, arm, made_with, num_steps, cpu_s, ours.batch_size)
        return [trained[arm] for arm in arms]

    def _class_images(self, one: SampleSet) -> Pictures:
        """Returns what the base generates of the class, the same images for all seeds."""
        folder = self.output / "class-images" / _base_hash()[:16] / one.noun
        paths = [folder / f"{index:03}.png" for index in range(self.num_class_images)]
        missing = [index for index, path in enumerate(paths) if not path.exists()]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            model = check_model(find_model(BASE_MODEL)).load()
            seeds = [_FIRST_CLASS_SEED + index for index in missing]
            for index, image in zip(missing, model.generate_many([one.class_prompt], seeds), strict=True):
                save_image(image, paths[index])
        return Pictures(paths, [one.class_prompt] * len(paths))

    def _path(self, one: SampleSet, arm: Arm) -> Path:
        budget = "" if arm.method == OURS else f"-{arm.budget}"
        return self.output / one.name / f"{one.name}-{arm.method}{budget}-seed{arm.seed}.safetensors"

    def _find(self, one: SampleSet, arm: Arm, made_with: dict[str, Any]) -> Trained | None:
        path = self._path(one, arm)
        if not path.exists() or not path.with_suffix(".json").exists():
            return None
        record = read_json(path.with_suffix(".json"))
        if record["made_with"] != made_with:
            logger.info("%s was made with another base or other settings, so it is made again.", path.name)
            return None
        return Trained(arm, path, record["steps"], record["cpu_s"], record["batch_size"])

    def _record(
        self, one: SampleSet, arm: Arm, made_with: dict[str, Any], num_steps: int, cpu_s: float, batch_size: int
    ) -> Trained:
        path = self._path(one, arm)
        costs = {"steps": num_steps, "cpu_s": cpu_s, "batch_size": batch_size}
        write_json(path.with_suffix(".json"), {**costs, "made_with": made_with})
        logger.info("%s: %d steps, %.1f CPU s", path.name, num_steps, cpu_s)
        return Trained(arm, path, num_steps, cpu_s, batch_size)


def _training(one: SampleSet, dreambooth: bool) -> Pictures:
    paths = sorted(one.training.glob("*.png"))
    captions = [path.with_suffix(".txt").read_text("utf-8").strip() for path in paths]
    return Pictures(paths, [one.instance_prompt] * len(paths) if dreambooth else captions)


def _base_hash() -> str:
    folder = builtin_path("emoji-sd")
    return "-".join(content_hash(path) for path in sorted(folder.glob("*/*.safetensors")))
