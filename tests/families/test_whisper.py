"""What is particular to Whisper: features, labels, loss, masks, files, and bases that cannot be used."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSpeechSeq2Seq,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from lora_diffusion.adapters import variants
from lora_diffusion.adapters.inject import inject
from lora_diffusion.adapters.plan import plan
from lora_diffusion.adapters.state import read_state
from lora_diffusion.config.schema import AdapterConfig, RecordingDataConfig
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.files import public_base
from lora_diffusion.core.protocols.family import step_loss
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import AudioText, Batch, Request
from lora_diffusion.data.sample_types import RECORDINGS
from lora_diffusion.families.language import speech
from lora_diffusion.families.whisper import FAMILY, WhisperOptions
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.tensorfile.arrays import in_float32
from tests.tiny_whisper import RATE, chirp, save_tiny_whisper, write_recording

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_whisper(tmp_path_factory.mktemp("whisper") / "base")


def load(base: Path, **options: Any) -> Loaded:
    return FAMILY.load(WhisperOptions(path=str(base), **options), CPU)


def samples(*texts: str) -> list[AudioText]:
    return [
        AudioText(str(index), Path(), transcript=text, waveforms=(torch.from_numpy(chirp(0.3 + 0.1 * index)),))
        for index, text in enumerate(texts)
    ]


def batch(loaded: Loaded, *texts: str) -> Batch:
    return FAMILY.collate(FAMILY.prepare(loaded, samples(*texts), frozenset()))


class TestPreparing:
    def test_features_are_those_of_transformers(self, base: Path, tmp_path: Path) -> None:
        write_recording(tmp_path / "a.wav", "one")
        config = RecordingDataConfig(path=str(tmp_path))
        loaded = load(base)
        opened = [RECORDINGS.open(sample, config) for sample in RECORDINGS.read(config, loaded.info)]  # type: ignore[arg-type]
        (item,) = FAMILY.prepare(loaded, opened, frozenset())
        extractor = WhisperFeatureExtractor.from_pretrained(base)
        sound = opened[0].waveforms[0].numpy()
        assert np.abs(sound - chirp()).max() < 1e-4
        expected = extractor([sound], sampling_rate=RATE, return_tensors="pt").input_features
        assert torch.equal(item.tensors["features"], expected)
        assert item.tensors["num_frames"].tolist() == [50]

    @pytest.mark.parametrize(
        ("sample", "options", "expected"),
        [
            ({}, {}, "<|en|><|transcribe|><|notimestamps|>one two<|endoftext|>"),
            ({"language": "de", "task": "translate"}, {}, "<|de|><|translate|><|notimestamps|>one two<|endoftext|>"),
            ({}, {"timestamps": True}, "<|en|><|transcribe|><|0.00|>one<|0.20|> two<|0.40|><|endoftext|>"),
        ],
    )
    def test_labels(self, base: Path, sample: dict[str, str], options: dict[str, Any], expected: str) -> None:
        loaded = load(base, **options)
        text = "<|0.00|>one<|0.20|> two<|0.40|>"
        ids = speech.labels(
            loaded.modules["tokenizer"], AudioText("a", Path(), transcript=text, **sample), loaded.options, loaded.info
        )
        tokenizer = WhisperTokenizer.from_pretrained(base)
        assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ") == expected
        assert loaded.info.count_tokens([text])[0] >= len(ids) + 1  # type: ignore[attr-defined]

    def test_cache_key_names_tokens_and_not_weights(self, base: Path, tmp_path: Path) -> None:
        def key(folder: Path, **options: Any) -> str:
            return FAMILY.cache_key(WhisperOptions(path=str(folder), **options), frozenset())

        other = save_tiny_whisper(tmp_path / "other", without=("<|de|>",))
        assert len({key(base), key(base, timestamps=True), key(base, language="de"), key(other)}) == 4
        assert key(base) == key(base, dtype="bf16", mask_time_prob=0.1)


class TestLoss:
    def test_a_step_is_the_mean_over_tokens_as_in_transformers(self, base: Path) -> None:
        loaded = load(base)
        inputs = batch(loaded, "one", "two three four five", "a")
        found = step_loss(FAMILY, loaded)(inputs, derive(0, "loss")).per_sample
        assert inputs.weights is not None
        assert inputs.weights.tolist() == (inputs.tensors["labels"] != -100).sum(1).tolist()
        with torch.no_grad():
            expected = loaded.modules["model"](
                input_features=inputs.tensors["features"][:, 0], labels=inputs.tensors["labels"]
            ).loss
        weighted = (found * inputs.weights).sum() / inputs.weights.sum()
        torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=1e-5)

    def test_equals_the_reference(self, base: Path) -> None:
        loaded = load(base)
        inputs = batch(loaded, "one", "two three", "a")
        found = step_loss(FAMILY, loaded)(inputs, derive(0, "loss")).per_sample
        model = loaded.modules["model"].double()
        start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
        for row, (features, labels) in enumerate(
            zip(inputs.tensors["features"], inputs.tensors["labels"], strict=True)
        ):
            own = [int(label) for label in labels if label != -100]
            ids = torch.tensor([[start, *own[:-1], *[pad] * 3]])  # padding on the right changes nothing
            logits = model(input_features=features.double(), decoder_input_ids=ids).logits[0]
            steps = [torch.logsumexp(logits[at], 0) - logits[at, label] for at, label in enumerate(own)]
            expected = torch.stack(steps).mean()
            torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)
            theirs = model(input_features=features.double(), labels=torch.tensor([own])).loss
            torch.testing.assert_close(expected, theirs)

    def test_masks_are_those_of_transformers(self, base: Path) -> None:
        loaded = load(base, mask_time_prob=0.3, mask_time_length=5, mask_feature_prob=0.4, mask_feature_length=3)
        inputs = batch(loaded, "one", "two")
        features, frames = inputs.tensors["features"][:, 0], inputs.tensors["num_frames"][:, 0]
        before = features.clone()
        masked = speech.mask(features, frames, loaded.options, derive(0, "a"))
        assert torch.equal(features, before)
        assert torch.equal(masked, speech.mask(features, frames, loaded.options, derive(0, "a")))
        assert not torch.equal(masked, speech.mask(features, frames, loaded.options, derive(0, "b")))
        core = loaded.modules["model"].model
        names = ("mask_time_prob", "mask_time_length", "mask_feature_prob", "mask_feature_length")
        core.config.update({name: getattr(loaded.options, name) for name in names} | {"apply_spec_augment": True})
        core.training = True
        sound = (torch.arange(features.shape[2])[None] < frames[:, None]).long()
        with speech._numpy_seeded(int(torch.randint(2**31, (1,), generator=derive(0, "a")))):
            expected = core._mask_input_features(before.clone(), attention_mask=sound)
        assert torch.equal(masked, expected)
        state = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
        speech.mask(features, frames, loaded.options, derive(0, "a"))
        assert np.array_equal(state, np.random.get_state()[1])  # type: ignore[index]

    def test_one_view_is_drawn_for_each_recording(self, base: Path) -> None:
        loaded = load(base)
        plain = batch(loaded, "one")
        silent = {**plain.tensors, "features": plain.tensors["features"].repeat(1, 2, 1, 1)}
        silent["features"][:, 1] = 0
        silent["num_frames"] = plain.tensors["num_frames"].repeat(1, 2)
        both = Batch(plain.keys, silent)
        found = {step_loss(FAMILY, loaded)(both, derive(seed)).per_sample.item() for seed in range(8)}
        assert len(found) == 2
        assert step_loss(FAMILY, loaded)(plain, derive(0)).per_sample.item() in found


def test_each_recording_is_heard_in_its_own_language_and_task(base: Path) -> None:
    (plain,) = samples("one")
    own = [plain, replace(plain, language="de"), replace(plain, language="de", task="translate")]
    told = FAMILY.generate(load(base), [Request("", 0, sample=sample) for sample in [*own, plain]])
    alone = [
        FAMILY.generate(load(base, **options), [Request("", 0, sample=plain)])[0].text
        for options in ({}, {"language": "de"}, {"language": "de", "task": "translate"})
    ]
    assert [output.text for output in told] == [*alone, alone[0]]
    assert len(set(alone)) == 3


def _without_names(base: Path, folder: Path) -> Path:
    """Returns a copy of a base whose tokenizer has the tokens of timestamps without their names."""
    own = shutil.copytree(base, folder)
    file = own / "tokenizer.json"
    told = json.loads(file.read_text("utf-8"))
    told["added_tokens"] = [one for one in told["added_tokens"] if not re.fullmatch(r"<\|\d.*\|>", one["content"])]
    file.write_text(json.dumps(told), encoding="utf-8")
    names = own / "added_tokens.json"
    if names.is_file():
        kept = {name: own for name, own in json.loads(names.read_text("utf-8")).items() if not name[2].isdigit()}
        names.write_text(json.dumps(kept), encoding="utf-8")
    settings = own / "tokenizer_config.json"
    told = json.loads(settings.read_text("utf-8"))
    told.get("added_tokens_decoder", {}).clear()
    settings.write_text(json.dumps(told), encoding="utf-8")
    return own


class TestTimestamps:
    TEXT = "<|0.00|>one<|0.20|> two<|0.40|>"

    def test_names_are_not_needed(self, base: Path, tmp_path: Path) -> None:
        own = _without_names(base, tmp_path / "own")
        assert "<|0.00|>" not in speech.read_processor(own).tokenizer.get_vocab()
        found = []
        for folder in (base, own):
            loaded = load(folder, timestamps=True)
            (item,) = FAMILY.prepare(loaded, samples(self.TEXT), frozenset())
            texts = [one.text for one in FAMILY.generate(loaded, [Request("", 0, sample=samples("")[0])])]
            found.append((item.tensors["labels"].tolist(), texts, loaded.info.count_tokens([self.TEXT])))  # type: ignore[attr-defined]
        assert found[0] == found[1]
        assert found[0][1][0].startswith("<|0.")

    def test_those_that_the_base_does_not_have_are_errors(self, base: Path) -> None:
        for timestamps in (True, False):
            info = FAMILY.check(WhisperOptions(path=str(base), timestamps=timestamps))
            (count,) = info.count_tokens(["<|0.00|>one<|1.02|>"])  # type: ignore[misc]
            assert ("has the timestamp 1.02, and the base has none above 1.00" in str(count)) == timestamps

    def test_a_base_without_their_tokens(self, base: Path, tmp_path: Path) -> None:
        own = shutil.copytree(base, tmp_path / "own")
        file = own / "config.json"
        told = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps(told | {"vocab_size": told["vocab_size"] - 51}), encoding="utf-8")
        with pytest.raises(ModelError, match=r"has no tokens for timestamps; set model\.timestamps=false"):
            FAMILY.check(WhisperOptions(path=str(own), timestamps=True))


class TestSearch:
    def test_beams_are_those_of_transformers(self, base: Path) -> None:
        requests = [Request("", 0, sample=sample) for sample in samples("one", "two", "three")]
        loaded = load(base, num_beams=3, repetition_guard=False)
        found = [output.text for output in FAMILY.generate(loaded, requests)]
        model, tokenizer = loaded.modules["model"], loaded.modules["tokenizer"]
        features = batch(loaded, "one", "two", "three").tensors["features"][:, 0]
        ids = model.generate(features, num_beams=3, do_sample=False, language="en", task="transcribe")
        assert found == [" ".join(text.split()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        greedy = [output.text for output in FAMILY.generate(load(base, repetition_guard=False), requests)]
        assert found != greedy

    def test_what_goes_in_circles_is_heard_again(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[int, float]] = []
        circle = "and so on and on " * 20

        def search(loaded: Loaded, features: torch.Tensor, wanted: Any, temperature: float) -> list[str]:
            asked.append((len(features), temperature))
            if temperature == 0:
                return ["one two", circle, "<|0.00|> three<|0.20|>"]
            return [circle[:60] if temperature < 0.6 else "and so on"]

        monkeypatch.setattr(speech, "_search", search)
        requests = [Request("", 0, sample=sample) for sample in samples("", "", "")]
        texts = [output.text for output in FAMILY.generate(load(base), requests)]
        assert texts == ["one two", "and so on", "<|0.00|> three<|0.20|>"]
        assert asked == [(3, 0.0), (1, 0.2), (1, 0.4), (1, 0.6)]
        asked.clear()
        texts = [output.text for output in FAMILY.generate(load(base, repetition_guard=False), requests)]
        assert (texts[1], asked) == (circle, [(3, 0.0)])

    def test_what_is_drawn_depends_on_the_recording_alone(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(speech, "_MOST_REPETITION", 0.0)
        monkeypatch.setattr(speech, "_TEMPERATURES", (1.0,))
        monkeypatch.setattr(speech, "_repetition", lambda text: 2.0 if text else 1.0)
        loaded = load(base)
        requests = [Request("", 0, sample=sample) for sample in samples("", "", "")]
        together = [output.text for output in FAMILY.generate(loaded, requests)]
        assert together == [FAMILY.generate(loaded, [request])[0].text for request in requests]


def train_some(loaded: Loaded, options: WhisperOptions, num_steps: int = 1) -> list[float]:
    config = AdapterConfig(rank=2, alpha=3.0, parts=tuple(FAMILY.parts), targets=("all-linear",))
    made = plan(FAMILY.meta_modules(options), FAMILY.parts, config)
    params = inject(loaded, made, variants.find("lora", options.quantization), 0.0, 0)
    optimizer = torch.optim.Adam([value for own in params.values() for value in own.values()], lr=0.05)
    inputs, losses = batch(loaded, "one", "two three"), []
    for _ in range(num_steps):
        loss = step_loss(FAMILY, loaded)(inputs, derive(0, "loss")).per_sample.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class TestFiles:
    def test_peft_loads_the_folder_on_the_whole_model(self, base: Path, tmp_path: Path) -> None:
        loaded, options = load(base), WhisperOptions(path=str(base))
        train_some(loaded, options, 2)
        key_map = FAMILY.key_map("peft", options)
        folder = write_verified(
            read_state(loaded), key_map, registry.find("formats", "peft"), tmp_path / "adapter", torch.float32
        )
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        plain = WhisperForConditionalGeneration.from_pretrained(base).eval()
        inputs = {
            "input_features": batch(loaded, "one").tensors["features"][:, 0],
            "decoder_input_ids": torch.tensor([[plain.config.decoder_start_token_id, 7, 8]]),
        }
        with torch.no_grad():
            before = plain(**inputs).logits
            theirs = PeftModel.from_pretrained(plain, folder).eval()(**inputs).logits
            ours = loaded.modules["model"](**inputs).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
        assert (ours - before).abs().max() > 0.01

    def test_names_without_a_base_are_those_of_every_base(self, base: Path) -> None:
        everything = dict(FAMILY.key_map("peft", None))
        own = dict(FAMILY.key_map("peft", WhisperOptions(path=str(base))))
        assert own.items() <= everything.items()
        assert everything[ModuleKey("decoder", "layers.31.encoder_attn.k_proj")] == (
            "model.decoder.layers.31.encoder_attn.k_proj"
        )


def _on_the_hub(base: Path, cache: Path, name: str = "someone/base") -> None:
    """Puts a base where huggingface_hub keeps what it fetched."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(base, repository / "snapshots" / "1a2b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1a2b")


class TestNamesItsBase:
    """A PEFT folder says what it was trained on, as PEFT's own save_pretrained does, but no path of this machine."""

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("someone/base", "someone/base"),
            ("builtin:digits", "builtin:digits"),
            ("/home/maria/models/base", None),
            ("./base", None),
            ("models/base", None),
            ("/c/hub/models--someone--base/snapshots/1a2b", "someone/base"),
        ],
    )
    def test_only_by_a_name_that_others_know(
        self, source: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models" / "base").mkdir(parents=True)
        assert public_base(source) == expected

    def test_auto_peft_model_and_pipelines_load_it(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        _on_the_hub(base, tmp_path / "hub")
        loaded, options = load(base), WhisperOptions(path=str(base))
        train_some(loaded, options, 2)
        state = read_state(loaded)
        metadata = {"base_model_name_or_path": "someone/base", "modelspec.architecture": "whisper/lora"}
        key_map = FAMILY.key_map("peft", options)
        format_ = registry.find("formats", "peft")
        folder = write_verified(replace(state, metadata=metadata), key_map, format_, tmp_path / "a", torch.float32)
        record = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        assert record["base_model_name_or_path"] == "someone/base"
        assert (record["task_type"], record["auto_mapping"]["base_model_class"]) == (
            None,
            "WhisperForConditionalGeneration",
        )
        inputs = {
            "input_features": batch(loaded, "one").tensors["features"][:, 0],
            "decoder_input_ids": torch.tensor([[7, 8]]),
        }
        cache = {"cache_dir": tmp_path / "hub", "local_files_only": True}
        with torch.no_grad():
            ours = loaded.modules["model"](**inputs).logits
            theirs = [
                AutoPeftModel.from_pretrained(folder, **cache).eval()(**inputs).logits,
                AutoModelForSpeechSeq2Seq.from_pretrained(folder, **cache).eval()(**inputs).logits,
            ]
        for logits in theirs:
            torch.testing.assert_close(logits, ours, rtol=1e-5, atol=1e-5)
        read = in_float32(format_.read(parse_file(folder), key_map))
        assert read.metadata["base_model_name_or_path"] == "someone/base"
        again = write_verified(read, key_map, format_, tmp_path / "b", torch.float32)
        assert json.loads((again / "adapter_config.json").read_text("utf-8")) == record

    @pytest.mark.parametrize(
        ("told", "kept"),
        [
            ({"base_model_name_or_path": "/home/maria/base"}, {}),
            ({"base_model_name_or_path": 7, "task_type": ["x"], "auto_mapping": "y"}, {}),
            ({"base_model_name_or_path": "a" * 5000 + "/b"}, {}),
            ({"task_type": "CAUSAL_LM"}, {"task_type": "CAUSAL_LM"}),
            ({"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}, {}),
            (
                {"auto_mapping": {"base_model_class": "A", "parent_library": "transformers.models.a"}},
                {"auto_mapping": {"base_model_class": "A", "parent_library": "transformers.models.a"}},
            ),
        ],
    )
    def test_what_a_stranger_says_is_kept_where_it_is_harmless(
        self, base: Path, told: dict[str, Any], kept: dict[str, Any], tmp_path: Path
    ) -> None:
        loaded, options = load(base), WhisperOptions(path=str(base))
        train_some(loaded, options)
        key_map, format_ = FAMILY.key_map("peft", options), registry.find("formats", "peft")
        folder = write_verified(read_state(loaded), key_map, format_, tmp_path / "a", torch.float32)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | told))
        again = write_verified(
            in_float32(format_.read(parse_file(folder), key_map)), key_map, format_, tmp_path / "b", torch.float32
        )
        record = json.loads((again / "adapter_config.json").read_text("utf-8"))
        nothing = dict.fromkeys(("base_model_name_or_path", "task_type", "auto_mapping"))
        assert {key: record[key] for key in nothing} == nothing | kept


@pytest.mark.parametrize(("kind", "layer"), [("8bit", "Linear8bitLt"), ("nf4", "Linear4bit")])
def test_quantized_bases_train(base: Path, kind: str, layer: str) -> None:
    pytest.importorskip("bitsandbytes")
    loaded = load(base, quantization=kind)
    assert type(loaded.parts["decoder"].layers[0].encoder_attn.q_proj).__name__ == layer  # type: ignore[index, union-attr]
    assert type(loaded.modules["model"].proj_out).__name__ == "Linear"
    plain = (
        step_loss(FAMILY, load(base))(batch(load(base), "one", "two three"), derive(0, "loss")).per_sample.mean().item()
    )
    first, second, third = train_some(loaded, WhisperOptions(path=str(base), quantization=kind), 3)
    assert first == pytest.approx(plain, rel=0.1)
    assert third < second < first


class TestBadBases:
    @pytest.fixture
    def own(self, base: Path, tmp_path: Path) -> Path:
        return shutil.copytree(base, tmp_path / "own")

    def refused(self, path: Path | str, error: str, **options: Any) -> None:
        with pytest.raises(ModelError) as raised:
            FAMILY.check(WhisperOptions(path=str(path), **options))
        assert error in str(raised.value)

    def test_language_without_a_token(self, base: Path) -> None:
        self.refused(base, "has no token for model.language=fr, only for en, de", language="fr")

    def test_timestamps_without_tokens(self, tmp_path: Path) -> None:
        own = save_tiny_whisper(tmp_path / "own", without=("<|notimestamps|>",))
        self.refused(own, "its tokenizer lacks <|notimestamps|>")

    def test_english_only(self, own: Path) -> None:
        file = own / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"is_multilingual": False}))
        self.refused(own, "it knows English only", task="translate")
        loaded = load(own)
        ids = speech.labels(loaded.modules["tokenizer"], samples("a")[0], loaded.options, loaded.info)  # type: ignore[arg-type]
        assert loaded.modules["tokenizer"].decode(ids) == "<|notimestamps|>a<|endoftext|>"

    def test_features_of_another_length(self, own: Path) -> None:
        file = own / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"max_source_positions": 40}))
        self.refused(own, "its feature extractor gives 100 frames, and its encoder takes 80")

    def test_another_type(self, own: Path) -> None:
        file = own / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "llava"}))
        self.refused(own, "is of the type llava, not whisper")

    def test_weights(self, own: Path) -> None:
        file = own / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        file.write_bytes(file.read_bytes()[:-100])
        self.refused(own, "is cut off or damaged")
        tensors.pop("model.encoder.layers.0.fc1.weight")
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ModelError, match=r"(?s)lack 1 tensors.*encoder\.layers\.0\.fc1\.weight is missing"):
            load(own)
        file.unlink()
        self.refused(own, "holds no weights")

    @pytest.mark.parametrize(
        ("path", "error"),
        [("builtin:emoji", "known: builtin:digits"), ("nowhere", "there is no such folder or file")],
    )
    def test_nothing_there(self, path: str, error: str) -> None:
        self.refused(path, error)
