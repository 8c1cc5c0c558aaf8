"""Every config that comes along loads, is short, says how it is run, and fits its base."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lora_diffusion.adapters import variants
from lora_diffusion.adapters.plan import plan
from lora_diffusion.config.load import load
from lora_diffusion.config.shipped import shipped
from lora_diffusion.core import registry
from lora_diffusion.core.files import shipped_path
from lora_diffusion.families._sources import build_skeleton

SD15 = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 49408,
    },
}
"""The sizes of Stable Diffusion 1.5; all else is the default of diffusers and transformers."""

SUITES = sorted(shipped_path("configs").glob("evaluate/*.yaml"))
FILES = sorted(set(shipped_path("configs").rglob("*.yaml")) - set(SUITES))


def test_there_are_some_and_all_are_listed() -> None:
    assert len(FILES) >= 4
    assert sorted(path for path, _ in shipped().values()) == FILES
    others = [path for path in shipped_path("configs").rglob("*") if path.is_file() and path not in FILES + SUITES]
    assert others == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
class TestConfigs:
    def test_loads_and_says_only_what_differs(self, path: Path) -> None:
        config = load(path)
        default = load(None, ["model.path=x", "data.path=x", "output.path=x", f"model.family={config.model.family}"])
        for section, values in yaml.safe_load(path.read_text("utf-8")).items():
            for key, value in values.items():
                kept = getattr(getattr(default, section), key)
                same = value == (list(kept) if isinstance(kept, tuple) else kept)
                # Sizes that people change first may be spelled out.
                assert not same or key in ("rank", "targets", "batch_size", "learning_rate"), f"{section}.{key}"

    def test_says_how_it_is_run(self, path: Path) -> None:
        first, second = path.read_text("utf-8").splitlines()[:2]
        assert first.startswith("# ")
        assert second.startswith(f"# lora-diffusion train --config configs/{path.parent.name}/{path.name} ")

    def test_its_plan_fits_its_base(self, path: Path) -> None:
        config = load(path)
        family = registry.find("families", config.model.family)
        variants.find(config.adapter.variant, config.model.quantization)
        if config.model.path.startswith("builtin:"):
            skeleton = family.skeleton(config.model)
        else:
            assert config.model.path.startswith("stable-diffusion-v1-5/"), "give the sizes of this base too"
            skeleton = build_skeleton(SD15)
            # 859,520,964 is the size of the published UNet, so this is its shape.
            assert sum(parameter.numel() for parameter in skeleton["unet"].parameters()) == 859_520_964
        made = plan(skeleton, family.parts, config.adapter)
        assert {module.part for module in made.modules} == set(config.adapter.parts)
        assert made.num_parameters > 10_000

    def test_its_data_is_there(self, path: Path) -> None:
        data = Path(load(path).data.path)
        if data.parts[0] == "datasets":
            folder = shipped_path("datasets").joinpath(*data.parts[1:])
            assert len(list(folder.glob("*.png"))) > 3
            assert (folder.parent / "LICENSE").is_file()
