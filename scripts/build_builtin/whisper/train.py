"""Stage 2: the weights, from scratch. Stopped at any time, it goes on from its last checkpoint."""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperTokenizer

from scripts.build_builtin.storage import load_checkpoint, save_checkpoint
from scripts.build_builtin.whisper.network import make_model, make_tokenizer

BATCH = 16
PEAK_LEARNING_RATE = 1.2e-3
WARMUP_STEPS = 200
CHECKPOINT_SECONDS = 60
_IGNORED = -100
_CTC_SHARE = 0.3
_MOST_SHIFT = 40
"""Frames of 10 ms by which the sound may begin later."""


class Listener(nn.Module):
    """The model, with a head that reads letters off the encoder: it makes the two halves find each other sooner.

    Source: Watanabe et al. 2017, "Hybrid CTC/attention architecture for end-to-end speech recognition".
    """

    def __init__(self, tokenizer: WhisperTokenizer) -> None:
        super().__init__()
        self.model = make_model(tokenizer)
        self.letters = nn.Linear(self.model.config.d_model, len(tokenizer))

    def forward(self, sounds: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch: [n, mels, frames], [n, tokens] padded with -100."""
        output = self.model(input_features=sounds, labels=labels)
        log_probabilities = self.letters(output.encoder_last_hidden_state).log_softmax(-1).transpose(0, 1)
        spelled = labels[:, 3:]  # without language, task and notimestamps
        blank = int(self.model.config.eos_token_id)
        lengths = ((spelled != _IGNORED) & (spelled != blank)).sum(1)
        times = torch.full((len(sounds),), log_probabilities.shape[0])
        ctc = F.ctc_loss(log_probabilities, spelled.clamp(min=0), times, lengths, blank=blank, zero_infinity=True)
        return (1 - _CTC_SHARE) * output.loss + _CTC_SHARE * ctc


def make_labels(tokenizer: WhisperTokenizer, texts: list[str]) -> Tensor:
    """[n, tokens] with -100 after the end-of-text token, and without the start that the model puts before labels."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return batch.input_ids.masked_fill(batch.attention_mask == 0, _IGNORED)[:, 1:]


def disturb(sounds: Tensor, rng: torch.Generator) -> Tensor:
    """Sounds that begin a little later, with a stripe of time and one of pitch taken out."""
    shifts = torch.randint(0, _MOST_SHIFT, (len(sounds),), generator=rng).tolist()
    rows = []
    for row, shift in zip(sounds, shifts, strict=True):
        silence = row.min()
        moved = F.pad(row, (shift, 0), value=float(silence))[:, : row.shape[1]]
        time_from, pitch_from = (
            int(torch.randint(0, size, (1,), generator=rng)) for size in (sounds.shape[2] - 20, sounds.shape[1] - 10)
        )
        moved[:, time_from : time_from + int(torch.randint(0, 12, (1,), generator=rng))] = 0
        moved[pitch_from : pitch_from + int(torch.randint(0, 10, (1,), generator=rng))] = 0
        rows.append(moved)
    return torch.stack(rows)


def learning_rate(progress: float, step: int) -> float:
    """Cosine over the steps after a short warm-up."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warm * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def train(work: Path, num_steps: int) -> None:
    """Train up to a step, over any number of starts."""
    data: Any = load_checkpoint(work / "training.pt")
    tokenizer = make_tokenizer()
    labels = make_labels(tokenizer, data["texts"])
    listener = Listener(tokenizer)
    optimizer = torch.optim.AdamW(listener.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    path = work / "listener.pt"
    state = load_checkpoint(path) or {"step": 0, "seconds": 0.0}
    if "model" in state:
        listener.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    listener.train()
    before, started, saved = state["seconds"], time.process_time(), time.monotonic()

    def store(step: int) -> None:
        tensors = {"model": listener.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(path, {**tensors, "step": step, "seconds": before + time.process_time() - started})

    for step in range(state["step"], num_steps):
        # One generator for each step: a restart draws what an unbroken run would have drawn.
        rng = torch.Generator().manual_seed(step)
        chosen = torch.randperm(len(labels), generator=rng)[:BATCH]
        targets = labels[chosen]
        targets = targets[:, : int((targets != _IGNORED).sum(1).max())]
        loss = listener(disturb(data["features"][chosen].float(), rng), targets)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / num_steps, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(listener.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step} cpu seconds {time.process_time() - started:.0f} loss {loss.item():.3f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            store(step + 1)
            saved = time.monotonic()
    store(num_steps)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin/whisper"))
    parser.add_argument("--steps", type=int, default=5000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.work, arguments.steps)


if __name__ == "__main__":
    main()
