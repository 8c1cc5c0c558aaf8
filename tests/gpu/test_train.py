"""The whole way on a GPU, in each precision. Results are close to those of the CPU, not equal to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_diffusion.config.load import load
from lora_diffusion.core.samples import Request
from lora_diffusion.families.sd1 import FAMILY, SD1Options
from lora_diffusion.runtime.device import pick_device
from lora_diffusion.workflows.train import train


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (16, 16), name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} square", encoding="utf-8")
    return folder


def trained(base: Path, pictures: Path, output: Path, *overrides: str) -> dict[str, torch.Tensor]:
    values = [f"model.path={base}", f"data.path={pictures}", f"output.path={output}", "train.max_steps=8", *overrides]
    result = train(load(None, [*values, "train.batch_size=2", "output.dtype=fp32", "adapter.rank=4"]))
    return load_file(result.files[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_precision_trains(tiny_base: Path, pictures: Path, tmp_path: Path, precision: str) -> None:
    assert pick_device().type == "cuda"
    tensors = trained(tiny_base, pictures, tmp_path / "run", f"train.precision={precision}", "model.dtype=fp32")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_up" in name)


def test_gradient_checkpointing_gives_the_same_adapter(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    plain = trained(tiny_base, pictures, tmp_path / "a", "train.precision=fp32", "model.dtype=fp32")
    saved = trained(
        tiny_base,
        pictures,
        tmp_path / "b",
        "train.precision=fp32",
        "model.dtype=fp32",
        "train.gradient_checkpointing=true",
    )
    for name, tensor in plain.items():
        # Kernels may sum in another order; eight steps of AdamW at 1e-4 move a number by 8e-4 at most.
        torch.testing.assert_close(saved[name], tensor, atol=2e-4, rtol=1e-2)


def test_pictures_are_those_of_the_cpu(tiny_base: Path) -> None:
    options = SD1Options(path=str(tiny_base), dtype="fp32")
    requests = [Request("a red cat", seed, num_steps=4) for seed in (0, 1)]
    on_gpu = FAMILY.generate(FAMILY.load(options, torch.device("cuda")), requests)
    on_cpu = FAMILY.generate(FAMILY.load(options, torch.device("cpu")), requests)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        difference = [abs(a - b) for a, b in zip(ours.image.tobytes(), theirs.image.tobytes(), strict=True)]
        assert max(difference) <= 8
