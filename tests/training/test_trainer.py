import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.config.schema import TrainConfig
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.errors import ConfigError, NonFiniteError, UnsupportedError
from lora_diffusion.training import checkpoint, optim
from lora_diffusion.training.hooks import EarlyStop, Hook, IntervalHook
from lora_diffusion.training.trainer import total_steps
from tests.training.toy import Toy, ToyBatches, moments


def read_metrics(run_path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_loss_falls_and_every_step_is_recorded(tmp_path: Path) -> None:
    toy = Toy(noise=0.0, dropout=0.0)
    trainer = toy.trainer(tmp_path, max_steps=60)
    trainer.fit(ToyBatches())
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics] == list(range(1, 61))
    assert [line["epoch"] for line in metrics[:11]] == [1] * 5 + [2] * 5 + [3]
    assert sum(line["loss"] for line in metrics[-5:]) < 0.5 * sum(line["loss"] for line in metrics[:5])
    assert all(line["samples"] == 2 and line["grad_norm"] > 0 for line in metrics)
    assert metrics[0]["half"] == pytest.approx(metrics[0]["loss"] / 2)
    assert trainer.step == 60


@pytest.mark.parametrize(("accumulation", "num_steps"), [(1, 10), (2, 6)])
def test_epochs_are_as_many_steps_as_their_batches_make(tmp_path: Path, accumulation: int, num_steps: int) -> None:
    batches = ToyBatches(num_items=10, batch_size=2, accumulation=accumulation)
    by_epochs, by_steps = Toy(), Toy()
    by_epochs.trainer(tmp_path / "a", epochs=2).fit(batches)
    by_steps.trainer(tmp_path / "b", max_steps=num_steps).fit(batches)
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
    assert len(read_metrics(tmp_path / "a")) == num_steps


def test_without_a_length_a_thousand_steps_are_made() -> None:
    assert total_steps(TrainConfig(), 5) == 1000


def test_steps_and_epochs_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of the two"):
        Toy().trainer(tmp_path, max_steps=3, epochs=2).fit(ToyBatches())


@pytest.mark.parametrize("num_items", [6, 5])
def test_accumulation_equals_one_big_batch(tmp_path: Path, num_items: int) -> None:
    """With five images the last batch holds one: it must weigh half as much as a full one."""
    small, big = Toy(noise=0.0, dropout=0.0), Toy(noise=0.0, dropout=0.0)
    small.trainer(tmp_path / "a", max_steps=3).fit(ToyBatches(num_items, batch_size=2, accumulation=3))
    big.trainer(tmp_path / "b", max_steps=3).fit(ToyBatches(num_items, batch_size=num_items))
    for name, value in small.weights().items():
        torch.testing.assert_close(value, big.weights()[name], rtol=1e-4, atol=1e-6)  # other order of sums
    losses = [[line["loss"] for line in read_metrics(tmp_path / run)] for run in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("batch_size", [4, 2])
def test_samples_weigh_as_the_batch_says(tmp_path: Path, batch_size: int) -> None:
    """A weight of 2 is the sample twice, a weight of 0 is none of it; equal weights change no bit."""

    def train(name: str, **batches: Any) -> tuple[Toy, list[float]]:
        toy = Toy(noise=0.0, dropout=0.0)
        toy.trainer(tmp_path / name, max_steps=3).fit(ToyBatches(accumulation=4 // batch_size, **batches))
        return toy, [line["loss"] for line in read_metrics(tmp_path / name)]

    plain, losses = train("plain", num_items=4, batch_size=batch_size)
    alike, same = train("alike", num_items=4, batch_size=batch_size, weights=[1.0] * 4)
    assert losses == same
    assert all(torch.equal(value, alike.weights()[name]) for name, value in plain.weights().items())

    weighted, actual = train("weighted", num_items=4, batch_size=batch_size, weights=[2.0, 2.0, 0.0, 0.0])
    few, expected = train("few", num_items=2, batch_size=2)
    assert actual == pytest.approx(expected, rel=1e-5)
    for name, value in weighted.weights().items():
        torch.testing.assert_close(value, few.weights()[name], rtol=1e-4, atol=1e-6)  # other order of sums


def test_resume_is_bit_for_bit_one_run(tmp_path: Path) -> None:
    batches = ToyBatches(num_items=9, batch_size=2, accumulation=2)
    whole, stopped, resumed = Toy(), Toy(), Toy()
    settings = {"max_steps": 11, "save_every_steps": 4, "warmup_steps": 2}
    expected = whole.trainer(tmp_path / "whole", **settings)
    expected.fit(batches)

    class Kill(Hook):
        def on_step(self, step: int) -> None:
            if step == 6:
                raise KeyboardInterrupt

        def on_checkpoint(self, path: Path, step: int) -> None:
            torch.randn(3)

    with pytest.raises(KeyboardInterrupt):
        stopped.trainer(tmp_path / "run", hooks=(Kill(),), **settings).fit(batches)
    assert len(read_metrics(tmp_path / "run")) == 6
    with (tmp_path / "run/metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')

    again = resumed.trainer(tmp_path / "run", **settings)
    with torch.no_grad():
        resumed.model[0].weight.zero_()
    assert again.resume(checkpoint.find_latest(tmp_path / "run")) == 4
    again.fit(batches)
    assert all(torch.equal(value, resumed.weights()[name]) for name, value in whole.weights().items())
    assert all(map(torch.equal, moments(again), moments(expected)))
    assert len(moments(again)) == 12
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    Toy().trainer(tmp_path, max_steps=3).fit(ToyBatches())
    toy = Toy()
    trainer = toy.trainer(tmp_path, max_steps=3)
    assert trainer.resume(checkpoint.find_latest(tmp_path)) == 3
    before = toy.weights()
    trainer.fit(ToyBatches())
    assert all(map(torch.equal, before.values(), toy.weights().values()))


def test_resume_without_a_checkpoint_starts_at_zero(tmp_path: Path) -> None:
    assert Toy().trainer(tmp_path).resume(checkpoint.find_latest(tmp_path)) == 0


def test_hooks_do_not_change_the_training(tmp_path: Path) -> None:
    drawn: list[int] = []

    def draw(step: int) -> None:
        torch.manual_seed(0)
        drawn.append(step)

    plain, watched = Toy(), Toy()
    plain.trainer(tmp_path / "a", max_steps=6).fit(ToyBatches())
    watched.trainer(tmp_path / "b", hooks=(IntervalHook(2, draw),), max_steps=6).fit(ToyBatches())
    assert drawn == [2, 4, 6]
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")


@pytest.mark.parametrize("save_every_steps", [2, 0])
def test_a_nan_stops_with_the_names_and_keeps_the_last_checkpoint(tmp_path: Path, save_every_steps: int) -> None:
    toy = Toy()
    trainer = toy.trainer(tmp_path, max_steps=20, save_every_steps=save_every_steps)
    kept = "checkpoint of step 2 is kept" if save_every_steps else "No checkpoint"
    with pytest.raises(NonFiniteError, match=rf"Step 4: the loss became nan with 7.png\. .*{kept}"):
        trainer.fit(ToyBatches(num_items=10, batch_size=2, bad=7))
    assert all(bool(value.isfinite().all()) for value in toy.weights().values())
    assert len(read_metrics(tmp_path)) == 3


def test_an_infinite_gradient_names_the_whole_step(tmp_path: Path) -> None:
    toy = Toy(noise=0.0, dropout=0.0)
    toy.model[2].bias.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=r"Step 1: the gradient norm became .* with 0.png, 1.png"):
        toy.trainer(tmp_path).fit(ToyBatches())


def test_text_encoders_learn_at_a_tenth_unless_told(tmp_path: Path) -> None:
    def rates(**settings: float) -> dict[str, float]:
        groups = Toy().trainer(tmp_path, learning_rate=0.01, **settings).optimizer.param_groups
        return {group["part"]: group["lr"] for group in groups}

    assert rates() == {"unet": 0.01, "text_encoder": 0.001}
    assert rates(text_encoder_learning_rate=0.02) == {"unet": 0.01, "text_encoder": 0.02}


class TestModuleRates:
    """A parameter of the second layer makes the first part hold two modules."""

    RATES: Mapping[ModuleKey, float] = {ModuleKey("unet", "0"): 0.05}

    @staticmethod
    def toy() -> Toy:
        toy = Toy()
        toy.params["unet"]["2.bias"] = toy.params["text_encoder"].pop("2.bias")
        return toy

    def test_come_before_those_of_parts(self, tmp_path: Path) -> None:
        rates = {**self.RATES, ModuleKey("text_encoder", "2"): 0.03}
        trainer = self.toy().trainer(tmp_path, module_rates=rates, text_encoder_learning_rate=0.02)
        groups = [(g["part"], g["initial_lr"], len(g["params"])) for g in trainer.optimizer.param_groups]
        assert groups == [("unet", 0.01, 1), ("unet", 0.05, 2), ("text_encoder", 0.03, 1)]

    def test_shown_rate_is_that_of_the_first_part(self, tmp_path: Path) -> None:
        self.toy().trainer(tmp_path, module_rates=self.RATES, max_steps=4, schedule="linear").fit(ToyBatches())
        self.toy().trainer(tmp_path / "plain", max_steps=4, schedule="linear").fit(ToyBatches())
        shown, plain = ([line["lr"] for line in read_metrics(path)] for path in (tmp_path, tmp_path / "plain"))
        assert shown == plain

    def test_of_one_size_change_nothing(self, tmp_path: Path) -> None:
        plain, named = self.toy(), self.toy()
        plain.trainer(tmp_path / "a", max_steps=6).fit(ToyBatches())
        named.trainer(tmp_path / "b", max_steps=6, module_rates={ModuleKey("unet", "0"): 0.01}).fit(ToyBatches())
        assert all(map(torch.equal, plain.weights().values(), named.weights().values()))
        files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors")]
        assert len(files) == 2
        assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)

    def test_train_the_others_as_before(self, tmp_path: Path) -> None:
        """Without clipping, the first step of a parameter depends on no other."""
        plain, named = self.toy(), self.toy()
        before = plain.weights()
        for toy, rates in ((plain, {}), (named, self.RATES)):
            settings = {"max_grad_norm": 0.0, "weight_decay": 0.0, "schedule": "constant"}
            trainer = toy.trainer(tmp_path, module_rates=rates, max_steps=1, **settings)
            trainer.take_step(1, next(ToyBatches().steps(0)))
        for name, value in plain.weights().items():
            factor = 5 if name.startswith("0.") else 1
            moved = (named.weights()[name] - before[name]) / (value - before[name])
            torch.testing.assert_close(moved, torch.full_like(moved, factor), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
    def test_resume_is_bit_for_bit_one_run(self, tmp_path: Path, optimizer: str) -> None:
        """The groups stand in another order than the parameters in a checkpoint."""
        settings = {"max_steps": 7, "save_every_steps": 3, "optimizer": optimizer, "module_rates": self.RATES}
        whole, resumed = self.toy(), self.toy()
        expected = whole.trainer(tmp_path, **settings)
        expected.fit(ToyBatches())
        again = resumed.trainer(tmp_path / "again", **settings)
        assert again.resume(checkpoint.saved_steps(tmp_path)[3]) == 3
        again.fit(ToyBatches())
        assert all(map(torch.equal, whole.weights().values(), resumed.weights().values()))
        kept = [
            [optim.read_state(trainer.optimizer, parameter) for _, parameter in optim.named(toy.params)]
            for trainer, toy in ((expected, whole), (again, resumed))
        ]
        for one, other in zip(*kept, strict=True):
            assert one
            assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_clipping_limits_the_gradient_and_zero_leaves_it(tmp_path: Path) -> None:
    norms = {}
    for limit in (0.0, 1e-3):
        toy = Toy()
        trainer = toy.trainer(tmp_path, max_grad_norm=limit)
        seen: list[float] = []

        def note(*_: object, toy: Toy = toy, seen: list[float] = seen) -> None:
            seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in toy.model.parameters()])))

        trainer.optimizer.register_step_pre_hook(note)
        metrics = trainer.take_step(1, next(ToyBatches().steps(0)))
        norms[limit] = (seen[0], metrics["grad_norm"])
    assert norms[0.0][0] == pytest.approx(norms[0.0][1])
    assert norms[1e-3][0] == pytest.approx(1e-3, rel=1e-2)
    assert norms[1e-3][1] == norms[0.0][1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_fp32(tmp_path: Path, precision: str) -> None:
    exact, low = Toy(dropout=0.0), Toy(dropout=0.0)
    exact.trainer(tmp_path / "a", max_steps=20).fit(ToyBatches())
    seen = set()
    low.model[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    low.trainer(tmp_path / "b", max_steps=20, precision=precision).fit(ToyBatches())
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    losses = [torch.tensor([line["loss"] for line in read_metrics(tmp_path / run)]) for run in "ab"]
    # 8 bits of mantissa in bf16; in fp16 the scaler leaves out the first step while it finds its scale.
    torch.testing.assert_close(losses[0], losses[1], rtol=0.1, atol=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in low.model.parameters())


def test_fp16_leaves_out_steps_that_overflow_and_resumes_with_its_scale(tmp_path: Path) -> None:
    toy = Toy()
    trainer = toy.trainer(tmp_path, max_steps=2, precision="fp16")
    trainer._scaler.load_state_dict({**trainer._scaler.state_dict(), "scale": 2.0**40})
    before = toy.weights()
    trainer.fit(ToyBatches())
    assert all(map(torch.equal, before.values(), toy.weights().values()))
    again = Toy().trainer(tmp_path, max_steps=2, precision="fp16")
    again.resume(checkpoint.find_latest(tmp_path))
    assert again._scaler.get_scale() == trainer._scaler.get_scale() < 2.0**40


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Toy().trainer(tmp_path, max_steps=2, fingerprint={"data": "abc", "adapter.targets": ("attn",)}).fit(ToyBatches())
    same = Toy().trainer(tmp_path, max_steps=2, threads="2", fingerprint={"data": "abc", "adapter.targets": ("attn",)})
    assert same.resume(checkpoint.find_latest(tmp_path)) == 2
    other = Toy().trainer(tmp_path, max_steps=2, learning_rate=0.5, fingerprint={"data": "abd", "model": "x"})
    with pytest.raises(ConfigError) as caught:
        other.resume(checkpoint.find_latest(tmp_path))
    text = str(caught.value)
    assert "data: abc in the checkpoint, abd now" in text
    assert "train.learning_rate: 0.01 in the checkpoint, 0.5 now" in text
    assert "model: absent in the checkpoint, x now" in text
    assert "train.seed" not in text


def test_a_list_that_is_new_in_this_version_may_be_empty(tmp_path: Path) -> None:
    Toy().trainer(tmp_path, max_steps=2).fit(ToyBatches())
    later = Toy().trainer(tmp_path, max_steps=2, fingerprint={"adapter.new": ()})
    assert later.resume(checkpoint.find_latest(tmp_path)) == 2
    with pytest.raises(ConfigError, match=r"adapter.new: absent in the checkpoint, \['x'\] now"):
        Toy().trainer(tmp_path, max_steps=2, fingerprint={"adapter.new": ("x",)}).resume(
            checkpoint.saved_steps(tmp_path)[2]
        )


def test_a_longer_run_is_continued_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Toy().trainer(tmp_path, max_steps=2).fit(ToyBatches())
    trainer = Toy().trainer(tmp_path, max_steps=4)
    trainer.resume(checkpoint.find_latest(tmp_path))
    with caplog.at_level(logging.WARNING):
        trainer.fit(ToyBatches())
    assert "planned with 2 steps and now has 4" in caplog.text
    assert list(checkpoint.saved_steps(tmp_path)) == [2, 4]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optimizer": "sgd"}, "train.optimizer=sgd is unknown; use one of adamw"),
        ({"schedule": "rex"}, "train.schedule=rex is unknown"),
        ({"tracker": "wandb"}, "train.tracker=wandb is unknown"),
        ({"precision": "fp8"}, "no dtype 'fp8'"),
    ],
)
def test_unknown_names_are_refused_before_training(tmp_path: Path, setting: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Toy().trainer(tmp_path, **setting)


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    toy = Toy()
    toy.params = {"unet": {}}
    with pytest.raises(ConfigError, match="nothing to train"):
        toy.trainer(tmp_path)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Toy().trainer(tmp_path, max_steps=3, tracker="tensorboard").fit(ToyBatches())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_a_missing_tensorboard_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(UnsupportedError, match="pip install tensorboard"):
        Toy().trainer(tmp_path, tracker="tensorboard")


class Scripted:
    """Gives scores by step and keeps what was recorded."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores, self.asked, self.recorded = scores, [], []  # type: ignore[var-annotated]

    def hook(self, patience: int) -> EarlyStop:
        return EarlyStop(2, patience, self.score, lambda scores: self.recorded.append(list(scores)))

    def score(self, step: int) -> float:
        torch.randn(5)
        self.asked.append(step)
        return self.scores[step]


def test_run_ends_when_the_score_stops_rising(tmp_path: Path) -> None:
    script = Scripted({2: 0.1, 4: 0.5, 6: 0.5, 8: 0.4, 10: 0.9})
    toy = Toy()
    trainer = toy.trainer(tmp_path / "stopped", hooks=(script.hook(2),), max_steps=20)
    trainer.fit(ToyBatches())
    assert trainer.step == 8
    assert script.asked == [2, 4, 6, 8]
    assert script.recorded[-1] == [(2, 0.1), (4, 0.5), (6, 0.5), (8, 0.4)]
    assert list(checkpoint.saved_steps(tmp_path / "stopped")) == [2, 4, 8]
    assert len(read_metrics(tmp_path / "stopped")) == 8

    script = Scripted({2: 0.1, 4: 0.5, 6: 0.5, 8: 0.4, 10: 0.9})
    patient = Toy().trainer(tmp_path / "patient", hooks=(script.hook(0),), max_steps=10)
    patient.fit(ToyBatches())
    assert patient.step == 10


def test_checkpoint_of_the_best_step_stays(tmp_path: Path) -> None:
    script = Scripted({2: 0.1, 4: 0.5, 6: 0.3, 8: 0.4, 10: 0.2})
    settings = {"save_every_steps": 3, "keep_checkpoints": 1, "max_steps": 10}
    Toy().trainer(tmp_path, hooks=(script.hook(0),), **settings).fit(ToyBatches())
    assert list(checkpoint.saved_steps(tmp_path)) == [4, 10]


def test_early_stop_survives_a_stop_in_between(tmp_path: Path) -> None:
    scores = {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.4, 10: 0.9}
    settings = {"save_every_steps": 3, "max_steps": 20}
    whole, halves = Scripted(scores), Scripted(scores)
    one, first, second = Toy(), Toy(), Toy()
    one.trainer(tmp_path / "whole", hooks=(whole.hook(2),), **settings).fit(ToyBatches())

    class Kill(Hook):
        def on_step(self, step: int) -> None:
            if step == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.trainer(tmp_path / "run", hooks=(halves.hook(2), Kill()), **settings).fit(ToyBatches())
    again = second.trainer(tmp_path / "run", hooks=(halves.hook(2),), **settings)
    assert again.resume(checkpoint.find_latest(tmp_path / "run")) == 6
    again.fit(ToyBatches())
    assert again.step == 8
    assert halves.recorded[-1] == whole.recorded[-1]
    assert all(torch.equal(value, second.weights()[name]) for name, value in one.weights().items())

    ended = Toy().trainer(tmp_path / "run", hooks=(halves.hook(2),), **settings)
    ended.resume(checkpoint.find_latest(tmp_path / "run"))
    ended.fit(ToyBatches())
    assert ended.step == 8


def test_checkpoint_of_the_first_release_has_no_hooks(tmp_path: Path) -> None:
    Toy().trainer(tmp_path, max_steps=2).fit(ToyBatches())
    path = checkpoint.find_latest(tmp_path)
    assert path is not None
    values = json.loads((path / "state.json").read_text())
    del values["hooks"], values["state_sha256"]
    (path / "state.json").write_text(json.dumps(values))
    script = Scripted({4: 0.2})
    trainer = Toy().trainer(tmp_path, hooks=(script.hook(1),), max_steps=4)
    assert checkpoint.find_latest(tmp_path) == path
    trainer.resume(path)
    trainer.fit(ToyBatches())
    assert script.recorded == [[(4, 0.2)]]
