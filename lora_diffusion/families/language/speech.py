"""What Whisper takes and gives: features, tokens, masks and the search for words."""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_diffusion.core.base_model import Loaded, SpeechInfo
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.samples import AudioText, Request
from lora_diffusion.families.language import loading
from lora_diffusion.families.language.options import WhisperOptions
from lora_diffusion.families.model_files import explained, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "generation_config.json",
)
"""Files of a base that decide features and tokens."""
_MIN_STRETCHES = 2
"""Of time, hidden in each recording: the default of transformers' mask_time_min_masks."""
_TIMESTAMP = re.compile(r"<\|(\d+\.\d\d)\|>")
_TIMESTAMP_S = 0.02
"""Between two timestamps."""
_ENGLISH = "en"
_OTHER_CODES = {"jv": "jw", "iw": "he", "in": "id", "nb": "no", "ji": "yi", "fil": "tl", "cmn": "zh", "eng": "en"}
"""Codes that tables use for languages that Whisper calls by another."""
_START, _NO_TIMESTAMPS, _FIRST_TIMESTAMP = "<|startoftranscript|>", "<|notimestamps|>", "<|0.00|>"
_TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
_MOST_REPETITION = 2.4
_MULTILINGUAL_VOCABULARY = 51865
"""Tokens of the smallest multilingual vocabulary that was published; English-only ones have one less."""


@cache
def read_processor(folder: Path) -> Any:
    """Returns the WhisperProcessor of a base; nobody may change it.

    Raises:
        ModelError: tokenizer or feature extractor are missing or damaged.
    """
    from transformers import WhisperProcessor

    with explained(folder):
        return WhisperProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def describe(folder: Path, options: WhisperOptions) -> SpeechInfo:
    """Returns what is known of a base, once it can do what the options ask.

    Raises:
        ModelError: it cannot be used, or its tokenizer lacks what is asked for.
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    config, processor = read_json(folder / "config.json"), read_processor(folder)
    tokenizer, extractor = processor.tokenizer, processor.feature_extractor
    vocabulary = tokenizer.get_vocab()
    frames, expected = extractor.nb_max_frames, 2 * config.get("max_source_positions", 1500)
    errors = []
    if frames != expected:
        errors.append(f"its feature extractor gives {frames} frames, and its encoder takes {expected}")
    if extractor.feature_size != config.get("num_mel_bins", 80):
        errors.append(f"its feature extractor gives {extractor.feature_size} bands, not {config.get('num_mel_bins')}")
    errors += [f"its tokenizer lacks {token}" for token in (_START, _NO_TIMESTAMPS) if token not in vocabulary]
    if options.timestamps and not errors and not _has_timestamps(processor, config):
        errors.append("it has no tokens for timestamps; set model.timestamps=false")
    languages = tuple(code for code in LANGUAGES if f"<|{code}|>" in vocabulary)
    if not _is_multilingual(folder, config):
        languages = ()
        if options.language != "en" or options.task != "transcribe":
            errors.append("it knows English only; set model.language=en and model.task=transcribe")
    elif options.language not in languages:
        errors.append(
            f"its tokenizer has no token for model.language={options.language}, only for {', '.join(languages[:20])}"
            + (f"; set model.language={code}" if (code := _find_language(languages, options.language)) else "")
        )
    if errors:
        raise ModelError(f"The base {folder} cannot be used.", errors)
    return SpeechInfo(
        architecture="whisper",
        source=options.path,
        path=folder,
        files=loading.weight_files(folder),
        sampling_rate=extractor.sampling_rate,
        max_duration_s=float(extractor.chunk_length),
        max_tokens=config.get("max_target_positions", 448),
        languages=languages,
        count_tokens=partial(_count_tokens, folder, options.timestamps),
        find_language=partial(_find_language, languages or (_ENGLISH,)),
    )


def _find_language(known: Sequence[str], name: str) -> str | None:
    """Returns the code by which a base knows a language that somebody calls English, EN, en-US or en_US."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    plain = name.strip().lower().replace("_", "-")
    code = TO_LANGUAGE_CODE.get(plain, plain)
    candidates = (code, code.partition("-")[0])
    return next(
        (spoken for variant in candidates for spoken in (variant, _OTHER_CODES.get(variant)) if spoken in known),
        None,
    )


def _has_timestamps(processor: Any, config: Mapping[str, Any]) -> bool:
    """Says whether a base has a token for each moment that it hears; older tokenizers do not name them."""
    first = first_timestamp(processor.tokenizer)
    name = processor.tokenizer.convert_ids_to_tokens(first)
    last = first + round(processor.feature_extractor.chunk_length / _TIMESTAMP_S)
    return last < config.get("vocab_size", 0) and name in (None, "", _FIRST_TIMESTAMP)


def first_timestamp(tokenizer: Any) -> int:
    """Returns the token of <|0.00|>, whether the tokenizer knows it by name or not."""
    return int(tokenizer.convert_tokens_to_ids(_NO_TIMESTAMPS)) + 1


def _is_multilingual(folder: Path, config: dict[str, Any]) -> bool:
    file = folder / "generation_config.json"
    is_multilingual = read_json(file).get("is_multilingual") if file.is_file() else None
    return config.get("vocab_size", 0) >= _MULTILINGUAL_VOCABULARY if is_multilingual is None else bool(is_multilingual)


def _count_tokens(folder: Path, timestamps: bool, texts: Sequence[str]) -> list[int | str]:
    processor = read_processor(folder)
    longest_s = processor.feature_extractor.chunk_length
    counts: list[int | str] = []
    for text in texts:
        late = [moment for moment in _TIMESTAMP.findall(text) if timestamps and float(moment) > longest_s]
        if late:
            counts.append(f"has the timestamp {late[0]}, and the base has none above {longest_s}.00; correct it.")
        else:
            # Start, language, task and the mark for no timestamps come before, the end after.
            counts.append(len(_words(processor.tokenizer, _written(text, timestamps))) + 5)
    return counts


def _words(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a transcript; timestamps are numbered, since not every tokenizer names theirs."""
    first = first_timestamp(tokenizer)
    pieces = _TIMESTAMP.split(text)
    # Without verbose=False it warns of long ones, which are told of where they are counted.
    words = [
        tokenizer(piece, add_special_tokens=False, verbose=False).input_ids if piece else [] for piece in pieces[::2]
    ]
    moments = [[first + round(float(moment) / _TIMESTAMP_S)] for moment in pieces[1::2]]
    pairs: Iterator[tuple[list[int], ...]] = zip_longest(words, moments, fillvalue=[])
    return [token for pair in pairs for tokens in pair for token in tokens]


def complete_generation_config(model: Any, tokenizer: Any, info: SpeechInfo) -> None:
    """Gives an older base the ids of its language and task tokens, which newer ones keep in generation_config.json."""
    config, vocabulary = model.generation_config, tokenizer.get_vocab()
    config.is_multilingual = bool(info.languages)
    config.no_timestamps_token_id = vocabulary[_NO_TIMESTAMPS]
    config.lang_to_id = {f"<|{code}|>": vocabulary[f"<|{code}|>"] for code in info.languages}
    tasks = ("transcribe", "translate")
    config.task_to_id = {task: vocabulary[f"<|{task}|>"] for task in tasks if f"<|{task}|>" in vocabulary}
    config.max_length = info.max_tokens


def parts_of(model: Any) -> dict[str, nn.Module]:
    """Returns the networks that can hold adapters."""
    return {"encoder": model.model.encoder, "decoder": model.model.decoder}


def log_mel(extractor: Any, waveform: Tensor) -> Tensor:
    """Returns [1, mels, frames], float32: what the base's own feature extractor gives, padded to full length."""
    import torch

    features = extractor(waveform.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="np").input_features
    return torch.from_numpy(features).float()


def labels(tokenizer: Any, sample: AudioText, options: WhisperOptions, info: SpeechInfo) -> list[int]:
    """Returns the tokens that the decoder must write after the start: language, task, words, end."""
    vocabulary = tokenizer.get_vocab()
    text = _written(sample.transcript, options.timestamps)
    names = []
    if info.languages:
        names = [f"<|{name}|>" for name in sample.language_and_task(options)]
    if not _TIMESTAMP.match(text):
        names.append(_NO_TIMESTAMPS)
    words = _words(tokenizer, text)
    return [*(vocabulary[name] for name in names), *words, tokenizer.eos_token_id]


def _written(transcript: str, timestamps: bool) -> str:
    """Returns a transcript as it is learnt."""
    return transcript if timestamps else " ".join(_TIMESTAMP.sub(" ", transcript).split())


def shift(ids: Tensor, config: Any) -> Tensor:
    """Returns the decoder's inputs for labels: the start token, then each label before the one it must give.

    Args:
        ids: [batch, tokens], -100 where there is no label.
        config: of the model; gives the start and the padding.
    """
    shifted = ids.new_full(ids.shape, config.decoder_start_token_id)
    shifted[:, 1:] = ids[:, :-1]
    return shifted.masked_fill(shifted == -100, config.pad_token_id)


def mask(features: Tensor, num_frames: Tensor, options: WhisperOptions, rng: torch.Generator) -> Tensor:
    """Returns features with stretches of time and stripes of pitch set to 0, as SpecAugment of transformers does.

    Args:
        features: [batch, mels, frames]; not changed.
        num_frames: [batch], those that hold sound: no other is hidden.
        options: shares and lengths.
        rng: decides which.

    Source: Park et al. 2019, arXiv 1904.08779; the rule is `_compute_mask_indices` of transformers.
    """
    import torch
    from transformers.models.whisper.modeling_whisper import _compute_mask_indices

    if not options.mask_time_prob and not options.mask_feature_prob:
        return features
    batch, bands, frames = features.shape
    hidden = torch.zeros(features.shape, dtype=torch.bool)
    with _numpy_seeded(int(torch.randint(2**31, (1,), generator=rng))):
        if options.mask_time_prob:
            sound: Any = (torch.arange(frames)[None] < num_frames[:, None]).long()
            sizes = (options.mask_time_prob, min(options.mask_time_length, frames))
            chosen = _compute_mask_indices((batch, frames), *sizes, attention_mask=sound, min_masks=_MIN_STRETCHES)
            hidden |= torch.from_numpy(chosen)[:, None, :]
        if options.mask_feature_prob:
            sizes = (options.mask_feature_prob, min(options.mask_feature_length, bands))
            hidden |= torch.from_numpy(_compute_mask_indices((batch, bands), *sizes))[:, :, None]
    return features.masked_fill(hidden, 0.0)


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Makes the draws of transformers, which come from numpy's global generator, depend on a seed only."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from warning of the arguments that its own search hands on."""
    logger = logging.getLogger("transformers.generation")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def transcribe(loaded: Loaded, requests: Sequence[Request]) -> list[str]:
    """Returns what is said in recordings of requests with equal adapter weights, language and task.

    A text that repeats itself is searched again with drawn tokens, warmer each time, and the least repetitive is taken.

    Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 4.5.
    """
    import torch

    first = requests[0]
    if first.weights is not None:
        assert loaded.adapters is not None, "a request gives adapter weights, but no adapter was loaded"
        loaded.adapters.set_weights(first.weights)
    samples: list[Any] = [request.sample for request in requests]
    log_mels = [log_mel(loaded.modules["extractor"], sample.waveforms[0]) for sample in samples]
    features = torch.cat(log_mels).to(loaded.device, loaded.modules["model"].dtype)
    language, task = samples[0].language_and_task(loaded.options)
    wanted = {"language": language, "task": task} if loaded.info.languages else {}  # type: ignore[attr-defined]
    texts = _search(loaded, features, wanted, 0.0)
    if loaded.options.repetition_guard:
        for index in [index for index, text in enumerate(texts) if _repetition(text) > _MOST_REPETITION]:
            # One by one, so that what is drawn does not depend on the company.
            texts[index] = _search_again(
                loaded, features[index : index + 1], wanted, texts[index], requests[index].seed
            )
    return texts


def _search_again(loaded: Loaded, features: Tensor, wanted: Mapping[str, str], text: str, seed: int) -> str:
    """Returns a transcript of a recording that repeats itself less than `text`, if one is drawn."""
    import torch

    texts = [text]
    with torch.random.fork_rng(devices=[loaded.device] if loaded.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for temperature in _TEMPERATURES:
            texts += _search(loaded, features, wanted, temperature)
            if _repetition(texts[-1]) <= _MOST_REPETITION:
                break
    return min(texts, key=_repetition)


def _repetition(text: str) -> float:
    """Returns by how much a text can be compressed: about 1 to 2 for what people say, more for what goes in circles."""
    data = _TIMESTAMP.sub("", text).encode()
    return len(data) / len(zlib.compress(data))


def _search(loaded: Loaded, features: Tensor, wanted: Mapping[str, str], temperature: float) -> list[str]:
    """Returns the likeliest texts, or such as are drawn where the temperature is above 0."""
    import torch

    model, tokenizer, options = loaded.modules["model"], loaded.modules["tokenizer"], loaded.options
    with torch.no_grad(), _quiet():
        output = model.generate(
            features,
            attention_mask=features.new_ones(features.shape[0], features.shape[2]).long(),
            return_timestamps=options.timestamps,
            return_segments=options.timestamps,
            temperature=temperature,
            num_beams=1 if temperature else options.num_beams,
            **wanted,
        )
    if options.timestamps:
        return ["".join(_segment_text(tokenizer, segment) for segment in segments) for segments in output["segments"]]
    return [" ".join(text.split()) for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


def _segment_text(tokenizer: Any, segment: Mapping[str, Any]) -> str:
    """Returns a segment with its timestamps; its words alone where it has no end."""
    first = first_timestamp(tokenizer)
    ids = segment["tokens"].tolist()
    words = " ".join(tokenizer.decode([token for token in ids if token < first], skip_special_tokens=True).split())
    start, end = float(segment["start"]), float(segment["end"])
    return f"<|{start:.2f}|> {words}<|{end:.2f}|>" if words else ""
