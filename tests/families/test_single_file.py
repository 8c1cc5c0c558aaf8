from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_diffusion.core import registry
from lora_diffusion.core.errors import ModelError
from lora_diffusion.families.sd1 import FAMILY, SD1Options
from tests.families.ldm import save_single_file, shaped_pipeline

SIZES = {"sd1": (512, 64), "sd2": (768, 64), "sdxl": (1024, 32)}
"""Family -> resolution and size step that its shapes mean."""


@pytest.fixture(scope="module", params=SIZES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(family: str) -> Any:
    return shaped_pipeline(family)


@pytest.fixture(scope="module")
def base(family: str, pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_single_file(pipeline, tmp_path_factory.mktemp("ldm") / f"{family}.safetensors", family)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_single_file(shaped_pipeline("sd1"), tmp_path_factory.mktemp("ldm") / "model.safetensors")


def options(family: str, path: Path, **values: Any) -> Any:
    return registry.find("families", family).options_type(path=str(path), **values)


def test_weights_and_configs_are_those_of_the_pipeline(family: str, pipeline: Any, base: Path) -> None:
    found = registry.find("families", family)
    loaded = found.load(options(family, base), torch.device("cpu"))
    for name, part in loaded.parts.items():
        own = getattr(pipeline, name)
        expected, got = own.state_dict(), part.state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    expected = pipeline.vae.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.modules["vae"].state_dict().items())
    assert (loaded.info.resolution, loaded.info.size_step) == SIZES[family]
    assert loaded.info.prediction == ("v_prediction" if family == "sd2" else "epsilon")


@pytest.mark.parametrize("part", ["unet", "text"])
def test_answers_are_those_of_the_pipeline(family: str, pipeline: Any, base: Path, part: str) -> None:
    loaded = registry.find("families", family).load(options(family, base), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if part == "text":
            ids = torch.randint(0, 49000, (1, 77), generator=generator)
            ids[:, 9:] = 49407
            for name in loaded.parts.keys() - {"unet"}:
                assert torch.equal(loaded.parts[name](ids)[0], getattr(pipeline, name)(ids)[0])
            return
        width = pipeline.unet.config.cross_attention_dim
        text = torch.randn(1, 77, width, generator=generator)
        sizes = {"text_embeds": torch.randn(1, 128, generator=generator), "time_ids": torch.ones(1, 6)}
        call = {"encoder_hidden_states": text, "added_cond_kwargs": sizes if family == "sdxl" else None}
        latents = torch.randn(1, 4, 16, 16, generator=generator)
        got, expected = (unet(latents, 500, **call).sample for unet in (loaded.parts["unet"], pipeline.unet))
        # Our weights may lie in memory otherwise, and then sums are taken in another order.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_every_key_is_consumed_under_the_names_of_checkpoints(family: str, base: Path) -> None:
    key_map = registry.find("families", family).key_map("ldm", options(family, base))
    with safe_open(base, framework="pt") as file:
        names = set(file.keys())
    for _, name in key_map:
        whole, _, mark = name.partition("#")
        assert (whole if mark else f"{name}.weight") in names
    used = {name.partition("#")[0] for _, name in key_map}
    is_layer = re.compile(r"(model\.diffusion_model|.*(resblocks|layers)\.\d+)\..*\.(weight|in_proj_weight)")
    left = {
        name for name in names if is_layer.fullmatch(name) and {name, name.removesuffix(".weight")}.isdisjoint(used)
    }
    assert all(re.search(r"norm|ln_|(in|out)_layers\.0|\.out\.0|resblocks\.23", name) for name in left)


@pytest.mark.parametrize(
    ("marks", "metadata", "prediction", "is_zero"),
    [
        (("v_pred",), {}, "v_prediction", False),
        (("v_pred", "ztsnr"), {}, "v_prediction", True),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ((), {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        ((), {"modelspec.predict_key": "v"}, "v_prediction", False),
        ((), {"modelspec.predict_key": "epsilon"}, "epsilon", False),
    ],
)
def test_marks_of_fine_tunes_are_read(
    family: str,
    pipeline: Any,
    tmp_path: Path,
    marks: tuple[str, ...],
    metadata: dict[str, str],
    prediction: str,
    is_zero: bool,
) -> None:
    path = save_single_file(pipeline, tmp_path / "marked.safetensors", family, marks, metadata or None)
    info = registry.find("families", family).check(options(family, path))
    assert (info.prediction, info.zero_terminal_snr) == (prediction, is_zero)


@pytest.mark.parametrize("other", SIZES)
def test_wrong_family_names_the_right_one(family: str, base: Path, other: str) -> None:
    if other != family:
        with pytest.raises(ModelError, match=rf"set model\.family={family}, or"):
            registry.find("families", other).check(options(other, base))


def test_prepared_items_depend_on_which_text_encoders_are_trained(family: str, base: Path) -> None:
    found = registry.find("families", family)
    encoders = [part for part in found.parts if part != "unet"]
    keys = {found.cache_key(options(family, base), frozenset(encoders[:count])) for count in range(len(encoders) + 1)}
    assert len(keys) == len(encoders) + 1
    assert found.cache_key(options(family, base), frozenset({"unet"})) in keys


def test_tokenizer_is_that_of_clip(checkpoint: Path) -> None:
    import open_clip

    loaded = FAMILY.load(SD1Options(path=str(checkpoint)), torch.device("cpu"))
    prompts = ["a photo of an astronaut, riding a horse!", "naïve café 12345", "don't"]
    ids = loaded.modules["tokenizer"](prompts, padding="max_length", max_length=77).input_ids
    expected = open_clip.get_tokenizer("ViT-L-14")(prompts)
    for got, want in zip(ids, expected.tolist(), strict=True):
        end = want.index(49407)
        assert got[: end + 1] == want[: end + 1]


def test_meta_modules_need_no_weights(checkpoint: Path) -> None:
    meta_modules = FAMILY.meta_modules(SD1Options(path=str(checkpoint)))
    assert {p.device.type for part in meta_modules.values() for p in part.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_x.lora_down.weight", "LoRA adapter, not a base"),
        ("conditioner.embedders.1.x", "is Stable Diffusion XL"),
        ("conditioner.embedders.0.model.x", "the refiner"),
        ("something.else", "holds no unet, vae, text_encoder"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=message):
        FAMILY.check(SD1Options(path=str(path)))


def test_truncated_and_pickled_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"cut.safetensors is not a whole"):
        FAMILY.check(SD1Options(path=str(cut)))
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"take the \.safetensors version"):
        FAMILY.check(SD1Options(path=str(pickled)))
