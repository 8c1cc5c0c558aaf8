# ruff: noqa: E501  (prose of the cards)
"""Model cards of the two published folders."""

from typing import Any

from scripts.build_builtin.sources import PACKAGES, UNSEEN_STYLE
from scripts.build_builtin.subjects import read_subjects

_MISSING = "not measured yet"


def _number(measures: dict[str, Any], *keys: str, digits: int = 3) -> str:
    value: Any = measures
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return f"{value:.{digits}f}" if isinstance(value, int | float) else _MISSING


def sources_table() -> str:
    """The packages that all models but the held-out style come from, as a Markdown table."""
    rows = ["| style | pictures from | licence |", "|---|---|---|"]
    rows += [
        f"| {p.style} | {p.author} ({p.name} {p.version}) | {p.licence} |" for p in PACKAGES if p.style != UNSEEN_STYLE
    ]
    return "\n".join(rows)


def _names(split: str) -> str:
    return ", ".join(subject.words for subject in read_subjects() if subject.split == split)


def _header(licence_note: str) -> str:
    return f"---\nlicense: apache-2.0\nlibrary_name: {licence_note}\n---\n"


def _retrieval(measures: dict[str, Any], key: str) -> str:
    part = (key,)
    return (
        f"top-1 {_number(measures, *part, 'top1')}, top-5 {_number(measures, *part, 'top5')}, "
        f"matched {_number(measures, *part, 'matched')} against mismatched {_number(measures, *part, 'mismatched')}, "
        f"AUC {_number(measures, *part, 'auc')}, {_number(measures, *part, 'names', digits=0)} names"
    )


def pipeline_card(measures: dict[str, Any], samples: int) -> str:
    """README.md of emoji-sd."""
    generated = measures.get("generated", {})
    interval = generated.get("difference_interval")
    span = f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else _MISSING
    return (
        _header("diffusers")
        + f"""# emoji-sd

A small but complete Stable Diffusion (CLIP text encoder, autoencoder, denoiser, tokenizer, scheduler; 64x64 pixels, half precision) that draws
emoji. It exists so that training, composing, scoring and exporting of adapters can be tried, taught and tested without downloading anything.
It is no use as a picture generator beyond that: it knows {len([s for s in read_subjects() if s.split == "train"])} subjects in six styles.

```python
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("lora_diffusion/builtin/emoji-sd")
pipeline("an emoji of a fox, noto style", width=64, height=64, num_inference_steps=25, guidance_scale=3.0).images[0]
```

Captions it was trained with: `an emoji of a fox, noto style`, `twemoji style fox`, `a picture of a fox`, `an emoji of an animal, flat style`, ...
Styles: noto, twemoji, fluent, flat, fxemoji, emojione. The words `sks`, `ohwx`, `zwx` and `blob` are one token each and mean nothing;
`blob` was never trained.

![samples](grid.png)

## Data

{sources_table()}

Never seen by any part: the style of Noto Emoji before 2017 (`blob`), and the subjects {_names("concept")}, {_names("unseen")}.
Fully listed in `scripts/build_builtin/subjects.tsv`; NOTICE holds the attributions. The weights are published under Apache-2.0.

## Recipe

`scripts/build_builtin/` rebuilds it on a processor with two cores. Autoencoder (32, 64, 96), four latents at 16x16, latents folded to mean 0 and
deviation 1 (scaling factor 1). Text encoder: 4 layers, 160 wide, out of a CLIP whose image tower was thrown away. Denoiser (48, 96, 160), one layer
per block, cross attention at the two lower levels. Training: v-prediction, scaled_linear 0.00085 to 0.012, min-SNR 5, AdamW 1e-3, averaged weights (0.998), 10 % of
captions dropped. This file: {samples:,} samples; denoiser training took {_number(measures, "unet", "hours", digits=1)} h. Then {_number(measures, "words", "samples", digits=0)} samples ({_number(measures, "words", "minutes", digits=0)} min) in which
text encoder and denoiser learnt to predict for captions with made-up words what they predict for the plain ones.

## Measured

- Autoencoder on the style it never saw: PSNR {_number(measures, "vae", "psnr", digits=1)} dB, L1 {_number(measures, "vae", "l1")}.
- Generated pictures, {_number(measures, "generated", "pictures", digits=0)} seen captions (25 DDIM steps, guidance 3), scored by the independent `emoji-clip`: own caption {_number(measures, "generated", "matched")},
  shuffled captions {_number(measures, "generated", "shuffled")}; mean difference {_number(measures, "generated", "difference")} ({span}, bootstrap over pictures); top-1 among
  all names {_number(measures, "generated", "top1")}. Real training pictures with the same captions: {_number(measures, "real", "matched")}, top-1 {_number(measures, "real", "top1")}.
  These numbers belong to {_number(measures, "generated", "samples", digits=0)} samples.
- Made-up words, {_number(measures, "unknown_words", "pictures", digits=0)} subjects, the cosine of `emoji-clip` with the plain caption: plain prompt {_number(measures, "unknown_words", "plain")},
  one made-up word {_number(measures, "unknown_words", "one")}, two {_number(measures, "unknown_words", "two")}, two with the bare subject {_number(measures, "unknown_words", "two_alone")}, `blob style` {_number(measures, "unknown_words", "blob")}.

One run, one seed.
"""
    )


def clip_card(measures: dict[str, Any]) -> str:
    """README.md of emoji-clip."""
    return (
        _header("open_clip")
        + f"""# emoji-clip

A small CLIP (open_clip format, 64x64 pixels) that scores pictures of `emoji-sd` and its adapters. It shares no weights with the text encoder of
`emoji-sd`: own seed, own text tower, own augmentation, so that the generator is not judged by itself.

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:lora_diffusion/builtin/emoji-clip")
tokenizer = open_clip.get_tokenizer("local-dir:lora_diffusion/builtin/emoji-clip")
```

Image tower: ModifiedResNet [1, 1, 1, 1], width 24; text tower: 3 layers, 160 wide; dimension 160. Prompt it with `an emoji of a fox` or
`an emoji of a fox, noto style`.

## Data

{sources_table()}

Never seen: the style of Noto Emoji before 2017 (`blob`) and the subjects {_names("unseen")}. It does know {_names("concept")}, which `emoji-sd`
does not: an adapter that teaches one of them can therefore be scored. The weights are published under Apache-2.0; NOTICE holds the attributions.

## Measured

- Style never seen, one picture per known name, prompt `an emoji of a NAME`: {_retrieval(measures, "unseen_style")}.
- Training pictures (undisturbed): {_retrieval(measures, "training_styles")}.
- Style by text (`NAME, STYLE style`), six styles, training pictures: {_number(measures, "style_by_text")} right, chance 0.17.
- Subjects never seen, picture to picture: the nearest picture of another style is of the same subject for {_number(measures, "unseen_subjects", "top1")} of the pictures
  (chance {_number(measures, "unseen_subjects", "chance")}).

One run, one seed; trained for {_number(measures, "scorer_minutes", digits=0)} minutes on one core.
"""
    )
