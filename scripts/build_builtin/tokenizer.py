"""Stage 2: a CLIP tokenizer of about 2,000 tokens, trained on the captions."""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from scripts.build_builtin.captions import COMMON_WORDS, GENERIC, RARE_TOKENS, STYLED, render
from scripts.build_builtin.sources import TRAINING_STYLES
from scripts.build_builtin.storage import replace_folder
from scripts.build_builtin.subjects import GENERATOR, read_subjects, visible

VOCABULARY = 2000
CONTEXT_LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"
_WHOLE_WORD_WEIGHT = 1000  # repeats that make a word one token before merges run out


def corpus() -> list[str]:
    """Lines the byte-pair merges are learnt from; the subjects held out of the generator are absent."""
    lines = []
    for subject in visible(read_subjects(), GENERATOR):
        for style in TRAINING_STYLES:
            lines += [render(template, subject, style) for template in (*STYLED, *GENERIC)]
    return [*lines, *[COMMON_WORDS] * 200, *[" ".join(RARE_TOKENS)] * _WHOLE_WORD_WEIGHT]


def train() -> CLIPTokenizer:
    """A tokenizer with the end-of-text token last, as CLIP's pooling expects."""
    backend = Tokenizer(BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", fuse_unk=False))
    empty = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[])
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learnt = VOCABULARY - len(letters) - 2
    trainer = BpeTrainer(vocab_size=learnt, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges if "".join(pair) not in set(tokens)]
    tokens = [*list(dict.fromkeys(tokens))[: VOCABULARY - 2], START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [pair for pair in merges if "".join(pair) in vocabulary]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


def check(tokenizer: CLIPTokenizer) -> None:
    """Raise ValueError unless every rare token and style is one token."""
    for word in (*RARE_TOKENS, *TRAINING_STYLES, "style"):
        pieces = tokenizer.tokenize(word)
        if pieces != [f"{word}</w>"]:
            raise ValueError(f"{word!r} became {pieces}; raise VOCABULARY or the word's weight.")


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    work = parser.parse_args().work
    tokenizer = train()
    check(tokenizer)
    replace_folder(work / "tokenizer", lambda folder: tokenizer.save_pretrained(folder) and None)
    print(
        f"{len(tokenizer)} tokens; longest caption {max(len(tokenizer(line).input_ids) for line in corpus()[:20000])}"
    )


if __name__ == "__main__":
    main()
