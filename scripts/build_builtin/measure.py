"""Numbers of the model cards, from the published folders."""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from scripts.build_builtin.captions import render
from scripts.build_builtin.latents import trained_vae
from scripts.build_builtin.pictures import Pictures, read_pictures, to_unit, training_pictures, unseen_style_pictures
from scripts.build_builtin.publish import DEFAULT_OUTPUT, read_measures
from scripts.build_builtin.sources import TRAINING_STYLES, UNSEEN_STYLE
from scripts.build_builtin.storage import load_checkpoint, write_atomic, write_json
from scripts.build_builtin.subjects import SCORER, Subject, read_subjects, visible
from scripts.build_builtin.train_vae import measure as measure_vae
from scripts.build_builtin.unknown_words import CHECKPOINT as UNKNOWN_WORDS
from scripts.build_builtin.unknown_words import known_words, make_word

PLAIN_PROMPT = "an emoji of {a} {name}"
STYLED_PROMPT = "an emoji of {a} {name}, {style} style"
_GRID_NAMES = """
grinning-face smiling-face-with-sunglasses crying-face angry-face skull ghost cat-face dog-face fox
panda penguin lion elephant honeybee red-apple strawberry banana pizza hamburger birthday-cake rose
cactus christmas-tree red-heart blue-heart broken-heart star crescent-moon fire rainbow soccer-ball
balloon crown gem-stone umbrella rocket
"""


class Scorer:
    """The published emoji-clip."""

    def __init__(self, folder: Path) -> None:
        name = f"local-dir:{folder}"
        self.model = open_clip.create_model(name).eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Unit features [n, dim] of uint8 pictures."""
        return torch.cat([F.normalize(self.model.encode_image(to_unit(part)), dim=-1) for part in pixels.split(128)])

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Unit features [n, dim]."""
        return torch.cat(
            [F.normalize(self.model.encode_text(part), dim=-1) for part in self.tokenizer(texts).split(128)]
        )


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Chance that a positive scores above a negative (Mann-Whitney)."""
    ranks = torch.cat([positive, negative]).argsort().argsort().double() + 1
    wins = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return (wins / (len(positive) * len(negative))).item()


def retrieval(scorer: Scorer, pictures: Pictures) -> dict[str, float]:
    """How well the scorer names pictures among all names that occur."""
    subjects = {subject.name: subject for subject in pictures.subjects}
    names = sorted(subjects)
    texts = scorer.texts([render(PLAIN_PROMPT, subjects[name], "") for name in names])
    scores = scorer.images(pictures.pixels) @ texts.T
    right = torch.tensor([names.index(subject.name) for subject in pictures.subjects])
    matching = F.one_hot(right, len(names)).bool()
    rank = (scores > scores[matching][:, None]).sum(1)
    return {
        "names": len(names),
        "top1": (rank == 0).float().mean().item(),
        "top5": (rank < 5).float().mean().item(),
        "matched": scores[matching].mean().item(),
        "mismatched": scores[~matching].mean().item(),
        "auc": area_under_curve(scores[matching], scores[~matching]),
    }


def style_by_text(scorer: Scorer, pictures: Pictures) -> float:
    """Share of pictures whose caption with the right style word beats the five others."""
    features, right = scorer.images(pictures.pixels), []
    scores = []
    for style in TRAINING_STYLES:
        texts = scorer.texts([render(STYLED_PROMPT, subject, style) for subject in pictures.subjects])
        scores.append((features * texts).sum(1))
        right.append(torch.tensor([name == style for name in pictures.styles]))
    best = torch.stack(scores).argmax(0)
    return torch.stack(right).gather(0, best[None]).float().mean().item()


def unseen_subjects(scorer: Scorer, pictures: Pictures) -> dict[str, float]:
    """Nearest picture of another style: is it the same subject, for subjects that no model saw?"""
    features = scorer.images(pictures.pixels)
    hits, chances = [], []
    for index, subject in enumerate(pictures.subjects):
        if subject.split != "unseen" or pictures.styles[index] == UNSEEN_STYLE:
            continue
        others = [k for k in range(len(pictures)) if pictures.styles[k] not in (pictures.styles[index], UNSEEN_STYLE)]
        nearest = others[int((features[others] @ features[index]).argmax())]
        hits.append(pictures.subjects[nearest].name == subject.name)
        chances.append(sum(pictures.subjects[k].name == subject.name for k in others) / len(others))
    return {"pictures": len(hits), "top1": float(np.mean(hits)), "chance": float(np.mean(chances))}


def generate(pipeline: StableDiffusionPipeline, captions: list[str], seed: int) -> Tensor:
    """uint8 pictures [n, 3, 64, 64], 25 DDIM steps, guidance 3, one seed per caption."""
    parts = []
    for start in range(0, len(captions), 20):
        part = captions[start : start + 20]
        rngs = [torch.Generator().manual_seed(seed + start + k) for k in range(len(part))]
        images = pipeline(
            part, width=64, height=64, num_inference_steps=25, guidance_scale=3.0, generator=rngs, output_type="np"
        ).images
        parts.append(torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2))
    return torch.cat(parts)


def score_captions(scorer: Scorer, pixels: Tensor, captions: list[str], subjects: list[Subject]) -> dict[str, Any]:
    """Own caption against shuffled captions, with a bootstrap interval of the mean difference."""
    images, texts = scorer.images(pixels), scorer.texts(captions)
    scores = images @ texts.T
    same = torch.tensor([[a.name == b.name for b in subjects] for a in subjects])
    others = scores.masked_fill(same, 0).sum(1) / (~same).sum(1)
    differences = (scores.diagonal() - others).numpy()
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (2000, len(differences))).mean(1)
    known = sorted({subject.name: subject for subject in visible(read_subjects(), SCORER)}.items())
    names = [name for name, _ in known]
    best = (images @ scorer.texts([render(PLAIN_PROMPT, subject, "") for _, subject in known]).T).argmax(1)
    return {
        "pictures": len(captions),
        "matched": scores.diagonal().mean().item(),
        "shuffled": others.mean().item(),
        "difference": float(differences.mean()),
        "difference_interval": [float(value) for value in np.quantile(means, [0.025, 0.975])],
        "top1": float(np.mean([names[b] == subject.name for b, subject in zip(best.tolist(), subjects, strict=True)])),
    }


def score_unknown_words(pipeline: StableDiffusionPipeline, scorer: Scorer, count: int) -> dict[str, Any]:
    """How well pictures show their plain caption when the prompt also holds none, one or two made-up words.

    Same seeds and subjects for each; `blob` is a token that no part was trained with.
    """
    subjects = visible(read_subjects(), "generator")
    subjects = random.Random(5).sample(subjects, min(count, len(subjects)))
    plain = [render(PLAIN_PROMPT, subject, "") for subject in subjects]
    rng, known = random.Random(6), known_words()
    words = [[make_word(known, rng) for _ in range(2)] for _ in plain]
    prompts = {
        "plain": plain,
        "one": [f"{caption}, {a} style" for caption, (a, _) in zip(plain, words, strict=True)],
        "two": [f"{a} {b} style {caption.removeprefix('an ')}" for caption, (a, b) in zip(plain, words, strict=True)],
        "two_alone": [f"{a} {b} {subject.words}" for subject, (a, b) in zip(subjects, words, strict=True)],
        "blob": [f"blob style {subject.words}" for subject in subjects],
    }
    texts = scorer.texts(plain)
    scores = {
        name: (scorer.images(generate(pipeline, texts_of, 500)) * texts).sum(1).mean().item()
        for name, texts_of in prompts.items()
    }
    return {**scores, "pictures": len(subjects)}


def write_grid(path: Path, pixels: Tensor, columns: int) -> None:
    """Tile uint8 pictures into one PNG."""
    rows = math.ceil(len(pixels) / columns)
    sheet = Image.new("RGB", (columns * 64, rows * 64), "white")
    for index, picture in enumerate(pixels):
        sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (index % columns * 64, index // columns * 64))
    write_atomic(path, lambda target: sheet.save(target, format="PNG", optimize=True))


def measure_scorer(work: Path, scorer: Scorer) -> dict[str, Any]:
    """All numbers of emoji-clip's card."""
    pictures = read_pictures(work)
    unseen, seen = unseen_style_pictures(pictures), training_pictures(pictures, SCORER)
    known = {subject.name for subject in seen.subjects}
    unseen = unseen.select([i for i in range(len(unseen)) if unseen.subjects[i].name in known])
    state = load_checkpoint(work / f"clip-{SCORER}.pt") or {"seconds": 0}
    return {
        "unseen_style": retrieval(scorer, unseen),
        "training_styles": retrieval(scorer, seen),
        "style_by_text": style_by_text(scorer, seen),
        "unseen_subjects": unseen_subjects(scorer, pictures),
        "scorer_minutes": state["seconds"] / 60,
    }


def measure_pipeline(work: Path, output: Path, scorer: Scorer, count: int, checkpoint: str) -> dict[str, Any]:
    """All numbers of emoji-sd's card, and work/grid.png."""
    pipeline = StableDiffusionPipeline.from_pretrained(output / "emoji-sd", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures = training_pictures(read_pictures(work), "generator")
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:count].tolist()
    real = pictures.select(chosen)
    captions = [render(STYLED_PROMPT, s, style) for s, style in zip(real.subjects, real.styles, strict=True)]
    images = generate(pipeline, captions, 1000)
    write_grid(work / "random.png", torch.stack([real.pixels, images], 1).flatten(0, 1), 20)
    by_name = {subject.name: subject for subject in read_subjects()}
    grid = [
        render(STYLED_PROMPT, by_name[name], TRAINING_STYLES[(index + index // 12) % len(TRAINING_STYLES)])
        for index, name in enumerate(_GRID_NAMES.split())
    ]
    write_grid(work / "grid.png", generate(pipeline, grid, 7), 12)
    state, words = (
        load_checkpoint(work / name) or {"seconds": 0, "samples": 0} for name in (checkpoint, UNKNOWN_WORDS)
    )
    return {
        "vae": measure_vae(trained_vae(work), unseen_style_pictures(read_pictures(work)).pixels),
        "generated": {**score_captions(scorer, images, captions, list(real.subjects)), "samples": state["samples"]},
        "unknown_words": score_unknown_words(pipeline, scorer, count),
        "real": score_captions(scorer, real.pixels, captions, list(real.subjects)),
        "unet": {"hours": state["seconds"] / 3600},
        "words": {"samples": words["samples"], "minutes": words["seconds"] / 60},
    }


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("pipeline", "clip"))
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--count", type=int, default=200, help="generated pictures")
    parser.add_argument("--checkpoint", default="unet.pt", help="what was published, for its samples and hours")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scorer = Scorer(arguments.output / "emoji-clip")
    if arguments.what == "clip":
        fresh = measure_scorer(arguments.work, scorer)
    else:
        fresh = measure_pipeline(arguments.work, arguments.output, scorer, arguments.count, arguments.checkpoint)
    write_json(arguments.work / "measures.json", {**read_measures(arguments.work), **fresh})
    print(json.dumps(fresh, indent=1))


if __name__ == "__main__":
    main()
