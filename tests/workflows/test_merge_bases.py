"""Adapters are merged into every file that holds the networks they change, and nothing else in it is touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_diffusion.workflows.bases import find_weights
from tests.families.ldm import save_single_file, shaped_pipeline
from tests.workflows.conftest import Commands

UNET = "model.diffusion_model."
QUERY = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
OLD_CLIP = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """A checkpoint of SD1's layout with all that published ones hold besides their weights."""
    path = save_single_file(shaped_pipeline("sd1"), tmp_path_factory.mktemp("base") / "base.safetensors", "sd1")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return {
        **load_file(path),
        "betas": betas.float(),
        "alphas_cumprod": torch.cumprod(1 - betas, 0).float(),
        "denoiser.sigmas": torch.linspace(0.029, 14.6, 1000),
        "cond_stage_model.logit_scale": torch.tensor(4.6052),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.attn_mask": torch.full((7, 7), -torch.inf).triu(1),
        "model_ema.diffusion_modelout2weight": torch.rand(3, 3),
        "v_pred": torch.zeros(0),
        "__index_timestep_zero__": torch.zeros(1),
    }


def unet(whole: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name.removeprefix(UNET): tensor for name, tensor in whole.items() if name.startswith(UNET)}


def adapter(whole: dict[str, Tensor], path: Path, *, text: bool = False) -> tuple[Path, Tensor]:
    """Returns a file of rank 2, and its change of the UNet's query."""
    out, width = whole[f"{UNET}{QUERY}.weight"].shape
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, width, generator=rng), torch.randn(out, 2, generator=rng)
    tensors = {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up, f"{FLAT}.alpha": torch.tensor(1.0)}
    if text:
        out, width = whole[f"{OLD_CLIP[0]}encoder.layers.0.mlp.fc1.weight"].shape
        tensors |= {f"{TEXT}.lora_down.weight": torch.ones(1, width), f"{TEXT}.lora_up.weight": torch.ones(out, 1)}
    save_file(tensors, path)
    return path, up @ down / 2


def merge(command: Commands, base: dict[str, Tensor], file: object, folder: Path, *more: object) -> dict[str, Tensor]:
    save_file(base, folder / "base.safetensors")
    output = folder / "merged.safetensors"
    command.good("merge", "--model", folder / "base.safetensors", "--adapter", file, "--output", output, *more)
    return load_file(output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_networks_weights_alone(
    command: Commands, whole: dict[str, Tensor], dtype: torch.dtype, tmp_path: Path
) -> None:
    file, change = adapter(whole, tmp_path / "a.safetensors")
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    merged = merge(command, whole, file, tmp_path, "--dtype", name)
    query = f"{UNET}{QUERY}.weight"
    assert torch.equal(merged[query], (whole[query] + change).to(dtype))
    for name, tensor in whole.items():
        is_weight = name.startswith((UNET, OLD_CLIP[0])) and tensor.is_floating_point()
        assert merged[name].dtype == (dtype if is_weight else tensor.dtype), name
        assert name == query or torch.equal(merged[name], tensor.to(merged[name].dtype)), name


def test_copies_of_the_weights_are_told(command: Commands, whole: dict[str, Tensor], tmp_path: Path) -> None:
    file, _ = adapter(whole, tmp_path / "a.safetensors")
    save_file(whole, tmp_path / "base.safetensors")
    arguments = ("--adapter", file, "--output", tmp_path / "o.safetensors")
    outcome = command.good("merge", "--model", tmp_path / "base.safetensors", *arguments)
    assert "1 tensors of model_ema are kept as they are" in outcome.message


WIDE = {"inpainting": 9, "editing": 8, "depth": 5}


@pytest.mark.parametrize("case", [*WIDE, "no VAE", "no text encoder", "old names of CLIP"])
def test_bases_that_cannot_be_trained(command: Commands, whole: dict[str, Tensor], case: str, tmp_path: Path) -> None:
    base = dict(whole)
    if case in WIDE:
        name = f"{UNET}input_blocks.0.0.weight"
        base[name] = torch.cat([base[name], base[name].repeat(1, 2, 1, 1)], 1)[:, : WIDE[case]].contiguous()
    if case == "no VAE":
        base = {name: tensor for name, tensor in whole.items() if not name.startswith("first_stage_model.")}
    if case == "no text encoder":
        base = {name: tensor for name, tensor in whole.items() if not name.startswith("cond_stage_model.")}
    if case == "old names of CLIP":
        base = {name.replace(*OLD_CLIP): tensor for name, tensor in whole.items()}
    file, change = adapter(whole, tmp_path / "a.safetensors", text=case != "no text encoder")
    merged = merge(command, base, file, tmp_path)
    query = f"{UNET}{QUERY}.weight"
    assert torch.allclose(merged[query], whole[query] + change)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    prefix = OLD_CLIP[case == "old names of CLIP"]
    text = {f"{prefix}encoder.layers.0.mlp.fc1.weight"} if case != "no text encoder" else set()
    assert changed == {query} | text
    assert merged.keys() == base.keys()


@pytest.mark.parametrize("prefix", [UNET, "diffusion_model.", "", "diffusers", "unet."])
def test_unet_alone_under_every_name(command: Commands, whole: dict[str, Tensor], prefix: str, tmp_path: Path) -> None:
    query = QUERY
    base = unet(whole, prefix)
    if prefix in ("diffusers", "unet."):
        prefix = prefix.removesuffix("diffusers")
        state = shaped_pipeline("sd1").unet.state_dict()
        base = {prefix + name: tensor.contiguous() for name, tensor in state.items()}
        query = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    file, change = adapter(whole, tmp_path / "a.safetensors")
    merged = merge(command, base, file, tmp_path, "--dtype", "fp16")
    name = f"{prefix}{query}.weight"
    assert torch.allclose(merged[name].float(), base[name] + change, atol=2e-3)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}


def test_a_part_that_the_base_lacks_can_be_left_out(
    command: Commands, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    file, change = adapter(whole, tmp_path / "a.safetensors", text=True)
    base = unet(whole, "")
    save_file(base, tmp_path / "base.safetensors")
    arguments = ("merge", "--model", tmp_path / "base.safetensors", "--output", tmp_path / "o.safetensors")
    outcome = command(*arguments, "--adapter", f"{file}:0.5")
    assert outcome.code == 2
    assert "holds no text_encoder, which a.safetensors changes; give" in outcome.message
    assert ":text_encoder=0,unet=0.5" in outcome.message.replace(" ", "")
    merged = merge(command, base, f"{file}:unet=0.5,text_encoder=0", tmp_path)
    assert torch.allclose(merged[f"{QUERY}.weight"], base[f"{QUERY}.weight"] + change / 2)


def test_other_files_are_no_bases(command: Commands, whole: dict[str, Tensor], tmp_path: Path) -> None:
    file, _ = adapter(whole, tmp_path / "a.safetensors")
    ema = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in unet(whole, "diffusion_model.").items()}
    save_file(ema, tmp_path / "ema.safetensors")
    for base, what in ((tmp_path / "ema.safetensors", "(EMA) alone"), (file, "a LoRA adapter, not a base")):
        outcome = command("merge", "--model", base, "--adapter", file, "--output", tmp_path / "o.safetensors")
        assert (outcome.code, what in outcome.message) == (2, True)
    save_file({name.replace(*OLD_CLIP): tensor for name, tensor in whole.items()}, tmp_path / "old.safetensors")
    outcome = command("generate", "--model", tmp_path / "old.safetensors", "--prompt", "x", "--output", tmp_path / "p")
    assert (outcome.code, "adapters can be merged into it" in outcome.message) == (2, True)


def test_folder_for_inpainting(command: Commands, tiny_base: Path, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    (file,) = (base / "unet").glob("*.safetensors")
    weights = load_file(file)
    first = weights["conv_in.weight"]
    save_file({**weights, "conv_in.weight": torch.cat([first, first, first[:, :1]], 1)}, file, {"format": "pt"})
    query = next(name for name in weights if name.endswith("attn1.to_q.weight"))
    out, width = weights[query].shape
    stem = f"unet.{query.removesuffix('.weight')}"
    factors = {f"{stem}.lora_A.weight": torch.ones(1, width), f"{stem}.lora_B.weight": torch.ones(out, 1)}
    save_file(factors, tmp_path / "a.safetensors")
    command.good(
        "merge", "--model", base, "--adapter", tmp_path / "a.safetensors", "--output", output, "--dtype", "fp16"
    )
    merged = load_file(output / "unet" / file.name)
    assert torch.allclose(merged[query].float(), weights[query] + 1, atol=1e-3)
    assert merged["conv_in.weight"].shape[1] == 9
    for path in base.rglob("*"):
        if path.is_file() and path.parent.name not in ("unet", "text_encoder"):
            assert (output / path.relative_to(base)).read_bytes() == path.read_bytes()
    outcome = command("generate", "--model", base, "--prompt", "x", "--output", tmp_path / "p")
    assert (outcome.code, "only merged into" in outcome.message) == (2, True)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_family_of_a_unet_alone(family: str, tmp_path: Path) -> None:
    state = shaped_pipeline(family).unet.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "unet.safetensors")
    assert find_weights(str(tmp_path / "unet.safetensors")).family == family


def test_difference_of_two_unets(command: Commands, whole: dict[str, Tensor], tmp_path: Path) -> None:
    base = unet(whole, "")
    query = f"{QUERY}.weight"
    change = torch.outer(torch.arange(len(base[query])) / 50, torch.ones(base[query].shape[1]))
    save_file(base, tmp_path / "base.safetensors")
    save_file({**base, query: base[query] + change}, tmp_path / "tuned.safetensors")
    output = tmp_path / "o.safetensors"
    arguments = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", output, "--rank", 1, "--dtype", "fp32")
    command.good("extract", *arguments)
    actual = load_file(output)
    assert torch.allclose(actual[f"{FLAT}.lora_up.weight"] @ actual[f"{FLAT}.lora_down.weight"], change, atol=1e-5)
