from __future__ import annotations

from dataclasses import replace

import pytest

from lora_diffusion.core.files import read_json
from lora_diffusion.workflows._base_and_adapters import find_family, read_adapter
from lora_diffusion.workflows.bases import find_model
from scripts.measure.peers import comparison, compositions
from scripts.measure.peers.sample_sets import SAMPLE_SETS
from scripts.measure.peers.tables import markdown, summary
from scripts.measure.peers.trainings import BASE_MODEL, OURS, Trainings

TINY = comparison.Sampling(num_draws=1, num_prompts=2, num_denoising_steps=2)
TEXT_TO_IMAGE, DREAMBOOTH = "text-to-image-r4-1e-3", "dreambooth-text-r8-1e-3"


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """Shared, so that each adapter is trained once."""
    changes = ("train.batch_size=2", "train.warmup_steps=0")
    return Trainings(tmp_path_factory.mktemp("peers"), 2, changes, num_class_images=2)


@pytest.mark.parametrize("name", list(SAMPLE_SETS))
def test_prompts_ask_with_the_trigger_and_others_do_not(name: str) -> None:
    one = SAMPLE_SETS[name]
    cases = one.cases()
    asked, others = ([case for case in cases if case.is_control is control] for control in (False, True))
    assert len(asked) >= 8
    assert len(others) == 8
    assert [case.index for case in cases] == list(range(len(cases)))
    assert all(one.trigger in case.prompt and one.trigger not in case.scoring_caption for case in asked)
    assert not any(one.trigger in case.prompt for case in others)
    assert one.subject or {case.prompt for case in asked} == {
        path.read_text("utf-8").strip() for path in one.references.glob("*.txt")
    }


def test_peers_are_compared_once_and_found_again(trainings: Trainings) -> None:
    page = comparison.measure(trainings, ["octopus"], [TEXT_TO_IMAGE, DREAMBOOTH], [0], TINY)
    numbers = read_json(trainings.output / "peers.json")
    methods = numbers["sets"]["octopus"]["methods"]
    assert next(iter(methods)) == OURS
    assert len(methods) == 5
    assert methods[f"{TEXT_TO_IMAGE}, equal steps"]["steps"] == methods[OURS]["steps"] == 2
    assert methods[f"{DREAMBOOTH}, equal time"]["cpu_s"] >= methods[OURS]["cpu_s"]
    difference = numbers["differences"]["all concepts"][f"{TEXT_TO_IMAGE}, equal steps"]["clip_text"]
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert f"| {TEXT_TO_IMAGE}, equal time |" in markdown(numbers)
    # Five methods and the base, two prompts, and the two real pictures.
    assert page.read_text("utf-8").count("<img") == 6 * 2 + 2

    one, files = SAMPLE_SETS["octopus"], sorted((trainings.output / "octopus").glob("*.safetensors"))
    changed = {path: path.stat().st_mtime_ns for path in files}
    found = trainings.of_set(one, [TEXT_TO_IMAGE, DREAMBOOTH], [0])
    assert {path: path.stat().st_mtime_ns for path in files} == changed
    assert {trained.path for trained in found} == set(files)

    # Another rank would be another adapter: the scale is alpha / rank, and 1 in the peers.
    model = find_model(BASE_MODEL)
    for trained in found[1:]:
        state = read_adapter(trained.path, find_family(model, None), model)
        assert all(adapter.alpha == adapter.rank for adapter in state.modules.values())
    parts = {key.part for key in read_adapter(found[-1].path, find_family(model, None), model).modules}
    assert parts == {"unet", "text_encoder"}


def test_compositions_are_live_in_one_file_and_cut(trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compositions, "PAIRS", [("octopus", "guitar")])
    monkeypatch.setattr(compositions, "_NUM_DRAWS", 1)
    (composed,) = compositions.compare_compositions(trainings, 0, 2)
    live, whole, cut, *alone = composed.scores.values()
    # The file holds the same change; its images differ by the rounding of sums.
    assert whole["clip_text"] == pytest.approx(live["clip_text"], abs=0.02)
    assert cut.keys() == live.keys()
    assert len(alone) == 2


def test_other_settings_train_again(trainings: Trainings) -> None:
    one = SAMPLE_SETS["octopus"]
    first = trainings.ours(one, 0)
    again = replace(trainings, num_steps=1).ours(one, 0)
    assert (first.num_steps, again.num_steps) == (2, 1)
    assert first.path == again.path


def test_tables_show_compositions_and_what_was_not_measured() -> None:
    pair = {"both live": {"clip_text": 0.25}, "composed": {"clip_text": 0.5}}
    text = markdown(summary([], {"octopus and guitar": pair}, ["match"]))
    assert "### octopus and guitar" in text
    assert "| both live | 0.250 |" in text
    assert "lacks it: match" in text
