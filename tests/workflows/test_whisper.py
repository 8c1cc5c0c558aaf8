"""Whole commands on recordings: train, resume, transcribe, score, and the tools for adapter files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.samples import Output, Request
from lora_diffusion.data.transcripts import segments
from lora_diffusion.families.language.speech_recognition import SpeechRecognition
from tests.tiny_whisper import RATE, save_tiny_whisper, write_recording
from tests.workflows.conftest import Commands, Outcome

WORDS = ("one", "two three", "four")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_whisper(tmp_path_factory.mktemp("whisper") / "base")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    for index, text in enumerate(WORDS):
        write_recording(folder / f"{index}.wav", text, seconds=0.3 + 0.1 * index, pitch=200.0 + 100 * index)
    return folder


@pytest.fixture
def train(command: Commands, base: Path, recordings: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    settings = [
        "model.family=whisper",
        f"model.path={base}",
        "model.mask_time_prob=0.2",
        f"data.path={recordings}",
        "data.speeds=[1.0, 1.1]",
        "data.noise_db=[20]",
        "adapter.rank=2",
        "adapter.dropout=0.1",
        "train.learning_rate=1e-2",
        "train.schedule=constant",
        "train.batch_size=2",
        "train.threads=1",
        "output.dtype=fp32",
        "output.name=adapter",
    ]

    def run(name: str, *more: str) -> Outcome:
        return command("train", *settings, f"output.path={tmp_path / name}", *more)

    return run


def test_resume_is_bit_for_bit(train, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    settings = (
        "adapter.module_ranks=[encoder/attn=3, 're:.*q_proj=1']",
        "train.module_learning_rates=decoder/attn=1e-3",
    )
    assert train("whole", "train.max_steps=5", *settings).code == 0
    assert train("halves", "train.max_steps=3", *settings).code == 0
    assert train("halves", "train.max_steps=5", "--resume", *settings).code == 0
    whole, halves = (
        load_file(tmp_path / name / "adapter.peft" / "adapter_model.safetensors") for name in ("whole", "halves")
    )
    assert whole.keys() == halves.keys()
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "halves")
    ]
    assert losses[0] == losses[1]


def test_files_of_a_run_and_tools(train, command: Commands, base: Path, recordings: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert train("run", "train.max_steps=2", "train.preview_every_steps=1").code == 0
    run = tmp_path / "run"
    lines = (run / "previews" / "step-000001.tsv").read_text(encoding="utf-8").split("\n")
    assert [line.split("\t")[0] for line in lines if "\t" in line] == ["0.wav", "1.wav", "2.wav"]

    def transcripts(*arguments: object) -> str:
        file = recordings / "1.wav"
        texts = json.loads(command.good("transcribe", *arguments, file, "--json").out)
        assert list(texts) == [str(file)]
        return str(texts[str(file)])

    adapter = run / "adapter.peft"
    result = json.loads(command.good("inspect", adapter, "--json").out)
    assert result["metadata"]["modelspec.architecture"] == "whisper/lora"
    assert "ss_base_model_version" not in result["metadata"]
    with_adapter = transcripts("--model", base, "--adapter", f"{adapter}:1")
    command.good("compose", f"{adapter}:0.5", f"{adapter}:0.5", "--output", tmp_path / "sum.peft")
    assert transcripts("--model", base, "--adapter", f"{tmp_path / 'sum.peft'}:1") == with_adapter
    command.good("merge", "--model", base, "--adapter", f"{adapter}:1", "--output", tmp_path / "merged")
    assert transcripts("--model", tmp_path / "merged") == with_adapter
    command.good("resize", adapter, tmp_path / "small.peft", "--rank", "1")
    card = json.loads(command.good("push", run, "--repo", "maria/words", "--dry-run", "--json").out)["card"]
    assert "pipeline_tag: automatic-speech-recognition" in card
    names: dict[str, object] = {}
    exec(
        card.split("```python\n")[1]
        .split("```")[0]
        .replace("maria/words", str(run))
        .replace('"base"', repr(str(base))),
        names,
    )
    assert isinstance(names["model"], PeftModel)


def test_adapter_as_wide_as_a_text_encoder_is_not_taken_for_one(command: Commands, tmp_path: Path) -> None:
    folder, prefix = tmp_path / "large.peft", "base_model.model.model.decoder.layers.0.self_attn.q_proj"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {f"{prefix}.lora_A.weight": torch.ones(2, 1280), f"{prefix}.lora_B.weight": torch.ones(1280, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    result = command.good("convert", folder, tmp_path / "same.peft", "--to", "peft").out
    assert "for whisper: modules 1 in decoder" in result


def test_score(command: Commands, base: Path, recordings: Path) -> None:
    outcome = command.good("transcribe", "--model", base, "--score", recordings, "--json")
    (score,) = json.loads(outcome.out).values()
    assert {one["key"] for one in score["recordings"]} == {"0.wav", "1.wav", "2.wav"}
    assert [one["wer"] for one in score["recordings"]] == sorted(
        (one["wer"] for one in score["recordings"]), reverse=True
    )
    assert "WER" in command.good("transcribe", "--model", base, "--score", recordings).out


def test_score_goes_by_the_languages_of_a_table(command: Commands, base: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_recording(tmp_path / f"{name}.wav")
    rows = ("a.wav,Twenty-one,,", "b.wav,Twenty-one,de,", "c.wav,Twenty-one,de,translate")
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,transcription,language,task", *rows]))

    def result(*arguments: str) -> dict[str, dict[str, str]]:
        outcome = command.good("transcribe", "--model", base, "--score", tmp_path, *arguments, "--json")
        (score,) = json.loads(outcome.out).values()
        return {one["key"]: one for one in score["recordings"]}

    plain, german = result(), result("--language", "de")
    assert {key: one["said"] for key, one in plain.items()} == {"a.wav": "21", "b.wav": "twenty one", "c.wav": "21"}
    assert plain["b.wav"] == german["a.wav"] | {"key": "b.wav"}
    assert plain["b.wav"]["heard"] != plain["a.wav"]["heard"]


def test_a_recording_that_is_named_twice_is_heard_once(command: Commands, base: Path, recordings: Path) -> None:
    def transcripts(*paths: object) -> dict[str, str]:
        return dict(json.loads(command.good("transcribe", "--model", base, *paths, "--json").out))

    again = (recordings / "1.wav", f"{recordings}/../{recordings.name}/1.wav", os.path.relpath(recordings / "1.wav"))
    assert transcripts(recordings, *again) == transcripts(recordings)


def test_kinds_that_are_not_heard_are_named(command: Commands, base: Path, tmp_path: Path) -> None:
    (tmp_path / "m.wma").write_bytes(b"\0" * 100)
    outcome = command("transcribe", "--model", base, tmp_path / "m.wma")
    assert outcome.code == 2
    assert "of a format that is not read, export it as one of .wav, .flac, .mp3, .ogg, .opus" in outcome.message
    write_recording(tmp_path / "a.wav")
    outcome = command.good("transcribe", "--model", base, tmp_path)
    assert "Left out recordings of a format that is not read: 1 (m.wma)" in outcome.message


def test_long_recordings_are_heard_in_pieces(command: Commands, base: Path, tmp_path: Path) -> None:
    write_recording(tmp_path / "long.wav", seconds=2.4)
    outcome = command.good("transcribe", "--model", base, tmp_path, "--json")
    assert len(json.loads(outcome.out)) == 1
    assert "2.4 s long, heard in 3 pieces" in outcome.message or "2.4 s long, heard in 4 pieces" in outcome.message


def test_timestamps_of_long_recordings_go_on_from_piece_to_piece(
    command: Commands, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(self: SpeechRecognition, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        lengths = [len(request.sample.waveforms[0]) / RATE for request in requests]  # type: ignore[union-attr]
        return [Output(one, text=f"<|0.00|> a<|{end:.2f}|>") for one, end in zip(requests, lengths, strict=True)]

    monkeypatch.setattr(SpeechRecognition, "generate", say)
    write_recording(tmp_path / "long.wav", seconds=2.4)
    config = tmp_path / "own.yaml"
    config.write_text(f"model:\n  family: whisper\n  path: {base}\n  timestamps: true\n")
    (text,) = json.loads(command.good("transcribe", "--config", config, tmp_path / "long.wav", "--json").out).values()
    pieces = segments(text)
    assert len(pieces) >= 3
    assert (pieces[0].start_s, pieces[-1].end_s) == (0.0, 2.4)
    # Whatever lies between is rounded to hundredths on both sides.
    assert all(abs(one.end_s - after.start_s) < 0.011 for one, after in pairwise(pieces))


@pytest.fixture
def _spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every base say the same, with timestamps if it is asked for them."""

    def say(self: SpeechRecognition, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        timed = "<|0.00|> a <b><|0.20|><|0.30|> --> c<|9.00|>" if loaded.options.timestamps else "a <b> --> c"
        return [Output(one, text=timed) for one in requests]

    monkeypatch.setattr(SpeechRecognition, "generate", say)


@pytest.mark.usefixtures("_spoken")
class TestFormats:
    """Transcripts as files."""

    SRT = "1\n00:00:00,000 --> 00:00:00,200\na <b>\n\n2\n00:00:00,300 --> 00:00:00,400\n--> c\n"
    VTT = "WEBVTT\n\n00:00:00.000 --> 00:00:00.200\na &lt;b&gt;\n\n00:00:00.300 --> 00:00:00.400\n--&gt; c\n"

    @pytest.fixture
    def heard(self, command: Commands, base: Path, recordings: Path):  # type: ignore[no-untyped-def]
        return lambda *more: command.good("transcribe", "--model", base, recordings / "1.wav", *more).out

    def test_one_recording_is_printed(self, heard, recordings: Path) -> None:  # type: ignore[no-untyped-def]
        file = recordings / "1.wav"
        assert heard() == f"{file}\ta <b> --> c\n"
        assert heard("--format", "srt") == self.SRT
        assert heard("--format", "vtt") == self.VTT
        assert heard("--format", "srt", "--no-timestamps") == "1\n00:00:00,000 --> 00:00:00,400\na <b> --> c\n"
        assert heard("--format", "txt") == "a <b> --> c\n"
        timed = "[00:00:00.000 --> 00:00:00.200] a <b>\n[00:00:00.300 --> 00:00:00.400] --> c\n"
        assert heard("--format", "txt", "--timestamps") == timed
        assert heard("--format", "csv") == f"file,start_s,end_s,text\n{file},0.00,0.40,a <b> --> c\n"
        (result,) = json.loads(heard("--format", "json", "--timestamps"))
        assert (result["file"], result["text"]) == (str(file), "a <b> --> c")
        assert result["segments"][1] == {"start_s": 0.3, "end_s": 0.4, "text": "--> c"}

    def test_files(self, command: Commands, base: Path, recordings: Path, tmp_path: Path) -> None:
        model = ("transcribe", "--model", base)
        result = command.good(*model, recordings, "--format", "srt", "--output", tmp_path / "subs", "--json").out
        files = [tmp_path / "subs" / f"{index}.srt" for index in range(3)]
        assert json.loads(result) == {"files": [*map(str, files)]}
        assert files[1].read_text(encoding="utf-8") == self.SRT
        assert (
            "0.srt is there already"
            in command(*model, recordings, "--format", "srt", "--output", tmp_path / "subs").message
        )
        command.good(*model, recordings, "--format", "srt", "--output", tmp_path / "subs", "--overwrite")
        command.good(*model, recordings, "--format", "csv", "--output", tmp_path / "all.csv")
        assert len((tmp_path / "all.csv").read_text(encoding="utf-8").splitlines()) == 4
        command.good(*model, recordings / "0.wav", "--format", "vtt", "--output", tmp_path / "one.vtt")
        assert (tmp_path / "one.vtt").read_text(encoding="utf-8").startswith("WEBVTT\n\n00:")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--format", "srt"), "holds one recording in a file, and these are 3; name a folder with --output DIR"),
            (("--format", "vtt", "--output", "x.vtt"), "holds one recording in a file"),
            (("--output", "x"), "needs --format, one of txt, srt, vtt, csv, json"),
            (("--format", "csv", "--json"), "drop one, or add --output"),
            (("--csv", "x.csv"), "which --score asks for; add it; --format csv writes plain transcripts"),
            (("--score", "--format", "srt"), "--format writes transcripts, and --score compares them"),
            (("--beams", "0"), "model.num_beams=0: must be 1 or greater"),
            (("--language", "German"), "only for en, de; set model.language=de"),
        ],
    )
    def test_bad_requests(
        self, command: Commands, base: Path, recordings: Path, arguments: tuple[str, ...], message: str
    ) -> None:
        outcome = command("transcribe", "--model", base, recordings, *arguments)
        assert outcome.code == 2
        assert message in outcome.message

    def test_recordings_of_one_name(self, command: Commands, base: Path, recordings: Path, tmp_path: Path) -> None:
        other = write_recording(tmp_path / "0.wav")
        outcome = command(
            "transcribe", "--model", base, recordings / "0.wav", other, "--format", "txt", "--output", tmp_path / "out"
        )
        assert "0.wav would share a file; transcribe them one by one" in outcome.message


def test_scores_as_a_table(command: Commands, base: Path, recordings: Path, tmp_path: Path) -> None:
    command.good("transcribe", "--model", base, "--score", recordings, "--csv", tmp_path / "scores.csv", "--beams", "2")
    lines = (tmp_path / "scores.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "set,key,said,heard,wer,cer"
    assert sorted(line.split(",")[1] for line in lines[1:]) == ["0.wav", "1.wav", "2.wav"]


def test_languages_of_a_table_may_have_names(command: Commands, base: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_recording(tmp_path / f"{name}.wav")
    rows = ("a.wav,x,German", "b.wav,x,EN_us", "c.wav,x,")
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text,locale", *rows]))
    result = command.good("data", "check", tmp_path, "model.family=whisper", f"model.path={base}", "--json").out
    assert json.loads(result)["languages"] == {"de": 1, "en": 1, "": 1}
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text,lang", "a.wav,x,Klingon", *rows[1:]]))
    outcome = command("data", "check", tmp_path, "model.family=whisper", f"model.path={base}")
    assert (
        "a.wav: the tokenizer of" in outcome.message and "has no token for Klingon, only for en, de" in outcome.message
    )


def test_tables_of_bases_that_know_english_only(command: Commands, tmp_path: Path) -> None:
    special = ("<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>")
    base, data = save_tiny_whisper(tmp_path / "base", without=special), tmp_path / "data"
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_multilingual": False}))
    for name in ("a", "b", "c", "d"):
        write_recording(data / f"{name}.wav")
    settings = ("data", "check", data, "model.family=whisper", f"model.path={base}")
    (data / "metadata.csv").write_text(
        "file_name,text,language\na.wav,x,en\nb.wav,x,English\nc.wav,x,en-GB\nd.wav,x,\n"
    )
    command.good(*settings)
    (data / "metadata.csv").write_text(
        "file_name,text,language,task\na.wav,x,de,\nb.wav,x,en,translate\nc.wav,x,,\nd.wav,x,,\n"
    )
    errors = command(*settings).message
    assert "a.wav: is in de, and" in errors and "knows English only; leave it out" in errors
    assert "b.wav: asks for a translation" in errors
    command.good(*settings, "data.skip_bad=true")


def test_dry_run(train) -> None:  # type: ignore[no-untyped-def]
    outcome = train("dry", "--dry-run", "train.epochs=2", "--json")
    result = json.loads(outcome.out)
    assert (result["data"]["num_recordings"], result["data"]["num_words"], result["steps"]) == (3, 4, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.flip=true"], "data.flip: there is no such key"),
        (["data.speeds=[1.0, 3.0]"], "must be one or more different speeds between 0.5 and 2"),
        (["adapter.parts=[unet]"], "unet"),
        (["output.formats=[kohya]"], "Whisper adapters have no format kohya; use peft"),
        (["model.language=fr"], "no token for model.language=fr"),
        (["train.preview_every_steps=1", "preview.prompts=[nine.wav]"], "no recording nine.wav"),
        (["train.preview_every_steps=1", "preview.guidance=2"], "preview.guidance=2.0: is about images"),
        (["evaluate.seeds=[3]"], "evaluate.seeds=[3]: is about images"),
        (["train.preview_every_steps=1", "output.thumbnail=preview"], "the previews of this base are no images"),
    ],
)
def test_bad_settings(train, tmp_path: Path, overrides: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    for mode in ([], ["--dry-run"]):
        outcome = train("bad", "train.max_steps=1", *overrides, *mode)
        assert outcome.code == 2, outcome.message
        assert message in outcome.message
        assert not (tmp_path / "bad").exists()


def test_commands_for_images_are_refused(command: Commands, base: Path, tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(f"model:\n  family: whisper\n  path: {base}\n")
    outcome = command("generate", "--config", config, "--prompt", "a cat", "--output", tmp_path / "out")
    assert outcome.code == 2
    assert "model.family=whisper does not generate images, its bases listen to recordings" in outcome.message
    outcome = command("transcribe", "--model", base, tmp_path / "none.wav")
    assert (outcome.code, "there is no such file" in outcome.message) == (2, True)
