"""`metadata show|edit|strip` on the file of a run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_diffusion.formats.metadata import LONGEST_SIDE, MOST_CHARACTERS, data_url
from lora_diffusion.tensorfile.safetensors_file import read_header
from tests.workflows.conftest import Commands


@pytest.fixture
def file(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(trained / "run.safetensors", tmp_path / "a.safetensors"))


def _data(path: Path) -> bytes:
    return path.read_bytes()[8 + read_header(path).num_bytes :]


def _show(command: Commands, path: Path) -> dict[str, str]:
    result: dict[str, str] = json.loads(command.good("metadata", "show", path, "--json").out)
    return result


def test_what_training_tells(command: Commands, file: Path) -> None:
    result = _show(command, file)
    known = {"ss_network_dim": "4", "ss_network_alpha": "3", "ss_steps": "8", "ss_total_batch_size": "2"}
    assert known.items() <= result.items()
    assert result["modelspec.unet_dtype"] == "float32"
    assert result["ss_cache_latents"] == "True"
    assert 1.7e9 < float(result["ss_training_started_at"]) < float(result["ss_training_finished_at"])
    buckets = json.loads(result["ss_bucket_info"])
    counts = {tuple(bucket["resolution"]): bucket["count"] for bucket in buckets["buckets"].values()}
    # Of the four images one is of 24x12.
    assert counts == {(16, 16): 3, (20, 12): 1}
    assert buckets["mean_img_ar_error"] == pytest.approx((2 - 20 / 12) / 4)
    assert (result["ss_num_reg_images"], result["ss_shuffle_caption"]) == ("0", "False")
    tensors = load_file(file)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    assert result["modelspec.hash_sha256"] == f"0x{digest.hexdigest()}"
    assert "ss_network_dim: 4\n" in command.good("metadata", "show", file).out


def test_edit_changes_texts_and_no_tensor(command: Commands, file: Path, tmp_path: Path) -> None:
    before, data, picture = _show(command, file), _data(file), tmp_path / "p.png"
    Image.new("RGB", (900, 300), "red").save(picture)
    new = tmp_path / "b.safetensors"
    arguments = ("--set", "modelspec.title=Ä=b", "ss_training_comment=x", "--unset", "ss_seed", "--thumbnail", picture)
    result = json.loads(command.good("metadata", "edit", file, *arguments, "--output", new, "--json").out)
    assert _show(command, file) == before
    assert _data(new) == data
    after = _show(command, new)
    assert result["metadata"] == after
    assert (after["modelspec.title"], after["ss_training_comment"]) == ("Ä=b", "x")
    assert "ss_seed" not in after
    assert after["sshs_model_hash"] == before["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    small = Image.open(io.BytesIO(base64.b64decode(after["modelspec.thumbnail"].split(",")[1])))
    assert small.size == (LONGEST_SIDE, LONGEST_SIDE // 3)
    assert result["removed"] == ["ss_seed"]


def test_hash_is_that_of_the_bytes_in_their_order(command: Commands, file: Path, tmp_path: Path) -> None:
    content, path = file.read_bytes(), tmp_path / "turned.safetensors"
    start = 8 + int.from_bytes(content[:8], "little")
    header, at, pieces = json.loads(content[8:start]), 0, []
    metadata = header.pop("__metadata__")
    turned = {}
    for name in reversed(header):
        first, last = header[name]["data_offsets"]
        pieces.append(content[start + first : start + last])
        turned[name] = {**header[name], "data_offsets": [at, at + last - first]}
        at += last - first
    text = json.dumps({"__metadata__": metadata, **turned}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))
    command.good("metadata", "edit", path, "--set", "modelspec.title=x")
    after = _show(command, path)
    assert after["sshs_model_hash"] == hashlib.sha256(_data(path)).hexdigest() != metadata["sshs_model_hash"]
    assert after["modelspec.hash_sha256"] == metadata["modelspec.hash_sha256"]


def test_strip_keeps_what_lists_the_file(command: Commands, file: Path) -> None:
    data = _data(file)
    out = command.good("metadata", "strip", file, "--keep", "ss_network_*").out
    assert "Kept ss_base_model_version, ss_v2, modelspec.architecture" in out
    after = _show(command, file)
    assert _data(file) == data
    visible = {"ss_base_model_version", "ss_v2", "modelspec.architecture"}
    hashes = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
    assert {name for name in after if not name.startswith("ss_network_")} == visible | hashes
    assert after["ss_network_dim"] == "4"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["edit", "--set", "sshs_model_hash=0"], "is computed from the tensors"),
        (["edit", "--unset", "lora_adapter_metadata"], "decides how strong the adapter is"),
        (["edit", "--unset", "ss_sed"], 'is not there (did you mean "ss_seed"'),
        (["edit", "--unset", "ss_seed", "--set", "ss_seed=1"], "both set and taken out"),
        (["edit", "--set", "title"], "write KEY=VALUE"),
        (["edit", "--set", "title=caf\udce9"], "title=caf\\udce9 is not UTF-8"),
        (["edit", "--thumbnail", "PICTURE"], "image, whatever its name says"),
        (["strip", "--keep", "ss_nothing*"], "no such metadata"),
        (["edit", "--set", "a=b", "--output", "FOLDER"], "is a folder"),
    ],
)
def test_errors_change_nothing(command: Commands, file: Path, arguments: list[str], text: str) -> None:
    content = file.read_bytes()
    (file.parent / "picture.png").write_bytes(b"no picture")
    given = [
        a.replace("PICTURE", str(file.parent / "picture.png")).replace("FOLDER", str(file.parent)) for a in arguments
    ]
    outcome = command("metadata", given[0], file, *given[1:])
    assert (outcome.code, text in outcome.message) == (2, True), outcome.message
    assert file.read_bytes() == content


def test_folder_and_file_without_metadata(command: Commands, trained: Path, tmp_path: Path) -> None:
    outcome = command("metadata", "show", trained / "run.peft")
    assert (outcome.code, "name a file of it" in outcome.message) == (2, True)
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(3)}, path)
    assert command.good("metadata", "show", path).out == "no metadata\n"
    command.good("metadata", "edit", path, "--set", "a=1")
    command.good("metadata", "edit", path, "--unset", "a")
    assert torch.equal(load_file(path)["x"], torch.ones(3))


def test_thumbnail_of_noise_stays_small() -> None:
    noise = torch.randint(0, 256, (600, 600, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert len(data_url(Image.fromarray(noise.numpy()))) <= MOST_CHARACTERS
