"""A live adapter, a file of its weighted sum, and the base that it is merged into draw one image."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_diffusion.adapters import merge as live_merge
from lora_diffusion.adapters.state import load_state, weight_shapes
from lora_diffusion.algebra.lowrank import AtRank
from lora_diffusion.compose.checkpoint import open_checkpoint
from lora_diffusion.compose.linear import Term, add
from lora_diffusion.compose.merge import merge
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.samples import Request
from lora_diffusion.families.sd1 import FAMILY, SD1Options
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.tensorfile.arrays import in_float32
from tests.adapters.test_variants import state_of

STORED = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "8bit": {"dtype": "fp32", "quantization": "8bit"},
    "nf4": {"dtype": "fp32", "quantization": "nf4"},
}
"""How the base is stored."""
KINDS = ("lora", "dora", "dora_out", "loha", "lokr")
ONLY_PLAIN = ("loha", "lokr")
WEIGHTS = {"lora": 0.3, "dora": 0.3, "dora_out": 0.3, "loha": 2.0, "lokr": 0.3}
"""Kind -> the weight at which an image differs visibly and still holds together."""
# Largest and mean difference of an image's values, of 255. In float32 a difference of 1e-3 moves a value by one at
# most, and NF4 weights are upcast to the same numbers for a live adapter and for the sum. In bf16 the sum is rounded
# once more, to steps of 2^-8, which is one value of 255; 8-bit layers round their inputs too, their upcast copies do
# not, to steps of 1/127 of the largest.
CLOSE = {"fp32": (1, 0.1), "bf16": (12, 1.0), "8bit": (6, 0.5), "nf4": (1, 0.1)}


def load(path: Path, stored: str) -> Loaded:
    return FAMILY.load(SD1Options(path=str(path), **STORED[stored]), torch.device("cpu"))


def drawn(loaded: Loaded) -> np.ndarray:
    (output,) = FAMILY.generate(loaded, [Request("a red cat", 3, num_steps=2)])
    return np.asarray(output.image).astype(int)


@cache
def state(kind: str) -> AdapterState:
    return state_of(kind)


def term(kind: str) -> Term:
    return Term("a", state(kind), dict.fromkeys(state(kind).parts(), WEIGHTS[kind]))


def merged(kind: str, stored: str, base: Path, folder: Path, live: Loaded) -> Loaded:
    """Returns the checkpoint with the adapter in its weights, or of a quantized base its upcast copy in memory."""
    if "quantization" in STORED[stored]:
        live_merge.merge(live, {"a": WEIGHTS[kind]})
        return live
    opened = open_checkpoint(base, FAMILY.parts, FAMILY.key_map("peft", SD1Options(path=str(base))))
    merge(opened, [term(kind)], folder, None, {})
    return load(folder, stored)


def composed(kind: str, stored: str, base: Path, path: Path) -> Loaded:
    """Returns the base with a file of the weighted sum."""
    loaded = load(base, stored)
    kernels = {key: shape[2:] for key, shape in weight_shapes(loaded.parts).items()}
    made = add([term(kind)], AtRank(600), kernels)
    kohya, names = registry.find("formats", "kohya"), FAMILY.key_map("kohya", loaded.options)
    write_verified(AdapterState(made.modules), names, kohya, path, torch.float32)
    load_state(loaded, in_float32(kohya.read(parse_file(path), names)), "sum")
    return loaded


@pytest.mark.parametrize(
    ("kind", "stored"),
    [(kind, stored) for stored in STORED for kind in KINDS if kind not in ONLY_PLAIN or stored in ("fp32", "bf16")],
)
def test_live_composed_and_merged_draw_the_same(kind: str, stored: str, tiny_base: Path, tmp_path: Path) -> None:
    live = load(tiny_base, stored)
    plain = drawn(live)
    load_state(live, state(kind), "a", WEIGHTS[kind])
    expected = drawn(live)
    assert np.abs(expected - plain).mean() > 2
    found = {"merged": drawn(merged(kind, stored, tiny_base, tmp_path / "merged", live))}
    if "dora" not in kind:  # its change depends on the base, so it has no sum without one
        found["composed"] = drawn(composed(kind, stored, tiny_base, tmp_path / "sum.safetensors"))
    largest, mean = CLOSE[stored]
    for name, image in found.items():
        difference = np.abs(image - expected)
        assert difference.max() <= largest, (name, difference.max(), difference.mean())
        assert difference.mean() <= mean, (name, difference.mean())


@pytest.mark.parametrize("kind", ONLY_PLAIN)
@pytest.mark.parametrize("stored", ["8bit", "nf4"])
def test_kinds_without_quantized_layers_are_refused(kind: str, stored: str, tiny_base: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"{kind} cannot run on a {stored} base.*merge"):
        load_state(load(tiny_base, stored), state(kind), "a")
