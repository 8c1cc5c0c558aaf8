"""Damaged and forged files: inspect, verify and read give a result or a clean error, never anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.compat.identify import guess_family
from lora_diffusion.compat.inspect import describe_file
from lora_diffusion.compat.matched_file import Base, match_file
from lora_diffusion.compat.pickled import load_pickle
from lora_diffusion.compat.verify import verify
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.errors import LoraDiffusionError
from lora_diffusion.families.stable_diffusion.module_names import key_map
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.tensorfile.arrays import in_float32

_FORMATS = ("kohya", "diffusers", "peft")
_LINEAR = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
_CONV = ModuleKey("unet", "mid_block.resnets.0.conv1")
_TEXT = ModuleKey("text_encoder", "encoder.layers.0.self_attn.q_proj")
_NORM = ModuleKey("unet", "mid_block.resnets.0.norm1")
_SHAPES = {_LINEAR: (6, 6), _CONV: (6, 4, 3, 3), _TEXT: (4, 4)}
_NAMES = [key_map(name, None, DIFFUSION["sd1"]) for name in (*_FORMATS, "norms")]
_NORM_NAME = _NAMES[3].name(_NORM)
_BASE = Base(DIFFUSION["sd1"], {**_SHAPES, _NORM: (4,)}, _NAMES)
_LOKR = {
    _LINEAR: {"w1": (2, 2), "w2": (3, 3)},
    _TEXT: {"w1_a": (2, 1), "w1_b": (1, 2), "w2": (2, 2)},
    _CONV: {"w1": (2, 2), "w2_a": (1, 3), "w2_b": (1, 2), "t2": (1, 1, 3, 3)},
}


def _pair(shape: tuple[int, ...], rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ones = (1, 1) if len(shape) == 4 else ()
    return torch.full((rank, *shape[1:]), 0.1), torch.full((shape[0], rank, *ones), 0.1)


def _kohya() -> bytes:
    tensors = {}
    for key, shape in _SHAPES.items():
        down, up = _pair(shape)
        name = _NAMES[0].name(key)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    tensors[f"{_NAMES[0].name(_LINEAR)}.dora_scale"] = torch.ones(1, 6)
    return save(tensors, {"ss_base_model_version": "sd_v1", "ss_tag_frequency": json.dumps({"a": {"b": 1}})})


def _lycoris() -> bytes:
    loha, lokr = _NAMES[0].name(_LINEAR), _NAMES[0].name(_CONV)
    tensors = {f"{loha}.hada_{role}_a": torch.ones(6, 2) for role in ("w1", "w2")}
    tensors |= {f"{loha}.hada_{role}_b": torch.ones(2, 6) for role in ("w1", "w2")}
    tensors |= {f"{lokr}.lokr_w1": torch.ones(2, 2), f"{lokr}.lokr_w2_a": torch.ones(3, 2)}
    tensors |= {f"{lokr}.lokr_w2_b": torch.ones(2, 18), f"{lokr}.alpha": torch.tensor(1.0)}
    return save({**tensors, f"{loha}.alpha": torch.tensor(1.0)}, {"ss_network_module": "lycoris.kohya"})


def _rare() -> bytes:
    """Kinds without factors, and others that few programs write."""
    names = [_NAMES[0].name(key) for key in (_LINEAR, _CONV, _TEXT)]
    tensors = {f"{names[0]}.oft_blocks": torch.ones(2, 3, 3), f"{names[0]}.rescale": torch.ones(6, 1)}
    tensors |= {f"{names[1]}.diff": torch.ones(6, 4, 3, 3), f"{names[1]}.diff_b": torch.ones(6)}
    tensors |= {f"{names[2]}.{role}.weight": torch.ones(4, 4) for role in ("a1", "a2", "b1", "b2")}
    tensors |= {f"{_NORM_NAME}.{role}": torch.ones(4) for role in ("w_norm", "b_norm")}
    return save(tensors, {"ss_network_module": "lycoris.kohya"})


def _lokr() -> bytes:
    tensors = {
        f"{_NAMES[0].name(key)}.lokr_{role}": torch.ones(shape)
        for key, shapes in _LOKR.items()
        for role, shape in shapes.items()
    }
    return save({**tensors, f"{_NAMES[0].name(_CONV)}.alpha": torch.tensor(1.0)}, {"ss_base_model_version": "sd_v1"})


def _dotted(prefix: Callable[[ModuleKey], str], record: dict[str, str]) -> bytes:
    tensors = {}
    for key, shape in _SHAPES.items():
        down, up = _pair(shape)
        tensors |= {f"{prefix(key)}.lora_A.weight": down, f"{prefix(key)}.lora_B.weight": up}
    return save(tensors, record)


_CONFIG = {"r": 2, "lora_alpha": 1.0, "alpha_pattern": {"mid_block.resnets": 2.0}, "peft_type": "LORA"}
_RECORD = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in _CONFIG.items()})}
CONTENTS = {
    "kohya": _kohya(),
    "lycoris": _lycoris(),
    "lokr": _lokr(),
    "rare": _rare(),
    "diffusers": _dotted(_NAMES[1].name, _RECORD),
    "peft": _dotted(lambda key: f"base_model.model.{key.path}", {}),
}
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
_TYPES = ("F32", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3")
_PIECES = ("lora_unet_", "lora_te2_", "unet.", ".alpha", ".dora_scale", ".lora_down.weight", ".lora_mid.weight")
_OTHERS = (".lora_A.default.weight", ".hada_t1", ".lokr_w1_a", ".oft_blocks", ".diff", ".rescale", ".w_norm")
_RECORDED = (_NORM_NAME, "lora_adapter_metadata")
_HOSTILE = ("../../x", "/etc/passwd", "\x1b[2J", "\ud800", "", "__metadata__")
_WORDS = st.sampled_from((*_TYPES, *_PIECES, *_OTHERS, *_RECORDED, *_HOSTILE))
_VALUES = _JSON | _WORDS | st.lists(st.integers(0, 4), max_size=5)


def _flip(draw: st.DataObject, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    return bytes(damaged)


def _cut(draw: st.DataObject, content: bytes) -> bytes:
    end = draw.draw(st.integers(0, len(content)))
    return content[:end] + draw.draw(st.binary(max_size=20))


def _reheaded(change: Callable[[st.DataObject, dict], None]) -> Callable[[st.DataObject, bytes], bytes]:
    """Returns a mutation of the header alone, in which the data stay where they are."""

    def mutate(draw: st.DataObject, content: bytes) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(draw, header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[end:]

    return mutate


def _tensor_name(draw: st.DataObject, header: dict) -> str:
    return draw.draw(st.sampled_from(sorted(name for name in header if name != "__metadata__") or [""]))


def _swap(draw: st.DataObject, header: dict) -> None:
    first, second = _tensor_name(draw, header), _tensor_name(draw, header)
    header[first], header[second] = header[second], header[first]


def _rename(draw: st.DataObject, header: dict) -> None:
    name = _tensor_name(draw, header)
    at = draw.draw(st.integers(0, len(name)))
    header[name[:at] + draw.draw(_WORDS | st.text(max_size=3)) + draw.draw(st.sampled_from((name[at:], "")))] = (
        header.pop(name)
    )


def _set_field(draw: st.DataObject, header: dict) -> None:
    entry = header[_tensor_name(draw, header)]
    entry[draw.draw(st.sampled_from(("dtype", "shape", "data_offsets")))] = draw.draw(_VALUES)


def _reshape(draw: st.DataObject, header: dict) -> None:
    """Gives a tensor another shape or dtype that fits its bytes."""
    entry = header[_tensor_name(draw, header)]
    start, end = entry["data_offsets"]
    dtype, size = draw.draw(
        st.sampled_from((("F32", 4), ("F16", 2), ("I8", 1), ("I32", 4), ("F8_E4M3", 1), ("BOOL", 1)))
    )
    rest = (end - start) // size
    first = draw.draw(st.sampled_from([side for side in range(1, rest + 1) if rest % side == 0] or [0]))
    shape = draw.draw(
        st.sampled_from(
            ([first, rest // max(1, first)], [rest], [rest, 1, 1, 1], [1, 1, first, rest // max(1, first)], [])
        )
    )
    entry["dtype"], entry["shape"] = dtype, shape


def _set_metadata(draw: st.DataObject, header: dict) -> None:
    metadata = header.setdefault("__metadata__", {})
    key = draw.draw(
        st.sampled_from([*metadata, "lora_adapter_metadata", "ss_dataset_dirs", "ss_v2", "sshs_model_hash"])
    )
    metadata[key] = draw.draw(st.text(max_size=8) | _VALUES.map(json.dumps) | _VALUES)


def _set_record(draw: st.DataObject, header: dict) -> None:
    record = {f"unet.{key}": value for key, value in _mutated_config(draw).items()}
    header.setdefault("__metadata__", {})["lora_adapter_metadata"] = json.dumps(record)


def _mutated_config(draw: st.DataObject) -> dict:
    keys = ("use_dora", "use_rslora", "bias", "base_model_name_or_path", "rank_pattern")
    changed = {
        draw.draw(st.sampled_from((*_CONFIG, *keys))): draw.draw(_VALUES) for _ in range(draw.draw(st.integers(0, 2)))
    }
    if draw.draw(st.booleans()):
        changed["alpha_pattern"] = {draw.draw(st.text(alphabet="ax.*+?()[]{}|^$\\1", max_size=8)): draw.draw(_VALUES)}
    return {**_CONFIG, **changed}


def _drop(draw: st.DataObject, header: dict) -> None:
    del header[_tensor_name(draw, header)]


_MUTATIONS = (_flip, _cut, *map(_reheaded, (_swap, _rename, _set_field, _reshape, _set_metadata, _set_record, _drop)))


def _attempt(work: Callable[[], object]) -> None:
    try:
        work()
    except LoraDiffusionError as error:
        assert str(error)
        str(error).encode()


def _inspect(path: Path) -> None:
    report = describe_file(parse_file(path))
    report.text().encode()
    json.dumps(report.to_json())


def _verify(path: Path) -> None:
    for result in verify(match_file(parse_file(path), _BASE)):
        "\n".join(result.lines()).encode()
        json.dumps(result.to_json(), allow_nan=False)


def _read(path: Path) -> None:
    name = detect(parse_file(path))
    state = in_float32(registry.find("formats", name).read(parse_file(path), _NAMES[_FORMATS.index(name)]))
    for other, names in zip(_FORMATS, _NAMES[:-1], strict=True):
        format_ = registry.find("formats", other)
        _attempt(lambda own=(format_, names): own[0].write(state, own[1], path.parent / own[0].name, torch.float32))
        _attempt(lambda own=format_: own.normalize(state))


def _look(path: Path) -> None:
    """Does with a file what the commands do before anything is loaded."""
    _attempt(lambda: _inspect(path))
    _attempt(lambda: _verify(path))
    _attempt(lambda: guess_family(parse_file(path)))
    _attempt(lambda: _read(path))
    if path.is_file():
        _attempt(lambda: load_pickle(path))


def _fuzz(folder: Path, kind: str, draw: st.DataObject) -> None:
    content = CONTENTS[kind]
    for _ in range(draw.draw(st.integers(1, 2))):
        try:
            content = draw.draw(st.sampled_from(_MUTATIONS), label="mutation")(draw, content)
        except (ValueError, KeyError, TypeError, AttributeError):
            break  # the first mutation left no header that the second could change
    if kind != "peft":
        path = folder / "a.safetensors"
        path.write_bytes(content)
    else:
        path = folder / "peft"
        (path / "unet").mkdir(parents=True, exist_ok=True)
        (path / "unet" / "adapter_model.safetensors").write_bytes(content)
        (path / "unet" / "adapter_config.json").write_text(json.dumps(_mutated_config(draw)))
    _look(path)
    shutil.rmtree(folder / "peft", ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


_PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
_CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


@pytest.mark.parametrize("kind", CONTENTS)
@settings(
    max_examples=84, deadline=None, derandomize=True, database=None, phases=_PHASES, suppress_health_check=_CHECKS
)
@given(draw=st.data())
def test_mutated_files(folder: Path, kind: str, draw: st.DataObject) -> None:
    """500 files."""
    _fuzz(folder, kind, draw)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTENTS)
@settings(max_examples=3334, deadline=None, database=None, phases=_PHASES, suppress_health_check=_CHECKS)
@given(draw=st.data())
def test_very_many_mutated_files(folder: Path, kind: str, draw: st.DataObject) -> None:
    """20,000 files."""
    _fuzz(folder, kind, draw)


@pytest.mark.parametrize("kind", CONTENTS)
def test_unchanged_files_are_read(kind: str, tmp_path: Path) -> None:
    """The mutations start from something whole."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(CONTENTS[kind])
    if kind == "peft":
        path = tmp_path / "peft"
        (path / "unet").mkdir(parents=True)
        (path / "unet" / "adapter_model.safetensors").write_bytes(CONTENTS[kind])
        (path / "unet" / "adapter_config.json").write_text(json.dumps(_CONFIG))
    _inspect(path)
    assert all(result.num_modules >= 2 for result in verify(match_file(parse_file(path), _BASE)))
