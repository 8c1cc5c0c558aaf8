"""Every config that comes along loads, is short, says how it is run, and fits its base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_diffusion.adapters import variants
from lora_diffusion.adapters.plan import plan
from lora_diffusion.config.load import load, shipped
from lora_diffusion.core import registry
from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.files import shipped_path
from lora_diffusion.workflows.estimate import step_memory
from scripts.benchmarks import published_networks
from tests.tiny_llava import published_llava_config, published_llava_parts
from tests.tiny_whisper import published_parts

PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd1", 859_520_964),
    "stabilityai/stable-diffusion-2-1": ("sd2", 865_910_724),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", 2_567_463_684),
}
"""Hub id -> family, and the number of parameters of its published UNet, by which we know that its shape is right."""

SUITES = sorted(shipped_path("configs").glob("evaluate/*.yaml"))
FILES = sorted(set(shipped_path("configs").rglob("*.yaml")) - set(SUITES))


def test_there_are_some_and_all_are_listed() -> None:
    assert len(FILES) >= 4
    assert sorted(path for path, _ in shipped().values()) == FILES
    others = [path for path in shipped_path("configs").rglob("*") if path.is_file() and path not in FILES + SUITES]
    assert others == []


LONGEST = {"whisper": (1, 100), "llava": (1024, 1)}
"""Family -> sizes of the sample that the headings speak of: tokens of a transcript, and of a conversation."""


def headings() -> Iterator[Any]:
    for path in FILES:
        if path.parent.name in LONGEST and not load(path).model.path.startswith("builtin:"):
            marks = [] if path.stem == "tiny" else [pytest.mark.slow]
            yield pytest.param(path, id=f"{path.parent.name}/{path.stem}", marks=marks)


@pytest.mark.parametrize("path", list(headings()))
def test_heading_gives_the_memory_that_is_estimated(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = path.parent.name
    published = published_networks.whisper_config(path.stem) if name == "whisper" else published_llava_config()
    published.save_pretrained(tmp_path)
    monkeypatch.setattr(registry.find("families", name), "_find", lambda options: tmp_path)
    config = load(path, ["model.dtype=bf16", "train.precision=bf16"])
    family = registry.find("families", name)
    modules = family.meta_modules(config.model)
    planned = plan(modules, family.parts, config.adapter)
    memory = step_memory(config, family, BaseInfo(0, 0, "", "", ""), modules, planned, LONGEST[name])
    heading = re.search(r"About ([\d.]+) GiB", path.read_text("utf-8").splitlines()[0])
    assert heading
    assert memory.total_bytes / 2**30 == pytest.approx(float(heading[1]), rel=0.03)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
class TestConfigs:
    def test_loads_and_says_only_what_differs(self, path: Path) -> None:
        config = load(path)
        default = load(None, ["model.path=x", "data.path=x", "output.path=x", f"model.family={config.model.family}"])
        for section, values in yaml.safe_load(path.read_text("utf-8")).items():
            for key, value in values.items():
                kept = getattr(getattr(default, section), key)
                same = value == (list(kept) if isinstance(kept, tuple) else kept)
                # Sizes that people change first may be spelled out, and the family decides the defaults.
                spelled = ("family", "rank", "targets", "batch_size", "learning_rate")
                assert not same or key in spelled, f"{section}.{key}"

    def test_says_how_it_is_run(self, path: Path) -> None:
        first, second = path.read_text("utf-8").splitlines()[:2]
        assert first.startswith("# ")
        assert second.startswith(f"# lora-diffusion train --config configs/{path.parent.name}/{path.name} ")

    def test_its_plan_fits_its_base(self, path: Path) -> None:
        config = load(path)
        family = registry.find("families", config.model.family)
        variants.find(config.adapter.variant, config.model.quantization)
        if config.model.path.startswith("builtin:"):
            modules = family.meta_modules(config.model)
        elif config.model.path.startswith("openai/whisper-"):
            modules = published_parts(config.model.path.removeprefix("openai/whisper-"))
        elif config.model.path == "llava-hf/llava-1.5-7b-hf":
            modules = published_llava_parts()
        else:
            name, size = PUBLISHED[config.model.path]
            assert name == config.model.family
            modules = published_networks.shared_networks(name)
            assert sum(parameter.numel() for parameter in modules["unet"].parameters()) == size
        planned = plan(modules, family.parts, config.adapter)
        assert {module.part for module in planned.modules} == set(config.adapter.parts)
        assert planned.num_parameters > 10_000

    def test_its_data_is_there(self, path: Path) -> None:
        data = Path(load(path).data.path)
        if data.parts[0] == "datasets":
            folder = shipped_path("datasets").joinpath(*data.parts[1:])
            assert len([*folder.glob("*.png"), *folder.glob("*.ogg")]) > 3
            assert (folder.parent / "LICENSE").is_file()
