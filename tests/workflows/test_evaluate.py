"""`lora-diffusion evaluate` on the tiny base: what it finds, and that nothing but its question decides it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import lora_diffusion as ld
from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.cli.main import main
from lora_diffusion.evaluation import results
from lora_diffusion.evaluation.results import Evaluation
from lora_diffusion.scoring.scorers import Scorers
from lora_diffusion.workflows import evaluate as workflow
from lora_diffusion.workflows.evaluate import EvaluationRequest
from tests.workflows.conftest import Commands, Killer

PROMPTS = """
subject:
  - a {trigger} {class}
  - a red {trigger} {class}
  - the {class} of {trigger}
leak:
  - a blue heart
"""
NUM_IMAGES = 4 * 2
"""Of each candidate: prompts by seeds."""
NUM_BESIDE_REFERENCES = 4
"""What the base generates for the captions of the references."""

Ask = Callable[..., Evaluation]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "mine.yaml"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def question(prompts: Path, run: Path, output: Path, *more: object) -> list[str]:
    options = ["evaluate", "--prompts", prompts, "--class", "cat", "--clip", "builtin:emoji-clip", "--output", output]
    options += ["--references", run.parent / "pictures", "--steps", 2, "--guidance", 3, "--seed", 0, "--seed", 1]
    return [str(word) for word in (*options, *more)]


@pytest.fixture(scope="module")
def done(tiny_base: Path, trained: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the checkpoints of a run, and of its file at two weights; shared, never changed."""
    output = tmp_path_factory.mktemp("done") / "evaluation"
    more = ["--run", trained, "--adapter", trained / "run.safetensors", "--weights", "0,1"]
    assert main(question(prompts, trained, output, *more)) == 0
    return output


def test_compares_checkpoints_files_and_weights_with_the_base(done: Path, trained: Path) -> None:
    actual = results.read(done)
    names = ["base", "run@0.0", "run@1.0", "step-000008@0.0", "step-000008@1.0"]
    assert [candidate.name for candidate in actual.candidates] == names
    assert actual.candidate("step-000008@1.0").step == 8
    assert actual.candidate("step-000008@1.0").file == str(trained / "checkpoints" / "step-000008")
    assert actual.base.architecture == "stable-diffusion-v1"
    assert actual.scorer == {"clip": "builtin:emoji-clip"}
    assert [case.prompt for case in actual.cases] == [
        "a sks style cat",
        "a red sks style cat",
        "the cat of sks style",
        "a blue heart",
    ]
    assert [case.scoring_caption for case in actual.cases][:2] == ["a cat", "a red cat"]
    measured = {metric.name for metric in actual.metrics}
    assert measured >= {"clip_text", "clip_image", "prior_drift", "prompt_leak", "diversity", "copying"}
    assert measured.isdisjoint({"dino_image", "aesthetic", "wer"})
    assert any("references are training images" in warning for warning in actual.warnings)
    assert actual.find("run@1.0", "prior_drift", "leak").mean > 0
    assert actual.find("base", "prior_drift").mean == pytest.approx(0, abs=1e-6)
    assert actual.find("run@1.0", "clip_text").count == 6


def test_images_depend_on_what_an_adapter_does_not_on_its_file(done: Path) -> None:
    """Weight 0 is the base; the last checkpoint is the adapter file that was written in float32."""
    actual = results.read(done)
    by_candidate = {
        name: {score.image for score in actual.scores if score.candidate == name and score.image}
        for name in (candidate.name for candidate in actual.candidates)
    }
    assert by_candidate["run@0.0"] == by_candidate["step-000008@0.0"] == by_candidate["base"]
    assert by_candidate["run@1.0"] == by_candidate["step-000008@1.0"] != by_candidate["base"]
    assert len(list((done / "pictures").iterdir())) == 2 * NUM_IMAGES + NUM_BESIDE_REFERENCES
    same = {"base", "run@0.0", "step-000008@0.0"}
    assert not any({open_.candidate, open_.other} <= same for open_ in actual.open_comparisons)


def test_stopped_continued_and_shared_evaluations_are_equal(
    killer: Killer, done: Path, trained: Path, prompts: Path, tmp_path: Path
) -> None:
    log = tmp_path / "killed.log"
    more = ["--run", str(trained), "--adapter", str(trained / "run.safetensors"), "--weights", "0,1"]
    stopped, shared = (question(prompts, trained, tmp_path / name, *more) for name in ("stopped", "shared"))
    assert killer.run(stopped, (f"{tmp_path}/stopped/pictures/[!.]*.png", 0, 0.0)) == -9, log.read_text()
    images = tmp_path / "stopped" / "pictures"
    # What was half-written when the process died has a name that starts with a dot, and is removed.
    there = {path: path.stat().st_mtime_ns for path in images.glob("[!.]*.png")}
    assert 0 < len(there) < 2 * NUM_IMAGES
    assert not (tmp_path / "stopped" / "evaluation.json").exists()
    assert killer.run(stopped) == 0, log.read_text()
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert not list(images.glob(".*"))
    assert killer.run(shared, num_processes=2) == 0, log.read_text()
    shares = [int(number) for number in re.findall(r"Generating (\d+) of \d+ images", log.read_text())]
    assert shares[-1] < 2 * NUM_IMAGES + NUM_BESIDE_REFERENCES
    for name in ("stopped", "shared"):
        for file in ("evaluation.json", "scores.csv"):
            assert (tmp_path / name / file).read_bytes() == (done / file).read_bytes(), f"{name} {file}"


def test_a_composition_shows_both_concepts_or_not(
    command: Commands, tiny_base: Path, trained: Path, tmp_path: Path
) -> None:
    adapter, images = trained / "run.safetensors", trained.parent / "pictures"
    prompts = tmp_path / "both.yaml"
    prompts.write_text("composition:\n  - a zwx in sks style\nsubject:\n  - a zwx\n", encoding="utf-8")
    options = ["evaluate", "--model", tiny_base, "--adapter", adapter, "--prompts", prompts, "--seed", 0, "--steps", 1]
    options += ["--clip", "builtin:emoji-clip", "--guidance", 1, "--metrics", "concepts_shown,clip_text"]
    concepts = ["--concept", f"style:sks style={images}", "--concept", f"subject:zwx={images}"]
    refused = command(*options, *concepts[:2], "--concept", f"subject:qvb={images}", "--output", tmp_path / "none")
    assert "no prompt holds the triggers of all concepts (sks style, qvb)" in refused.message
    command.good(*options, *concepts, "--output", tmp_path / "out")
    found = results.read(tmp_path / "out")
    metrics = {metric.name: metric for metric in found.metrics}
    if "concepts_shown" in metrics:
        assert "sks style above" in metrics["concepts_shown"].remark
        assert {score.prompt for score in found.scores if score.metric == "concepts_shown"} == {"a zwx in sks style"}
    else:
        assert any("concepts_shown is not measured" in warning for warning in found.warnings)
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2 * 2 + NUM_BESIDE_REFERENCES


def test_a_request_takes_texts_and_paths() -> None:
    folders = {"run": "run", "references": "r", "training": "t", "cache_path": "c"}
    texts = EvaluationRequest("out", "suite", adapters="a.safetensors", **folders)  # type: ignore[arg-type]
    paths = EvaluationRequest(
        Path("out"),
        "suite",
        adapters=[Path("a.safetensors")],  # type: ignore[list-item]
        run=Path("run"),
        references=Path("r"),
        training=Path("t"),
        cache_path=Path("c"),
        scorers={"dino": Path("d")},  # type: ignore[dict-item]
    )
    assert replace(paths, scorers={}) == texts
    assert texts.output_path == Path("out")
    assert texts.adapters == ("a.safetensors",)
    assert paths.scorers == {"dino": "d"}
    assert EvaluationRequest(Path("out"), ()).references is None
    assert replace(texts, metrics="clip_text", triggers="sks").triggers == ("sks",)


@pytest.mark.parametrize(
    ("clip", "is_warned"), [("openai/clip-vit-large-patch14", True), ("builtin:emoji-clip", False)]
)
def test_a_base_scored_by_its_own_text_encoder_is_warned_about(clip: str, is_warned: bool) -> None:
    warnings = workflow._warnings([], [], Scorers({"clip": clip}), DIFFUSION["sd1"])
    assert any("the very CLIP that scores" in warning for warning in warnings) == is_warned


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("asked") / "evaluation"


class TestAsked:
    """Small questions, each answered from the images of one folder."""

    @pytest.fixture
    def ask(self, command: Commands, tiny_base: Path, trained: Path, prompts: Path, output: Path) -> Callable[..., str]:
        def run(*more: object, code: int = 0) -> str:
            options = question(prompts, trained, output, "--model", tiny_base, *more)
            outcome = command(*options)
            assert outcome.code == code, outcome.err
            return outcome.out + outcome.message

        return run

    def test_compositions_and_json(self, ask: Callable[..., str], trained: Path) -> None:
        kohya, peft = trained / "run.safetensors", trained / "run.peft"
        said = ask("--adapter", f"{kohya}:0.25+{peft}:0.75", "--metrics", "clip_text", "--json")
        actual = json.loads(re.split("INFO|WARNING", said)[0])
        names = [candidate["name"] for candidate in actual["candidates"]]
        assert names == ["base", "run.safetensors:0.25+run.peft:0.75@1.0"]
        assert actual["candidates"][1]["weights"] == {"run.safetensors": 0.25, "run.peft": 0.75}
        assert actual["candidates"][1]["file"] is None
        assert {entry["path"] for entry in actual["adapters"].values()} == {str(kohya), str(peft)}
        assert [metric["name"] for metric in actual["metrics"]] == ["clip_text"]
        assert actual["failed"] == []

    def test_gates_decide_the_exit_code(self, ask: Callable[..., str], trained: Path) -> None:
        adapter = ("--adapter", trained / "run.safetensors", "--metrics", "clip_image,clip_text")
        ask(*adapter, "--assert", "clip_image>=-1", "--assert", "clip_text@run@1.0<=1")
        said = ask(*adapter, "--assert", "clip_image>=1.5", "--assert", "clip_text@base<=-1", code=1)
        assert "2 condition(s) of --assert do not hold" in said
        assert "clip_image>=1.5: run@1.0 has" in said
        assert "clip_text@base<=-1: base has" in said

    def test_as_a_library(self, tiny_base: Path, trained: Path, prompts: Path, output: Path) -> None:
        scores = ld.evaluate(
            str(tiny_base),
            adapters=[trained / "run.safetensors"],
            prompts=str(prompts),
            classes="cat",
            references=str(trained.parent / "pictures"),
            metrics=["clip_text", "diversity"],
            scorers={"clip": "builtin:emoji-clip"},
            num_steps=2,
            guidance=3.0,
            seeds=[0, 1],
            output_path=str(output),
        )
        assert list(scores.columns)[:4] == ["candidate", "step", "weight", "case"]
        means = scores.groupby(["candidate", "metric"]).value.mean()
        assert set(means.index) == {(name, m) for name in ("base", "run@1.0") for m in ("clip_text", "diversity")}
        assert scores[scores.metric == "clip_text"].seed.tolist() == [0, 1] * 6
        assert scores[scores.metric == "diversity"].seed.isna().all()
        kept = results.read(output)
        assert means["base", "clip_text"] == pytest.approx(kept.find("base", "clip_text").mean, abs=1e-6)


def test_all_errors_are_told_before_the_base_is_loaded(
    command: Commands, tiny_base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("lora_diffusion.families.stable_diffusion.family.StableDiffusion.load", refuse)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "0.png").write_text("no picture")
    options = ["evaluate", "--model", tiny_base, "--adapter", trained / "run.safetensors", "--adapter", "none:1"]
    options += ["--adapter", f"{trained / 'run.safetensors'}:1+{trained / 'run.safetensors'}:0.5"]
    options += ["--prompts", "dreambooth-object", "--references", bad, "--training", tmp_path / "nowhere"]
    options += [
        "--metrics",
        "clip_text,clip_imag,dino_image,wer",
        "--clip",
        "/no/such/clip",
        "--seed",
        -1,
        "--steps",
        1000,
    ]
    options += ["--guidance", 0, "--size", "17x16", "--weights", "1,nan", "--assert", "oops", "--output", bad]
    outcome = command(*options)
    assert outcome.code == 2
    assert outcome.out == ""
    for error in (
        "there is no file none",
        "names a file twice; name it once, with the sum of its weights",
        "give --class",
        "0.png",
        f"--training={tmp_path / 'nowhere'}: there is no such folder",
        'clip_imag\' among the metrics (did you mean "clip_image"',
        "--metrics dino_image needs",
        "--scorer dino=NAME",
        "--metrics wer scores texts",
        "The CLIP /no/such/clip cannot be loaded",
        "--seed -1",
        "--steps 1000",
        "--guidance 0",
        "--size 17x16",
        "--weights 1.0,nan",
        'assert "oops" is no condition',
        "holds other files",
    ):
        assert error in outcome.message, error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--adapter", "x"], "There is no base"),
        (["--model", "builtin:emoji"], "There is nothing to evaluate"),
        (["--run", "nowhere"], "is not a run folder"),
        (["--model", "builtin:emoji", "--scorer", "dino"], "names no scorer"),
        (["--model", "builtin:emoji", "--weights", "a,b"], "are no numbers"),
        (["--model", "builtin:emoji", "--guidance", "1", "--negative", "text"], "--negative does nothing"),
        (["--model", "builtin:emoji", "--scorer", "dinno=x"], "such a model; use one of"),
        (["--model", "builtin:emoji", "--scorer", "dino=x"], "--scorer dino=x does nothing"),
        (["--model", "builtin:emoji", "--class", "dog"], "'dog' does nothing: no prompt of"),
        (["--model", "builtin:emoji", "--trigger", "a", "--trigger", "b"], "'b' does nothing: no prompt of"),
        (["--model", "builtin:emoji", "--concept", "octopus=x"], "--concept octopus=x: is no concept; write subject:"),
        (["--model", "builtin:emoji", "--concept", "style:blob=nowhere"], "--concept=nowhere: there is no such folder"),
    ],
)
def test_missing_parts(command: Commands, prompts: Path, tmp_path: Path, arguments: list[str], reason: str) -> None:
    outcome = command("evaluate", "--prompts", prompts, "--class", "cat", "--output", tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert reason in outcome.message
