"""A damaged or foreign file gives one clear error, never a crash."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from lora_diffusion.compat.inspect import describe_file
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import in_float32


def _good(path: Path) -> bytes:
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 3), "lora_unet_x.alpha": torch.tensor(1.0)}, path)
    return path.read_bytes()


def _with_header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def test_header_tells_shapes_types_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2, 3, dtype=torch.bfloat16)}, path, {"ss_seed": "1"})
    header = safetensors_file.read_header(path)
    assert header.tensors == {"x": safetensors_file.TensorInfo("BF16", (2, 3))}
    assert header.metadata == {"ss_seed": "1"}


_ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"hello world, this is text", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04 and so on", "is a pickle"),
        (b"\x80\x02}q\x00X\x05\x00", "is a pickle"),
        ((10**8).to_bytes(8, "little") + b"{", "header would have 100,000,000 bytes"),
        ((1000).to_bytes(8, "little") + b"{", "header should have 1,000 bytes, but the file has 9 in all"),
        (_with_header("{not json"), "not JSON"),
        (_with_header("{" * 100_000), "not JSON"),
        (_with_header(f'{{"a": {_ENTRY}, "a": {_ENTRY}}}', bytes(4)), "names 'a' twice"),
        (_with_header(f'{{"a": {_ENTRY}}}', bytes(3)), "announces 4 bytes of tensors, but 3 follow"),
        (_with_header('{"a": {"dtype": "F32", "shape": [1]}}'), "does not describe a properly"),
        (_with_header('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', bytes(4)), "impossible"),
        (_with_header('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', bytes(4)), "impossible"),
        (_with_header('{"a": {"dtype": "F32", "shape": [1e0], "data_offsets": [0, 4]}}', bytes(4)), "impossible"),
        (
            _with_header('{"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
            "dtype 'Q4', which",
        ),
        (_with_header('{"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}', bytes(8)), "again in fp16"),
        (_with_header('{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', bytes(4)), "of dtype"),
        (_with_header('{"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)), "another number"),
        (_with_header('{"a": {"dtype": "F32", "shape": [9999999999, 9999999999], "data_offsets": [0, 4]}}'), "another"),
        (_with_header(f'{{"a": {_ENTRY}, "b": {_ENTRY}}}', bytes(4)), "b overlaps another tensor"),
        (_with_header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', bytes(8)), "a follows a gap"),
        (_with_header(f'{{"a\\u001b[2J": {_ENTRY}}}', bytes(4)), "characters that cannot be shown"),
        (_with_header(f'{{"a\\ud800": {_ENTRY}}}', bytes(4)), "characters that cannot be shown"),
        (_with_header('{"__metadata__": {"a": 1}}'), "metadata are not texts"),
        (_with_header('{"__metadata__": {"a": "\\ud800"}}'), "metadata are not texts"),
        (_with_header('{"__metadata__": {"a": "1", "a": "2"}}'), "names 'a' twice"),
        (_with_header('{"__metadata__": {"a": "' + 9 * 2**20 * "x" + '"}}'), r"metadata hold 9,437,185 characters"),
    ],
)
def test_what_is_wrong_is_said(content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterFileError, match=text):
        safetensors_file.read_header(path)


def test_pickle_by_ending_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"anything at all")
    with pytest.raises(AdapterFileError, match=rf"is a pickle.*convert {path} NEW.*--from-pickle"):
        detect(parse_file(path))
    with pytest.raises(AdapterFileError, match="There is no adapter file"):
        detect(parse_file(tmp_path / "none.safetensors"))
    with pytest.raises(AdapterFileError, match="not a PEFT adapter"):
        detect(parse_file(tmp_path))


def test_every_cut_and_many_changed_bytes_end_in_our_error_or_in_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    content = _good(path)
    draw = random.Random(0)
    cuts = [content[:end] for end in range(0, len(content), 5)]
    changed = []
    for _ in range(60):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] = draw.randrange(256)
        changed.append(bytes(damaged))
    refused = 0
    for damaged_content in (*cuts, *changed):
        path.write_bytes(damaged_content)
        try:
            describe_file(parse_file(path))
            parse_file(path).parts[0].arrays()
        except AdapterFileError:
            refused += 1
    assert refused >= len(cuts)


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"good": torch.ones(2), "bad": torch.tensor([1.0, float("inf")])}, path)
    with pytest.raises(AdapterFileError) as caught:
        parse_file(path).parts[0].arrays()
    assert caught.value.errors == ("bad",)


@pytest.mark.parametrize("tensor", [torch.ones(0, 4), torch.ones(2, 2, dtype=torch.int8), torch.ones(3) > 0])
def test_what_cannot_be_weights_is_refused_by_name(tensor: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"good": torch.ones(2), "alpha": torch.tensor(4), "odd": tensor}, path)
    with pytest.raises(AdapterFileError, match="empty or hold whole numbers") as caught:
        parse_file(path).parts[0].arrays()
    assert caught.value.errors == ("odd",)


def test_mixed_and_unknown_spellings_are_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"lora_unet_x.alpha": torch.tensor(1.0), "unet.x.lora_A.weight": torch.ones(1, 1)}, path)
    with pytest.raises(AdapterFileError, match="mixes the formats diffusers and kohya"):
        detect(parse_file(path))
    save_file({"model.weight": torch.ones(1)}, path)
    with pytest.raises(AdapterFileError, match="not an adapter in a known format"):
        detect(parse_file(path))


def test_broken_peft_config(tmp_path: Path) -> None:
    from lora_diffusion.core import registry
    from lora_diffusion.core.adapter_state import ModuleKey
    from lora_diffusion.core.keymap import KeyMap

    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "adapter_model.safetensors")
    key_map = KeyMap([(ModuleKey("unet", "x"), "unet.x")])
    good = {"lora_alpha": 1, "r": 1}
    errors = ({"r": 1}, {"lora_alpha": "many"}, {**good, "r": "a"}, {**good, "r": 0}, {**good, "alpha_pattern": [1]})
    errors += (
        {**good, "rank_pattern": {"x": -1}},
        {**good, "alpha_pattern": {"x": True}},
        [],
        good | {"lora_alpha": 1e999},
    )
    errors += (good | {"lora_alpha": int("9" * 400)}, good | {"r": 10**400})
    for text in ("", "{", "[" * 100_000, *map(json.dumps, errors)):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterFileError, match="cannot be read as a LoRA configuration"):
            in_float32(registry.find("formats", "peft").read(parse_file(tmp_path), key_map))
    for pattern, told in (("(", "no regular expression"), ("(x+)+", "for ever"), ("x?x?x?", "for ever")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**good, "alpha_pattern": {pattern: 1}}))
        with pytest.raises(AdapterFileError, match=told):
            in_float32(registry.find("formats", "peft").read(parse_file(tmp_path), key_map))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        *(({"init_lora_weights": name}, "path_initial_model_for_weight_conversion") for name in ("corda", "lora_ga")),
        ({"init_lora_weights": "loftq"}, "merge_and_unload"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"peft_type": "IA3", "lora_alpha": None}, "of the kind ia3"),
    ],
)
def test_what_the_factors_do_not_tell_is_refused(setting: dict[str, object], told: str, tmp_path: Path) -> None:
    config = {"lora_alpha": 1, "r": 1, **setting}
    tensors = {"x.lora_A.weight": torch.ones(1, 1), "x.lora_B.weight": torch.ones(1, 1)}
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")  # fmt: skip # noqa: E501
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    record = json.dumps({f"unet.{name}": value for name, value in config.items()})
    path = tmp_path / "a.safetensors"
    save_file({f"unet.{name}": tensor for name, tensor in tensors.items()}, path, {"lora_adapter_metadata": record})
    for source in (tmp_path, path):
        with pytest.raises(UnsupportedError, match=told):
            describe_file(parse_file(source))


@pytest.mark.parametrize(
    "start", [True, False, "gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora"]
)
def test_starts_that_change_the_base_are_refused_and_no_others(start: object, tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(8, 8))
    before = network[0].weight.clone()
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["0"], init_lora_weights=start))
    changes_base = not torch.equal(network[0].get_base_layer().weight, before)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="path_initial_model") if changes_base else nullcontext():
        describe_file(parse_file(tmp_path))
