"""The fixed inputs of a recording: small bases, samples, and adapter files of many sorts, all made from seeds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families.ldm import save_single_file, shaped_pipeline
from tests.tiny import save_tiny_pipeline, save_tiny_sd2_pipeline, save_tiny_sdxl_pipeline
from tests.tiny_llava import entry, save_tiny_llava, write_chats, write_picture
from tests.tiny_whisper import save_tiny_whisper, write_recording

Roles = Callable[[int, int], dict[str, tuple[int, ...]]]
"""Shape of a layer's weight -> suffixes and shapes of an adapter's tensors."""
GOLDEN = Path(__file__).parents[1] / "golden"
_SUBJECTS = ("cat", "dog", "heart", "face", "round cat", "red dog")
_SIZES = ((16, 16), (16, 16), (24, 12), (16, 16), (12, 24), (16, 16))


def write_bases() -> None:
    """Writes a base of each family into the working folder."""
    save_tiny_pipeline(Path("base-sd1"))
    save_tiny_sd2_pipeline(Path("base-sd2"))
    save_tiny_sdxl_pipeline(Path("base-sdxl"))
    save_tiny_whisper(Path("base-whisper"))
    save_tiny_llava(Path("base-llava"))


def write_samples() -> None:
    """Writes captioned images, recordings and chats, and an image folder with mistakes in it."""
    rng = np.random.default_rng(0)
    for folder in (Path("images"), Path("references"), Path("mistakes")):
        folder.mkdir()
        for index, (subject, (width, height)) in enumerate(zip(_SUBJECTS, _SIZES, strict=True)):
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(f"a {subject}, sks style\nthe {subject} of sks style\n")
    Path("mistakes/0.txt").unlink()
    Path("mistakes/1.png").write_bytes(b"no image")
    shutil.copy("mistakes/2.png", "mistakes/twin.png")
    Path("mistakes/3.txt").write_text("")
    for index, text in enumerate(("one", "two three", "four")):
        seconds, pitch = 0.3 + 0.1 * index, 200.0 + 100 * index
        write_recording(Path(f"recordings/{index}.wav"), text, seconds=seconds, pitch=pitch)
        write_recording(Path(f"held_out/{index}.wav"), text, seconds=seconds, pitch=pitch + 20)
    names = [write_picture(Path(f"chats/{index}.png"), index).name for index in range(3)]
    texts = (("What?", "a cat"), ("What?", "a dog", "Sure?", "yes"), ("Colour?", "red"))
    write_chats(Path("chats"), [entry(name, *own) for name, own in zip(names, texts, strict=True)])
    Path("prompts.yaml").write_text(
        "object:\n  - a red {class} of {trigger}\nprior:\n  - a {class}\nleak:\n  - a dog\n"
    )


def write_checkpoint() -> None:
    """Writes a single-file base with the depth and names of the published one, and one that was tuned."""
    base = save_single_file(shaped_pipeline("sd1"), Path("single.safetensors"))
    change = torch.Generator().manual_seed(5)
    tuned = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=change) if "attn" in name else tensor
        for name, tensor in load_file(base).items()
    }
    save_file(tuned, "tuned.safetensors")


def write_adapters() -> dict[str, Path]:
    """Writes files of many variants over the modules of a golden one; returns these and the golden ones by name."""
    golden = sorted(path for release in GOLDEN.glob("*/") for path in release.glob("tiny.*"))
    files = {f"{path.parent.name}/{path.name}": path for path in golden}
    source = load_file(GOLDEN / "0.1.0" / "tiny.safetensors")
    downs = {name.removesuffix(".lora_down.weight"): t for name, t in source.items() if name.endswith("down.weight")}
    shapes = {name: (source[f"{name}.lora_up.weight"].shape[0], down.shape[1]) for name, down in downs.items()}
    for variant, roles in _VARIANTS.items():
        files[variant] = _write_adapter(variant, shapes, roles)
    for name, shapes in _PUBLISHED.items():
        files[name] = _write_adapter(name, shapes, _lora)
    return files


def _write_adapter(name: str, shapes: dict[str, tuple[int, int]], roles: Roles) -> Path:
    tensors: dict[str, Tensor] = {}
    for module, (rows, columns) in shapes.items():
        for role, shape in roles(rows, columns).items():
            tensors[f"{module}.{role}"] = _numbers(shape, len(tensors))
    path = Path(f"{name}.safetensors")
    save_file(tensors, path, {"ss_network_dim": "2", "note": name})
    return path


def _numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Returns sixteenths, which every processor makes alike and every dtype holds; of alpha a positive one."""
    sixteenths = np.random.default_rng(seed).integers(1, 17, shape) - 8 * bool(shape)
    return torch.tensor(sixteenths / 16).float()


def _lora(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {"lora_down.weight": (2, columns), "lora_up.weight": (rows, 2), "alpha": ()}


_PUBLISHED = {
    "sd1-modules": {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
        "lora_unet_mid_block_attentions_0_proj_in": (1280, 1280),
        "lora_te_text_model_encoder_layers_11_mlp_fc1": (3072, 768),
    },
    "sdxl-modules": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048),
        "lora_unet_output_blocks_0_1_transformer_blocks_9_ff_net_2": (1280, 5120),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
        "lora_te2_text_model_encoder_layers_31_mlp_fc2": (1280, 5120),
    },
}
"""Some modules of published bases."""
_VARIANTS: dict[str, Roles] = {
    "lora": _lora,
    "lora_without_alpha": lambda rows, columns: {"lora_down.weight": (2, columns), "lora_up.weight": (rows, 2)},
    "dora": lambda rows, columns: {**_lora(rows, columns), "dora_scale": (1, columns)},
    "dora_out": lambda rows, columns: {**_lora(rows, columns), "dora_scale": (rows, 1)},
    "loha": lambda rows, columns: {
        **{f"hada_{role}_a": (rows, 2) for role in ("w1", "w2")},
        **{f"hada_{role}_b": (2, columns) for role in ("w1", "w2")},
        "alpha": (),
    },
    "lokr": lambda rows, columns: {"lokr_w1": (4, 4), "lokr_w2_a": (rows // 4, 2), "lokr_w2_b": (2, columns // 4)},
    "lokr_whole": lambda rows, columns: {"lokr_w1": (4, 4), "lokr_w2": (rows // 4, columns // 4)},
    "full": lambda rows, columns: {"diff": (rows, columns)},
    "bias": lambda rows, columns: {**_lora(rows, columns), "diff_b": (rows,)},
    "oft": lambda rows, columns: {"oft_blocks": (4, rows // 4, rows // 4), "alpha": ()},
    "glora": lambda rows, columns: {
        "a1.weight": (columns, 2),
        "a2.weight": (2, columns),
        "b1.weight": (rows, 2),
        "b2.weight": (2, columns),
    },
    "ia3": lambda rows, columns: {"weight": (rows,), "on_input": ()},
}
