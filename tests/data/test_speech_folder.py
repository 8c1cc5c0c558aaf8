"""Recordings with transcripts, in the layouts that people have, and all that can be wrong with them."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from lora_diffusion.config.schema import PreviewConfig, RecordingDataConfig
from lora_diffusion.core.base_model import SpeechInfo
from lora_diffusion.core.errors import ConfigError, DataError
from lora_diffusion.core.samples import AudioText
from lora_diffusion.data import audio, transcripts
from lora_diffusion.data.sample_types import RECORDINGS
from tests.tiny_whisper import RATE, chirp, write_recording

INFO = SpeechInfo(
    source="tiny base",
    max_duration_s=1.0,
    languages=("en", "de"),
    max_tokens=20,
    count_tokens=lambda texts: [len(transcripts.without_timestamps(text)) for text in texts],
)


def _read(folder: Path, **settings: object) -> list[AudioText]:
    return RECORDINGS.read(RecordingDataConfig(path=str(folder), **settings), INFO)  # type: ignore[arg-type]


class TestLayouts:
    def test_text_files_beside(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "b.wav", "two\n three ")
        write_recording(tmp_path / "in" / "a.flac", "one", seconds=0.3)
        samples = _read(tmp_path)
        assert [(sample.key, sample.transcript) for sample in samples] == [("b.wav", "two three"), ("in/a.flac", "one")]
        assert samples[1].duration_s == pytest.approx(0.3, abs=1e-3)

    @pytest.mark.parametrize(
        ("name", "table"),
        [
            ("metadata.csv", 'file_name,transcription,language\na.wav,"one, two",de\n'),
            ("metadata.tsv", "path\tsentence\tlanguage\na.wav\tone, two\tde\n"),
            ("lines.jsonl", json.dumps({"audio": "a.wav", "text": "one, two", "language": "de", "task": "translate"})),
        ],
    )
    def test_tables(self, tmp_path: Path, name: str, table: str) -> None:
        write_recording(tmp_path / "a.wav")
        (tmp_path / name).write_text(table, encoding="utf-8")
        (sample,) = _read(tmp_path)
        assert (sample.transcript, sample.language) == ("one, two", "de")
        assert sample.task == ("translate" if name == "lines.jsonl" else None)

    def test_names_that_windows_wrote(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "sub" / "a.wav")
        (tmp_path / "metadata.csv").write_text("file_name,transcription\nsub\\a.wav,one\n", encoding="utf-8")
        assert [sample.key for sample in _read(tmp_path)] == ["sub/a.wav"]

    def test_separators_of_unicode_do_not_end_a_line_of_json(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "a.wav")
        line = json.dumps({"file": "a.wav", "text": "one\u2028two\x85three"}, ensure_ascii=False)
        (tmp_path / "lines.jsonl").write_text(line, encoding="utf-8")
        (sample,) = _read(tmp_path)
        assert sample.transcript == "one two three"

    def test_a_saved_data_set(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        buffer = io.BytesIO()
        soundfile.write(buffer, chirp(0.4), RATE, format="WAV")
        rows = {"audio": [{"bytes": buffer.getvalue(), "path": None}] * 2, "text": ["one", "two"]}
        table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
        table.save_to_disk(str(tmp_path / "saved"))
        samples = _read(tmp_path / "saved")
        assert [(sample.key, sample.transcript) for sample in samples] == [("row 0", "one"), ("row 1", "two")]
        (view,) = RECORDINGS.open(samples[0], RecordingDataConfig()).waveforms
        np.testing.assert_allclose(view.numpy(), chirp(0.4), atol=1e-4)

    @pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "ogg"])
    def test_every_audio_format_sounds_alike(self, tmp_path: Path, ending: str) -> None:
        write_recording(tmp_path / f"a.{ending}", "one")
        (view,) = RECORDINGS.open(_read(tmp_path)[0], RecordingDataConfig()).waveforms
        expected = chirp()
        length = min(len(view), len(expected))
        assert abs(len(view) - len(expected)) < RATE // 10
        assert np.corrcoef(view.numpy()[:length], expected[:length])[0, 1] > 0.99


class TestSound:
    def test_stereo_is_mixed_down_and_8_khz_resampled_and_both_are_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        write_recording(tmp_path / "both.wav", "one", rate=8000, channels=2)
        (sample,) = _read(tmp_path)
        (view,) = RECORDINGS.open(sample, RecordingDataConfig()).waveforms
        assert view.shape == (RATE // 2,)
        expected = chirp()
        assert np.corrcoef(view.numpy()[500:-500], expected[500:-500])[0, 1] > 0.999
        assert "Mixed down to one channel: 1 (both.wav)." in caplog.text
        assert "Resampled to 16000 Hz: 1 (both.wav 8000 Hz)." in caplog.text

    def test_views_of_speed_and_noise(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "a.wav", "one")
        config = RecordingDataConfig(path=str(tmp_path), speeds=(1.0, 2.0), noise_db=(10.0,))
        (sample,) = RECORDINGS.read(config, INFO)
        plain, noisy, fast, _ = RECORDINGS.open(sample, config).waveforms
        assert len(fast) == len(plain) // 2
        ratio = plain.square().mean() / (noisy - plain).square().mean()
        assert 10 * torch.log10(ratio) == pytest.approx(10.0, abs=0.2)
        assert torch.equal(RECORDINGS.open(sample, config).waveforms[1], noisy)
        assert RECORDINGS.identity(sample, config) != RECORDINGS.identity(sample, RecordingDataConfig())

    def test_windows_are_cut_where_it_is_quiet(self) -> None:
        sound = np.concatenate([chirp(0.8), np.zeros(RATE // 5, np.float32), chirp(0.7)])
        pieces = audio.windows(sound, RATE, 1.0)
        assert len(pieces) == 2
        assert 0.8 < len(pieces[0]) / RATE < 1.0
        np.testing.assert_array_equal(np.concatenate(pieces), sound)


class TestErrors:
    def test_all_are_listed_at_once(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "good.wav", "one")
        (tmp_path / "corrupt.wav").write_bytes(b"RIFF" + b"\0" * 40)
        (tmp_path / "empty.flac").touch()
        soundfile.write(tmp_path / "silent.wav", np.zeros(RATE // 2), RATE)
        soundfile.write(tmp_path / "nothing.wav", np.zeros(0), RATE)
        soundfile.write(tmp_path / "long.flac", np.zeros(2 * 3600 * 800, np.int16), 800)
        write_recording(tmp_path / "latin.wav").with_suffix(".txt").write_bytes("gr\xfcn".encode("latin-1"))
        write_recording(tmp_path / "wide.wav").with_suffix(".txt").write_bytes("one".encode("utf-16"))
        write_recording(tmp_path / "blank.wav", " \n")
        write_recording(tmp_path / "lacking.wav")
        write_recording(tmp_path / "wordy.wav", "a" * 30)
        for name in ("corrupt", "empty", "silent", "nothing", "long"):
            (tmp_path / f"{name}.txt").write_text("one")
        with pytest.raises(DataError) as raised:
            _read(tmp_path)
        errors = dict(error.split(": ", 1) for error in raised.value.errors)
        expected = {
            "corrupt.wav": "cannot be decoded",
            "empty.flac": "is empty (0 bytes)",
            "silent.wav": "is silent",
            "nothing.wav": "holds 0.00 s of sound",
            "long.flac": "is 2:00:00 long, and at most 1.0 s can be used; cut it, or set data.long=split",
            "latin.txt": "byte 0xfc at position 2 (line 1) is not UTF-8",
            "wide.txt": "is not UTF-8",
            "blank.wav": "its transcript in blank.txt is empty",
            "lacking.wav": "has no transcript; write lacking.txt",
            "wordy.wav": "its transcript has 30 tokens, and the base writes at most 20",
        }
        assert errors.keys() == expected.keys()
        for name, text in expected.items():
            assert text in errors[name]
        assert " at 0x" not in str(raised.value)  # addresses of streams

    def test_a_file_that_breaks_off(self, tmp_path: Path) -> None:
        path = write_recording(tmp_path / "a.flac", "one", seconds=0.9)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=r"a\.flac: (breaks off|cannot be decoded)"):
            _read(tmp_path)

    def test_a_wav_file_that_breaks_off(self, tmp_path: Path) -> None:
        path = write_recording(tmp_path / "a.wav", "one", seconds=0.9)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"a\.wav: breaks off after 0\.4 of 0\.9 s"):
            _read(tmp_path)

    def test_a_wav_file_from_a_pipe_has_no_length(self, tmp_path: Path) -> None:
        path = write_recording(tmp_path / "a.wav", "one", seconds=0.9)
        whole = path.read_bytes()
        path.write_bytes(whole[:4] + b"\xff\xff\xff\xff" + whole[8:])
        (sample,) = _read(tmp_path)
        assert sample.duration_s == pytest.approx(0.9)

    def test_a_table_that_cannot_be_read_is_the_only_error(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "a.wav")
        (tmp_path / "metadata.csv").write_bytes("file_name,transcription\na.wav,gr\xfcn".encode("latin-1"))
        with pytest.raises(DataError) as raised:
            _read(tmp_path)
        (error,) = raised.value.errors
        assert error.startswith("metadata.csv: byte 0xfc at position 32 (line 2) is not UTF-8")

    @pytest.mark.parametrize(("head", "line"), [("", 1), ("file_name,transcription\n", 2)])
    def test_a_quote_without_its_pair_before_a_long_rest(self, tmp_path: Path, head: str, line: int) -> None:
        write_recording(tmp_path / "a.wav")
        (tmp_path / "metadata.csv").write_text(f'{head}a.wav,"one\n' + "b.wav,two three\n" * 10_000)
        with pytest.raises(DataError) as raised:
            _read(tmp_path)
        (error,) = raised.value.errors
        assert error.startswith(f"metadata.csv, line {line}: cannot be read (field larger than field limit")

    def test_a_comma_without_quotes_is_no_end_of_a_transcript(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "a.wav")
        write_recording(tmp_path / "b.wav")
        (tmp_path / "metadata.csv").write_text("file_name,transcription\na.wav,one, two\nb.wav,three\n")
        with pytest.raises(DataError) as raised:
            _read(tmp_path)
        (error,) = raised.value.errors
        assert error.startswith("metadata.csv, line 2: has more columns than the header")

    def test_what_is_no_file_is_not_waited_for(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "good.wav", "one")
        os.mkfifo(tmp_path / "a.wav")
        os.mkfifo(tmp_path / "b.jsonl")
        (tmp_path / "c.wav").symlink_to("c.wav")
        write_recording(tmp_path / "d.wav")
        (tmp_path / "d.txt").write_bytes(b"x" * (2**20 + 1))
        with pytest.raises(DataError) as raised:
            _read(tmp_path)
        errors = raised.value.errors
        assert any(error.startswith("a.wav: is a pipe and no file") for error in errors)
        assert any(error.startswith("b.jsonl: is a pipe and no file") for error in errors)
        assert any(error.startswith("c.wav: cannot be read") for error in errors)
        assert any(error.startswith("d.txt: has 1,048,577 bytes, and at most 1,048,576 are read") for error in errors)

    def test_bad_ones_can_be_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_recording(tmp_path / "good.wav", "one")
        soundfile.write(tmp_path / "silent.wav", np.zeros(RATE // 2), RATE)
        (tmp_path / "silent.txt").write_text("one")
        assert [sample.key for sample in _read(tmp_path, skip_bad=True)] == ["good.wav"]
        assert "Left out, since data.skip_bad=true: 1 (silent.wav); kept: 1." in caplog.text
        write_recording(tmp_path / "mute.wav")
        write_recording(tmp_path / "blank.wav", " ")
        write_recording(tmp_path / "wordy.wav", "a" * 30)
        write_recording(tmp_path / "long.wav", "one", seconds=1.2)
        write_recording(tmp_path / "torn.wav", "<|0.00|> a<|0.50|><|0.40|> b<|1.10|>", seconds=1.2)
        write_recording(tmp_path / "foreign.wav")
        (tmp_path / "lines.jsonl").write_text(
            "\n".join(
                [
                    '{"path": "foreign.wav", "text": "un", "language": "fr"}',
                    '{"path": "gone.wav", "text": "x"}',
                    '{"path": "good.wav"',
                ]
            )
        )
        assert [sample.key for sample in _read(tmp_path, skip_bad=True, long="split")] == ["good.wav"]
        assert "Left out, since data.skip_bad=true: 9 (" in caplog.text
        with pytest.raises(DataError, match=r"9 errors in 8 .* or set data\.skip_bad=true to leave out") as caught:
            _read(tmp_path)
        (tmp_path / "good.wav").unlink()
        with pytest.raises(DataError) as caught:
            _read(tmp_path, skip_bad=True)
        assert "data.skip_bad" not in str(caught.value)

    def test_recordings_with_contradictions_are_left_out(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "a.wav")
        write_recording(tmp_path / "b.wav", "two")
        lines = [json.dumps({"path": "a.wav", "text": text}) for text in ("x", "y", "x")]
        (tmp_path / "lines.jsonl").write_text("\n".join(lines))
        assert [sample.key for sample in _read(tmp_path, skip_bad=True)] == ["b.wav"]

    def test_warnings_name_files_that_are_not_used(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for name in ("a.wav", "a.flac", "in/b.wav"):
            write_recording(tmp_path / name, "one")
        for name in ("c.wma", "in/D.APE", "c.txt", "in/e.txt"):
            (tmp_path / name).write_text("one")
        assert len(_read(tmp_path)) == 3
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert warnings == [
            "Left out recordings of a format that is not read: 2 (c.wma, in/D.APE). Convert them to wav or flac to use "
            "them.",
            "Recordings that share a name, and with it a transcript file: 1 (a.flac and a.wav).",
            "Transcript files that belong to none of the recordings, not used: 2 (c.txt, in/e.txt).",
        ]

    @pytest.mark.parametrize(
        ("line", "error"),
        [
            ("{}", "lines.jsonl, line 1: names no file"),
            (r'{"path": "a.wav", "text": "one \ud83d"}', "lines.jsonl, line 1: holds half a character"),
            ("[1", "lines.jsonl, line 1: is no JSON object"),
            ("[" * 100_000, "lines.jsonl, line 1: holds brackets in brackets too deep"),
            ('{"path": "b.wav", "text": "x"}', "lines.jsonl, line 1: there is no recording b.wav"),
            ('{"path": "a.wav"}', "lines.jsonl, line 1: has no transcript"),
            ('{"path": "a.wav", "text": "x", "task": "sing"}', "asks for the task 'sing'"),
            ('{"path": "a.wav", "text": "x", "language": "fr"}', "tiny base has no token for fr, only for en, de"),
            ('{"path": "a.wav", "text": "x"}\n{"path": "a.wav", "text": "y"}', "say different things"),
        ],
    )
    def test_lines_of_a_table(self, tmp_path: Path, line: str, error: str) -> None:
        write_recording(tmp_path / "a.wav")
        (tmp_path / "lines.jsonl").write_text(line)
        with pytest.raises(DataError) as raised:
            _read(tmp_path)
        assert error in str(raised.value)


def test_long_recordings_are_decoded_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = np.stack([chirp(2.0), chirp(2.0)[::-1]], axis=1)
    soundfile.write(tmp_path / "a.wav", sound, RATE)
    whole = {rate: audio.decode(tmp_path / "a.wav", rate) for rate in (RATE, RATE // 2)}
    facts = audio.check(tmp_path / "a.wav", 10)
    monkeypatch.setattr(audio, "_BLOCK_SAMPLES", 1000)
    monkeypatch.setattr(audio, "_LONGEST_WHOLE", 1000)
    assert audio.check(tmp_path / "a.wav", 10) == facts
    np.testing.assert_array_equal(audio.decode(tmp_path / "a.wav", RATE), whole[RATE])
    # The resampler works on pieces as on the whole.
    np.testing.assert_allclose(audio.decode(tmp_path / "a.wav", RATE // 2), whole[RATE // 2], atol=1e-6)


def test_a_header_that_promises_hours_costs_nothing(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", chirp(0.5), RATE)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    # 36 bits of STREAMINFO hold the number of samples. RFC 9639, section 8.2.
    data[21:26] = (int.from_bytes(data[21:26], "big") & ~(2**36 - 1) | 3 * 3600 * RATE).to_bytes(5, "big")
    (tmp_path / "a.flac").write_bytes(data)
    with pytest.raises(audio.RecordingError, match=r"breaks off after 0\.5 of 10800\.0 s|cannot be decoded"):
        audio.check(tmp_path / "a.flac", 4 * 3600)


class TestLong:
    TEXT = "<|0.10|> one<|0.60|><|0.70|> two<|1.00|><|1.10|> three<|1.80|>"

    def test_split_at_timestamps(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "a.wav", self.TEXT, seconds=1.9)
        first, second = _read(tmp_path, long="split")
        assert (first.key, first.transcript) == ("a.wav@0.10", "<|0.00|> one<|0.50|><|0.60|> two<|0.90|>")
        assert (second.start_s, second.duration_s) == (1.1, pytest.approx(0.7))
        (view,) = RECORDINGS.open(second, RecordingDataConfig()).waveforms
        start = round(1.1 * RATE)
        np.testing.assert_allclose(view.numpy(), chirp(1.9)[start : start + len(view)], atol=1e-4)

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("one two", "its transcript has no timestamps"),
            ("<|0.00|> one<|1.50|>", "more than 1 s apart"),
            ("<|0.80|> one<|0.20|>", "out of order"),
            ("<|0.00|> one<|0.50|><|2.00|> two<|2.90|>", "its last timestamp is 2.90"),
        ],
    )
    def test_what_cannot_be_split_is_refused(self, tmp_path: Path, text: str, error: str) -> None:
        write_recording(tmp_path / "a.wav", text, seconds=1.9)
        with pytest.raises(DataError, match=error):
            _read(tmp_path, long="split")

    def test_slow_views_count(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "a.wav", "one", seconds=0.9)
        with pytest.raises(DataError, match=r"is 0.9 s long, and at most 0.8 s can be used"):
            _read(tmp_path, speeds=(1.0, 0.8))

    def test_joined_segments_are_as_few_as_can_be(self) -> None:
        pieces = transcripts.segments(self.TEXT)
        assert [len(group) for group in transcripts.join(pieces, 0.9)] == [2, 1]
        assert [len(group) for group in transcripts.join(pieces, 5.0)] == [3]


def test_report_and_previews(tmp_path: Path) -> None:
    write_recording(tmp_path / "a.wav", "one two")
    write_recording(tmp_path / "b.wav", "one two", seconds=0.7)
    samples = _read(tmp_path)
    report = RECORDINGS.describe(samples)
    assert (report.num_words, report.longest, report.same_transcript) == (4, ("b.wav", 0.7), (("a.wav", "b.wav"),))
    assert RECORDINGS.largest(samples) == (round(0.7 * RATE), 7)
    (request,) = RECORDINGS.previews(samples, PreviewConfig(prompts=("b.wav",)))
    assert request.sample and request.sample.key == "b.wav"
    with pytest.raises(ConfigError, match=r'no recording c.wav \(did you mean "[ab].wav"'):
        RECORDINGS.previews(samples, PreviewConfig(prompts=("c.wav",)))


class TestCorpora:
    """Layouts in which speech is published."""

    def test_common_voice(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for name in ("a", "b", "c", "d"):
            write_recording(tmp_path / "clips" / f"{name}.mp3")
        head = "client_id\tpath\tsentence\tup_votes\tlocale"
        rows = {
            "train": ['x\ta.mp3\tSay "one', '\tb.mp3\t"""Two"" she said"\t\t'],
            "test": ["x\tc.mp3\tthree\t2\ten"],
            "validated": ["x\ta.mp3\tsomething else\t2\ten", "x\td.mp3\tfour\t2\tde"],
        }
        for name, lines in rows.items():
            (tmp_path / f"{name}.tsv").write_text("\n".join([head, *lines, ""]), encoding="utf-8")
        transcripts = [(sample.key, sample.transcript) for sample in _read(tmp_path)]
        assert transcripts == [("clips/a.mp3", 'Say "one'), ("clips/b.mp3", '"Two" she said')]
        assert "left out what belongs to other splits: test (1 files)" in caplog.text
        assert "do not stand in train.tsv: 2 (clips/c.mp3, clips/d.mp3)" in caplog.text
        (sample,) = _read(tmp_path, split="test")
        assert (sample.transcript, sample.language) == ("three", "en")
        assert [sample.transcript for sample in _read(tmp_path, split="validated")] == ["something else", "four"]
        assert [sample.key for sample in _read(tmp_path, split="all")] == [f"clips/{name}.mp3" for name in "abc"]
        (tmp_path / "train.tsv").unlink()
        with pytest.raises(DataError, match=r"validated\.tsv is read with data\.split set to its name"):
            _read(tmp_path)
        with pytest.raises(DataError, match=r'data\.split=tset: .* no split of this name \(did you mean "test"'):
            _read(tmp_path, split="tset")

    def test_librispeech(self, tmp_path: Path) -> None:
        for split in ("train-clean-100", "dev-clean"):
            chapter = tmp_path / split / "84" / "121"
            for number in (0, 1):
                write_recording(chapter / f"84-121-000{number}.flac")
            (chapter / "84-121.trans.txt").write_text("84-121-0000 ONE TWO\n84-121-0001 THREE'S A CROWD\n")
        for settings in ({}, {"split": "dev"}, {"split": "dev-clean"}):
            assert [sample.transcript for sample in _read(tmp_path, **settings)] == ["ONE TWO", "THREE'S A CROWD"]
        assert len(_read(tmp_path, split="all")) == 4

    def test_ljspeech(self, tmp_path: Path) -> None:
        write_recording(tmp_path / "wavs" / "LJ001-0001.wav")
        (tmp_path / "metadata.csv").write_text('LJ001-0001|"Part 1, it|"Part one, it\n', encoding="utf-8")
        assert [sample.transcript for sample in _read(tmp_path)] == ['"Part one, it']

    def test_held_out_folders_and_tables_are_left_out_and_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("train/a", "test/b", "validation/c", "speakers/test.x", "val"):
            write_recording(tmp_path / f"{name}.wav", "one")
        table = "file_name,text\ntrain/a.wav,one\ntest/b.wav,one\n"
        (tmp_path / "metadata.csv").write_text(table)
        assert [sample.key for sample in _read(tmp_path)] == ["speakers/test.x.wav", "train/a.wav", "val.wav"]
        assert "test (2 files), validation (2 files)" in caplog.text
        assert [sample.key for sample in _read(tmp_path, split="test")] == ["test/b.wav"]
        assert len(_read(tmp_path, split="all")) == 5
        assert len(_read(tmp_path / "test")) == 1
        for name in ("train/a", "speakers/test.x", "val"):
            (tmp_path / f"{name}.wav").unlink()
        with pytest.raises(DataError, match="holds only splits that are usually kept to test with"):
            _read(tmp_path)

    @pytest.mark.parametrize("form", ["splits", "parquet", "parquet of another program"])
    def test_rows(self, tmp_path: Path, form: str) -> None:
        datasets = pytest.importorskip("datasets")
        path = write_recording(tmp_path / "a.wav")
        named = "a.wav" if form == "parquet of another program" else str(path)
        cells = [{"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": named}]
        table = datasets.Dataset.from_dict({"audio": cells, "sentence": ["one", "two"], "lang": ["English", "de_DE"]})
        typed = table.cast_column("audio", datasets.Audio(decode=False))
        folder = tmp_path
        if form == "splits":
            folder = tmp_path / "saved"
            datasets.DatasetDict({"train": typed, "test": typed.select([0])}).save_to_disk(str(folder))
        else:
            (typed if form == "parquet" else table).to_parquet(str(folder / "train-00000-of-00001.parquet"))
            typed.select([0]).to_parquet(str(folder / "test-00000-of-00001.parquet"))
        info = replace(INFO, find_language=lambda name: {"English": "en", "de_DE": "de"}[name])

        def read(**settings: object) -> list[AudioText]:
            return RECORDINGS.read(RecordingDataConfig(path=str(folder), **settings), info)  # type: ignore[arg-type]

        samples = read()
        assert [(sample.transcript, sample.language) for sample in samples] == [("one", "en"), ("two", "de")]
        assert len(RECORDINGS.open(samples[1], RecordingDataConfig()).waveforms[0]) == RATE // 2
        assert [sample.transcript for sample in read(split="test")] == ["one"]
        with pytest.raises(DataError, match="has no split of this name"):
            read(split="other")

    def test_damaged_and_foreign_tables(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
        with pytest.raises(DataError, match="cannot be read as a table of recordings"):
            _read(tmp_path)
        datasets.Dataset.from_dict({"text": ["one"]}).to_parquet(str(tmp_path / "a.parquet"))
        with pytest.raises(DataError, match="has the columns text; the recordings must stand in one named file_name"):
            _read(tmp_path)


class TestContainers:
    """What phones and browsers write."""

    FORMS = (("m4a", "ipod", "aac"), ("mp4", "mp4", "aac"), ("webm", "webm", "libopus"), ("aac", "adts", "aac"))

    @pytest.mark.parametrize(("ending", "form", "codec"), FORMS)
    def test_sounds_as_it_did(self, tmp_path: Path, ending: str, form: str, codec: str) -> None:
        av = pytest.importorskip("av")
        path = tmp_path / f"a.{ending}"
        with av.open(str(path), "w", format=form) as container:
            stream = container.add_stream(codec, rate=48000, layout="stereo")
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(chirp(0.5, rate=48000, channels=2).T), format="fltp", layout="stereo"
            )
            frame.sample_rate = 48000
            container.mux([*stream.encode(frame), *stream.encode(None)])
        path.with_suffix(".txt").write_text("one")
        (sample,) = _read(tmp_path)
        (view,) = RECORDINGS.open(sample, RecordingDataConfig()).waveforms
        expected = chirp(0.5)
        late = int(np.argmax(np.correlate(view.numpy()[:9000], expected[:6000], "valid")))
        length = min(len(view) - late, len(expected)) - 200
        assert np.corrcoef(view.numpy()[late : late + length], expected[:length])[0, 1] > 0.99
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(DataError, match=rf"a\.{ending}: (breaks off|cannot be decoded|holds)"):
            _read(tmp_path)

    def test_without_the_package_its_name_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        write_recording(tmp_path / "a.wav", "one")
        (tmp_path / "b.M4A").write_bytes(b"\0\0\0\x1cftypM4A more")
        (tmp_path / "b.txt").write_text("two")
        with pytest.raises(
            DataError, match=r"b\.M4A: is MP4, WebM or AAC\. .* needs the package av, .* pip install av"
        ):
            _read(tmp_path)
        assert [sample.key for sample in _read(tmp_path, skip_bad=True)] == ["a.wav"]
