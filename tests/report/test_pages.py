from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.core.errors import ConfigError, DataError
from lora_diffusion.core.evidence import SampleLoss
from lora_diffusion.core.samples import Request
from lora_diffusion.evaluation.harness import Comparison, Condition, PromptGrid
from lora_diffusion.evaluation.results import BASE, Case, Evaluation, Table, to_csv
from lora_diffusion.evaluation.select import choose
from lora_diffusion.evaluation.statistics import MeanWithError
from lora_diffusion.report import comparison_page, plots, rendering
from lora_diffusion.report.quickstart_page import write_quickstart_page
from lora_diffusion.report.rendering import Album, number
from lora_diffusion.report.report_page import Training, write_report
from lora_diffusion.report.sections import Findings, Shots
from tests.evaluation.sample import STEPS, WEIGHTS, make_sample

LOSSES = [{"step": float(step), "loss": 1 / step} for step in range(1, 30)]


class Page(HTMLParser):
    """What a page refers to, its headings, and its images without a text for those who do not see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: list[str] = []
        self.ids: list[str] = []
        self.levels: list[int] = []
        self.num_images, self.num_mute, self.num_plots = 0, 0, 0
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.ids += [own["id"] or ""] if "id" in own else []
        target = own.get("src") or own.get("href") or own.get("xlink:href") or ""
        if tag == "a" and target.startswith("#"):
            self.anchors.append(target[1:])
        elif target and not target.startswith(("data:", "#")):
            self.links.append(target)
        if tag == "img" and "src" in own:
            self.num_images += 1
            self.num_mute += not own.get("alt")
        if tag == "svg":
            self.num_plots += 1
            self.num_mute += not own.get("aria-label")
        if re.fullmatch(r"h[1-6]", tag):
            self.levels.append(int(tag[1]))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    folder = tmp_path_factory.mktemp("sample")
    return folder, make_sample(folder)


def findings(sample: tuple[Path, Evaluation]) -> Findings:
    folder, evaluation = sample
    return Findings(evaluation, folder, choose(evaluation), Table(evaluation))


def losses(folder: Path) -> list[SampleLoss]:
    image = str(folder / "training" / "0.png")
    return [
        SampleLoss("good.png", image, "a <good> caption", 0.9, 0.2),
        SampleLoss("wrong.png", image, "a car", 1.1, -0.1),
        SampleLoss("gone.png", str(folder / "gone.png"), "gone", 1.0, 0.1),
    ]


@pytest.fixture(scope="module")
def written(sample: tuple[Path, Evaluation], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    training = Training(LOSSES, losses(sample[0]), {"train.max_steps": "<300>"})
    return write_report(
        tmp_path_factory.mktemp("page") / "report.html",
        title="A <title>",
        findings=findings(sample),
        training=training,
        chosen_file="run/x.safetensors",
    )


def test_page_needs_no_other_file_and_no_network(written: tuple[Path, ...]) -> None:
    html = written[0].read_text()
    shown = Page(html)
    assert shown.links == ["report.json", "report.csv"]
    assert [path.name for path in written] == ["report.html", *shown.links]
    assert "http" not in html.replace("http://www.w3.org/", "")
    assert not re.search(r"@import|url\((?!#)", html)


def test_page_is_told_to_those_who_do_not_see_it(written: tuple[Path, ...]) -> None:
    shown = Page(written[0].read_text())
    assert shown.num_mute == 0
    assert shown.num_images > 50
    assert shown.levels[0] == 1
    assert all(after - before <= 1 for before, after in zip(shown.levels, shown.levels[1:], strict=False))
    assert set(shown.anchors) <= set(shown.ids)
    assert {"choice", "candidates", "curves", "grid-1", "prompts", "training", "settings"} <= set(shown.anchors)
    assert len(shown.ids) == len(set(shown.ids))


def test_page_shows_choice_scores_and_warnings(written: tuple[Path, ...], sample: tuple[Path, Evaluation]) -> None:
    html, choice = written[0].read_text(), findings(sample).choice
    assert choice
    assert "A &lt;title&gt;" in html
    assert "&lt;300&gt;" in html
    assert all(sentence in html for sentence in choice.sentences)
    assert all(warning in html for warning in (*choice.warnings, *sample[1].warnings))
    assert "1 comparison that these images cannot decide" in html
    assert "about 4,300" in html
    assert number(choice.score.likeness) in html
    assert "<code>x.safetensors</code>" in html
    assert sample[1].candidates[1].sha256 not in html  # hashes are those of the adapters, told below
    assert all(file.sha256 in html for file in sample[1].references)


def test_numbers_beside_the_page_are_those_of_the_evaluation(
    written: tuple[Path, ...], sample: tuple[Path, Evaluation]
) -> None:
    values = json.loads(written[1].read_text())
    assert values["evaluation"]["seeds"] == list(sample[1].seeds)
    assert values["choice"]["candidate"] == "step-000100@1.5"
    assert values["training"]["losses"][1]["caption_help"] == -0.1
    rows = list(csv.DictReader(io.StringIO(written[2].read_text())))
    assert len(rows) == len(sample[1].scores)


def test_suspicious_training_images_come_first_and_lost_ones_are_said(written: tuple[Path, ...]) -> None:
    html = written[0].read_text()
    table = html[html.index('class="losses"') :]
    assert table.index("wrong.png") < table.index("gone.png") < table.index("good.png")
    assert "(gone)" in table
    assert "a &lt;good&gt; caption" in table
    assert re.findall(r'<li class="chosen">\s*<img [^>]*alt="(.*?)"', table) == ["wrong.png"]


def test_each_image_finds_that_of_the_base(written: tuple[Path, ...]) -> None:
    tags = re.findall(r'<figure class="shot[^"]*" data-pair="([^"]*)" data-role="([^"]*)">', written[0].read_text())
    bases = {pair for pair, role in tags if role == "base"}
    assert {pair for pair, _ in tags if pair} == bases
    assert sum(role == "chosen" for _, role in tags) > 8


def test_curves_are_over_checkpoints_and_weights(written: tuple[Path, ...]) -> None:
    html = written[0].read_text()
    section = html[html.index('id="curves"') : html.index('id="grid-1"')]
    assert re.findall(r"<h3>(.*?)</h3>", section) == ["Over checkpoints", "Over weights"]
    labels = [f"weight {weight:g}" for weight in WEIGHTS] + [f"step {step}" for step in STEPS]
    assert re.findall(r"<li style=[^>]*>(.*?)</li>", section) == labels
    assert section.count("<svg") == 2 * 5


def test_evaluation_without_references_has_no_choice_but_a_page(
    sample: tuple[Path, Evaluation], tmp_path: Path
) -> None:
    folder, evaluation = sample
    bare = dataclasses.replace(
        evaluation,
        candidates=evaluation.candidates[:2],
        scores=[s for s in evaluation.scores if s.metric == "clip_text"],
        metrics=evaluation.metrics[:1],
    )
    files = write_report(tmp_path / "r.html", title="x", findings=Findings(bare, folder, None, Table(bare)))
    shown = Page(files[0].read_text())
    assert "choice" not in shown.anchors
    assert "candidates" in shown.anchors


def test_run_without_evaluation_has_a_page(tmp_path: Path) -> None:
    files = write_report(tmp_path / "r.html", title="x", training=Training(LOSSES))
    assert [path.name for path in files] == ["r.html", "r.json"]
    assert Page(files[0].read_text()).num_plots == 1


def test_images_shrink_until_the_page_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    album, noise = Album(), Image.effect_noise((600, 300), 80)
    for index in range(4):
        album.add(str(index), noise)
    album.add("0", noise)
    monkeypatch.setattr(rendering, "_PAGE_BYTES", 60_000)
    album.develop()
    total = sum(len(album.url(str(index))) for index in range(4)) + len(album.url("0"))
    assert 20_000 < total < 60_000 * 1.4


def test_plots_take_their_colours_from_the_page() -> None:
    line = plots.Curve("a", [1, 2], [0.1, 0.2], [0.0, 0.1], [0.2, 0.3])
    for svg in (plots.curves("x & y", "step", [line], {"base": 0.1}), plots.loss(LOSSES)):
        assert "var(--series-1)" in svg
        assert not re.search(r"#[0-9a-f]{6}", svg)
        assert "DejaVu" not in svg
        assert 'pt"' not in svg.split(">", 1)[0]
    assert "x &amp; y" in plots.curves("x & y", "step", [line], {})


def test_numbers_are_written_for_people() -> None:
    assert [number(0.12345), number(-1.0), number(0.5, "+"), number(float("nan"))] == [
        "0.123",
        "\N{MINUS SIGN}1.000",
        "+0.500",
        "\N{EN DASH}",
    ]


def test_quickstart_page_is_of_the_same_design(tmp_path: Path) -> None:
    images = (Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue"))
    conditions = ("base, with trigger", "adapter, with trigger", "base, without trigger", "adapter, without trigger")
    scores = {"clip_image": MeanWithError(0.5, 0.1), "clip_text": MeanWithError(0.25, 0.05)}
    rows = tuple(Condition(label, images, scores) for label in conditions)
    references = Condition("real pictures", (), {"clip_image": MeanWithError(0.9, 0.0)})
    cases = [Case(i, f"zwx {name}", name, name, "subject", "s") for i, name in enumerate(("cat", "dog"))]
    comparison = Comparison(PromptGrid(cases, (0,), Request("", 0)), rows, references, "builtin:emoji-clip")
    path = tmp_path / "r.html"
    training = Training(LOSSES, facts={"base": "x"})
    write_quickstart_page(
        path, title="Quick", comparison=comparison, num_rows=1, training=training, next_commands=["lora-diffusion x"]
    )
    html = path.read_text()
    shown = Page(html)
    assert shown.num_images == 4
    assert shown.num_mute == 0
    assert "0.500 ± 0.100" in html
    assert 'data-pair="0:True" data-role="base"' in html
    assert 'data-pair="0:True" data-role="chosen"' in html
    assert {"pictures", "scores", "training", "settings", "next"} <= set(shown.ids)


@pytest.fixture(scope="module")
def compared(
    sample: tuple[Path, Evaluation], tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[Path, ...], Evaluation]:
    other = tmp_path_factory.mktemp("other")
    second = make_sample(other, seed=1)
    entries = [
        comparison_page.Entry("one", findings(sample), Training(LOSSES, facts={"adapter.rank": "8", "same": "1"})),
        comparison_page.Entry("two", findings((other, second)), Training(facts={"adapter.rank": "16", "same": "1"})),
    ]
    return comparison_page.write_comparison(tmp_path_factory.mktemp("page") / "c.html", entries), second


def test_comparison_pairs_prompts_and_seeds(
    compared: tuple[tuple[Path, ...], Evaluation], sample: tuple[Path, Evaluation]
) -> None:
    files, second = compared
    html = files[0].read_text()
    shown = Page(html)
    assert shown.num_mute == 0
    assert [path.name for path in files[1:]] == ["c.json", "c-one.csv", "c-two.csv"] == shown.links
    one, two = findings(sample), findings((files[0].parent, second))
    names = one.shown.name, two.shown.name
    draws = [(c.index, s) for c in sample[1].cases if c.group != "prior" for s in sample[1].seeds]
    by_hand = [
        two.table.values(names[1], "clip_image")[draw] - one.table.values(names[0], "clip_image")[draw]
        for draw in draws
    ]
    assert number(sum(by_hand) / len(by_hand), "+") in html
    assert 'data-pair="0:0" data-role="base"' in html
    assert html.count('class="pair"') == len(sample[1].cases) * len(sample[1].seeds)


def test_comparison_shows_the_settings_that_differ(compared: tuple[tuple[Path, ...], Evaluation]) -> None:
    html = compared[0][0].read_text()
    table = html[html.index("Settings that differ") :]
    assert "adapter.rank" in table
    assert ">16<" in table
    assert "same" not in re.sub(r"<script>.*", "", table, flags=re.DOTALL)


def test_comparison_says_what_cannot_be_compared(sample: tuple[Path, Evaluation], tmp_path: Path) -> None:
    folder, evaluation = sample
    other = dataclasses.replace(
        evaluation,
        scorer={"clip": "another"},
        cases=[dataclasses.replace(case, prompt=f"other {case.prompt}") for case in evaluation.cases],
    )
    sides = [findings(sample), Findings(other, folder, None, Table(other))]
    entries = [comparison_page.Entry(name, side, Training()) for name, side in zip("ab", sides, strict=True)]
    html = comparison_page.write_comparison(
        tmp_path / "c.html", [*entries, comparison_page.Entry("c", None, Training())]
    )[0].read_text()
    for text in ("different scorers", "share no prompt", "c was not evaluated"):
        assert text in html
    with pytest.raises(DataError, match="Two of the folders are called a"):
        comparison_page.write_comparison(tmp_path / "d.html", [entries[0], entries[0]])


def _other(evaluation: Evaluation, folder: Path, **changes: object) -> comparison_page.Entry:
    own = dataclasses.replace(evaluation, **changes)  # type: ignore[arg-type]
    return comparison_page.Entry("other", Findings(own, folder, None, Table(own)), Training())


def _compared(sample: tuple[Path, Evaluation], path: Path, **changes: object) -> tuple[str, list[list[str]]]:
    """Returns the page that compares the sample with a changed one, and its table of differences."""
    folder, evaluation = sample
    one = comparison_page.Entry("one", Findings(evaluation, folder, None, Table(evaluation)), Training())
    files = comparison_page.write_comparison(path / "c.html", [one, _other(evaluation, folder, **changes)])
    return files[0].read_text(), json.loads(files[1].read_text())["differences"]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"seeds": (7, 8)}, "share no seed"),
        ({"cases": ()}, "share no prompt"),
    ],
)
def test_what_shares_nothing_does_not_differ_for_sure(
    sample: tuple[Path, Evaluation], tmp_path: Path, changes: dict[str, tuple[int, ...]], warning: str
) -> None:
    if "seeds" in changes:
        scores = [dataclasses.replace(s, seed=None if s.seed is None else s.seed + 7) for s in sample[1].scores]
        changes = {**changes, "scores": [s for s in scores if s.seed is not None]}  # type: ignore[dict-item]
    html, differences = _compared(sample, tmp_path, **changes)
    assert warning in html
    assert differences
    assert {tuple(cells[-2:]) for cells in differences} == {("\N{EN DASH}", "\N{EN DASH}")}


def test_images_are_paired_by_prompt_where_the_order_differs(sample: tuple[Path, Evaluation], tmp_path: Path) -> None:
    evaluation = sample[1]
    order = {case.index: len(evaluation.cases) - 1 - case.index for case in evaluation.cases}
    html, _ = _compared(
        sample,
        tmp_path,
        cases=[dataclasses.replace(c, index=order[c.index]) for c in reversed(evaluation.cases)],
        scores=[dataclasses.replace(s, case=order[s.case or 0]) for s in evaluation.scores],
    )
    found = re.findall(r'data-pair="([^"]*)" data-role="([^"]*)">\s*<img [^>]*alt="(.*?), (?:one|other), seed', html)
    prompts: dict[str, set[str]] = {}
    for pair, _role, prompt in found:
        prompts.setdefault(pair, set()).add(prompt)
    assert len(prompts) == len(evaluation.cases) * len(evaluation.seeds)
    assert all(len(own) == 1 for own in prompts.values())


def test_comparison_knows_references_and_bases_by_what_they_hold(
    sample: tuple[Path, Evaluation], tmp_path: Path
) -> None:
    references, base = sample[1].references, sample[1].base
    moved = [dataclasses.replace(file, path=f"elsewhere/{file.path}") for file in reversed(references)]
    assert "different references" not in _compared(sample, tmp_path, references=moved)[0]
    assert "different references: likeness to them cannot" in _compared(sample, tmp_path, references=references[1:])[0]
    assert "different bases" in _compared(sample, tmp_path, base=dataclasses.replace(base, source="x"))[0]
    told = (sample[0], dataclasses.replace(sample[1], base=dataclasses.replace(base, base_key="a")))
    for source, key, is_warned in (("x", "a", False), (base.source, "b", True), (base.source, "", False)):
        other = dataclasses.replace(base, source=source, base_key=key)
        assert ("different bases" in _compared(told, tmp_path, base=other)[0]) == is_warned


@pytest.mark.parametrize("name", ["evaluation", "selection", "plan", "scores"])
def test_numbers_are_not_written_over_other_files(sample: tuple[Path, Evaluation], tmp_path: Path, name: str) -> None:
    others = {tmp_path / "evaluation.json": '{"version": 1}', tmp_path / "selection.json": '{"file": ""}'}
    others |= {tmp_path / "plan.json": "[]", tmp_path / "scores.csv": to_csv(sample[1].scores)}
    for path, text in others.items():
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"would be written over .*{name}"):
        write_report(tmp_path / f"{name}.html", title="x", findings=findings(sample))
    entries = [comparison_page.Entry(side, None, Training()) for side in "ab"]
    if name != "scores":
        with pytest.raises(ConfigError, match=f"would be written over .*{name}.json"):
            comparison_page.write_comparison(tmp_path / f"{name}.html", entries)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == others


def test_pages_are_written_anew(sample: tuple[Path, Evaluation], tmp_path: Path) -> None:
    for _ in range(2):
        write_report(tmp_path / "r.html", title="x", training=Training(LOSSES))
        _compared(sample, tmp_path)
    (tmp_path / "r.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"over .*r\.csv"):
        write_report(tmp_path / "r.html", title="x", findings=findings(sample))


def test_a_single_image_has_a_page_without_intervals(sample: tuple[Path, Evaluation], tmp_path: Path) -> None:
    folder, evaluation = sample
    few = dataclasses.replace(
        evaluation, cases=evaluation.cases[:1], scores=[s for s in evaluation.scores if (s.case, s.seed) == (0, 0)]
    )
    files = write_report(tmp_path / "r.html", title="x", findings=Findings(few, folder, None, Table(few)))
    assert "nan" not in re.sub(r"base64,[^\"]*", "", files[0].read_text())
    entries = [comparison_page.Entry(name, Findings(few, folder, None, Table(few)), Training()) for name in "ab"]
    cells = json.loads(comparison_page.write_comparison(tmp_path / "c.html", entries)[1].read_text())["differences"][0]
    assert cells[-2:] == ["+0.000 (\N{EN DASH} to \N{EN DASH})", "cannot tell"]


def test_page_tells_what_it_was_made_with_and_prints_unfolded(sample: tuple[Path, Evaluation], tmp_path: Path) -> None:
    folder, evaluation = sample
    told = dataclasses.replace(evaluation, versions={"torch": "9.8", "open_clip_torch": "7.6"})
    files = write_report(tmp_path / "r.html", title="x", findings=Findings(told, folder, None, Table(told)))
    html = files[0].read_text()
    assert f"lora-diffusion {told.lora_diffusion}, torch 9.8, open_clip_torch 7.6" in html
    assert "<details><summary>" in html
    assert "beforeprint" in html


def test_training_images_come_by_the_worse_of_two_ranks(tmp_path: Path) -> None:
    shown = {"usual": (1.0, 0.3), "odd": (3.0, 0.4), "wrong": (0.9, -0.5), "harder": (1.5, 0.2), "fine": (0.8, 0.5)}
    listed = [SampleLoss(key, "", f"a picture called {key}", loss, gain) for key, (loss, gain) in shown.items()]
    html = write_report(tmp_path / "r.html", title="x", training=Training(losses=listed))[0].read_text()
    assert re.findall(r"a picture called (\w+)", html) == ["wrong", "odd", "harder", "usual", "fine"]
    assert "the worse of an image's two ranks" in html.replace("&#39;", "'")


def test_missing_images_are_left_out(sample: tuple[Path, Evaluation], tmp_path: Path) -> None:
    evaluation = sample[1]
    bare = Findings(evaluation, tmp_path, choose(evaluation), Table(evaluation))
    assert Shots(bare, Album()).find(BASE, evaluation.cases[0], 0, "base") is None
    files = write_report(tmp_path / "r.html", title="x", findings=bare)
    assert Page(files[0].read_text()).num_images <= 8


def test_running_mean_of_a_falling_loss_stays_inside_its_plot() -> None:
    """It lags behind the loss, so that it lies above nearly all of it."""
    svg = plots.loss([{"step": step, "loss": 1 / step} for step in range(1, 30)])
    *_, mean = re.findall(r'<path d="([^"]*)" clip-path', svg)
    top = float(re.findall(r'<clipPath.*?<rect x="\S+" y="(\S+)"', svg, re.DOTALL)[0])
    heights = [float(height) for height in re.findall(r"[ML] \S+ (\S+)", mean)]
    assert heights
    assert sum(height < top for height in heights) <= 0.05 * len(heights)


def test_numbers_at_a_curve_keep_their_sign() -> None:
    values = [-0.010, -0.002, 0.0]
    svg = plots.curves("leak", "weight", [plots.Curve("step 8", [0.5, 0.7, 1.0], values, values, values)], {})
    ticks = re.findall(r'text-anchor: end[^>]* x="([^"]*)"[^>]*>([^<]*)<', svg)
    assert "\N{MINUS SIGN}0.010" in [text for _, text in ticks]
    assert all(float(right) >= 9 * 0.6 * len(text) for right, text in ticks)


def test_labels_do_not_lie_on_each_other_where_real_images_are_far_above() -> None:
    places = {"chosen": (0.40, 0.02, "chosen"), "a": (0.46, 0.010, "frontier"), "b": (0.465, 0.015, "frontier")}
    points = [plots.Point(label, text, likeness, kind, label) for label, (text, likeness, kind) in places.items()]
    assert {"a", "b"} <= set(re.findall(r">(\w+)</text>", plots.frontier(points, ("text", "likeness"), None)))
    assert "b" not in re.findall(r">(\w+)</text>", plots.frontier(points, ("text", "likeness"), 0.5))
