"""Stage 1: the image tower, which learns what the image tower of emoji-clip sees, and to tell names and styles."""

import argparse
import math
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from scripts.build_builtin.llava.network import PIXELS, vision_config
from scripts.build_builtin.pictures import (
    Affine,
    Pictures,
    cut_out,
    disturb_colours,
    read_pictures,
    to_unit,
    training_pictures,
)
from scripts.build_builtin.publish import DEFAULT_OUTPUT
from scripts.build_builtin.storage import load_checkpoint, save_checkpoint
from scripts.build_builtin.subjects import SCORER

BATCH = 96
PEAK_LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100
CHECKPOINT_SECONDS = 60
MOVES = Affine(degrees=12, scale=(0.8, 1.1), shift=0.06, mirror=0.3)
_CLIP_WIDTH = 160


class Tower(nn.Module):
    """The image tower with heads for what it is taught."""

    def __init__(self, num_names: int, num_styles: int) -> None:
        super().__init__()
        config = vision_config()
        self.vision = CLIPVisionModel(config)
        self.clip = nn.Linear(config.hidden_size, _CLIP_WIDTH)
        self.name = nn.Linear(config.hidden_size, num_names)
        self.style = nn.Linear(config.hidden_size, num_styles)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The CLIP embedding, and scores of names and styles."""
        pooled = features(self.vision, pixels).mean(dim=1)
        return F.normalize(self.clip(pooled), dim=-1), self.name(pooled), self.style(pooled)


def features(vision: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """What the projector reads, [n, patches, width]; pixels are those of 64x64 pictures in -1..1."""
    small = F.interpolate(pixels, (PIXELS, PIXELS), mode="bilinear", antialias=True, align_corners=False)
    patches: Tensor = vision(small, output_hidden_states=True).hidden_states[-1][:, 1:]
    return patches


def augmented(pictures: Pictures, chosen: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures in -1..1, moved, and some with a rectangle cut out; colours change little, as they are asked for."""
    moved = MOVES.apply(to_unit(pictures.pixels[chosen]), rng)
    return cut_out(disturb_colours(moved, 0.06, rng), 0.15, rng)


def learning_rate(progress: float, step: int) -> float:
    """Cosine over the steps after a short warm-up."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warm * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def numbered(words: list[str]) -> Tensor:
    """The place of each word among the different ones."""
    places = {word: index for index, word in enumerate(sorted(set(words)))}
    return torch.tensor([places[word] for word in words])


def train(work: Path, num_steps: int) -> None:
    """Train up to a step, over any number of starts."""
    pictures = training_pictures(read_pictures(work.parent), SCORER)
    names, styles = numbered([subject.name for subject in pictures.subjects]), numbered(list(pictures.styles))
    teacher, _, _ = open_clip.create_model_and_transforms(f"local-dir:{DEFAULT_OUTPUT / 'emoji-clip'}")
    teacher.eval()
    torch.manual_seed(0)
    tower = Tower(int(names.max()) + 1, int(styles.max()) + 1)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    path = work / "tower.pt"
    state = load_checkpoint(path) or {"step": 0}
    if "model" in state:
        tower.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    tower.train()
    saved = time.monotonic()
    for step in range(state["step"], num_steps):
        rng = torch.Generator().manual_seed(7_000_003 + step)
        chosen = torch.randint(0, len(pictures), (BATCH,), generator=rng)
        pixels = augmented(pictures, chosen, rng)
        with torch.no_grad():
            wanted = F.normalize(teacher.encode_image(pixels), dim=-1)
        seen, name, style = tower(pixels)
        alike = (seen * wanted).sum(dim=1).mean()
        name_loss = F.cross_entropy(name, names[chosen], label_smoothing=0.05)
        loss = 4 * (1 - alike) + name_loss + 0.5 * F.cross_entropy(style, styles[chosen])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / num_steps, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        is_last = step + 1 == num_steps
        if (step + 1) % 20 == 0 or is_last:
            right = (name.argmax(1) == names[chosen]).float().mean()
            right_style = (style.argmax(1) == styles[chosen]).float().mean()
            print(
                f"tower step {step + 1} cpu {time.process_time():.0f} loss {loss.item():.3f} alike {alike.item():.3f} "
                f"name {right.item():.2f} style {right_style.item():.2f}",
                flush=True,
            )
        if time.monotonic() - saved > CHECKPOINT_SECONDS or is_last:
            save_checkpoint(path, {"model": tower.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
            saved = time.monotonic()


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin/llava"))
    parser.add_argument("--steps", type=int, default=360)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.work, arguments.steps)


if __name__ == "__main__":
    main()
