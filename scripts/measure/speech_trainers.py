"""Compares Whisper adapters of lora-diffusion with those of transformers' Seq2SeqTrainer and PEFT.

python -m scripts.measure speech --seeds 0 1 2 3 4

Both train the built-in Whisper on the same recordings, with the same steps, batch, rank, modules, learning rate and
schedule, in fp32; both adapters are then scored by the same search for words. Needs espeak-ng, which speaks the harder
set: words and accents that the base has never heard, under noise.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks.processes import call

STEPS, BATCH_SIZE, RANK, RATE, WARMUP_STEPS = 250, 8, 16, 2e-3, 10
_FOREIGN_VOICES = ("de", "fr-fr", "en-gb-scotland")
_NUM_TRAINING, _NUM_TESTS = 240, 200


def measure(output: Path, seeds: Sequence[int], changes: Sequence[str]) -> None:
    """Trains by each program in a process of its own, and prints a row for each data set, program and seed.

    Args:
        output: folder of the runs and of the harder set.
        seeds: one training run for each.
        changes: none can be made, since the other program has no such settings.

    Raises:
        SystemExit: there are changes, or a run failed.
    """
    if changes:
        sys.exit(f"--set {changes[0]}: both programs train with settings of this file; change them there.")
    for name in ("digits", "hard"):
        data = _data(name, output)
        rows: dict[str, list[dict[str, float]]] = {program: [] for program in _PROGRAMS}
        print(f"\n| {name}, seed | {' | '.join(_PROGRAMS)} |\n|{'---|' * (1 + len(_PROGRAMS))}", flush=True)
        for seed in seeds:
            for program, values in rows.items():
                result = call(_measure, program, data, seed, output / f"{program}-{seed}")
                values.append(result or sys.exit(f"{program} failed with seed {seed}"))
            print(f"| {seed} | {' | '.join(_cell(values[-1:]) for values in rows.values())} |", flush=True)
        print(f"| mean | {' | '.join(_cell(values) for values in rows.values())} |", flush=True)


def _cell(rows: list[dict[str, float]]) -> str:
    means = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
    return f"{means['errors']:.1f} of {means['words']:.0f} words, {means['cpu_s']:.0f} CPU s"


def _data(name: str, output: Path) -> Path:
    """Returns a folder with `train` and `test`."""
    if name == "digits":
        from lora_diffusion.core.files import shipped_path

        return shipped_path("datasets") / "spoken-digits"
    from scripts.build_builtin.whisper.make_dataset import write
    from scripts.build_builtin.whisper.speech import COMMANDS, DIGITS, HELD_OUT_WORDS, Utterance, draw

    folder = output / "hard"
    if folder.is_dir():
        return folder
    words = (*HELD_OUT_WORDS, *HELD_OUT_WORDS, *DIGITS, *COMMANDS)
    for part, count in (("train", _NUM_TRAINING), ("new", _NUM_TESTS)):
        rng = random.Random(f"hard {part}")
        drawn = [draw(rng, words, _FOREIGN_VOICES, 3) for _ in range(count)]
        noisy = [
            Utterance(one.words, one.voice, one.pitch, one.speed, rng.choice((0.0, 0.004, 0.01)), one.lead_s)
            for one in drawn
        ]
        write(folder / part, noisy)
    return folder


def _measure(program: str, data: Path, seed: int, output: Path) -> dict[str, float]:
    import time

    import torch

    from lora_diffusion.families.language.options import WhisperOptions
    from lora_diffusion.workflows.transcribe import score_transcripts

    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    adapter = _PROGRAMS[program](data / "train", seed, output)
    cpu_s = time.process_time() - started
    (result,) = score_transcripts(WhisperOptions(), [data / "new"], [(adapter, 1.0)]).scores
    words = sum(len(text.target.split()) for text in result.texts)
    return {"errors": result.scores["wer"] * words, "words": words, "cpu_s": cpu_s}


def _train_ours(data: Path, seed: int, output: Path) -> Path:
    from lora_diffusion.config.load import find_shipped, load
    from lora_diffusion.workflows.train import train

    changes = [f"data.path={data}", f"output.path={output / 'run'}", f"train.seed={seed}", f"train.max_steps={STEPS}"]
    changes += ["model.mask_time_prob=0", "model.mask_feature_prob=0", "data.speeds=[1.0]", "data.noise_db=[]"]
    changes += [f"train.batch_size={BATCH_SIZE}", f"adapter.rank={RANK}", f"train.learning_rate={RATE}"]
    changes += [f"train.warmup_steps={WARMUP_STEPS}", "train.precision=fp32", "train.threads=1", "output.dtype=fp32"]
    return train(load(find_shipped("whisper/digits"), changes), overwrite=True).files[0]


def _train_plain(data: Path, seed: int, output: Path) -> Path:
    import pandas
    import peft
    import soundfile
    import torch
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, WhisperForConditionalGeneration, WhisperProcessor

    from lora_diffusion.core.files import shipped_path

    torch.manual_seed(seed)
    folder = shipped_path("builtin") / "digits-whisper"
    processor = WhisperProcessor.from_pretrained(folder)
    model: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    targets = r".*layers\.\d+\.((self_attn|encoder_attn)\.(q|k|v|out)_proj|fc[12])"
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    items = []
    for row in pandas.read_csv(data / "metadata.csv").itertuples():
        wave, rate = soundfile.read(data / row.file_name, dtype="float32")
        features = processor.feature_extractor(wave, sampling_rate=rate, return_tensors="np").input_features[0]
        items.append({"input_features": features, "labels": processor.tokenizer(row.transcription).input_ids})

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        batch = processor.feature_extractor.pad(
            [{"input_features": one["input_features"]} for one in chosen], return_tensors="pt"
        )
        texts = processor.tokenizer.pad([{"input_ids": one["labels"]} for one in chosen], return_tensors="pt")
        labels = texts["input_ids"].masked_fill(texts.attention_mask.ne(1), -100)
        batch["labels"] = labels[:, 1:] if (labels[:, 0] == model.config.decoder_start_token_id).all() else labels
        return dict(batch)

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(output / "plain"),
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=STEPS,
        learning_rate=RATE,
        warmup_steps=WARMUP_STEPS,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="no",
        disable_tqdm=True,
    )
    Seq2SeqTrainer(model=model, args=arguments, train_dataset=items, data_collator=collate).train()
    model.save_pretrained(output / "plain")
    return output / "plain"


_PROGRAMS = {"ours": _train_ours, "plain": _train_plain}
