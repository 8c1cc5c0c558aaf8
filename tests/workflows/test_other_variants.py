"""Files of other programs with more in them than factors are read, merged, and converted where a format holds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_diffusion.algebra.delta import delta_weight
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.workflows._adapter_files import read_alone
from tests.families.ldm import save_single_file, shaped_pipeline
from tests.workflows.conftest import Commands

UNET = "model.diffusion_model."
BLOCK, FLAT = "input_blocks.{}.1.transformer_blocks.0.", "lora_unet_down_blocks_0_attentions_{}_transformer_blocks_0_"
CONV, FLAT_CONV = "input_blocks.1.0.in_layers.2", "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of SD1's layout with narrow layers."""
    return save_single_file(shaped_pipeline("sd1"), tmp_path_factory.mktemp("base") / "base.safetensors", "sd1")


def random(*shape: int, size: float = 0.1) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def merged(
    command: Commands, base: Path, tensors: dict[str, Tensor], folder: Path, weight: float = 1.0
) -> dict[str, Tensor]:
    """Returns by how much each tensor of the base changes."""
    save_file(tensors, folder / "a.safetensors")
    output = folder / "merged.safetensors"
    arguments = ("--adapter", f"{folder / 'a.safetensors'}:{weight:g}", "--output", output, "--overwrite")
    command.good("merge", "--model", base, *arguments)
    before, after = load_file(base), load_file(output)
    changes = {name.removeprefix(UNET): after[name] - tensor for name, tensor in before.items()}
    return {name: change for name, change in changes.items() if change.any()}


def trained_by_comfyui(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns a file as ComfyUI's own training node writes it of some layers, and the changes that it stands for.

    Every layer has a change of its bias, norms have whole changes, and factors of convolutions are flat.
    """
    query, norm, embedding = BLOCK.format(1) + "attn1.to_q", "input_blocks.1.0.in_layers.0", "time_embed.0"
    file, changes = {}, {}
    for name in (query, CONV, embedding, "out.2"):
        out, *inputs = weights[f"{UNET}{name}.weight"].shape
        down, up = random(2, torch.Size(inputs).numel()), random(out, 2)
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
        changes[f"{name}.weight"] = (up @ down / 2).reshape(out, *inputs)
    for name in (norm, "out.0"):
        file[f"{name}.diff"] = changes[f"{name}.weight"] = random(len(weights[f"{UNET}{name}.weight"]), size=0.3)
    for name in (CONV, embedding, "out.2", norm, "out.0", "input_blocks.2.0.in_layers.2"):
        file[f"{name}.diff_b"] = changes[f"{name}.bias"] = random(len(weights[f"{UNET}{name}.bias"]), size=0.2)
    return {f"diffusion_model.{name}": tensor for name, tensor in file.items()}, changes


def test_what_comfyui_trains(command: Commands, base: Path, tmp_path: Path) -> None:
    tensors, changes = trained_by_comfyui(load_file(base))
    for weight in (1.0, 0.5):
        actual = merged(command, base, tensors, tmp_path, weight)
        assert actual.keys() == changes.keys()
        for name, change in changes.items():
            assert torch.allclose(actual[name], weight * change, atol=1e-6), name
    source, output = tmp_path / "a.safetensors", tmp_path / "kohya.safetensors"
    command.good("convert", source, output, "--to", "kohya", "--model", base)
    written = load_file(output)
    assert written[f"{FLAT_CONV}.lora_down.weight"].shape == (2, 32, 3, 3)
    assert torch.equal(written[f"{FLAT_CONV}.diff_b"], tensors[f"diffusion_model.{CONV}.diff_b"])
    assert torch.equal(written["lora_unet_conv_norm_out.diff"], tensors["diffusion_model.out.0.diff"])
    again = merged(command, base, written, tmp_path)
    assert again.keys() == changes.keys()
    assert all(torch.allclose(again[name], change, atol=1e-6) for name, change in changes.items())


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_formats_that_hold_no_whole_changes_say_which_do(
    command: Commands, base: Path, to: str, tmp_path: Path
) -> None:
    tensors, _ = trained_by_comfyui(load_file(base))
    for ending, what in ((".diff", "full adapters"), (".diff_b", "changes of biases")):
        module = "" if ending == ".diff" else CONV
        settings = {
            name: t for name, t in tensors.items() if module in name and name.endswith((".weight", ".alpha", ending))
        }
        save_file(settings, tmp_path / "a.safetensors")
        outcome = command("convert", tmp_path / "a.safetensors", tmp_path / "o", "--to", to, "--model", base)
        assert outcome.code == 2
        assert f"cannot hold {what}" in outcome.message
        assert "Formats that can: kohya" in outcome.message


def variants(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns tensors of each variant for a square layer of a width, as LyCORIS, A1111 or ComfyUI write them."""
    width = len(weights[f"{UNET}{BLOCK.format(1)}attn1.to_q.weight"])
    return {
        "ia3": {"weight": random(width), "on_input": torch.tensor(1)},
        "oft": {"oft_blocks": random(width // 4, 4, 4), "rescale": random(width, 1), "alpha": torch.tensor(0.5)},
        "boft": {"oft_blocks": random(2, width // 4, 4, 4), "alpha": torch.tensor(0.0)},
        "glora": {
            **{f"{name}.weight": random(width, 3) for name in ("a1", "b1")},
            **{f"{name}.weight": random(3, width) for name in ("a2", "b2")},
            "alpha": torch.tensor(2.0),
        },
        "loha+dora": {
            **{f"hada_w{n}_a": random(width, 2) for n in "12"},
            **{f"hada_w{n}_b": random(2, width) for n in "12"},
            "alpha": torch.tensor(1.0),
            "dora_scale": random(1, width).abs(),
        },
        "lokr+dora": {
            "lokr_w1": random(4, 4),
            "lokr_w2": random(width // 4, width // 4),
            "alpha": torch.tensor(1.0),
            "dora_scale": random(1, width).abs(),
        },
        "full": {"diff": random(width, width)},
        "set": {"set_weight": random(width, width)},
    }


def test_every_kind_is_merged_and_kept_in_kohyas_names(command: Commands, base: Path, tmp_path: Path) -> None:
    places = [(index, matrix) for index in (0, 1) for matrix in ("to_q", "to_k", "to_v", "to_out.0")]
    weights = load_file(base)
    actual = variants(weights)
    tensors, modules = {}, {}
    for (variant, each), (index, matrix) in zip(actual.items(), places, strict=True):
        flat = FLAT.format(index) + "attn1_" + matrix.replace(".", "_")
        tensors |= {f"{flat}.{name}": tensor for name, tensor in each.items()}
        modules[f"{BLOCK.format(index + 1)}attn1.{matrix}.weight"] = variant
    changes = merged(command, base, tensors, tmp_path)
    assert changes.keys() == modules.keys()
    command.good("convert", tmp_path / "a.safetensors", tmp_path / "o.safetensors", "--to", "kohya")
    written = load_file(tmp_path / "o.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor), name
        assert written[name].dtype == tensor.dtype
    _, state = read_alone(parse_file(tmp_path / "o.safetensors"))
    assert {adapter.variant for _, adapter in state} == set(variants(weights))
    by_change = {adapter.variant: adapter for _, adapter in state}
    for name, variant in modules.items():
        assert torch.allclose(changes[name], delta_weight(by_change[variant], weights[UNET + name]), atol=1e-6)


def test_limits_of_rotations_that_programs_disagree_about_are_told(
    command: Commands, base: Path, tmp_path: Path
) -> None:
    settings = variants(load_file(base))["oft"]
    stem = f"{FLAT.format(0)}attn1_to_q"
    for alpha, is_told in ((0.5, True), (50.0, False), (0.0, False)):
        tensors = {f"{stem}.oft_blocks": settings["oft_blocks"], f"{stem}.alpha": torch.tensor(alpha)}
        save_file(tensors, tmp_path / "a.safetensors")
        arguments = ("convert", tmp_path / "a.safetensors", tmp_path / "o.safetensors", "--to", "kohya", "--overwrite")
        assert ("alpha limits the rotations" in command.good(*arguments).message) == is_told


@pytest.mark.parametrize(("to", "able"), [("peft", "kohya"), ("diffusers", "kohya")])
def test_kinds_that_peft_and_diffusers_lack(command: Commands, base: Path, to: str, able: str, tmp_path: Path) -> None:
    for variant, each in variants(load_file(base)).items():
        save_file({f"{FLAT.format(0)}attn1_to_q.{name}": t for name, t in each.items()}, tmp_path / "a.safetensors")
        outcome = command("convert", tmp_path / "a.safetensors", tmp_path / "o", "--to", to)
        assert outcome.code == 2
        assert f"cannot hold {variant} adapters" in outcome.message
        assert f"Formats that can: {able}" in outcome.message


def test_norms_of_lycoris(command: Commands, base: Path, tmp_path: Path) -> None:
    width = len(load_file(base)[f"{UNET}input_blocks.1.0.in_layers.0.weight"])
    flat = "lora_unet_down_blocks_0_resnets_0_norm1"
    tensors = {f"{flat}.w_norm": random(width), f"{flat}.b_norm": random(width, size=0.2)}
    changes = merged(command, base, tensors, tmp_path)
    norm = "input_blocks.1.0.in_layers.0"
    assert changes.keys() == {f"{norm}.weight", f"{norm}.bias"}
    assert torch.allclose(changes[f"{norm}.weight"], tensors[f"{flat}.w_norm"], atol=1e-6)
    assert torch.allclose(changes[f"{norm}.bias"], tensors[f"{flat}.b_norm"], atol=1e-6)
    command.good("convert", tmp_path / "a.safetensors", tmp_path / "o.safetensors", "--to", "kohya")
    assert load_file(tmp_path / "o.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("oft_unet_x.oft_blocks", (2, 4, 4), "oft as kohya's networks.oft writes it"),
        ("lora_unet_x.oft_diag", (2, 4, 4), "oft as PEFT or LyCORIS before 2024 writes it"),
        ("lora_unet_x.bm.weight", (2, 2, 3, 3), "glora with a Tucker core"),
        ("unet.x.ia3_l", (1, 4), "ia3 as PEFT writes it"),
        ("lora_unet_x.scale", (1,), "lora with a scale of its own"),
    ],
)
def test_kinds_that_are_not_read_are_named(
    command: Commands, name: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    save_file({name: torch.ones(shape)}, tmp_path / "a.safetensors")
    outcome = command("convert", tmp_path / "a.safetensors", tmp_path / "o.safetensors", "--to", "kohya")
    assert (outcome.code, message in outcome.message) == (2, True), outcome.message


def test_shape_that_fills_up_nothing_is_taken(command: Commands, base: Path, tmp_path: Path) -> None:
    out, width = load_file(base)[f"{UNET}{BLOCK.format(1)}attn1.to_q.weight"].shape
    flat = f"{FLAT.format(0)}attn1_to_q"
    tensors = {f"{flat}.lora_down.weight": random(2, width), f"{flat}.lora_up.weight": random(out, 2)}
    assert merged(command, base, {**tensors, f"{flat}.reshape_weight": torch.tensor([out, width])}, tmp_path)
    save_file({**tensors, f"{flat}.reshape_weight": torch.tensor([out, 2 * width])}, tmp_path / "b.safetensors")
    outcome = command("convert", tmp_path / "b.safetensors", tmp_path / "o.safetensors", "--to", "kohya")
    assert (outcome.code, "reshape_weight" in outcome.message) == (2, True)


def xl_file(path: Path, with_embeddings: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Writes a plain lora with text embeddings beside it, as OneTrainer packs them."""
    rng = torch.Generator().manual_seed(seed)
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(4, 2048, generator=rng).half(),
        f"{stem}.lora_up.weight": torch.randn(640, 4, generator=rng).half(),
        f"{stem}.alpha": torch.tensor(4.0),
    }
    if with_embeddings:
        tensors |= {
            f"bundle_emb.me.{name}": torch.randn(2, width, generator=rng)
            for name, width in (("clip_l", 768), ("clip_g", 1280))
        }
    save_file(tensors, path)
    return tensors


def test_packed_embeddings_are_kept_or_dropped(command: Commands, tmp_path: Path) -> None:
    source, output = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    tensors = xl_file(source)
    packed = {name for name in tensors if name.startswith("bundle_emb.")}
    command.good("convert", source, output, "--to", "kohya")
    kept = load_file(output)
    assert all(torch.equal(kept[name], tensor) and kept[name].dtype == tensor.dtype for name, tensor in tensors.items())
    command.good("convert", source, output, "--to", "kohya", "--embeddings", "drop", "--overwrite")
    assert load_file(output).keys() == tensors.keys() - packed
    command.good("resize", source, output, "--rank", 2, "--overwrite")
    assert packed < load_file(output).keys()
    xl_file(tmp_path / "plain.safetensors", with_embeddings=False, seed=1)
    command.good("compose", f"{source}:1", f"{tmp_path / 'plain.safetensors'}:1", "--output", output, "--overwrite")
    assert packed < load_file(output).keys()
    xl_file(tmp_path / "other.safetensors", seed=2)
    two = (f"{source}:1", f"{tmp_path / 'other.safetensors'}:1", "--output", output, "--overwrite")
    outcome = command("compose", *two)
    assert (outcome.code, "different text embeddings of the name me.clip_" in outcome.message) == (2, True)
    command.good("compose", *two, "--embeddings", "drop")
    outcome = command("convert", source, tmp_path / "peft", "--to", "peft")
    assert (outcome.code, "--embeddings drop" in outcome.message) == (2, True)
    command.good("convert", source, tmp_path / "peft", "--to", "peft", "--embeddings", "drop")


@pytest.mark.parametrize(
    ("family", "encoder", "part", "width"),
    [
        ("sd1", "clip_l", "te", 768),
        ("sdxl", "clip_l", "te1", 768),
        ("sdxl", "clip_g", "te2", 1280),
        ("sd2", "clip_h", "te", 1024),
    ],
)
def test_text_encoders_as_comfyui_names_them(
    command: Commands, family: str, encoder: str, part: str, width: int, tmp_path: Path
) -> None:
    stem = f"text_encoders.{encoder}.transformer.text_model."
    tensors = {}
    for matrix in ("q", "k", "v", "out"):
        name = f"{stem}encoder.layers.0.self_attn.{matrix}_proj"
        tensors |= {f"{name}.lora_down.weight": random(2, width), f"{name}.lora_up.weight": random(width, 2)}
    tensors[f"{stem}encoder.layers.0.layer_norm1.diff"] = random(width)
    tensors[f"{stem}final_layer_norm.diff_b"] = random(width)
    # Its extraction finds no change in a projection that bases of Stable Diffusion lack.
    projection = f"text_encoders.{encoder}.transformer.text_projection"
    tensors |= {
        f"{projection}.lora_up.weight": torch.zeros(width, 2),
        f"{projection}.lora_down.weight": random(2, width),
    }
    source, output = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    save_file(tensors, source)
    outcome = command.good("convert", source, output, "--to", "kohya", "--family", family)
    assert ("1 modules that this base does not have change nothing" in outcome.message) == (encoder != "clip_g")
    written = load_file(output)
    flat = f"lora_{part}_text_model_"
    query = f"{stem}encoder.layers.0.self_attn.q_proj.lora_up.weight"
    assert torch.equal(written[f"{flat}encoder_layers_0_self_attn_q_proj.lora_up.weight"], tensors[query])
    assert f"{flat}encoder_layers_0_layer_norm1.diff" in written
    assert f"{flat}final_layer_norm.diff_b" in written


def test_sum_of_files_with_whole_changes(command: Commands, base: Path, tmp_path: Path) -> None:
    tensors, changes = trained_by_comfyui(load_file(base))
    names = {name: tensor for name, tensor in tensors.items() if ".input_blocks.1.0.in_layers.0" in name}
    query = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    xl = {f"{query}.lora_down.weight": random(2, 768), f"{query}.lora_up.weight": random(320, 2)}
    save_file({**names, **{f"unet.{query}": t for query, t in {}.items()}}, tmp_path / "a.safetensors")
    save_file(xl, tmp_path / "b.safetensors")
    output = tmp_path / "o.safetensors"
    two = (f"{tmp_path / 'a.safetensors'}:2", f"{tmp_path / 'b.safetensors'}:0.5", "--output", output)
    command.good("compose", *two)
    written = load_file(output)
    norm = "input_blocks.1.0.in_layers.0"
    assert torch.allclose(written["lora_unet_down_blocks_0_resnets_0_norm1.diff"], 2 * changes[f"{norm}.weight"])
    assert torch.allclose(written["lora_unet_down_blocks_0_resnets_0_norm1.diff_b"], 2 * changes[f"{norm}.bias"])
    product = written[f"{query}.lora_up.weight"] @ written[f"{query}.lora_down.weight"]
    scale = float(written[f"{query}.alpha"]) / 2
    assert torch.allclose(
        scale * product, 0.5 * xl[f"{query}.lora_up.weight"] @ xl[f"{query}.lora_down.weight"], atol=1e-6
    )


def test_nothing_is_left_of_an_adapter_minus_itself(command: Commands, tmp_path: Path) -> None:
    source, copy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    xl_file(source, with_embeddings=False)
    xl_file(copy, with_embeddings=False)
    outcome = command.good("compose", f"{source}:1", f"{copy}:-1", "--output", tmp_path / "o.safetensors")
    assert "Nothing is left" in outcome.out
    assert "Nothing is left" in outcome.message
    result = command.good("compose", f"{source}:1", f"{copy}:-0.5", "--output", tmp_path / "p.safetensors", "--json")
    assert json.loads(result.out)["share_left"] == pytest.approx(0.5 / 1.25**0.5, rel=1e-3)
    assert "Nothing is left" not in result.err


def test_extract_tells_rounding_from_change(command: Commands, base: Path, tmp_path: Path) -> None:
    weights = load_file(base)
    half, tuned, output = (tmp_path / f"{name}.safetensors" for name in ("half", "tuned", "o"))
    save_file({name: tensor.half() for name, tensor in weights.items()}, half)
    outcome = command("extract", base, half, output, "--rank", 2)
    assert (outcome.code, "by more than the rounding" in outcome.message) == (2, True)
    query = f"{UNET}{BLOCK.format(1)}attn1.to_q.weight"
    changed = {
        **weights,
        query: weights[query] + 0.01 * random(len(weights[query]), 1) @ random(1, len(weights[query])),
    }
    save_file({name: tensor.half() for name, tensor in changed.items()}, tuned)
    outcome = command.good("extract", base, tuned, output, "--rank", 2, "--json")
    assert (result := json.loads(outcome.out))["modules"] == 1
    assert result["not_held"] == []
    assert "float32 and" in outcome.message
    assert "rounding makes up to" in outcome.message
    assert 0.01 < result["rounding"] < 10
    save_file(changed, tuned)
    outcome = command.good("extract", base, tuned, output, "--rank", 2, "--overwrite")
    assert "rounding makes" not in outcome.message
    with safe_open(output, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1"
