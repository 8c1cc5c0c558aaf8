from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.algebra.delta import delta_weight
from lora_diffusion.algebra.lowrank import AtRank, ByEnergy
from lora_diffusion.compose.checkpoint import Checkpoint
from lora_diffusion.compose.extract import extract
from lora_diffusion.compose.linear import Term
from lora_diffusion.compose.merge import merge
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.errors import ModelError
from lora_diffusion.tensorfile.streaming import TensorFile
from tests.compose.test_merge import opened
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import random_state, tiny_loaded

ONE = {"unet": 1.0, "text_encoder": 1.0}


@pytest.fixture(scope="module")
def state() -> AdapterState:
    return random_state(tiny_loaded(), rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def tuned(state: AdapterState, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "base"
    merge(opened(tiny_base), [Term("a", state, ONE)], path, None, {})
    return path


@pytest.mark.parametrize("rule", [AtRank(4), ByEnergy(1 - 1e-10)])
def test_what_was_merged_comes_out_again(rule: AtRank, state: AdapterState, tiny_base: Path, tuned: Path) -> None:
    extraction = extract(opened(tiny_base), opened(tuned), list(state.modules), rule, seed=0)
    assert extraction.num_equal == 0
    assert extraction.others == ()
    for key, adapter in state:
        # The merged weights were rounded to float32 once.
        change, wanted = delta_weight(extraction.changes.modules[key]).reshape(-1), delta_weight(adapter).reshape(-1)
        assert float((change - wanted).norm() / wanted.norm()) < 1e-5
        assert extraction.changes.relative(key) < 1e-5
    if isinstance(rule, AtRank):
        assert {adapter.rank for adapter in extraction.changes.modules.values()} == {4}


def test_error_is_what_the_cut_leaves(state: AdapterState, tiny_base: Path, tuned: Path) -> None:
    extraction = extract(opened(tiny_base), opened(tuned), list(state.modules), AtRank(1), seed=0).changes
    for key, adapter in state:
        singular = torch.linalg.svdvals(delta_weight(adapter).flatten(1).double())
        assert extraction.norms[key] == pytest.approx(float(singular.norm()), rel=1e-4)
        assert extraction.errors[key] == pytest.approx(float(singular[1:].norm()), rel=1e-4)


def test_equal_modules_are_counted_and_all_else_that_differs_is_named(
    state: AdapterState, tiny_base: Path, tuned: Path, tmp_path: Path
) -> None:
    keys = list(state.modules)
    some = {key for key in keys if "to_q" in key.path}
    left = extract(opened(tiny_base), opened(tuned), sorted(some), AtRank(1), seed=0).others
    assert left is not None
    assert set(left) == {f"{key.part}/{key.path}.weight" for key in set(keys) - some}
    base = tmp_path / "base"
    tiny_pipeline().save_pretrained(base)
    (file,) = (base / "unet").glob("*.safetensors")
    tensors = load_file(file)
    query = next(f"{key.path}.weight" for key in keys if key.part == "unet" and "to_q" in key.path)
    changed = {query: tensors[query] + 1, "conv_in.bias": tensors["conv_in.bias"] + 1}
    save_file({**tensors, **changed}, file, {"format": "pt"})
    extraction = extract(opened(tiny_base), opened(base), keys, AtRank(1), seed=0)
    assert len(extraction.changes.modules) == 1
    assert extraction.num_equal == len(keys) - 1
    assert extraction.others == ("unet/conv_in.bias",)


def test_nothing_and_misfits(state: AdapterState, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"None of the \d+ modules differs"):
        extract(opened(tiny_base), opened(tiny_base), list(state.modules), AtRank(1), seed=0)
    base = tmp_path / "base"
    tiny_pipeline().save_pretrained(base)
    (file,) = (base / "unet").glob("*.safetensors")
    key = next(key for key in state.modules if key.part == "unet")
    tensors = load_file(file)
    wide = torch.cat([tensors[f"{key.path}.weight"]] * 2)
    save_file({**tensors, f"{key.path}.weight": wide}, file, {"format": "pt"})
    names = opened(tiny_base).names
    other = Checkpoint(base, {file: TensorFile(file)}, names)
    with pytest.raises(ModelError, match="1 modules have other shapes"):
        extract(opened(tiny_base), other, [key], AtRank(1), seed=0)
