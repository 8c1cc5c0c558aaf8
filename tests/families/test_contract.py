"""What every family must do, on a tiny base of its own; a new family is found here by its name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lora_diffusion.adapters import variants
from lora_diffusion.adapters.inject import inject
from lora_diffusion.adapters.merge import merge, unmerge
from lora_diffusion.adapters.plan import InjectionPlan, plan
from lora_diffusion.adapters.state import load_state, read_state
from lora_diffusion.config.schema import (
    AdapterConfig,
    CacheConfig,
    ChatDataConfig,
    DataConfig,
    ImageDataConfig,
    RecordingDataConfig,
)
from lora_diffusion.core import registry
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.protocols.family import Family, step_loss
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import AudioText, Batch, Chat, ImageText, Output, Request, Sample
from lora_diffusion.data import cache, sample_types
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.tensorfile.arrays import in_float32
from tests.tiny import save_tiny_pipeline, save_tiny_sd2_pipeline, save_tiny_sdxl_pipeline
from tests.tiny_llava import entry, save_tiny_llava, write_chats, write_picture
from tests.tiny_whisper import save_tiny_whisper, write_recording

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """What the tests need to know of a family."""

    save_base: Callable[[Path], Path]
    """Writes a tiny base, the same each time."""
    settings: Mapping[str, Mapping[str, Any]]
    """Name -> options that make its loss go other ways."""
    formats: tuple[str, ...] = ("diffusers", "kohya", "peft")
    """Those that can spell its adapters."""


_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"min_snr_gamma": 5.0, "noise_offset": 0.1},
    "velocity": {"prediction": "v_prediction", "min_snr_gamma": 5.0, "zero_terminal_snr": "always"},
    "captions": {"caption_dropout": 0.3, "prior_weight": 0.5},
}
CASES = {
    "llava": Case(save_tiny_llava, {"plain": {}}, formats=("peft",)),
    "sd1": Case(save_tiny_pipeline, _SETTINGS),
    "sd2": Case(save_tiny_sd2_pipeline, {"plain": {}, "noise": {"prediction": "epsilon", "caption_dropout": 0.3}}),
    "sdxl": Case(save_tiny_sdxl_pipeline, _SETTINGS),
    "whisper": Case(
        save_tiny_whisper,
        {"plain": {}, "masked": {"mask_time_prob": 0.2, "mask_time_length": 4, "timestamps": True}},
        formats=("peft",),
    ),
}


@dataclass(frozen=True)
class Kind:
    """What the tests need to know of a kind of samples."""

    write: Callable[[Path], None]
    """Fills a folder with three samples."""
    settings: DataConfig
    """More than one view of each; the path is filled in."""
    requests: Callable[[list[Any]], list[Request]]
    """Four requests whose outputs differ."""
    pixels: Callable[[Output], np.ndarray]
    """Numbers that differ by no more than 1 between outputs that are alike."""


def _write_pictures(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for index, subject in enumerate(("cat", "dog", "heart")):
        pixels = generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines = f"a {subject}, sks style\n" + "sks style dog\n" * index
        (folder / f"{index}.txt").write_text(lines, encoding="utf-8")


def _ask_for_images(samples: list[ImageText]) -> list[Request]:
    del samples
    return [Request(prompt, seed, num_steps=2) for prompt in ("a cat", "a dog") for seed in (1, 2)]


def _write_recordings(folder: Path) -> None:
    for index, text in enumerate(("one", "two three", "<|0.00|> four<|0.60|>")):
        write_recording(folder / f"{index}.wav", text, seconds=0.4 + 0.2 * index, pitch=200.0 + 150 * index)


def _ask_for_transcripts(samples: list[AudioText]) -> list[Request]:
    kind = sample_types.find(AudioText)
    asked = [kind.open(sample, RecordingDataConfig(speeds=(speed,))) for sample in samples[:2] for speed in (1.0, 1.5)]
    return [Request("", 0, sample=sample) for sample in asked]


def _bytes(output: Output) -> np.ndarray:
    return np.frombuffer(output.text.encode("utf-8").ljust(200), dtype=np.uint8).astype(int)


def _write_chats(folder: Path) -> None:
    names = [write_picture(folder / f"{index}.png", index).name for index in range(3)]
    texts = (("What?", "a cat"), ("Say more.", "a dog", "Sure?", "yes"), ("Colour?", "red and blue"))
    write_chats(folder, [entry(name, *own) for name, own in zip(names, texts, strict=True)])


def _ask_about_images(samples: list[Chat]) -> list[Request]:
    asked = [sample_types.find(Chat).open(sample, ChatDataConfig()) for sample in samples[:2]]
    return [Request(prompt, 0, sample=sample) for sample in asked for prompt in ("What?", "Which colour is it?")]


SAMPLES: Mapping[type[Sample], Kind] = {
    ImageText: Kind(
        _write_pictures,
        ImageDataConfig(flip=True, caption_lines="each"),
        _ask_for_images,
        lambda output: np.asarray(output.image).astype(int),
    ),
    AudioText: Kind(
        _write_recordings,
        RecordingDataConfig(speeds=(1.0, 1.1), noise_db=(20.0,)),
        _ask_for_transcripts,
        _bytes,
    ),
    Chat: Kind(_write_chats, ChatDataConfig(zooms=(1.0, 0.8)), _ask_about_images, _bytes),
}
FAMILIES = registry.available("families")
FORMATS = registry.available("formats")
CASES_OF_LOSS = [(name, kind) for name in FAMILIES for kind in CASES[name].settings]


def test_every_family_has_a_case() -> None:
    assert sorted(CASES) == FAMILIES


def test_protocol_stays_small() -> None:
    members = [name for name in {**vars(Family), **Family.__annotations__} if not name.startswith("_")]
    assert len(members) <= 15
    for name in FAMILIES:
        family = registry.find("families", name)
        assert [member for member in members if not hasattr(family, member)] == []
        public = [member for member in dir(family) if not member.startswith("_")]
        assert sorted(public) == sorted(members)
        assert family.architecture.name == name


@pytest.mark.parametrize("name", FAMILIES)
def test_import_is_light(name: str) -> None:
    code = f"import sys; from lora_diffusion.families.{name} import FAMILY; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@dataclass(frozen=True)
class Setup:
    """A family with a base on disk and some samples."""

    family: Family
    base: Path
    data: DataConfig
    samples: list[Any]

    def options(self, **values: Any) -> Any:
        return self.family.options_type(path=str(self.base), **values)

    def plan(
        self, *parts: str, targets: tuple[str, ...] = (), unread: Mapping[str, Sequence[str]] | None = None
    ) -> InjectionPlan:
        """Plans for the targets, or for the first group of each part."""
        parts = parts or tuple(self.family.parts)
        first = tuple(f"{part}/{next(iter(self.family.parts[part].groups))}" for part in parts)
        config = AdapterConfig(rank=2, alpha=3.0, parts=parts, targets=targets or first)
        return plan(self.family.meta_modules(self.options()), self.family.parts, config, unread=unread or {})

    def opened(self) -> list[Sample]:
        kind = sample_types.find(self.family.sample_type)
        return [kind.open(sample, self.data) for sample in self.samples]

    def batch(self, loaded: Loaded, trained: frozenset[str] = frozenset()) -> Batch:
        return self.family.collate(self.family.prepare(loaded, self.opened(), trained))

    def inject(self, loaded: Loaded, *parts: str, seed: int | None = None) -> dict[str, dict[str, nn.Parameter]]:
        """Adds an adapter, with random factors if a seed is given."""
        params = inject(loaded, self.plan(*parts, unread=loaded.info.unread), variants.find("lora"), 0.0, 0)
        generator = torch.Generator().manual_seed(seed or 0)
        for parameter in [value for own in params.values() for value in own.values()] if seed is not None else ():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        return params


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return _set_up(request.param, tmp_path_factory.mktemp(request.param))


_SETUPS: dict[str, Setup] = {}


def _set_up(name: str, folder: Path) -> Setup:
    if name not in _SETUPS:
        family = registry.find("families", name)
        base = CASES[name].save_base(folder / "base")
        kind = SAMPLES[family.sample_type]
        files = folder / "files"
        files.mkdir()
        kind.write(files)
        data = replace(kind.settings, path=str(files))
        info = family.check(family.options_type(path=str(base)))
        _SETUPS[name] = Setup(family, base, data, list(sample_types.find(family.sample_type).read(data, info)))
    return _SETUPS[name]


@pytest.fixture
def loaded(setup: Setup) -> Loaded:
    return setup.family.load(setup.options(), CPU)


@pytest.fixture
def _same_global_random_state() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "torch's global generator was used"


class TestBase:
    def test_loaded_frozen_as_the_meta_modules_says(self, setup: Setup, loaded: Loaded) -> None:
        meta_modules = setup.family.meta_modules(setup.options())
        assert meta_modules.keys() == loaded.parts.keys() == setup.family.parts.keys()
        for name, network in loaded.parts.items():
            expected = {key: value.shape for key, value in meta_modules[name].state_dict().items()}
            assert {key: value.shape for key, value in network.state_dict().items()} == expected
            assert all(parameter.is_meta for parameter in meta_modules[name].parameters())
            assert not network.training
            assert not any(parameter.requires_grad for parameter in network.parameters())
        assert loaded.info == setup.family.check(setup.options())
        assert loaded.info.source == str(setup.base)
        assert loaded.encoders <= {*loaded.parts, *loaded.modules}
        assert loaded.decoders <= loaded.encoders

    def test_cache_key_names_what_prepares_and_not_the_place(
        self, setup: Setup, loaded: Loaded, tmp_path: Path
    ) -> None:
        family, none = setup.family, frozenset[str]()
        encoders = loaded.encoders
        key = family.cache_key(setup.options(), none)
        moved = shutil.copytree(setup.base, tmp_path / "moved")
        assert family.cache_key(replace(setup.options(), path=str(moved)), none) == key
        assert (family.cache_key(setup.options(dtype="bf16"), none) != key) == bool(encoders)
        for part in family.parts:
            assert (family.cache_key(setup.options(), frozenset({part})) != key) == (part in encoders)
        CASES[family.architecture.name].save_base(moved, seed=1)  # type: ignore[call-arg]
        assert (family.cache_key(replace(setup.options(), path=str(moved)), none) != key) == bool(encoders)

    def test_example_runs_on_the_meta_device(self, setup: Setup) -> None:
        meta_modules = setup.family.meta_modules(setup.options())
        for trained in (frozenset[str](), frozenset(setup.family.parts)):
            size = sample_types.find(setup.family.sample_type).largest(setup.samples)
            example = setup.family.example(setup.options(), trained, 2, size)
            assert trained <= example.inputs.keys()
            for name, inputs in example.inputs.items():
                assert {**meta_modules, **example.heads}[name](**inputs)[0].is_meta


class TestNames:
    def test_every_group_matches_modules_that_can_hold_an_adapter(self, setup: Setup) -> None:
        for part, declared in setup.family.parts.items():
            for group in declared.groups:
                assert setup.plan(part, targets=(f"{part}/{group}",)).modules

    @pytest.mark.parametrize("format_name", FORMATS)
    def test_key_maps_are_bijections_over_all_modules(self, setup: Setup, format_name: str) -> None:
        if format_name not in CASES[setup.family.architecture.name].formats:
            with pytest.raises(UnsupportedError, match=format_name):
                setup.family.key_map(format_name, setup.options())
            return
        key_map = setup.family.key_map(format_name, setup.options())
        names = {name for _, name in key_map}
        assert len(names) == len(key_map)
        for key, name in key_map:
            assert key_map.key(name) == key
            assert key_map.name(key) == name
        for part, network in setup.family.meta_modules(setup.options()).items():
            paths = {path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
            # Norms and embeddings have names too, since adapters of other programs change them.
            own = {key.path for key, _ in key_map if key.part == part}
            assert paths <= own <= {path for path, _ in network.named_modules()}

    @pytest.mark.parametrize("format_name", FORMATS)
    def test_written_adapter_is_read_back(self, setup: Setup, loaded: Loaded, format_name: str, tmp_path: Path) -> None:
        if format_name not in CASES[setup.family.architecture.name].formats:
            return
        setup.inject(loaded, seed=3)
        state = read_state(loaded)
        format_, key_map = registry.find("formats", format_name), setup.family.key_map(format_name, setup.options())
        path = write_verified(state, key_map, format_, tmp_path / "adapter", torch.float32)
        again = in_float32(format_.read(parse_file(path), key_map))
        assert again.modules.keys() == state.modules.keys()
        for key, adapter in state:
            assert again.modules[key].alpha == adapter.alpha
            for name, tensor in adapter.tensors.items():
                assert torch.equal(again.modules[key].tensors[name], tensor)
        fresh = setup.family.load(setup.options(), CPU)
        load_state(fresh, again, "again")
        batch = setup.batch(loaded, frozenset(setup.family.parts))
        losses = [step_loss(setup.family, one)(batch, derive(0, "loss")).per_sample for one in (loaded, fresh)]
        assert torch.equal(*losses)


class TestPrepare:
    @pytest.mark.parametrize("trained", [False, True])
    @pytest.mark.usefixtures("_same_global_random_state")
    def test_twice_is_equal_and_alone_is_equal(self, setup: Setup, loaded: Loaded, trained: bool) -> None:
        samples, parts = setup.opened(), frozenset(setup.family.parts if trained else ())
        first, second = (setup.family.prepare(loaded, samples, parts) for _ in range(2))
        (alone,) = setup.family.prepare(loaded, samples[1:2], parts)
        for one, other in zip(first, second, strict=True):
            assert one.key == other.key
            assert one.group == other.group
            assert {name: tensor.device.type for name, tensor in one.tensors.items()}.keys() == other.tensors.keys()
            assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
            assert not any(tensor.requires_grad for tensor in one.tensors.values())
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(tensor, first[1].tensors[name], rtol=1e-4, atol=1e-5, msg=name)

    @pytest.mark.parametrize("trained", [False, True])
    def test_views_and_texts_are_apart(self, setup: Setup, loaded: Loaded, trained: bool) -> None:
        parts = frozenset(setup.family.parts if trained else ())
        whole = setup.family.prepare(loaded, setup.opened(), parts)
        views = setup.family.prepare(loaded, setup.opened(), parts, frozenset({"views"}))
        texts = setup.family.prepare(loaded, setup.samples, parts, frozenset({"texts"}))
        for item, seen, told in zip(whole, views, texts, strict=True):
            assert seen.tensors and told.tensors and not seen.tensors.keys() & told.tensors.keys()
            again = {**seen.tensors, **told.tensors}
            assert again.keys() == item.tensors.keys()
            assert all(torch.equal(again[name], item.tensors[name]) for name in again)
        keys = [setup.family.cache_key(setup.options(), parts, frozenset(own)) for own in ({"views"}, {"texts"})]
        assert keys[0] != keys[1]

    @pytest.mark.parametrize("trained", [False, True])
    def test_cached_loss_is_the_uncached_loss(
        self, setup: Setup, loaded: Loaded, trained: bool, tmp_path: Path
    ) -> None:
        config, parts = CacheConfig(path=str(tmp_path)), frozenset(setup.family.parts if trained else ())
        fresh = setup.batch(loaded, parts)
        losses = [step_loss(setup.family, loaded)(fresh, derive(0, "loss")).per_sample]
        for _ in range(2):  # written, then read
            items = cache.prepare(setup.family, loaded, setup.samples, parts, config, setup.data)
            losses.append(step_loss(setup.family, loaded)(setup.family.collate(items), derive(0, "loss")).per_sample)
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(("name", "kind"), CASES_OF_LOSS)
@pytest.mark.parametrize("all_parts", [False, True], ids=["main", "all parts"])
class TestLoss:
    @pytest.fixture
    def parts(self, name: str, all_parts: bool) -> tuple[str, ...]:
        names = tuple(registry.find("families", name).parts)
        return names if all_parts else names[:1]

    @pytest.fixture
    def own(self, name: str, tmp_path_factory: pytest.TempPathFactory) -> Setup:
        return _set_up(name, tmp_path_factory.mktemp(name))

    @pytest.fixture
    def base(self, own: Setup, name: str, kind: str) -> Loaded:
        return own.family.load(own.options(**CASES[name].settings[kind]), CPU)

    @pytest.mark.usefixtures("_same_global_random_state")
    def test_finite_for_each_sample_and_decided_by_the_generator(
        self, own: Setup, base: Loaded, parts: tuple[str, ...]
    ) -> None:
        own.inject(base, *parts, seed=1)
        batch = own.batch(base, frozenset(parts))
        before = {key: tensor.clone() for key, tensor in batch.tensors.items()}
        one, same, other = (step_loss(own.family, base)(batch, derive(seed, "loss")).per_sample for seed in (0, 0, 1))
        assert one.shape == (len(batch),)
        assert one.dtype == torch.float32
        assert torch.isfinite(one).all()
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert all(torch.equal(batch.tensors[key], tensor) for key, tensor in before.items())

    def test_only_adapters_get_gradients(self, own: Setup, base: Loaded, parts: tuple[str, ...]) -> None:
        params = own.inject(base, *parts, seed=1)
        trained = {id(parameter) for values in params.values() for parameter in values.values()}
        step_loss(own.family, base)(own.batch(base, frozenset(parts)), derive(0, "loss")).per_sample.sum().backward()
        networks = [*base.parts.values(), *(m for m in base.modules.values() if isinstance(m, nn.Module))]
        moved = {id(p) for network in networks for p in network.parameters() if p.grad is not None}
        assert moved == trained
        assert set(params) == set(parts)
        for part, values in params.items():
            # A padded token or a dead activation may leave single tensors at 0, but not a part.
            assert sum(bool(parameter.grad.any()) for parameter in values.values()) > 0.9 * len(values), part

    def test_what_is_called_unread_gets_no_gradient(self, own: Setup, base: Loaded, parts: tuple[str, ...]) -> None:
        params = inject(base, own.plan(*parts), variants.find("lora"), 0.0, 0)
        step_loss(own.family, base)(own.batch(base, frozenset(parts)), derive(0, "loss")).per_sample.sum().backward()
        idle = {
            f"{part}/{path.rpartition('.')[0]}"
            for part, values in params.items()
            for path, parameter in values.items()
            if parameter.grad is None
        }
        assert idle == set(own.plan(*parts, unread=base.info.unread).unread)

    def test_zero_adapter_changes_nothing(self, own: Setup, base: Loaded, parts: tuple[str, ...]) -> None:
        batch = own.batch(base, frozenset(parts))
        batch = replace(batch, tensors={**batch.tensors, "num_priors": torch.zeros(len(batch), dtype=torch.int64)})
        before = step_loss(own.family, base)(batch, derive(0, "loss")).per_sample
        own.inject(base, *parts)
        torch.testing.assert_close(step_loss(own.family, base)(batch, derive(0, "loss")).per_sample, before)

    def test_merged_is_unmerged(self, own: Setup, base: Loaded, parts: tuple[str, ...], kind: str) -> None:
        if kind == "captions":
            return  # a merged base is no longer the base that prior samples ask
        batch = own.batch(base, frozenset(parts))
        own.inject(base, *parts, seed=1)
        with torch.no_grad():
            apart = step_loss(own.family, base)(batch, derive(0, "loss")).per_sample
            merge(base, {"default": 1.0})
            torch.testing.assert_close(
                step_loss(own.family, base)(batch, derive(0, "loss")).per_sample,
                apart,
                rtol=1e-4,
                atol=1e-5,
            )
            unmerge(base)
            assert torch.equal(step_loss(own.family, base)(batch, derive(0, "loss")).per_sample, apart)


class TestGenerate:
    @pytest.mark.usefixtures("_same_global_random_state")
    def test_order_weights_and_batches(self, setup: Setup, loaded: Loaded) -> None:
        state_of = setup.family.load(setup.options(), CPU)
        setup.inject(state_of, seed=5)
        load_state(loaded, read_state(state_of), "a")
        kind = SAMPLES[setup.family.sample_type]
        asked = kind.requests(setup.samples)
        requests = [replace(request, weights={"a": weight}) for weight in (0.0, 1.0) for request in asked]
        outputs = setup.family.generate(loaded, requests)
        # The guidance that suits the base is filled in.
        assert [replace(output.request, guidance=None) for output in outputs] == requests
        pixels = [kind.pixels(output) for output in outputs]
        assert len({image.tobytes() for image in pixels}) == len(requests)
        for index in (1, 6):
            (alone,) = setup.family.generate(loaded, [requests[index]])
            assert np.abs(kind.pixels(alone) - pixels[index]).max() <= 1
