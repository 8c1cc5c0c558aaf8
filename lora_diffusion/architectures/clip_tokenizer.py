"""CLIP's tokenizer without torch: its merge table, and how much of a text an encoder reads."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.architectures.base import CLIP_LENGTH, CLIP_VOCABULARY
from lora_diffusion.core.base_model import Cut
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.files import read_json
from lora_diffusion.core.text import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_WORD = "</w>"
_NUM_MERGES = CLIP_VOCABULARY - 2 * 256 - 2
_CONFIG = "tokenizer_config.json"
_ENDS = ("<|startoftext|>", "<|endoftext|>")
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache
def merges() -> tuple[str, ...]:
    """Returns the lines of CLIP's merge table, the most frequent first, such as "do g</w>".

    The table is the one that open_clip ships (Radford et al. 2021, arXiv 2103.00020), found without importing it.
    """
    spec = find_spec("open_clip")
    assert spec and spec.origin, "open-clip-torch is installed with this program"
    with gzip.open(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as table:
        return tuple(line.rstrip("\n") for line in islice(table, 1, 1 + _NUM_MERGES))


def as_bytes(word: str) -> str:
    """Returns a word as the merge table writes it, in which each byte of UTF-8 is one letter.

    >>> as_bytes("sautéed")
    'sautÃ©ed'
    """
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)
    return "".join(piece for piece, _ in pieces)


@dataclass(frozen=True)
class ClipTextLimit:
    """How much of a caption a text encoder reads."""

    folder: Path | None = None
    """The tokenizer of a base; None stands for CLIP's own."""

    @cached_property
    def max_tokens(self) -> int:
        """Tokens that are read; those that begin and end a text are not counted."""
        length = None if self.folder is None else _read_json(self.folder / _CONFIG).get("model_max_length")
        # Where it is not told, transformers writes an astronomical number.
        return (length if isinstance(length, int) and length <= CLIP_VOCABULARY else CLIP_LENGTH) - 2

    def cuts(self, texts: Sequence[str]) -> list[Cut | None]:
        """Returns for each text how it is cut, or None where it is read as a whole.

        Raises:
            ModelError: the tokenizer of the base is missing or damaged.
        """
        # No token is shorter than a byte, so that most texts need not be encoded.
        is_long = [len(text.encode("utf-8", "replace")) > self.max_tokens for text in texts]
        return [self._cut(text) if long else None for text, long in zip(texts, is_long, strict=True)]

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Returns the tokens of each text, begin and end not counted.

        Raises:
            ModelError: the tokenizer of the base is missing or damaged.
        """
        return [len(self._tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]

    def _cut(self, text: str) -> Cut | None:
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return Cut(len(offsets), offsets[self.max_tokens][0]) if len(offsets) > self.max_tokens else None

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if self.folder is None:
            return _clip()
        try:
            return _of_folder(self.folder)
        except Exception as error:  # the tokenizers library raises nothing narrower
            reason = shown(" ".join(str(error).split()), 300)
            raise ModelError(
                f"The tokenizer in {self.folder} cannot be read ({reason}); fetch the base again."
            ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} of the base cannot be read as a JSON object ({error}); fetch it again.") from error


def _of_folder(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        return tokenizer
    files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    padding = _read_json(folder / _CONFIG).get("pad_token", _ENDS[1])
    padding = padding["content"] if isinstance(padding, dict) else padding
    model = BPE.from_file(*files, end_of_word_suffix=END_OF_WORD, unk_token=_ENDS[1])
    return _assembled(model, [*_ENDS, str(padding)])


@cache
def _clip() -> Tokenizer:
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    pairs = [(first, second) for first, second in map(str.split, merges())]
    joined = [first + second for first, second in pairs]
    words = [*letters, *(letter + END_OF_WORD for letter in letters), *joined, *_ENDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    return _assembled(BPE(vocabulary, pairs, end_of_word_suffix=END_OF_WORD, unk_token=_ENDS[1]))


def _assembled(model: Any, whole: Sequence[str] = _ENDS) -> Tokenizer:
    """Returns a tokenizer that prepares text as transformers' CLIPTokenizer does (models/clip/tokenization_clip.py).

    Args:
        model: with the vocabulary.
        whole: what is one token wherever it stands, and ends a word before it.
    """
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens(list(whole))
    return tokenizer
