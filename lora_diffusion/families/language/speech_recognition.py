"""Families that transcribe recordings: Whisper, at any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.architectures.base import TextOutputArchitecture
from lora_diffusion.core.base_model import Example, Loaded, LossOutput, Part, SpeechInfo
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.keymap import KeyMap, naming
from lora_diffusion.core.samples import PIECES, AudioText, Batch, Output, Prepared, Request
from lora_diffusion.families.language.options import WhisperOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora_diffusion.families.language.training_loss import DrawnSpeech

_MAX_BATCH = 16
"""Recordings transcribed at once."""


class SpeechRecognition:
    """A family object; see core.protocols.Family for what each method must do."""

    sample_type = AudioText

    def __init__(
        self,
        architecture: TextOutputArchitecture,
        options_type: type[WhisperOptions],
        parts: Mapping[str, Part],
        builtins: Mapping[str, str],
    ) -> None:
        """Makes the family of an architecture.

        Args:
            architecture: of its bases.
            options_type: the `model:` section.
            parts: networks that can hold an adapter, and their groups of modules.
            builtins: name after "builtin:" -> folder that comes along.
        """
        self.architecture, self.options_type, self.parts, self._builtins = architecture, options_type, parts, builtins

    def _find(self, options: WhisperOptions) -> Path:
        from lora_diffusion.families.language import loading

        return loading.find(options, self._builtins, self.architecture)

    def check(self, options: WhisperOptions) -> SpeechInfo:
        """Reads config, tokenizer and feature extractor of the base."""
        from lora_diffusion.families.language import speech
        from lora_diffusion.families.model_files import explained

        folder = self._find(options)
        with explained(folder):
            return speech.describe(folder, options)

    def meta_modules(self, options: WhisperOptions) -> dict[str, nn.Module]:
        """Builds encoder and decoder on the meta device."""
        from transformers import WhisperForConditionalGeneration

        from lora_diffusion.families.language import loading, speech

        return speech.parts_of(loading.on_meta(self._find(options), WhisperForConditionalGeneration))

    def key_map(self, format_name: str, options: WhisperOptions | None) -> KeyMap:
        """Maps linear layers to their paths in WhisperForConditionalGeneration; only PEFT has names for them."""
        from lora_diffusion.families.language import loading

        if naming(format_name) != "peft":
            raise UnsupportedError(f"Whisper adapters have no format {format_name}; use peft.")
        return loading.peft_map(self.architecture, None if options is None else self.meta_modules(options))

    def load(self, options: WhisperOptions, device: torch.device) -> Loaded:
        """Loads model, tokenizer and feature extractor."""
        from transformers import WhisperForConditionalGeneration

        from lora_diffusion.families.language import loading, speech

        folder = self._find(options)
        info = self.check(options)
        model = loading.load(folder, WhisperForConditionalGeneration, options, device)
        processor = speech.read_processor(folder)
        speech.complete_generation_config(model, processor.tokenizer, info)
        parts = speech.parts_of(model)
        loading.place(model, parts, options.quantization, device)
        modules = {"model": model, "tokenizer": processor.tokenizer, "extractor": processor.feature_extractor}
        return Loaded(parts, modules, options, device, info)

    def cache_key(self, options: WhisperOptions, trained: frozenset[str], pieces: frozenset[str] = PIECES) -> str:
        """Names tokenizer, feature extractor, and how transcripts are written; no weights prepare anything."""
        from lora_diffusion.families.language import loading, speech

        del trained
        files = loading.fingerprint(self._find(options), speech.PROCESSOR_FILES)
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
        info: Any = loaded.info
        extractor, tokenizer = loaded.modules["extractor"], loaded.modules["tokenizer"]
        items = []
        for sample in samples:
            tensors: dict[str, torch.Tensor] = {}
            if "views" in pieces:
                assert sample.waveforms, f"{sample.key} was not opened"
                frames = [-(-len(waveform) // extractor.hop_length) for waveform in sample.waveforms]
                tensors["features"] = torch.cat([speech.log_mel(extractor, wave) for wave in sample.waveforms])
                tensors["num_frames"] = torch.tensor(frames)
            if "texts" in pieces:
                tensors["labels"] = torch.tensor(speech.labels(tokenizer, sample, loaded.options, info))
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
        weights = torch.tensor([float(len(row)) for row in labels])
        return Batch(tuple(item.key for item in items), tensors, weights=weights)

    def draw(self, loaded: Loaded, batch: Batch, rng: torch.Generator) -> DrawnSpeech:
        """Draws one view of each recording, and what of it is masked."""
        from lora_diffusion.families.language import training_loss

        return training_loss.draw_speech(loaded, batch, rng)

    def loss(self, loaded: Loaded, drawn: DrawnSpeech) -> LossOutput:
        """Mean cross-entropy of each sample's labels, padding left out."""
        from lora_diffusion.families.language import training_loss

        return training_loss.speech_loss(loaded, drawn)

    def example(
        self, options: WhisperOptions, trained: frozenset[str], batch_size: int, size: tuple[int, int]
    ) -> Example:
        """Gives features for the encoder, which are always of full length, and token ids for the decoder."""
        from lora_diffusion.families.language import examples

        del trained
        return examples.speech_example(self.meta_modules(options)["encoder"], batch_size, size)

    def generate(self, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        """Transcribes recordings, in batches of equal adapter weights, language and task."""
        from lora_diffusion.families.language import sampling, speech

        def settings(request: Request) -> tuple[str, str]:
            assert isinstance(request.sample, AudioText), "a request of speech recognition is about a recording"
            return request.sample.language_and_task(loaded.options)

        return sampling.generate(requests, partial(speech.transcribe, loaded), settings, _MAX_BATCH)
