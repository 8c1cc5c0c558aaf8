"""Metrics against plain implementations: a few lines of open_clip, torchmetrics, and answers that are known."""

from __future__ import annotations

import shutil
from pathlib import Path

import jiwer
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.multimodal import clip_score

from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError, ModelError
from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.core.files import builtin_path, shipped_path
from lora_diffusion.scoring.clip import DEFAULT, load_clip
from lora_diffusion.scoring.probe import Probe, load_probe
from lora_diffusion.scoring.scorers import Scorers
from scripts.benchmarks.scoring import make_images, torchmetrics_clip

EMOJI_CLIP = f"local-dir:{builtin_path('emoji-clip')}"


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[str]]:
    """200 images of several shapes, and what each shows."""
    return make_images(tmp_path_factory.mktemp("pictures"), 200, sides=(64, 80, 40))


@pytest.fixture(scope="module")
def reference(image_files: tuple[list[Path], list[str]]) -> tuple[Tensor, Tensor]:
    """Unit vectors of images and texts, by open_clip one after another."""
    model, _, transform = open_clip.create_model_and_transforms(EMOJI_CLIP)
    tokenizer = open_clip.get_tokenizer(EMOJI_CLIP)
    model.eval()
    with torch.no_grad():
        seen = torch.cat([model.encode_image(transform(Image.open(path))[None]) for path in image_files[0]])
        read = model.encode_text(tokenizer(image_files[1]))
    return seen / seen.norm(dim=1, keepdim=True), read / read.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def scorers() -> Scorers:
    return Scorers({"clip": "builtin:emoji-clip"})


def judge(name: str, evidence: Evidence) -> Scores:
    return registry.find("metrics", name).score(evidence)  # type: ignore[no-any-return]


def test_clip_text_and_score_equal_open_clip_and_torchmetrics(
    image_files: tuple[list[Path], list[str]], reference: tuple[Tensor, Tensor], scorers: Scorers
) -> None:
    paths, texts = image_files
    evidence = Evidence(paths, texts, scorers=scorers)
    cosines = (reference[0] * reference[1]).sum(dim=1)
    own = judge("clip_text", evidence).values
    torch.testing.assert_close(own, cosines, atol=1e-4, rtol=0)
    torch.testing.assert_close(judge("clip_score", evidence).values, 2.5 * cosines.clamp(min=0), atol=1e-4, rtol=0)
    parts = torchmetrics_clip()
    tensors = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths]
    theirs = clip_score(tensors, texts, lambda: parts).item() / 100
    assert own.mean().item() == pytest.approx(theirs, abs=1e-4)
    for index in range(0, 200, 20):
        one = clip_score(tensors[index], texts[index], lambda: parts).item() / 100
        assert max(own[index].item(), 0) == pytest.approx(one, abs=1e-4)


def test_clip_image_equals_open_clip_and_torchmetrics(
    image_files: tuple[list[Path], list[str]], reference: tuple[Tensor, Tensor], scorers: Scorers
) -> None:
    evidence = Evidence(image_files[0], references=image_files[0][:5], scorers=scorers)
    cosines = reference[0] @ reference[0][:5].T
    own = judge("clip_image", evidence).values
    torch.testing.assert_close(own, cosines.mean(dim=1), atol=1e-4, rtol=0)
    torch.testing.assert_close(judge("clip_image_max", evidence).values, cosines.amax(dim=1), atol=1e-4, rtol=0)
    parts = torchmetrics_clip()
    pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in image_files[0][:6]]
    theirs = clip_score([pixels[5]] * 5, pixels[:5], lambda: parts).item() / 100
    assert max(own[5].item(), 0) == pytest.approx(theirs, abs=1e-4)


def test_shuffled_captions_score_at_chance(image_files: tuple[list[Path], list[str]], scorers: Scorers) -> None:
    paths, texts = image_files
    metric = registry.find("metrics", "clip_text")
    evidence = Evidence(paths, texts, scorers=scorers)
    right, chance = metric.score(evidence).values, metric.random_baseline(evidence)
    shift = next(n for n in range(50, 200) if all(a != b for a, b in zip(texts, texts[n:] + texts[:n], strict=True)))
    shuffled = metric.score(Evidence(paths, texts[shift:] + texts[:shift], scorers=scorers)).values
    error = shuffled.std().item() / len(shuffled) ** 0.5
    assert shuffled.mean().item() == pytest.approx(chance, abs=3 * error)
    assert right.mean().item() > chance + 10 * error
    assert metric.random_baseline(Evidence(paths[:2], texts[:1] * 2, scorers=scorers)) is None


def test_a_training_image_among_the_samples_is_found(
    image_files: tuple[list[Path], list[str]], scorers: Scorers, tmp_path: Path
) -> None:
    training = sorted((shipped_path("datasets") / "blob-style" / "train").glob("*.png"))
    planted = Path(shutil.copy(training[7], tmp_path / "sample.png"))
    samples = [*sorted((shipped_path("datasets") / "blob-style" / "references").glob("*.png")), planted]
    metric = registry.find("metrics", "copying")
    evidence = Evidence(samples, references=samples[:-1], training_images=training, scorers=scorers)
    scores = metric.score(evidence)
    assert scores.values.argmax().item() == len(samples) - 1
    assert scores.values[-1].item() == pytest.approx(1, abs=1e-4)
    assert scores.details[-1] == str(training[7])
    assert metric.reference_score(evidence) < 0.97
    assert not metric.higher_is_better


def test_drift_and_leak_compare_with_the_base(image_files: tuple[list[Path], list[str]], scorers: Scorers) -> None:
    paths = image_files[0][:6]
    cases = [0, 0, 0, 1, 1, 1]
    still = Evidence(paths, cases=cases, base_images=paths, references=paths[:2], scorers=scorers)
    moved = Evidence(paths, cases=cases, base_images=[*paths[1:], paths[0]], references=paths[:2], scorers=scorers)
    for name in ("prior_drift", "prompt_leak"):
        assert judge(name, still).values.abs().max() < 1e-5
        assert judge(name, moved).values.abs().max() > 0.1
    vectors = scorers.see("clip", paths)
    pairs = [1 - vectors[a] @ vectors[b] for a, b in ((0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5))]
    metric = registry.find("metrics", "prior_drift")
    assert metric.random_baseline(still) == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
    assert metric.random_baseline(Evidence(paths[:1], cases=[0], scorers=scorers)) is None


def test_diversity_counts_different_images(image_files: tuple[list[Path], list[str]], scorers: Scorers) -> None:
    one, other = image_files[0][0], image_files[0][30]
    evidence = Evidence([one, one, one, other], cases=[5, 5, 2, 2], scorers=scorers)
    cosine = float(scorers.see("clip", [one])[0] @ scorers.see("clip", [other])[0])
    torch.testing.assert_close(judge("diversity", evidence).values, torch.tensor([0, 1 - cosine]), atol=1e-5, rtol=0)
    # Eigenvalues of [[1, c], [c, 1]] / 2.
    shares = np.array([(1 + cosine) / 2, (1 - cosine) / 2])
    expected = torch.tensor([1, np.exp(-(shares * np.log(shares)).sum())]).float()
    torch.testing.assert_close(judge("vendi", evidence).values, expected, atol=1e-4, rtol=0)


def test_vendi_of_unrelated_images_is_their_number() -> None:
    class Orthogonal:
        def encode_images(self, images: list[Path]) -> Tensor:
            return torch.eye(len(images))

    files = [Path(str(number)) for number in range(4)]
    evidence = Evidence(files, cases=[0] * 4, scorers=Scorers({}, models={"clip": Orthogonal()}))
    assert judge("vendi", evidence).values.tolist() == pytest.approx([4])
    assert judge("diversity", evidence).values.tolist() == [1]


def test_likeness_of_real_images_leaves_themselves_out(
    image_files: tuple[list[Path], list[str]], scorers: Scorers
) -> None:
    references = image_files[0][:3]
    evidence = Evidence(references=references, scorers=scorers)
    vectors = scorers.see("clip", references)
    others = [float(vectors[a] @ vectors[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert registry.find("metrics", "clip_image").reference_score(evidence) == pytest.approx(np.mean(others), abs=1e-5)
    nearest = [max(others[0], others[1]), max(others[0], others[2]), max(others[1], others[2])]
    assert registry.find("metrics", "clip_image_max").reference_score(evidence) == pytest.approx(
        np.mean(nearest), abs=1e-5
    )
    alone = Evidence(references=references[:1], scorers=scorers)
    assert registry.find("metrics", "clip_image").reference_score(alone) is None


def test_dino_from_a_folder(image_files: tuple[list[Path], list[str]], tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
        model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    scorers = Scorers({"dino": str(tmp_path / "dino")})
    square = [path for path in image_files[0] if len(set(Image.open(path).size)) == 1][:3]
    own = judge("dino_image", Evidence(square, references=square[:2], scorers=scorers)).values

    def pixels(path: Path) -> Tensor:
        """As BitImageProcessor does it: the shorter side to 32, the centre of 28, ImageNet's mean and deviation."""
        image = Image.open(path).resize((32, 32), Image.Resampling.BICUBIC).crop((2, 2, 30, 30))
        values = np.asarray(image, dtype=np.float32) / 255
        values = (values - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        return torch.from_numpy(values).permute(2, 0, 1).float()

    with torch.no_grad():
        tokens = model(torch.stack([pixels(path) for path in square])).last_hidden_state[:, 0]
    vectors = torch.nn.functional.normalize(tokens, dim=1)
    torch.testing.assert_close(own, (vectors @ vectors[:2].T).mean(dim=1), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def clip_of_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIPModel of random weights that takes images of 24x24 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(builtin_path("emoji-sd") / "tokenizer")
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config={**layers, **text},
                vision_config={**layers, "image_size": 24, "patch_size": 8},
                projection_dim=16,
            )
        )
    folder = tmp_path_factory.mktemp("transformers") / "clip"
    for piece in (model, tokenizer, CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24)):
        piece.save_pretrained(folder)
    return folder


def test_clip_in_the_format_of_transformers(
    image_files: tuple[list[Path], list[str]], clip_of_transformers: Path
) -> None:
    from transformers import AutoProcessor, CLIPModel

    model, processor = (kind.from_pretrained(clip_of_transformers) for kind in (CLIPModel, AutoProcessor))
    paths, texts = image_files[0][:6], ["a cat", "an emoji of a red apple, noto style"]
    images = [Image.open(path).convert("RGB").resize((24, 40)) for path in paths]
    with torch.no_grad():
        inputs = processor(text=texts, images=images, padding="max_length", max_length=24, return_tensors="pt")
        expected = model(**inputs)
    clip = load_clip(str(clip_of_transformers))
    # The processor of transformers scales in another library, which rounds otherwise.
    torch.testing.assert_close(clip.encode_images(images), expected.image_embeds, atol=5e-3, rtol=0)
    torch.testing.assert_close(clip.encode_texts(texts), expected.text_embeds, atol=1e-5, rtol=0)


def test_preference_is_scored_by_its_own_model(
    image_files: tuple[list[Path], list[str]], scorers: Scorers, clip_of_transformers: Path
) -> None:
    paths, texts = image_files[0][:4], image_files[1][:4]
    own = Scorers({"clip": "builtin:emoji-clip", "preference": str(clip_of_transformers)})
    clip = load_clip(str(clip_of_transformers))
    expected = 100 * (clip.encode_images(paths) * clip.encode_texts(texts)).sum(dim=1)
    values = judge("preference", Evidence(paths, scoring_captions=texts, scorers=own)).values
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="give --scorer preference=NAME"):
        judge("preference", Evidence(paths, scoring_captions=texts, scorers=scorers))


def test_other_models_are_no_clip(tmp_path: Path) -> None:
    from transformers import Dinov2Config

    Dinov2Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="of type dinov2, not clip"):
        load_clip(str(tmp_path))


class TestProbe:
    def test_chain_of_layers_is_one_layer(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        layers = [torch.nn.Linear(160, 8), torch.nn.Linear(8, 1)]
        tensors = {}
        for number, layer in zip((0, 10), layers, strict=True):
            layer.weight.data.normal_(generator=generator)
            layer.bias.data.normal_(generator=generator)
            tensors |= {f"layers.{number}.weight": layer.weight.data, f"layers.{number}.bias": layer.bias.data}
        save_file(tensors, tmp_path / "probe.safetensors")
        vectors = torch.randn(5, 160, generator=generator)
        expected = layers[1](layers[0](vectors))[:, 0].detach()
        found = load_probe(str(tmp_path / "probe.safetensors")).apply(vectors)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    def test_aesthetic_asks_clip_and_probe(
        self, image_files: tuple[list[Path], list[str]], scorers: Scorers, tmp_path: Path
    ) -> None:
        weight = torch.zeros(1, 160)
        weight[0, 3] = 2
        save_file({"weight": weight, "bias": torch.tensor([0.5])}, tmp_path / "probe.safetensors")
        both = Scorers({"clip": "builtin:emoji-clip", "probe": str(tmp_path / "probe.safetensors")})
        own = judge("aesthetic", Evidence(image_files[0][:3], scorers=both)).values
        torch.testing.assert_close(own, 2 * scorers.see("clip", image_files[0][:3])[:, 3] + 0.5)

    @pytest.mark.parametrize(
        ("tensors", "reason"),
        [
            ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, "gives 2 numbers"),
            ({"weight": torch.ones(1, 4)}, "do not fit together"),
            ({"conv.kernel": torch.ones(1)}, "neither a weight nor a bias"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path: Path, tensors: dict[str, Tensor], reason: str) -> None:
        save_file(tensors, tmp_path / "probe.safetensors")
        with pytest.raises(ModelError, match=reason):
            load_probe(str(tmp_path / "probe.safetensors"))

    def test_of_another_clip(self) -> None:
        with pytest.raises(ModelError, match="length 4, and --clip gives 5"):
            Probe("p", torch.ones(4), 0.0).apply(torch.ones(2, 5))


class TestAnswers:
    targets = ("the cat sat", "a", "", "Dog")
    answers = ("the bat sat down", "a", "noise", "dog")

    @pytest.mark.parametrize(("name", "function"), [("wer", jiwer.wer), ("cer", jiwer.cer)])
    def test_error_rates(self, name: str, function) -> None:  # type: ignore[no-untyped-def]
        scores = judge(name, Evidence(answers=self.answers[:2], targets=self.targets[:2]))
        for value, target, answer in zip(scores.values.tolist(), self.targets, self.answers, strict=False):
            assert value == pytest.approx(function(target, answer))
        assert scores.mean() == pytest.approx(function(list(self.targets[:2]), list(self.answers[:2])))

    def test_words_heard_in_silence_are_errors(self) -> None:
        assert judge("wer", Evidence(answers=["", "a b"], targets=["", ""])).values.tolist() == [0, 2]

    def test_exact_match(self) -> None:
        scores = judge("exact_match", Evidence(answers=(*self.answers, " a "), targets=(*self.targets, "a")))
        assert scores.values.tolist() == [0, 1, 0, 0, 1]
        assert scores.mean() == pytest.approx(0.4)


@pytest.mark.parametrize("name", registry.available("metrics"))
def test_every_metric_says_what_it_is(name: str) -> None:
    metric = registry.find("metrics", name)
    assert metric.name == name
    assert len(metric.meaning) > 10
    assert metric.outputs in ("concept", "control", "texts")
    assert isinstance(metric.higher_is_better, bool)
    assert metric.needs <= set(Evidence.__dataclass_fields__)


class TestScorers:
    def test_each_image_and_text_is_encoded_once(self) -> None:
        asked: list[object] = []

        class Counting:
            def encode_images(self, images: list[Path]) -> Tensor:
                asked.extend(images)
                return torch.ones(len(images), 2)

            encode_texts = encode_images

        scorers = Scorers({}, models={"clip": Counting()})
        assert scorers.see("clip", [Path("a"), Path("b"), Path("a")]).shape == (3, 2)
        scorers.see("clip", [Path("b"), Path("c")])
        scorers.read("clip", ["b", "b"])
        assert asked == [Path("a"), Path("b"), Path("c"), "b"]

    def test_images_in_memory_are_not_confused(self) -> None:
        """The id of an image that is gone may be given to the next one."""
        scorers = Scorers({"clip": "builtin:emoji-clip"})
        found = [scorers.see("clip", [Image.new("RGB", (64, 64), colour)]) for colour in ("red", "blue", "green")]
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[1], found[2])

    def test_unnamed_scorer(self) -> None:
        with pytest.raises(ConfigError, match="give --scorer dino=NAME"):
            Scorers({}).find("dino")

    @pytest.mark.parametrize("name", [DEFAULT, "no/such-model", "/no/such/folder"])
    def test_missing_clip_is_refused_offline(self, name: str) -> None:
        with pytest.raises(ModelError, match="Give --clip a folder"):
            load_clip(name)

    def test_missing_dino_is_refused_offline(self) -> None:
        with pytest.raises(ModelError, match="hub id such as facebook/dinov2-base"):
            Scorers({"dino": "facebook/dinov2-base"}).find("dino")
