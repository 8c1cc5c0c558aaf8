"""Whisper: an encoder that hears log-mel features, and a decoder that writes what is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_diffusion.architectures import whisper
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.config.settings import AT_LEAST_ONE, SHARE, fixed, free, one_of
from lora_diffusion.core.base_model import Example, Loaded, LossOutput, Part, SpeechInfo
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.keymap import KeyMap, naming
from lora_diffusion.core.samples import PIECES, AudioText, Batch, Output, Prepared, Request

if TYPE_CHECKING:
    import torch
    from torch import nn


_BUILTIN = {"digits": "digits-whisper"}
_PREFIXES = {"encoder": "model.encoder.", "decoder": "model.decoder."}
_MAX_BATCH = 16
"""Recordings transcribed at once."""
_PROJECTIONS = r"(q|k|v|out)_proj"


@dataclass(frozen=True)
class WhisperOptions(ModelOptions):
    """A Whisper base, and what is asked of it."""

    family: str = "whisper"
    """Kind of base model."""
    path: str = "builtin:digits"
    """builtin:digits, a folder of Whisper as save_pretrained makes it, or a hub id."""
    language: str = "en"
    """Code of the language that is spoken, for recordings whose table names none."""
    task: str = fixed("transcribe", one_of("transcribe", "translate"))
    """transcribe, or translate into English."""
    timestamps: bool = False
    """Keep timestamps such as <|0.00|> in transcripts and learn them; false drops them."""
    num_beams: int = free(1, AT_LEAST_ONE)
    """Transcripts that are followed at once in search of the likeliest; 5 is usual, 1 takes the likeliest token."""
    repetition_guard: bool = free(True)
    """Hear a recording again, with drawn tokens, where its transcript repeats itself, as Whisper's authors do."""
    mask_time_prob: float = fixed(0.0, SHARE)
    """SpecAugment: share of a recording's frames that are hidden in a training step; 0.05 is usual, 0 turns it off."""
    mask_time_length: int = fixed(10, AT_LEAST_ONE)
    """Frames of 10 ms in each hidden stretch."""
    mask_feature_prob: float = fixed(0.0, SHARE)
    """SpecAugment: share of the mel bands that are hidden in a training step."""
    mask_feature_length: int = fixed(10, AT_LEAST_ONE)
    """Mel bands in each hidden stripe."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "adapter.parts": ("encoder", "decoder"),
        "output.formats": ("peft",),
    }
    augmentation: ClassVar[Mapping[str, Any]] = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}


class Whisper:
    """The family object; see core.protocols.Family for what each method must do."""

    architecture = whisper.ARCHITECTURE
    options_type = WhisperOptions
    sample_type = AudioText
    parts: Mapping[str, Part] = {
        "encoder": Part(
            groups={
                "attn": (rf"layers\.\d+\.self_attn\.{_PROJECTIONS}",),
                "ff": (r"layers\.\d+\.fc[12]",),
                "all-linear": (rf"layers\.\d+\.(self_attn\.{_PROJECTIONS}|fc[12])",),
            }
        ),
        "decoder": Part(
            groups={
                "attn": (rf"layers\.\d+\.(self|encoder)_attn\.{_PROJECTIONS}",),
                "cross": (rf"layers\.\d+\.encoder_attn\.{_PROJECTIONS}",),
                "ff": (r"layers\.\d+\.fc[12]",),
                "all-linear": (rf"layers\.\d+\.((self|encoder)_attn\.{_PROJECTIONS}|fc[12])",),
            }
        ),
    }

    def check(self, options: WhisperOptions) -> SpeechInfo:
        """Reads config, tokenizer and feature extractor of the base."""
        from lora_diffusion.families.language import speech
        from lora_diffusion.families.stable_diffusion import loading

        folder = _find(options)
        with loading.explained(folder):
            return speech.describe(folder, options)

    def skeleton(self, options: WhisperOptions) -> dict[str, nn.Module]:
        """Builds encoder and decoder on the meta device."""
        from transformers import WhisperForConditionalGeneration

        from lora_diffusion.families.language import loading

        return _parts(loading.on_meta(_find(options), WhisperForConditionalGeneration))

    def key_map(self, format_name: str, options: WhisperOptions | None) -> KeyMap:
        """Maps linear layers to their paths in WhisperForConditionalGeneration; only PEFT has names for them."""
        from lora_diffusion.families.language import loading, speech

        if naming(format_name) != "peft":
            raise UnsupportedError(f"Whisper adapters have no spelling {format_name}; use peft.")
        paths = speech.published_paths() if options is None else loading.layers(self.skeleton(options))
        return loading.peft_map(paths, _PREFIXES)

    def load(self, options: WhisperOptions, device: torch.device) -> Loaded:
        """Loads model, tokenizer and feature extractor."""
        from transformers import WhisperForConditionalGeneration

        from lora_diffusion.families.language import loading, speech

        folder = _find(options)
        info = self.check(options)
        model = loading.load(folder, WhisperForConditionalGeneration, options, device)
        processor = speech.read_processor(folder)
        speech.complete_generation_config(model, processor.tokenizer, info)
        parts = _parts(model)
        loading.place(model, parts, options.quantization, device)
        modules = {"model": model, "tokenizer": processor.tokenizer, "extractor": processor.feature_extractor}
        return Loaded(parts, modules, options, device, info)

    def cache_key(self, options: WhisperOptions, trained: frozenset[str], pieces: frozenset[str] = PIECES) -> str:
        """Names tokenizer, feature extractor, and how transcripts are written; no weights prepare anything."""
        from lora_diffusion.families.language import loading, speech

        del trained
        files = loading.fingerprint(_find(options), speech.PROCESSOR_FILES)
        if "texts" not in pieces:
            return f"{self.architecture.name} {files}"
        return f"{self.architecture.name} {files} {options.language} {options.task} {options.timestamps}"

    def prepare(
        self, loaded: Loaded, samples: Sequence[AudioText], trained: frozenset[str], pieces: frozenset[str] = PIECES
    ) -> list[Prepared]:
        """Gives log-mel features and labels.

        Tensors of an item: "features" [views, mels, frames] as the base's feature extractor gives them; "num_frames"
        [views], those that are not padding; "labels" [tokens], from the first token after the start to the end.
        """
        import torch

        from lora_diffusion.families.language import speech

        del trained
        extractor, tokenizer = loaded.modules["extractor"], loaded.modules["tokenizer"]
        items = []
        for sample in samples:
            tensors = {}
            if "views" in pieces:
                assert sample.waveforms, f"{sample.key} was not opened"
                frames = [-(-len(waveform) // extractor.hop_length) for waveform in sample.waveforms]
                tensors["features"] = torch.cat([speech.log_mel(extractor, wave) for wave in sample.waveforms])
                tensors["num_frames"] = torch.tensor(frames)
            if "texts" in pieces:
                tensors["labels"] = torch.tensor(speech.labels(tokenizer, sample, loaded.options, loaded.info))
            items.append(Prepared(sample.key, tensors, "", sample.num_repeats))
        return items

    def collate(self, items: Sequence[Prepared]) -> Batch:
        """Stacks items; labels are padded with -100, and each token counts alike in the loss of a step."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from lora_diffusion.families.language import loading

        labels = [item.tensors["labels"] for item in items]
        tensors = {
            "features": torch.stack([item.tensors["features"] for item in items]),
            "num_frames": torch.stack([item.tensors["num_frames"] for item in items]),
            "labels": pad_sequence(labels, batch_first=True, padding_value=loading.IGNORED),
        }
        weights = torch.tensor([float(len(own)) for own in labels])
        return Batch(tuple(item.key for item in items), tensors, weights=weights)

    def loss(self, loaded: Loaded, batch: Batch, rng: torch.Generator) -> LossOutput:
        """Mean cross-entropy of each sample's labels, padding left out; one view of each is drawn and masked."""
        import torch

        from lora_diffusion.families.language import speech, training_loss

        views, num_frames, labels = (batch.tensors[name] for name in ("features", "num_frames", "labels"))
        rows = torch.arange(len(batch))
        drawn = torch.randint(views.shape[1], (len(batch),), generator=rng)
        features = speech.mask(views[rows, drawn], num_frames[rows, drawn], loaded.options, rng)
        labels = labels.to(loaded.device)
        model = loaded.modules["model"]
        # Given labels, transformers shifts them, and computes a mean over the batch that is not wanted.
        ids, features = speech.shift(labels, model.config), features.to(loaded.device, model.dtype)
        output = model.model(input_features=features, decoder_input_ids=ids, use_cache=False)
        return LossOutput(training_loss.loss(output.last_hidden_state, model.proj_out, labels))

    def example(
        self, options: WhisperOptions, trained: frozenset[str], batch_size: int, size: tuple[int, int]
    ) -> Example:
        """Gives features for the encoder, which are always of full length, and token ids for the decoder."""
        import torch

        from lora_diffusion.families.language.training_loss import Head

        del trained
        config: Any = self.skeleton(options)["encoder"].config
        width, length = config.d_model, min(max(size[1], 1), config.max_target_positions)
        with torch.device("meta"):
            inputs = {
                "encoder": {
                    "input_features": torch.empty(batch_size, config.num_mel_bins, 2 * config.max_source_positions)
                },
                "decoder": {
                    "input_ids": torch.zeros(batch_size, length, dtype=torch.int64),
                    "encoder_hidden_states": torch.empty(batch_size, config.max_source_positions, width),
                    # Without a mask of its own, transformers looks into position ids, which hold no values here.
                    "attention_mask": torch.zeros(batch_size, 1, length, length),
                    "use_cache": False,
                },
                "head": {"hidden": torch.empty(batch_size * length, width)},
            }
        return Example(inputs, {"head": Head(config.vocab_size, width, is_tied=True)})

    def generate(self, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        """Transcribes recordings, in batches of equal adapter weights, language and task."""
        from lora_diffusion.families.language import speech

        outputs: dict[int, Output] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            weights = None if request.weights is None else sorted(request.weights.items())
            asked = request.sample.asked(loaded.options)  # type: ignore[union-attr]
            groups.setdefault(repr((weights, asked)), []).append(index)
        for indices in groups.values():
            for start in range(0, len(indices), _MAX_BATCH):
                chunk = indices[start : start + _MAX_BATCH]
                texts = speech.transcribe(loaded, [requests[i] for i in chunk])
                outputs.update({i: Output(requests[i], text=text) for i, text in zip(chunk, texts, strict=True)})
        return [outputs[i] for i in range(len(requests))]


def _find(options: WhisperOptions) -> Path:
    from lora_diffusion.families.language import loading

    return loading.find(options, _BUILTIN, ("whisper",), "Whisper as save_pretrained of transformers makes it")


def _parts(model: Any) -> dict[str, nn.Module]:
    return {"encoder": model.model.encoder, "decoder": model.model.decoder}


FAMILY = Whisper()
