"""What is particular to LLaVA: spelling, loss, answers, files, and bases that cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from lora_diffusion.adapters import variants
from lora_diffusion.adapters.inject import inject
from lora_diffusion.adapters.plan import plan
from lora_diffusion.adapters.state import read_state
from lora_diffusion.config.schema import AdapterConfig
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.protocols.family import step_loss
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import Batch, Chat, ChatImage, Request, Turn
from lora_diffusion.families.language import conversation, vision
from lora_diffusion.families.llava import FAMILY, LlavaOptions
from lora_diffusion.formats.verified import write_verified
from tests.tiny_llava import TEMPLATE_WITHOUT_END, save_tiny_llava, save_tiny_llava_next, write_picture

CPU = torch.device("cpu")
_IMAGE_TOKENS = 4
CONVERSATIONS = (("What?", "a cat"), ("Say more.", "a dog, no doubt", "Sure?", "yes"), ("Colour of it?", "red"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava") / "base")


@pytest.fixture(scope="module")
def next_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava_next(tmp_path_factory.mktemp("llava") / "next")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("pictures")
    return [Image.open(write_picture(folder / f"{seed}.png", seed, (24, 12))).convert("RGB") for seed in range(3)]


def load(base: Path, **options: Any) -> Loaded:
    return FAMILY.load(LlavaOptions(path=str(base), **options), CPU)


def chat(index: int, image: Image.Image, texts: tuple[str, ...]) -> Chat:
    roles = ("user", "assistant")
    turns = tuple(Turn(roles[place % 2], text, int(place == 0)) for place, text in enumerate(texts))
    images = (ChatImage(Path(), image.size),)
    return Chat(str(index), Path(), turns=turns, images=images, views=((image,),))


def chats(images: list[Image.Image]) -> list[Chat]:
    return [chat(index, image, CONVERSATIONS[index]) for index, image in enumerate(images)]


def make_batch(loaded: Loaded, images: list[Image.Image], trained: frozenset[str] = frozenset()) -> Batch:
    return FAMILY.collate(FAMILY.prepare(loaded, chats(images), trained))


def losses(loaded: Loaded, batch: Batch) -> torch.Tensor:
    return step_loss(FAMILY, loaded)(batch, derive(0, "loss")).per_sample


def by_hand(model: Any, processor: Any, image: Image.Image, texts: tuple[str, ...]) -> float:
    """Mean of -log p(token | all before) over the tokens of the answers, from logits in float64."""
    ids: list[int] = []
    is_answer: list[bool] = []
    for place in range(0, len(texts), 2):
        shown = "<image>" * _IMAGE_TOKENS + "\n" if place == 0 else ""
        start = "<s>" if place == 0 else ""
        asked = processor.tokenizer(
            f"{start}USER: {shown}{texts[place]} ASSISTANT:", add_special_tokens=False
        ).input_ids
        said = processor.tokenizer(f" {texts[place + 1]}</s>", add_special_tokens=False).input_ids
        ids += asked + said
        is_answer += [False] * len(asked) + [True] * len(said)
    pixels = processor.image_processor(images=[image], return_tensors="pt").pixel_values.double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
    terms = [
        torch.logsumexp(logits[place - 1], 0) - logits[place - 1, ids[place]]
        for place in range(1, len(ids))
        if is_answer[place]
    ]
    return float(torch.stack(terms).mean())


class TestLoss:
    @pytest.mark.parametrize("trained", [frozenset(), frozenset({"vision_tower"})], ids=["features", "pixels"])
    def test_is_that_by_hand_on_three_conversations_of_different_length(
        self, base: Path, images: list[Image.Image], trained: frozenset[str]
    ) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float64).eval()
        processor = AutoProcessor.from_pretrained(base)
        wanted = [by_hand(model, processor, *pair) for pair in zip(images, CONVERSATIONS, strict=True)]
        loaded = load(base)
        batch = make_batch(loaded, images, trained)
        assert ("pixels" in batch.tensors) == bool(trained)
        assert (batch.tensors["labels"][0] == -100).sum() > (batch.tensors["labels"][1] == -100).sum()
        found = losses(loaded, batch)
        assert found.tolist() == pytest.approx(wanted, rel=2e-4)

    def test_padding_and_company_change_nothing(self, base: Path, images: list[Image.Image]) -> None:
        loaded = load(base)
        together = losses(loaded, make_batch(loaded, images))
        alone = [
            losses(loaded, FAMILY.collate(FAMILY.prepare(loaded, [sample], frozenset()))) for sample in chats(images)
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)

    def test_next_looks_at_tiles_as_transformers_does(self, next_base: Path, images: list[Image.Image]) -> None:
        loaded = load(next_base)
        batch = make_batch(loaded, images)
        assert batch.tensors["num_tiles"].tolist() == [3, 3, 3]
        model = LlavaNextForConditionalGeneration.from_pretrained(next_base).eval()
        processor = AutoProcessor.from_pretrained(next_base)
        found = losses(loaded, batch)
        for index, image in enumerate(images):
            ids, labels = (batch.tensors[name][index] for name in ("input_ids", "labels"))
            length = int((labels != -100).nonzero().max()) + 1
            seen = processor.image_processor(images=[image], return_tensors="pt")
            with torch.no_grad():
                output = model(input_ids=ids[None, :length], labels=labels[None, :length], **seen)
            assert found[index].item() == pytest.approx(output.loss.item(), rel=1e-3)


def mixed(images: list[Image.Image]) -> list[Chat]:
    """Returns conversations about one image, about none, about two at once, and about one that comes late."""
    alone = Chat("alone", Path(), turns=(Turn("user", "A haiku."), Turn("assistant", "old pond")), views=((),))
    pair = tuple(ChatImage(Path(str(index)), image.size) for index, image in enumerate(images[:2]))
    turns = (Turn("user", "Both red?", 2), Turn("assistant", "no"))
    late = (Turn("user", "Hi"), Turn("assistant", "Yes?"), Turn("user", "What?", 1), Turn("assistant", "a cat"))
    return [
        chat(0, images[0], CONVERSATIONS[0]),
        alone,
        Chat("pair", Path(), turns=turns, images=pair, views=(tuple(images[:2]),)),
        Chat("late", Path(), turns=late, images=pair[:1], views=((images[0],),)),
    ]


class TestMixed:
    """Texts alone, one image and several in one batch."""

    @pytest.mark.parametrize("is_next", [False, True], ids=["1.5", "NeXT"])
    @pytest.mark.parametrize("trained", [frozenset(), frozenset({"vision_tower"})], ids=["features", "pixels"])
    def test_loss_is_that_of_transformers(
        self, base: Path, next_base: Path, images: list[Image.Image], trained: frozenset[str], is_next: bool
    ) -> None:
        folder = next_base if is_next else base
        loaded = load(folder)
        shapes = [images[0], images[1].resize((7, 40))]
        samples = mixed(shapes)
        batch = FAMILY.collate(FAMILY.prepare(loaded, samples, trained))
        assert batch.tensors["num_images"].tolist() == [1, 0, 2, 1]
        found = losses(loaded, batch)
        model = vision.model_class(folder, FAMILY.architecture).from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        for index, sample in enumerate(samples):
            ids, labels = conversation.tokens_and_labels(loaded.modules["processor"], sample)
            seen = {}
            if sample.images:
                seen = processor.image_processor(images=list(sample.views[0]), return_tensors="pt")
            with torch.no_grad():
                output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), **seen)
            assert found[index].item() == pytest.approx(output.loss.item(), rel=1e-3), sample.key

    def test_tokens_are_those_of_the_processor(self, base: Path, images: list[Image.Image]) -> None:
        processor = conversation.read_processor(base, None)
        ids, _ = conversation.tokens_and_labels(processor, mixed(images)[2])
        text = "USER: <image>\n<image>\nBoth red? ASSISTANT: no</s>"
        assert ids == processor(text=text, images=images[:2]).input_ids[0]

    @pytest.mark.parametrize("parts", [("language_model",), ("projector",), ("vision_tower",)])
    def test_a_batch_of_texts_alone_trains_what_reads_them(
        self, base: Path, images: list[Image.Image], parts: tuple[str, ...]
    ) -> None:
        loaded = load(base)
        made = plan(
            FAMILY.meta_modules(loaded.options),
            FAMILY.parts,
            AdapterConfig(rank=2, parts=parts, targets=("all-linear",)),
        )
        params = inject(loaded, made, variants.find("lora", "none"), 0.0, 0)
        items = FAMILY.prepare(loaded, [mixed(images)[1]], frozenset(parts))
        losses(loaded, FAMILY.collate(items)).sum().backward()
        gradients = [own.grad for part in params.values() for own in part.values()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.any() for gradient in gradients) == (parts == ("language_model",))  # type: ignore[union-attr]

    def test_items_of_older_caches_can_be_stacked(self, base: Path, images: list[Image.Image]) -> None:
        loaded = load(base)
        items = FAMILY.prepare(loaded, mixed(images), frozenset())
        old = dict(items[0].tensors)
        del old["num_tiles"]
        old["image_size"] = old["image_size"][0]
        now, then = (FAMILY.collate([first, *items[1:]]) for first in (items[0], replace(items[0], tensors=old)))
        assert all(torch.equal(tensor, then.tensors[name]) for name, tensor in now.tensors.items())

    def test_a_template_of_one_image_is_named(self, base: Path, images: list[Image.Image], tmp_path: Path) -> None:
        file = tmp_path / "one.jinja"
        image = "{% if loop.first %}<image>{% endif %}"
        end = "{{ eos_token if m.role == 'assistant' }}"
        file.write_text(
            f"{{% for m in messages %}}{{{{ m.role }}}}:{image}{{{{ m.content[-1].text }}}}{end}{{% endfor %}}"
        )
        info = FAMILY.check(LlavaOptions(path=str(base), chat_template=str(file)))
        one, none, two, late = info.count_tokens(mixed(images))  # type: ignore[attr-defined, misc]
        assert isinstance(one, int)
        assert "writes 1 times <image> for no image" in str(none)
        assert "writes 1 times <image> for 2 images; set model.chat_template" in str(two)
        assert "for no image" in str(late)

    def test_answers(self, base: Path, images: list[Image.Image]) -> None:
        loaded = load(base, max_new_tokens=6)
        requests = [Request(sample.first_question().text, 0, sample=sample) for sample in mixed(images)]
        together = [output.text for output in FAMILY.generate(loaded, requests)]
        alone = [FAMILY.generate(loaded, [request])[0].text for request in requests]
        assert together == alone


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_quantized_next_answers_about_images_of_any_shape(
    next_base: Path, images: list[Image.Image], kind: str
) -> None:
    loaded = load(next_base, quantization=kind, max_new_tokens=3)
    shapes = [images[0].resize(size) for size in ((1, 1), (1, 90), (90, 1), (17, 16), (33, 7))]
    requests = [Request("What?", 0, sample=chat(0, shape, ("What?", ""))) for shape in shapes]
    assert len(FAMILY.generate(loaded, requests)) == len(shapes)


@pytest.mark.parametrize(("layer", "expected"), [(-2, [1]), (-1, []), (1, [1]), ([0, -1], []), ([0, 1], [1])])
def test_layers_of_the_encoder_that_are_never_read(base: Path, tmp_path: Path, layer: Any, expected: list[int]) -> None:
    own = shutil.copytree(base, tmp_path / "own")
    file = own / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"vision_feature_layer": layer}))
    options = LlavaOptions(path=str(own))
    info, config = FAMILY.check(options), AdapterConfig(rank=2, parts=("vision_tower",), targets=("all-linear",))
    made = plan(FAMILY.meta_modules(options), FAMILY.parts, config, unread=info.unread)
    kept = {int(module.path.split(".")[2]) for module in made.modules}
    assert kept == {0, 1} - set(expected)
    assert {int(name.split(".")[2]) for name in made.unread} == set(expected)
    assert any(line.startswith("left out: 6 modules") for line in made.lines()) == bool(expected)


class TestSpelling:
    def test_tokens_are_those_of_the_processor(self, base: Path, images: list[Image.Image]) -> None:
        processor = conversation.read_processor(base, None)
        ids, labels = conversation.tokens_and_labels(processor, chat(0, images[0], CONVERSATIONS[1]))
        text = "USER: <image>\nSay more. ASSISTANT: a dog, no doubt</s>USER: Sure? ASSISTANT: yes</s>"
        assert ids == processor(text=text, images=images[0]).input_ids[0]
        learnt = processor.tokenizer.decode([label for label in labels if label != -100])
        assert learnt == " a dog, no doubt</s> yes</s>"

    def test_end_token_is_added_where_the_template_has_none(
        self, base: Path, images: list[Image.Image], tmp_path: Path
    ) -> None:
        file = tmp_path / "hub.jinja"
        file.write_text(TEMPLATE_WITHOUT_END, encoding="utf-8")
        sample = chat(0, images[0], CONVERSATIONS[1])
        with_end, without = (conversation.read_processor(base, name) for name in (None, str(file)))
        assert conversation.tokens_and_labels(without, sample) == conversation.tokens_and_labels(with_end, sample)

    def test_system_turn_is_rendered_but_not_learnt(self, base: Path, images: list[Image.Image]) -> None:
        processor = conversation.read_processor(base, None)
        sample = chat(0, images[0], ("What?", "a cat"))
        led = Chat("0", Path(), turns=(Turn("system", "Be brief."), *sample.turns), images=sample.images)
        ids, labels = conversation.tokens_and_labels(processor, led)
        assert "Be brief." in processor.tokenizer.decode(ids)
        assert labels[-7:] == ids[-7:] and set(labels[:-7]) == {-100}

    def test_counts_are_the_lengths(self, base: Path, next_base: Path, images: list[Image.Image]) -> None:
        for folder in (base, next_base):
            info = FAMILY.check(LlavaOptions(path=str(folder)))
            assert info.count_tokens is not None
            items = FAMILY.prepare(load(folder), chats(images), frozenset())
            assert info.count_tokens(chats(images)) == [len(item.tensors["input_ids"]) for item in items]


class TestMemory:
    def test_released_encoder_is_gone_and_training_goes_on(self, base: Path, images: list[Image.Image]) -> None:
        loaded = load(base)
        batch = make_batch(loaded, images)
        before = losses(loaded, batch)
        encoder = loaded.parts["vision_tower"]
        loaded.release("vision_tower")
        held = {id(module) for module in loaded.modules["model"].modules()}
        assert not held & {id(module) for module in encoder.modules()}
        assert torch.equal(losses(loaded, batch), before)


class TestAnswers:
    def ask(self, loaded: Loaded, images: list[Image.Image], *seeds: int) -> list[str]:
        sample = chat(0, images[0], ("What?", ""))
        return [output.text for output in FAMILY.generate(loaded, [Request("What?", s, sample=sample) for s in seeds])]

    def test_drawn_answers_depend_on_the_seed_only(self, base: Path, images: list[Image.Image]) -> None:
        loaded = load(base, temperature=2.0, max_new_tokens=12)
        first, second, again = self.ask(loaded, images, 1, 2, 1)
        assert first == again != second

    def test_likeliest_answer_is_that_of_transformers(self, base: Path, images: list[Image.Image]) -> None:
        loaded = load(base, max_new_tokens=12)
        (found,) = self.ask(loaded, images, 0)
        model = LlavaForConditionalGeneration.from_pretrained(base).eval()
        processor = AutoProcessor.from_pretrained(base)
        inputs = processor(text="USER: <image>\nWhat? ASSISTANT:", images=images[0], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert found == " ".join(processor.tokenizer.decode(ids, skip_special_tokens=True).split())


def _train(loaded: Loaded, images: list[Image.Image], **settings: Any) -> list[float]:
    """Makes two steps with every part trained, the projector in full."""
    parts = tuple(FAMILY.parts)
    config = AdapterConfig(rank=2, parts=parts, targets=("all-linear",), full=("projector",), **settings)
    made = plan(FAMILY.meta_modules(loaded.options), FAMILY.parts, config)
    params = inject(loaded, made, variants.find("lora", loaded.options.quantization), 0.0, 0)
    flat = [parameter for own in params.values() for parameter in own.values()]
    optimizer = torch.optim.AdamW(flat, lr=1e-2)
    batch = make_batch(loaded, images, frozenset(parts))
    values = []
    for _ in range(3):
        loss = losses(loaded, batch).mean()
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return values


class TestFiles:
    @pytest.mark.parametrize("save", [save_tiny_llava, save_tiny_llava_next])
    def test_peft_gives_the_same_logits(
        self, save: Callable[[Path], Path], images: list[Image.Image], tmp_path: Path
    ) -> None:
        base = save(tmp_path / "base")
        loaded = load(base)
        _train(loaded, images)
        names = FAMILY.key_map("peft", loaded.options)
        write_verified(read_state(loaded), names, registry.find("formats", "peft"), tmp_path / "peft", torch.float32)
        plain = vision.model_class(base, FAMILY.architecture).from_pretrained(base)
        model = PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
        batch = make_batch(loaded, images, frozenset(FAMILY.parts))
        found = losses(loaded, batch)
        processor = AutoProcessor.from_pretrained(base)
        for index, image in enumerate(images):
            ids, labels = (batch.tensors[name][index] for name in ("input_ids", "labels"))
            length = int((labels != -100).nonzero().max()) + 1
            seen = processor.image_processor(images=[image], return_tensors="pt")
            with torch.no_grad():
                output = model(input_ids=ids[None, :length], labels=labels[None, :length], **seen)
            assert output.loss.item() == pytest.approx(found[index].item(), rel=1e-3)

    def test_names_of_older_versions_are_read(self, base: Path) -> None:
        for options in (None, LlavaOptions(path=str(base))):
            names = FAMILY.key_map("peft", options)
            assert names.key("language_model.model.layers.0.mlp.up_proj") == names.key(
                "model.language_model.layers.0.mlp.up_proj"
            )
            encoder = ModuleKey("vision_tower", "encoder.layers.1.mlp.fc1")
            assert names.key("vision_tower.vision_model.encoder.layers.1.mlp.fc1") == encoder

    def test_published_names_cover_the_base(self, base: Path) -> None:
        known = {key for key, _ in FAMILY.key_map("peft", None)}
        assert {key for key, _ in FAMILY.key_map("peft", LlavaOptions(path=str(base)))} <= known


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_quantized_base_is_trained(base: Path, images: list[Image.Image], kind: str) -> None:
    loaded = load(base, quantization=kind)
    flag = {"8bit": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}[kind]
    assert getattr(loaded.parts["language_model"], flag) and getattr(loaded.parts["vision_tower"], flag)
    assert type(loaded.parts["projector"].linear_1) is torch.nn.Linear
    first, *_, last = _train(loaded, images)
    assert last < first


class TestBadBase:
    def test_without_a_template_the_remedy_is_named(self, tmp_path: Path) -> None:
        base = save_tiny_llava(tmp_path / "base", template=None)
        with pytest.raises(ModelError, match=r"no chat template; put the chat_template\.jinja .* model\.chat_template"):
            FAMILY.check(LlavaOptions(path=str(base)))
        file = tmp_path / "mine.jinja"
        file.write_text(TEMPLATE_WITHOUT_END, encoding="utf-8")
        FAMILY.check(LlavaOptions(path=str(base), chat_template=str(file)))

    def test_template_that_is_not_there(self, base: Path) -> None:
        with pytest.raises(ModelError, match="there is no such file"):
            FAMILY.check(LlavaOptions(path=str(base), chat_template="nowhere.jinja"))

    def test_template_of_another_encoding(self, base: Path, tmp_path: Path) -> None:
        file = tmp_path / "mine.jinja"
        file.write_bytes(f"{{# gr\xfcn #}}{TEMPLATE_WITHOUT_END}".encode("latin-1"))
        with pytest.raises(ModelError, match=r"model\.chat_template=.*mine\.jinja is not UTF-8 \(.*\); save it so\."):
            FAMILY.check(LlavaOptions(path=str(base), chat_template=str(file)))

    def test_image_token_of_another_tokenizer(self, tmp_path: Path) -> None:
        base = save_tiny_llava(tmp_path / "base")
        config = json.loads((base / "config.json").read_text("utf-8"))
        for name in ("image_token_index", "image_token_id"):
            config.update({name: 7} if name in config else {})
        (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ModelError, match="token 7 stands for an image"):
            FAMILY.check(LlavaOptions(path=str(base)))

    def test_template_that_needs_texts_is_a_error_of_the_conversation(
        self, base: Path, images: list[Image.Image], tmp_path: Path
    ) -> None:
        file = tmp_path / "texts.jinja"
        file.write_text("{% for m in messages %}{{ m['content'].strip() }}{% endfor %}", encoding="utf-8")
        info = FAMILY.check(LlavaOptions(path=str(base), chat_template=str(file)))
        assert info.count_tokens is not None
        (found,) = info.count_tokens(chats(images)[:1])
        assert isinstance(found, str) and "cannot render it" in found
