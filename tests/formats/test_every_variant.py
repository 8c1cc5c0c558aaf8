"""What was trained is written, read and converted through every format that can hold it without losing a bit."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from lora_diffusion.adapters.state import load_state
from lora_diffusion.adapters.variants import VARIANTS
from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.compat.inspect import describe_file
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.families.stable_diffusion.module_names import key_map
from lora_diffusion.formats.capabilities import check_output
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.formats.verified import write_exactly, write_verified
from lora_diffusion.tensorfile.arrays import in_float32
from scripts.benchmarks.published_networks import shared_networks
from tests.formats.trained import FAMILIES, MIXED, PIPELINES, answers, bare, names_of, parts_of, trained
from tests.tiny_adapters import same

FORMATS = ("kohya", "diffusers", "peft")
HOLDING = {
    "lora": FORMATS,
    "rslora": FORMATS,
    "locon": FORMATS,
    "dora": ("kohya",),
    "dora_out": ("diffusers", "peft"),
    "loha": ("kohya", "peft"),
    "lokr": ("kohya", "peft"),
}
# float32, a few layers deep; other programs add the change in another order than we do.
_CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def _part(state: AdapterState, part: str) -> AdapterState:
    return replace(state, modules={key: own for key, own in state.modules.items() if key.part.startswith(part)})


def _rounded(state: AdapterState, dtype: torch.dtype) -> AdapterState:
    return replace(
        state,
        modules={
            key: ModuleAdapter(own.variant, {n: t.to(dtype).float() for n, t in own.tensors.items()}, own.alpha)
            for key, own in state
        },
    )


def _expected(state: AdapterState, family: str) -> dict[str, torch.Tensor]:
    loaded = bare(parts_of(PIPELINES[family]()))
    load_state(loaded, state, "ours")
    with torch.no_grad():
        return answers(loaded.parts)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("variant", ["lora", "locon", "dora", "dora_out", "loha", "lokr"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_through_every_pair_of_formats(family: str, variant: str, part: str, tmp_path: Path) -> None:
    state = found = _part(trained(family, variant), part)
    assert {adapter.variant for _, adapter in state} == {VARIANTS[variant].stored}
    first, *others = HOLDING[variant]
    chains = {1: [first, first], 2: [first, *others, first], 3: [first, *others, first, *reversed(others), first]}
    for number, name in enumerate(chains[len(HOLDING[variant])]):
        path, format_, names = tmp_path / f"{number}", registry.find("formats", name), names_of(name, family)
        assert write_exactly(found, names, format_, path, torch.float32).rounding == 0
        assert detect(parse_file(path)) == name
        found = in_float32(format_.read(parse_file(path), names))
        assert _same(found, state)
        assert {key: found.metadata[key] for key in state.metadata} == state.metadata


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_told_and_happens_once(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = trained("sd1", variant)
    name = HOLDING[variant][-1]
    format_, names = registry.find("formats", name), names_of(name, "sd1")
    written = write_exactly(state, names, format_, tmp_path / "1", dtype)
    assert 1e-6 < written.rounding < torch.finfo(dtype).eps / 2
    again = in_float32(format_.read(parse_file(tmp_path / "1"), names))
    assert _same(again, _rounded(state, dtype))
    assert write_exactly(again, names, format_, tmp_path / "2", dtype).rounding == 0
    assert _same(in_float32(format_.read(parse_file(tmp_path / "2"), names)), again)


def _same(found: AdapterState, expected: AdapterState) -> bool:
    # An alpha that float32 does not hold, as sqrt(3) times one, comes back as the nearest that it does.
    alphas = {key: adapter.alpha for key, adapter in expected}
    assert all(math.isclose(adapter.alpha, alphas[key], rel_tol=1e-7) for key, adapter in found)
    moved = {key: replace(adapter, alpha=alphas[key]) for key, adapter in found}
    return same(AdapterState(moved), expected) and all(
        adapter.variant == expected.modules[key].variant for key, adapter in found
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_formats_refuse_what_they_cannot_hold(variant: str, tmp_path: Path) -> None:
    for name in FORMATS:
        if name not in HOLDING[variant]:
            with pytest.raises(UnsupportedError, match=f"The {name} format cannot hold.*Formats that can: ") as caught:
                write_verified(
                    trained("sd1", variant), names_of(name, "sd1"), registry.find("formats", name), tmp_path / "x",
                    torch.float32,
                )  # fmt: skip
            assert str(caught.value).rsplit(": ", 1)[1] == ", ".join(sorted(HOLDING[variant])) + "."
            with pytest.raises(UnsupportedError):
                check_output([name], VARIANTS[variant].stored)
    assert not list(tmp_path.iterdir())
    check_output(HOLDING[variant], VARIANTS[variant].stored)


@pytest.mark.parametrize("settings", [{}, MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize(
    ("family", "variant", "name"),
    [
        ("sd1", "locon", "kohya"),
        ("sd2", "locon", "kohya"),
        ("sdxl", "locon", "kohya"),
        ("sd2", "rslora", "diffusers"),
        ("sd1", "dora_out", "diffusers"),
        ("sdxl", "dora_out", "diffusers"),
    ],
)
def test_diffusers_loads_every_key(
    family: str,
    variant: str,
    name: str,
    settings: dict[str, tuple[str, ...]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = trained(family, variant, **settings)
    write_verified(
        state, names_of(name, family), registry.find("formats", name), tmp_path / "a.safetensors", torch.float32
    )
    pipeline = PIPELINES[family]()
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    assert not [record.message for record in caplog.records if record.name.startswith("diffusers")]
    parts = parts_of(pipeline)
    for part, network in parts.items():
        adapted = {path for path, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
        assert adapted == {key.path for key in state.modules if key.part == part}
    expected, base = _expected(state, family), answers(parts_of(PIPELINES[family]()))
    with torch.no_grad():
        for part, answer in answers(parts).items():
            torch.testing.assert_close(answer, expected[part], **_CLOSE)
            assert not torch.allclose(answer, base[part], atol=1e-3)


@pytest.mark.parametrize("settings", [{}, MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize(
    ("family", "variant"), [("sd1", "rslora"), ("sd1", "loha"), ("sd2", "lokr"), ("sdxl", "dora_out")]
)
def test_peft_loads_each_part(family: str, variant: str, settings: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    state = trained(family, variant, **settings)
    write_verified(state, names_of("peft", family), registry.find("formats", "peft"), tmp_path / "p", torch.float32)
    parts = parts_of(PIPELINES[family]())
    for part, network in parts.items():
        parts[part] = PeftModel.from_pretrained(network, tmp_path / "p" / part).get_base_model()
    with torch.no_grad():
        for part, answer in answers(parts).items():
            torch.testing.assert_close(answer, _expected(state, family)[part], **_CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_and_alphas_of_single_modules_go_through_all_formats(variant: str, tmp_path: Path) -> None:
    state = trained("sd1", variant, **MIXED)
    # Whole factors of lokr have the rank of their size.
    assert {adapter.rank for _, adapter in state} == ({2, 3, 8} if variant == "lokr" else {2, 3, 4, 5})
    expected = _expected(state, "sd1")
    for name in HOLDING[variant]:
        path, format_, names = tmp_path / name, registry.find("formats", name), names_of(name, "sd1")
        assert write_exactly(state, names, format_, path, torch.float32).rounding == 0
        assert _same(in_float32(format_.read(parse_file(path), names)), state)
        write_verified(state, names, format_, tmp_path / f"normalized-{name}", torch.float32)
        normalize = in_float32(format_.read(parse_file(tmp_path / f"normalized-{name}"), names))
        assert {key: normalize.modules[key].rank for key in state.modules} == {key: own.rank for key, own in state}
        for part, answer in _expected(normalize, "sd1").items():
            torch.testing.assert_close(answer, expected[part], **_CLOSE)
    if "kohya" in HOLDING[variant] and VARIANTS[variant].stored == "lora":
        again = in_float32(
            registry.find("formats", "kohya").read(parse_file(tmp_path / "normalized-kohya"), names_of("kohya", "sd1"))
        )
        assert [len({own.alpha for key, own in again if key.part == part}) for part in again.parts()] == [1, 1]


@pytest.mark.parametrize("factor", [-1, 4])
def test_peft_holds_lokr_of_any_one_factor(factor: int, tmp_path: Path) -> None:
    state = trained("sd1", "lokr", lokr_factor=factor, rank=4)
    kinds = {(frozenset(adapter.tensors), adapter.scale) for _, adapter in state}
    assert kinds == {(frozenset({"w1", "w2_a", "w2_b"}), 0.5), (frozenset({"w1", "w2"}), 1.0)}
    peft, names = registry.find("formats", "peft"), names_of("peft", "sd1")
    write_exactly(state, names, peft, tmp_path / "p", torch.float32)
    assert _same(in_float32(peft.read(parse_file(tmp_path / "p"), names)), state)
    key, adapter = next((key, own) for key, own in state if "w2_a" in own.tensors)
    mixed = {**state.modules, key: replace(adapter, tensors={"w1": torch.ones(1, 1), "w2": torch.ones(32, 32)})}
    with pytest.raises(UnsupportedError, match="works out the sizes"):
        peft.write(AdapterState(mixed), names, tmp_path / "q", torch.float32)


def test_only_kohya_holds_several_kinds_in_one_part(tmp_path: Path) -> None:
    kinds = [trained("sd1", kind) for kind in ("lora", "dora", "loha", "lokr")]
    mixed = AdapterState({key: kinds[index % 4].modules[key] for index, key in enumerate(kinds[0].modules)})
    kohya = registry.find("formats", "kohya")
    write_verified(mixed, names_of("kohya", "sd1"), kohya, tmp_path / "a.safetensors", torch.float32)
    assert same(in_float32(kohya.read(parse_file(tmp_path / "a.safetensors"), names_of("kohya", "sd1"))), mixed)
    assert set(describe_file(parse_file(tmp_path / "a.safetensors")).variant.split(" and ")) == {
        "lora",
        "dora",
        "loha",
        "lokr",
    }
    several = AdapterState({key: kinds[index % 2 * 2].modules[key] for index, key in enumerate(kinds[0].modules)})
    with pytest.raises(UnsupportedError, match="one kind of adapter in each part, but unet has loha and lora"):
        registry.find("formats", "peft").write(several, names_of("peft", "sd1"), tmp_path / "p", torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_kohya_files_are_complete_and_have_one_alpha_in_each_part(family: str, tmp_path: Path) -> None:
    state = trained(family, "lora")
    modules = {
        key: replace(own, alpha=1.0 if index % 3 else 0.5)
        for index, (key, own) in enumerate(state)
        if key.part == "unet" or key.path.endswith("q_proj")
    }
    uneven, kohya, names = AdapterState(modules), registry.find("formats", "kohya"), names_of("kohya", family)
    path = write_verified(uneven, names, kohya, tmp_path / "a.safetensors", torch.float32)
    again = in_float32(kohya.read(parse_file(path), names))
    for part in again.parts():
        assert len({own.alpha for key, own in again if key.part == part}) == 1
    encoders = [part for part in again.parts() if part != "unet"]
    layers = {part: sum(key.part == part for key in modules) for part in encoders}
    assert {part: sum(key.part == part for key in again.modules) for part in encoders} == {
        part: 4 * count for part, count in layers.items()
    }
    expected, found = _expected(uneven, family), _expected(again, family)
    for part, answer in found.items():
        torch.testing.assert_close(answer, expected[part], **_CLOSE)


@pytest.mark.parametrize("variant", ["dora", "loha", "lokr"])
def test_attention_of_a_text_encoder_is_completed_beside_other_kinds(variant: str, tmp_path: Path) -> None:
    state = trained("sd2", variant)
    modules = {key: own for key, own in state if key.path.endswith(("q_proj", "v_proj"))}
    partial, kohya, names = AdapterState(modules), registry.find("formats", "kohya"), names_of("kohya", "sd2")
    path = write_verified(partial, names, kohya, tmp_path / "a.safetensors", torch.float32)
    again = in_float32(kohya.read(parse_file(path), names))
    added = [own for key, own in again if key not in modules]
    assert len(added) == len(modules)
    assert {(own.variant, float(own.tensors["up"].abs().sum())) for own in added} == {("lora", 0.0)}
    assert same(replace(again, modules={key: again.modules[key] for key in modules}), partial)
    for part, answer in _expected(again, "sd2").items():
        torch.testing.assert_close(answer, _expected(partial, "sd2")[part], **_CLOSE)


def test_dora_along_outputs_stays_alone(tmp_path: Path) -> None:
    state = trained("sd1", "dora_out")
    modules = {key: own for key, own in state if key.path.endswith("q_proj")}
    names, diffusers = names_of("diffusers", "sd1"), registry.find("formats", "diffusers")
    path = write_verified(AdapterState(modules), names, diffusers, tmp_path / "a.safetensors", torch.float32)
    assert in_float32(diffusers.read(parse_file(path), names)).modules.keys() == modules.keys()


def _full_state(family: str, *variants: str) -> AdapterState:
    """Returns an adapter of rank 1 for every module of the published base that tools train, of each variant in turn."""
    chosen, generator = registry.find("families", family).parts, torch.Generator().manual_seed(0)
    modules: dict[ModuleKey, ModuleAdapter] = {}
    for part, network in shared_networks(family).items():
        groups = chosen[part].groups
        patterns = [re.compile(p) for group in ("all-linear", "proj", "conv") for p in groups.get(group, ())]
        for path, module in network.named_modules():
            if any(pattern.fullmatch(path) for pattern in patterns):
                variant = VARIANTS[variants[len(modules) % len(variants)]]
                shapes = variant.shapes(tuple(module.weight.shape), 1, 16)
                tensors = {n: torch.rand(s, generator=generator).half().float() for n, s in shapes.items()}
                modules[ModuleKey(part, path)] = ModuleAdapter(variant.stored, tensors, 1.0)
    return AdapterState(modules)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("names", "variants"),
    [(("kohya",), ("lora", "dora", "loha", "lokr")), (("diffusers", "peft"), ("lora",))],
)
def test_full_size_modules_are_all_consumed(
    family: str, names: tuple[str, ...], variants: tuple[str, ...], tmp_path: Path
) -> None:
    state = _full_state(family, *variants)
    assert len(state.modules) == {"sd1": 278 + 72, "sd2": 278 + 138, "sdxl": 788 + 264}[family]
    for number, name in enumerate(names):
        format_ = registry.find("formats", name)
        keys = key_map(name, shared_networks(family), DIFFUSION[family])
        format_.write(state, keys, tmp_path / f"{number}", torch.float16)
        again = in_float32(format_.read(parse_file(tmp_path / f"{number}"), key_map(name, None, DIFFUSION[family])))
        assert same(again, state)
        state = again


def test_written_tensors_are_those_of_lycoris(tmp_path: Path) -> None:
    found = {}
    for variant in ("lora", "dora", "loha", "lokr"):
        path = tmp_path / f"{variant}.safetensors"
        write_verified(
            trained("sd1", variant), names_of("kohya", "sd1"), registry.find("formats", "kohya"), path, torch.float16
        )
        prefix = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q."
        tensors = load_file(path)
        found[variant] = {
            name.removeprefix(prefix): tuple(tensor.shape)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
    plain = {"lora_down.weight": (3, 64), "lora_up.weight": (64, 3), "alpha": ()}
    assert found == {
        "lora": plain,
        "dora": {**plain, "dora_scale": (1, 64)},
        "loha": {"hada_w1_a": (64, 3), "hada_w1_b": (3, 64), "hada_w2_a": (64, 3), "hada_w2_b": (3, 64), "alpha": ()},
        "lokr": {"lokr_w1": (8, 8), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 8), "alpha": ()},
    }
