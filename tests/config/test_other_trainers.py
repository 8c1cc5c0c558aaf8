"""What people bring from other trainers is told by its name here."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from lora_diffusion.cli.main import main
from lora_diffusion.config.importers import other_trainers
from lora_diffusion.config.load import load
from lora_diffusion.config.schema import DATA_SECTIONS, Config
from lora_diffusion.config.settings import allowed_values
from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError

NEEDED = ["model.path=base", "data.path=images", "output.path=run"]

KOHYA_DATA = (
    "[general]\nshuffle_caption = true\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'x'\n"
)
KOHYA_TRAINING = (
    'pretrained_model_name_or_path = "sd15.safetensors"\n[network_arguments]\nnetwork_module = "networks.lora"\n'
    "network_dim = 32\nunet_lr = 1e-4\n"
)
AI_TOOLKIT = """
job: extension
config:
  name: zorg
  process:
    - type: sd_trainer
      network: {type: lora, linear: 16}
      datasets: [{folder_path: /images}]
      train: {steps: 100, lr: 1e-4}
"""
ACCELERATE = (
    "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: fp16\n"
)


@pytest.mark.parametrize(
    ("name", "content", "title", "lines"),
    [
        ("d.toml", KOHYA_DATA, "a TOML file, the data set config of kohya's sd-scripts", ["image_dir=x is data.path"]),
        (
            "t.toml",
            KOHYA_TRAINING,
            "a TOML file, a training config of kohya's sd-scripts",
            ["network_dim=32 is adapter.rank", "unet_lr=0.0001 is train.learning_rate", "adapter.alpha=1 here"],
        ),
        ("t.yaml", KOHYA_TRAINING, "a TOML file, a training config of kohya's", ["network_dim=32 is adapter.rank"]),
        ("x.toml", "a = [", "a TOML file", []),
        ("x.toml", "[train]\nmax_steps = 5\n", "a TOML file", []),
        (
            "gui.json",
            json.dumps({"LoRA_type": "Standard", "network_dim": 8, "epoch": 3, "lr_warmup": 10}, indent="\t"),
            "a preset of the kohya_ss GUI",
            ["epoch=3 is train.epochs", "lr_warmup=10 is train.warmup_steps, which counts steps and is no share here"],
        ),
        (
            "a.yaml",
            AI_TOOLKIT,
            "a config of ai-toolkit",
            ["linear=16 is adapter.rank", "lr=1e-4 is train.learning_rate"],
        ),
        (
            "o.json",
            json.dumps({"__version": 11, "training_method": "LORA", "lora_rank": 16, "unet": {"train": True}}),
            "a config of OneTrainer",
            ["lora_rank=16 is adapter.rank"],
        ),
        ("acc.yaml", ACCELERATE, "a config of accelerate", []),
        (
            "k.yaml",
            "network_dim: 8\ntrain_data_dir: x\n",
            "a training config of kohya's",
            ["train_data_dir=x is data.path"],
        ),
        ("ac.json", '{"peft_type": "LORA", "target_modules": ["q"]}', "the adapter_config.json of a PEFT folder", []),
        ("c.json", '{"architectures": ["X"], "model_type": "x"}', "the config.json of a model", []),
        ("w.json", '{"nodes": [], "links": []}', "a workflow of ComfyUI", []),
        ("s.yaml", "style:\n- a cat\n", "a suite of prompts", []),
    ],
)
def test_files_of_other_programs(tmp_path: Path, name: str, content: str, title: str, lines: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load(path, NEEDED)
    first, *errors = str(caught.value).splitlines()
    assert first.startswith(f"{path} is {title}")
    assert "not a config, which is YAML with sections" in first
    for line in lines:
        assert any(line in error for error in errors), errors


def test_other_things_that_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {seed: 1}")
    with pytest.raises(ConfigError, match=r"is a folder, not a config file; give .*config.yaml"):
        load(tmp_path / "run")
    (tmp_path / "a.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ConfigError, match="is not a YAML file: it is no text"):
        load(tmp_path / "a.safetensors")


def test_json_is_yaml_too(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"train": {"max_steps": 5, "learning_rate": 1e-05}}))
    assert load(path, NEEDED).train.max_steps == 5


@pytest.mark.parametrize("section", ["", "train.", "adapter."])
@pytest.mark.parametrize(
    ("key", "ours"),
    [
        *(("network_dim", "adapter.rank"), ("network_alpha", "adapter.alpha"), ("lr", "train.learning_rate")),
        *(("unet_lr", "train.learning_rate"), ("text_encoder_lr", "train.text_encoder_learning_rate")),
        *(("train_batch_size", "train.batch_size"), ("mixed_precision", "train.precision")),
        *(("pretrained_model_name_or_path", "model.path"), ("train_data_dir", "data.path")),
        *(("output_dir", "output.path"), ("max_train_steps", "train.max_steps"), ("lr_scheduler", "train.schedule")),
        *(("save_every_n_epochs", "train.save_"), ("resolution", "data.resolution"), ("epochs", "train.epochs")),
        *(("min_snr_gamma", "model.min_snr_gamma"), ("NETWORK_DIM", "adapter.rank"), ("network-dim", "adapter.rank")),
        *(("repeats", "the number in front of a folder's name"), ("caption_extension", "name.txt or name.caption")),
    ],
)
def test_keys_that_people_know(tmp_path: Path, section: str, key: str, ours: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"{section[:-1]}: {{{key}: 1}}" if section else f"{key}: 1")
    if section + key in ("train.epochs",):
        return
    sources = [(path, [])] + ([] if "-" in key else [(None, [f"{section}{key}=1"])])
    for source, overrides in sources:
        with pytest.raises(ConfigError) as caught:
            load(source, [*NEEDED, *overrides])
        (error,) = caught.value.errors
        assert error.startswith(f"{section}{key}: there is no such")
        assert ours in error


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        *(("train.optimizer=AdamW8bit", "adamw8bit"), ("train.optimizer=PagedAdamW8bit", "paged_adamw8bit")),
        *(("train.precision=no", "fp32"), ("train.precision=bfloat16", "bf16"), ("output.dtype=float", "fp32")),
        *(("train.schedule=cosine_with_restarts", "cosine"), ("train.schedule=COSINE", "cosine")),
        *(("output.formats=safetensors", "kohya"), ("model.quantization=int8", "8bit"), ("train.tracker=wandb", "")),
        ("output.formats=[kohya, Diffusers]", "diffusers"),
    ],
)
def test_values_that_people_know(override: str, ours: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [*NEEDED, override])
    (error,) = caught.value.errors
    assert error.endswith(f"; write {ours}" if ours else "tensorboard")


def test_every_hint_names_a_key_that_there_is() -> None:
    families = [registry.find("families", name).options_type for name in registry.available("families")]
    hints = typing.get_type_hints(Config)
    types = [(name, hints[name]) for name in hints if dataclasses.is_dataclass(hints[name])]
    types += [("model", config_class) for config_class in families] + [
        ("data", config_class) for config_class in DATA_SECTIONS
    ]
    known = {f"{name}.{field.name}" for name, config_class in types for field in dataclasses.fields(config_class)}
    for foreign, ours in other_trainers.KEYS.items():
        first = [part.partition(",")[0] for part in ours.split(" or ")]
        assert " " in first[0] or any(part in known for part in first), foreign
        assert foreign == foreign.lower()
    sections = {**hints, "model": registry.find("families", "sd1").options_type}
    for key, choices in other_trainers._CHOICES.items():
        section, name = key.split(".")
        rule = allowed_values(sections[section], name)
        assert rule is not None
        written = [ours.split()[0] for ours in choices]
        assert all(rule.test((ours,) if key == "output.formats" else ours) for ours in written), key


def test_options_of_other_trainers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--network_dim", "32", "--lr=1e-4"])
    assert "--network_dim: adapter.rank; --lr: train.learning_rate" in capsys.readouterr().err
