"""A merged base does what the base does with live adapters, and is otherwise the base."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.adapters.state import check_fit, load_state
from lora_diffusion.adapters.variants import VARIANTS
from lora_diffusion.compose.checkpoint import Checkpoint, open_checkpoint
from lora_diffusion.compose.linear import Term
from lora_diffusion.compose.merge import merge
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.families.sd1 import FAMILY, SD1Options
from tests.adapters.test_variants import state_of
from tests.families.ldm import save_single_file, sd1_shaped_pipeline
from tests.tiny import save_tiny_sdxl_pipeline, tiny_pipeline
from tests.tiny_adapters import answers, random_state, tiny_loaded

WEIGHTS = {"unet": 0.7, "text_encoder": -0.4}


def opened(path: Path) -> Checkpoint:
    options = SD1Options(path=str(path))
    return open_checkpoint(path, FAMILY.parts, FAMILY.key_map("ldm" if path.is_file() else "peft", options))


def loaded_from(path: Path) -> Loaded:
    return FAMILY.load(SD1Options(path=str(path)), torch.device("cpu"))


def live(state: AdapterState) -> Loaded:
    """Returns the tiny base with an adapter at the weights of its parts."""
    loaded = tiny_loaded()
    for part in state.parts():
        part_state = AdapterState({key: adapter for key, adapter in state if key.part == part})
        load_state(loaded, part_state, part, WEIGHTS[part])
    return loaded


def assert_same_answers(first: Loaded, second: Loaded) -> None:
    for one, other in zip(answers(first), answers(second), strict=True):
        # Sums of float32 in another order; images are asked to agree to 1e-3.
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_folder_answers_like_the_live_adapter(variant: str, tiny_base: Path, tmp_path: Path) -> None:
    state = state_of(variant)
    done = merge(opened(tiny_base), [Term("a", state, WEIGHTS)], tmp_path / "out", None, {"made": "here"})
    assert done.num_modules == done.num_changed == len(state.modules)
    assert_same_answers(loaded_from(tmp_path / "out"), live(state))


def test_all_else_of_the_folder_is_that_of_the_base(tiny_base: Path, tmp_path: Path) -> None:
    state, output = random_state(tiny_loaded(), groups="attn"), tmp_path / "out"
    merge(opened(tiny_base), [Term("a", state, WEIGHTS)], output, None, {})
    changed = {f"{key.part}/{key.path}.weight" for key, _ in state}
    assert {path.relative_to(output) for path in output.rglob("*")} == {
        path.relative_to(tiny_base) for path in tiny_base.rglob("*")
    }
    for path in tiny_base.rglob("*.*"):
        relative = path.relative_to(tiny_base)
        if path.suffix != ".safetensors" or relative.parts[0] == "vae":
            assert (output / relative).read_bytes() == path.read_bytes()
            continue
        before, after = load_file(path), load_file(output / relative)
        differing = {name for name in before if not torch.equal(before[name], after[name])}
        assert {f"{relative.parts[0]}/{name.removeprefix('text_model.')}" for name in differing} == {
            name for name in changed if name.startswith(relative.parts[0] + "/")
        }


def test_two_adapters_add_up_whatever_their_order(tiny_base: Path, tmp_path: Path) -> None:
    loaded = tiny_loaded()
    terms = [Term("a", random_state(loaded, 1), WEIGHTS), Term("b", random_state(loaded, 2, groups="ff"), WEIGHTS)]
    merge(opened(tiny_base), terms, tmp_path / "one", None, {})
    merge(opened(tiny_base), terms[::-1], tmp_path / "two", None, {})
    assert_same_answers(loaded_from(tmp_path / "one"), loaded_from(tmp_path / "two"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_rounded_to_once(dtype: torch.dtype, tiny_base: Path, tmp_path: Path) -> None:
    term = Term("a", random_state(tiny_loaded()), WEIGHTS)
    merge(opened(tiny_base), [term], tmp_path / "wide", None, {})
    merge(opened(tiny_base), [term], tmp_path / "small", dtype, {})
    for path in (tmp_path / "wide").rglob("*.safetensors"):
        wide, small = load_file(path), load_file(tmp_path / "small" / path.relative_to(tmp_path / "wide"))
        expected = torch.float32 if path.parent.name == "vae" else dtype
        assert all(torch.equal(tensor.to(expected), small[name]) for name, tensor in wide.items())
        assert {tensor.dtype for tensor in small.values()} == {expected}


def test_shards_keep_their_index(tmp_path: Path, tiny_base: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    tiny_pipeline().save_pretrained(base, max_shard_size="200KB")
    (index,) = (base / "unet").glob("*.index.json")
    state = random_state(tiny_loaded())
    merge(opened(base), [Term("a", state, WEIGHTS)], output, torch.bfloat16, {})
    before, after = (json.loads((root / "unet" / index.name).read_text()) for root in (base, output))
    assert after["weight_map"] == before["weight_map"]
    assert 2 * after["metadata"]["total_size"] == before["metadata"]["total_size"]
    merge(opened(base), [Term("a", state, WEIGHTS)], tmp_path / "wide", None, {})
    assert_same_answers(loaded_from(tmp_path / "wide"), live(state))


def test_weights_in_other_forms_are_left_out_by_name(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "base"
    tiny_pipeline().save_pretrained(base)
    for name in ("unet/diffusion_pytorch_model.bin", "all.safetensors", ".cache/huggingface/x.bin"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(b"old weights")
    with caplog.at_level(logging.WARNING):
        merge(opened(base), [Term("a", random_state(tiny_loaded()), WEIGHTS)], tmp_path / "out", None, {})
    assert "2 weight file(s) are left out" in caplog.text
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert not (tmp_path / "out" / "all.safetensors").exists()


def test_quantized_weights_are_refused_before_writing(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_pipeline().save_pretrained(base)
    (file,) = (base / "unet").glob("*.safetensors")
    tensors = load_file(file)
    state = random_state(tiny_loaded(), groups="attn")
    name = next(f"{key.path}.weight" for key, _ in state if key.part == "unet")
    save_file({**tensors, name: tensors[name].to(torch.uint8)}, file, {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"1 of the weights quantized.*merge into the checkpoint") as caught:
        merge(opened(base), [Term("a", state, WEIGHTS)], tmp_path / "out", None, {})
    assert caught.value.errors == (f"{name} is torch.uint8",)
    assert not (tmp_path / "out").exists()


def test_single_file_is_merged_like_its_folder(tmp_path: Path) -> None:
    pipeline = sd1_shaped_pipeline()
    single = save_single_file(pipeline, tmp_path / "model.safetensors")
    options = SD1Options(path=str(single))
    modules = FAMILY.meta_modules(options)
    state = random_state(Loaded(modules, {}, None, torch.device("meta"), FAMILY.check(options)), groups="attn ff conv")
    output = tmp_path / "out.safetensors"
    done = merge(opened(single), [Term("a", state, WEIGHTS)], output, None, {"made": "here"})
    assert done.num_changed == len(state.modules)
    assert done.num_kept == len(load_file(single)) - done.num_changed
    merged, base = loaded_from(output), loaded_from(single)
    for part, network in base.parts.items():
        load_state(base, AdapterState({key: a for key, a in state if key.part == part}), part, WEIGHTS[part])
        expected = network.state_dict()
        weights = merged.parts[part].state_dict()
        for key, adapter in state:
            if key.part == part:
                change = WEIGHTS[part] * (adapter.tensors["up"].flatten(1) @ adapter.tensors["down"].flatten(1)) / 2
                weight = expected[f"{key.path}.base_layer.weight"]
                assert torch.allclose(weights[f"{key.path}.weight"], weight + change.reshape(weight.shape), atol=1e-6)


def test_fused_attention_of_sdxl_gets_its_third(tmp_path: Path) -> None:
    names = registry.find("families", "sdxl").key_map("ldm", None)
    layer = "text_model.encoder.layers.0.self_attn."
    keys = {matrix: ModuleKey("text_encoder_2", f"{layer}{matrix}_proj") for matrix in ("q", "v", "out")}
    block = "conditioner.embedders.1.model.transformer.resblocks.0.attn."
    path, rng = tmp_path / "xl.safetensors", torch.Generator().manual_seed(0)
    before = {
        f"{block}in_proj_weight": torch.randn(24, 8, generator=rng),
        f"{block}in_proj_bias": torch.randn(24, generator=rng),
        f"{block}out_proj.weight": torch.randn(8, 8, generator=rng),
    }
    save_file(before, path)
    factors = {key: (torch.randn(2, 8, generator=rng), torch.randn(8, 2, generator=rng)) for key in keys.values()}
    state = AdapterState({key: ModuleAdapter("lora", {"down": d, "up": u}, 2.0) for key, (d, u) in factors.items()})
    term = Term("a", state, {"text_encoder_2": 0.5})
    done = merge(open_checkpoint(path, ["unet"], names), [term], tmp_path / "out.safetensors", None, {})
    assert (done.num_modules, done.num_changed, done.num_kept) == (3, 2, 1)
    after = load_file(tmp_path / "out.safetensors")
    changes = {matrix: 0.5 * factors[key][1] @ factors[key][0] for matrix, key in keys.items()}
    wanted = torch.cat([changes["q"], torch.zeros(8, 8), changes["v"]])
    assert torch.allclose(after[f"{block}in_proj_weight"] - before[f"{block}in_proj_weight"], wanted, atol=1e-6)
    assert torch.allclose(
        after[f"{block}out_proj.weight"] - before[f"{block}out_proj.weight"], changes["out"], atol=1e-6
    )
    assert torch.equal(after[f"{block}in_proj_bias"], before[f"{block}in_proj_bias"])


def test_all_three_networks_of_sdxl(tmp_path: Path) -> None:
    family = registry.find("families", "sdxl")
    options = family.options_type(path=str(save_tiny_sdxl_pipeline(tmp_path / "xl")))
    keys = [key for key, _ in family.key_map("peft", options) if key.path.endswith(("to_q", "v_proj", "proj_in"))]
    base = family.load(options, torch.device("cpu")).parts
    rng = torch.Generator().manual_seed(0)
    modules, wanted = {}, {}
    for key in keys:
        weight = base[key.part].get_submodule(key.path).weight
        down, up = torch.randn(2, weight.shape[1], generator=rng), torch.randn(weight.shape[0], 2, generator=rng)
        modules[key] = ModuleAdapter("lora", {"down": down, "up": up}, 2.0)
        wanted[key] = weight + 0.5 * up @ down
    term = Term("a", AdapterState(modules), dict.fromkeys(family.parts, 0.5))
    checkpoint = open_checkpoint(tmp_path / "xl", family.parts, family.key_map("peft", options))
    merge(checkpoint, [term], tmp_path / "out", None, {})
    merged = family.load(family.options_type(path=str(tmp_path / "out")), torch.device("cpu")).parts
    assert {key.part for key in keys} == set(family.parts)
    for key in keys:
        assert torch.allclose(merged[key.part].get_submodule(key.path).weight, wanted[key], atol=1e-6)


def test_biases_norms_and_embeddings_of_a_folder(tiny_base: Path, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    base = loaded_from(tiny_base).parts
    keys = {
        "lora": ModuleKey("unet", "conv_in"),
        "full": ModuleKey("text_encoder", "encoder.layers.0.layer_norm1"),
        "table": ModuleKey("text_encoder", "embeddings.token_embedding"),
        "bias": ModuleKey("unet", "conv_out"),
    }
    shapes = {name: base[key.part].get_submodule(key.path).weight.shape for name, key in keys.items()}
    out, *inputs = shapes["lora"]
    down, up = torch.randn(2, *inputs, generator=rng), torch.randn(out, 2, 1, 1, generator=rng)
    change, table = torch.randn(shapes["full"], generator=rng), torch.randn(shapes["table"], generator=rng)
    biases = {name: torch.randn(shapes[name][0], generator=rng) for name in ("lora", "full", "bias")}
    modules = {
        keys["lora"]: ModuleAdapter("lora", {"down": down, "up": up, "bias": biases["lora"]}, 2.0),
        keys["full"]: ModuleAdapter("full", {"diff": change, "bias": biases["full"]}, 0.0),
        keys["table"]: ModuleAdapter("full", {"diff": table}, 0.0),
        keys["bias"]: ModuleAdapter("full", {"bias": biases["bias"]}, 0.0),
    }
    state = AdapterState(modules)
    check_fit(state, base, "it")
    done = merge(opened(tiny_base), [Term("a", state, WEIGHTS)], tmp_path / "out", None, {})
    assert (done.num_modules, done.num_changed) == (4, 6)
    merged = loaded_from(tmp_path / "out").parts
    wanted = {"lora": torch.einsum("orxy,rikl->oikl", up, down), "full": change, "table": table}
    for name, key in keys.items():
        old, new = (parts[key.part].get_submodule(key.path) for parts in (base, merged))
        assert torch.allclose(new.weight - old.weight, WEIGHTS[key.part] * wanted.get(name, torch.zeros(1)), atol=1e-6)
        if name in biases:
            assert torch.allclose(new.bias - old.bias, WEIGHTS[key.part] * biases[name], atol=1e-6)
    with pytest.raises(UnsupportedError, match=r"holds changes of biases, full, .*lora-diffusion merge"):
        load_state(tiny_loaded(), state, "it")
    query = ModuleKey("unet", next(path for path, _ in base["unet"].named_modules() if path.endswith("attn1.to_q")))
    wrong = {query: ModuleAdapter("lora", {**random_state(tiny_loaded()).modules[query].tensors, "bias": up}, 1.0)}
    with pytest.raises(AdapterFileError, match="does not fit") as caught:
        check_fit(AdapterState(wrong), base, "it")
    assert "a bias is changed, and the base has none" in caught.value.errors[0]
