"""The metric of style on planted images: what it sees, what it does not see, and where it says nothing."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.evidence import Evidence
from lora_diffusion.core.files import shipped_path
from lora_diffusion.scoring.clip import BUILTIN, Clip, early_layers, load_clip
from lora_diffusion.scoring.image_encoding import CentreCrop, Preprocessing
from lora_diffusion.scoring.metrics.match import METRIC as MATCH
from lora_diffusion.scoring.metrics.style import METRIC as STYLE
from lora_diffusion.scoring.scorers import Scorers
from lora_diffusion.scoring.style_probe import fit

BLOB = shipped_path("datasets") / "blob-style"


@pytest.fixture(scope="module")
def scorers() -> Scorers:
    return Scorers({"clip": BUILTIN})


def other_style(path: Path, folder: Path) -> Path:
    """The same subject in lines on grey, as a base might draw it."""
    image = Image.open(path).convert("RGB")
    edges = ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB")
    target = folder / f"lines-{path.name}"
    Image.blend(edges, Image.new("RGB", image.size, "grey"), 0.3).save(target)
    return target


def halfway(path: Path, other: Path, folder: Path) -> Path:
    """A subject whose style is learnt only in part."""
    target = folder / f"half-{path.name}"
    Image.blend(Image.open(path).convert("RGB"), Image.open(other).convert("RGB"), 0.12).save(target)
    return target


@pytest.fixture(scope="module")
def references() -> list[Path]:
    return sorted((BLOB / "references").glob("*.png"))


@pytest.fixture(scope="module")
def drawn(references: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What the base draws of the subjects of the references."""
    folder = tmp_path_factory.mktemp("drawn")
    return [other_style(path, folder) for path in references]


def evidence(images: list[Path], references: list[Path], drawn: list[Path], scorers: Scorers) -> Evidence:
    names = [path.stem for path in references]
    return Evidence(
        images,
        [name.replace("-", " ") for name in names][: len(images)],
        references=references,
        reference_captions=[name.replace("-", " ") for name in names],
        base_references=drawn,
        scorers=scorers,
    )


def test_new_images_are_told_by_their_look_whatever_they_show(
    references: list[Path], drawn: list[Path], scorers: Scorers, tmp_path: Path
) -> None:
    train = sorted((BLOB / "train").glob("*.png"))[:8]
    others = [other_style(path, tmp_path) for path in train]
    real = STYLE.score(evidence(train, references, drawn, scorers))
    base = STYLE.score(evidence(others, references, drawn, scorers))
    assert real.mean() > 0.9
    assert base.mean() < 0.1
    assert real.remark == base.remark
    assert "of 32 held-out images" in real.remark
    assert not real.warnings
    assert STYLE.reference_score(evidence(train, references, drawn, scorers)) > 0.9  # type: ignore[operator]


def test_wrong_subject_falls_in_match_and_wrong_style_in_style_and_both_rank_as_they_should(
    references: list[Path], drawn: list[Path], scorers: Scorers, tmp_path: Path
) -> None:
    turned, turned_drawn = references[1:] + references[:1], drawn[1:] + drawn[:1]
    learnt = [halfway(path, other, tmp_path) for path, other in zip(references, drawn, strict=True)]
    sets = {
        "base": turned_drawn,
        "style without subject": turned,
        "subject without style": drawn,
        "both": learnt,
        "real": references,
    }
    scores = {}
    for name, images in sets.items():
        made = evidence(images, references, drawn, scorers)
        scores[name] = MATCH.score(made).mean(), STYLE.score(made).mean()
    low = scores["base"][0]
    together = {name: (match - low) / (1 - low) + style for name, (match, style) in scores.items()}
    assert together["base"] < min(together["style without subject"], together["subject without style"])
    assert max(together["style without subject"], together["subject without style"]) < together["both"]
    assert together["both"] < together["real"]
    assert scores["style without subject"][0] < scores["both"][0] - 0.1
    assert scores["style without subject"][1] > 0.9
    assert scores["subject without style"][1] < 0.1


def test_says_nothing_where_it_cannot_tell_the_looks_apart(references: list[Path], scorers: Scorers) -> None:
    same = evidence(references[:4], references[:8], references[8:], scorers)
    scores = STYLE.score(same)
    assert scores.values.isnan().all()
    assert "may be chance" in scores.warnings[0]
    assert STYLE.reference_score(same) is None
    few = STYLE.score(evidence(references[:2], references[:2], references[2:4], scorers))
    assert "three references" in few.warnings[0]


def test_held_out_images_are_new_to_the_probe() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 20, 400, generator=generator)
    assert not fit(features[0], features[1]).is_sure  # type: ignore[union-attr]
    features[0, :, :40] += 1
    probe = fit(features[0], features[1])
    assert probe is not None
    assert probe.is_sure
    assert probe.held_out.shape == (20, 2)


@pytest.mark.parametrize("architecture", ["ViT-S-32-alt", "RN50"])
def test_looks_come_from_the_first_layers_of_any_encoder(architecture: str, references: list[Path]) -> None:
    config = open_clip.get_model_config(architecture)
    layers = [1, 1, 1, 1] if architecture == "RN50" else 4
    config["vision_cfg"] |= {"width": 64, "layers": layers, "image_size": 64, "head_width": 32}
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    clip = Clip(architecture, model.eval(), Preprocessing(CentreCrop(64, 64), (0.5,) * 3, (0.5,) * 3), None)
    looks = clip.encode_looks(references[:3])
    assert looks.shape == (3, 2 * (64 + 256 + 512) if architecture == "RN50" else 2 * 64)
    torch.testing.assert_close(looks[1:2], clip.encode_looks(references[1:2]), atol=1e-4, rtol=1e-4)


def test_layers_of_an_unknown_encoder_are_refused() -> None:
    clip = load_clip(BUILTIN)
    assert len(early_layers(BUILTIN, clip.model)) == 3

    class Other:
        visual = torch.nn.Identity()

    with pytest.raises(ModelError, match=r"x are not known \(Identity\)"):
        early_layers("x", Other())
