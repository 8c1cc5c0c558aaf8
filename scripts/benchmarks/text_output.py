"""Checks Whisper and LLaVA at full size: memory against its estimate, and the adapter in plain transformers.

    python -m scripts.benchmarks text-output                      # six cases: needs 8 GB, and 3 GB of disk for a while
    python -m scripts.benchmarks text-output --cases whisper-nf4

Bases are folders of the real classes with random weights: Whisper small, and LLaVA around a Llama of a billion
weights. Each case is trained for ten steps by the workflow of `lora-diffusion train`, in a process of its own. Its peak
is counted from the second step on, less what the process took once everything was imported. Then the PEFT folder is
loaded by `PeftModel.from_pretrained` on the plain model of transformers, quantized alike, and the logits are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks import processes, published_networks

LARGEST_ERROR, LARGEST_DIFFERENCE = 0.15, 0.001
"""Of the estimate, relative; of the logits, relative to what the adapter changes in them."""
DATA = {"whisper": "spoken-digits/new", "llava": "emoji-questions/known"}
_BUILTIN = {"whisper": "digits-whisper", "llava": "emoji-llava"}
"""Bases whose tokenizers are taken."""
_UNQUANTIZED = {"whisper": ["proj_out"], "llava": ["lm_head", "model.multi_modal_projector"]}
NUM_STEPS = 10


@dataclass(frozen=True)
class Case:
    """One training setting."""

    family: str
    quantization: str = "none"


CASES: Mapping[str, Case] = {
    f"{family}-{name}": Case(family, quantization)
    for family in DATA
    for name, quantization in (("bf16", "none"), ("8bit", "8bit"), ("nf4", "nf4"))
}


def build_base(family: str, folder: Path) -> None:
    """Writes a base with random weights in bf16."""
    import torch

    processor = {"whisper": _whisper_processor, "llava": _llava_processor}[family]()
    model = {"whisper": _whisper, "llava": _llava}[family](processor.tokenizer)
    published_networks.fill(model, torch.Generator().manual_seed(0))
    model.tie_weights()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _whisper(tokenizer: Any) -> Any:
    import torch
    from transformers import WhisperForConditionalGeneration

    end, start = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    ids = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    nothing = {"suppress_tokens": None, "begin_suppress_tokens": None}
    with torch.device("meta"):
        return WhisperForConditionalGeneration(published_networks.whisper_config("small", **ids, **nothing))


def _whisper_processor() -> Any:
    from transformers import WhisperFeatureExtractor, WhisperProcessor

    from lora_diffusion.core.files import shipped_path

    tokenizer = WhisperProcessor.from_pretrained(shipped_path("builtin") / _BUILTIN["whisper"]).tokenizer
    return WhisperProcessor(WhisperFeatureExtractor(), tokenizer)


def _llava(tokenizer: Any) -> Any:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**published_networks.LLAVA_1B["vision_config"]),
        text_config=LlamaConfig(**published_networks.LLAVA_1B["text_config"], **ids),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def _llava_processor() -> Any:
    from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor

    from lora_diffusion.core.files import shipped_path

    builtin = AutoProcessor.from_pretrained(shipped_path("builtin") / _BUILTIN["llava"])
    sizes = published_networks.LLAVA_1B["vision_config"]
    side = {"height": sizes["image_size"], "width": sizes["image_size"]}
    return LlavaProcessor(
        CLIPImageProcessor(size=side, crop_size=side),
        builtin.tokenizer,
        patch_size=sizes["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=builtin.chat_template,
    )


def config_of(case: Case, base: Path, run: Path) -> Any:
    """Returns the config that the case stands for: rank 16 on all linear layers, two samples a step, AdamW, bf16."""
    from lora_diffusion.config.load import load
    from lora_diffusion.core.files import shipped_path

    values = {
        "model.family": case.family,
        "model.path": base,
        "model.quantization": case.quantization,
        "model.dtype": "bf16",
        "data.path": shipped_path("datasets") / DATA[case.family],
        "adapter.targets": "[all-linear]",
        "train.max_steps": NUM_STEPS,
        "train.batch_size": 2,
        "train.learning_rate": 1e-3,
        "train.precision": "bf16",
        "cache.path": run.parent / "cache",
        "output.path": run,
    }
    return load(None, [f"{key}={value}" for key, value in values.items()])


def measured(case: Case, base: Path, run: Path) -> dict[str, Any]:
    """Trains, and returns the estimated and the measured peak of a step, in bytes, and the PEFT folder."""
    from lora_diffusion.workflows.estimate import estimate
    from lora_diffusion.workflows.train import train

    config = config_of(case, base, run)
    estimated = estimate(config).memory  # which also imports what training needs
    before = processes.resident_bytes()
    with _peak_from_second_step(run):
        trained = train(config)
    return {
        "estimated": estimated.total_bytes,
        "parts": estimated.parts(),
        "peak": processes.peak_bytes() - before,
        "adapter": str(trained.files[0]),
    }


@contextmanager
def _peak_from_second_step(run: Path) -> Iterator[None]:
    """Forgets the peak of loading once a step is written down: weights that are quantized lie there in bf16 first."""
    metrics, is_over = run / "metrics.jsonl", threading.Event()

    def watch() -> None:
        while not is_over.is_set() and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.05)
        processes.reset_peak()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield
    is_over.set()
    watcher.join()


def difference(case: Case, base: Path, run: Path, adapter: str) -> float:
    """Returns how far our logits are from those of the plain model with the PEFT folder.

    As the norm of the difference, by that of what the adapter changes.
    """
    ours, inputs = _our_logits(case, base, run, Path(adapter))
    theirs, without = _plain_logits(case, base, adapter, inputs)
    return float((ours - theirs).norm() / (theirs - without).norm())


def _our_logits(case: Case, base: Path, run: Path, adapter: Path) -> tuple[Any, dict[str, Any]]:
    """Returns the logits of the first sample, float32, and what the plain model takes for it."""
    import torch

    from lora_diffusion.core import registry
    from lora_diffusion.data import sample_types
    from lora_diffusion.families.language import speech, vision
    from lora_diffusion.runtime.device import pick_device
    from lora_diffusion.workflows._base_and_adapters import attach, read_adapter

    config, family = config_of(case, base, run), registry.find("families", case.family)
    sample_type = sample_types.find(family.sample_type)
    sample: Any = sample_type.open(sample_type.read(config.data, family.check(config.model))[0], config.data)
    state = read_adapter(adapter, family, config.model)
    loaded = family.load(config.model, pick_device())
    batch = family.collate(family.prepare(loaded, [sample], frozenset()))
    attach(loaded, [state], [1.0])
    model = loaded.modules["model"]
    with torch.no_grad():
        if case.family == "whisper":
            ids = speech.shift(batch.tensors["labels"], model.config)
            inputs = {"input_features": batch.tensors["features"][:, 0].to(model.dtype), "decoder_input_ids": ids}
            return model(**inputs).logits.float(), inputs
        ids = batch.tensors["input_ids"]
        inputs = {"input_ids": ids, "pixel_values": vision.pixels(loaded, sample.views[0])[0].to(model.dtype)}
        embedded = vision.embed(loaded, ids, list(batch.tensors["features"]), batch.tensors["image_size"])
        hidden = loaded.parts["language_model"](inputs_embeds=embedded, use_cache=False).last_hidden_state
        return model.lm_head(hidden).float(), inputs


def _plain_logits(case: Case, base: Path, adapter: str, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the logits of the plain model of transformers with the PEFT folder and without it, float32."""
    import torch
    import transformers
    from peft import PeftModel

    name = {"whisper": "WhisperForConditionalGeneration", "llava": "LlavaForConditionalGeneration"}[case.family]
    kept = {"llm_int8_skip_modules": _UNQUANTIZED[case.family]}
    four_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    quantization = {
        "none": None,
        "8bit": transformers.BitsAndBytesConfig(load_in_8bit=True, **kept),
        "nf4": transformers.BitsAndBytesConfig(load_in_4bit=True, **four_bits, **kept),
    }[case.quantization]
    plain = getattr(transformers, name).from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu"
    )
    for module in plain.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a kernel that rounds scales, see lora_diffusion/quantize.py
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(plain, adapter).eval()
    with torch.no_grad():
        theirs = model(**inputs).logits.float()
        with model.disable_adapter():
            return theirs, model(**inputs).logits.float()


def measure(names: list[str]) -> dict[str, Any]:
    """Returns what was found of each case; what this machine has no memory for is null."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in DATA:
            base = Path(folder) / family
            for name in (name for name in names if CASES[name].family == family):
                if not base.exists():
                    processes.call_like_gpu(build_base, family, base)
                run = Path(folder) / name
                measurement = processes.call_like_gpu(measured, CASES[name], base, run)
                if measurement:
                    measurement["difference"] = processes.call_like_gpu(
                        difference, CASES[name], base, run, measurement["adapter"]
                    )
                rows[name] = measurement
                print(name, measurement, file=sys.stderr, flush=True)
    return rows


def print_report(rows: dict[str, Any]) -> None:
    """Prints the table for people."""
    print("| case | measured GB | estimated GB | estimated / measured | difference of logits |\n|---|---|---|---|---|")
    for name, row in rows.items():
        if row:
            peak, estimated = row["peak"], row["estimated"]
            far = "" if row["difference"] is None else f"{row['difference']:.4f}"
            print(f"| {name} | {peak / 1e9:.2f} | {estimated / 1e9:.2f} | {estimated / peak:.2f} | {far} |")
    print(f"\nEstimates within {LARGEST_ERROR:.0%}; logits within {LARGEST_DIFFERENCE} of what the adapter changes.")


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    rows = measure(arguments.cases)
    print(json.dumps(rows, indent=2)) if arguments.json else print_report(rows)


def add_parser(commands: Any) -> None:
    """Adds the command `text-output`."""
    parser = commands.add_parser("text-output", help="Whisper and LLaVA at full size: memory, and the PEFT folder")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)
