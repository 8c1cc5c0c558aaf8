from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from lora_diffusion.architectures import clip_tokenizer
from lora_diffusion.architectures.clip_tokenizer import ClipTextLimit
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.files import builtin_path
from lora_diffusion.families.stable_diffusion.single_file import _write_tokenizer

_TEXT = (
    "zorg style \u732b\u732b \u00fcber na\u00efve e\u0301 it's don't 12345 \U0001f600 ,,, ...!? (a:1.2) \\( __x__ "
    "<|endoftext|> \u0130stanbul \u00df\u200b \ufdfa"
)
WORDS = _TEXT.split()


def _folder(root: Path, layout: str) -> Path:
    if layout == "builtin":
        return builtin_path("emoji-sd") / "tokenizer"
    if layout == "without tokenizer.json":
        folder = shutil.copytree(builtin_path("emoji-sd") / "tokenizer", root / "copy")
        (folder / "tokenizer.json").unlink()
        return folder
    _write_tokenizer(root / "clip", "!" if layout == "open_clip" else "<|endoftext|>")
    return root / "clip"


@pytest.mark.parametrize("layout", ["builtin", "without tokenizer.json", "clip", "open_clip"])
def test_counts_tokens_as_transformers_does(tmp_path, layout):
    folder = _folder(tmp_path, layout)
    limit, tokenizer = ClipTextLimit(folder), CLIPTokenizer.from_pretrained(folder)
    assert limit.max_tokens == tokenizer.model_max_length - 2
    rng = random.Random(0)
    texts = [" ".join(rng.choices([*WORDS, "\n \n"], k=rng.randint(3, 120))) for _ in range(60)]
    numbers = [len(ids) - 2 for ids in tokenizer(texts, truncation=False, verbose=False).input_ids]
    assert min(numbers) < limit.max_tokens < max(numbers)
    for limit_ in (limit, ClipTextLimit()) if layout == "clip" else (limit,):
        cuts = limit_.cuts(texts)
        assert [cut.num_tokens for cut in cuts if cut] == [number for number in numbers if number > limit.max_tokens]


def test_what_is_read_ends_where_the_tokens_do():
    (cut,) = ClipTextLimit().cuts(["cat " * 75 + "zorg"])
    assert cut.num_read == len("cat " * 75)
    assert ClipTextLimit().cuts(["cat " * 75]) == [None]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizers_are_model_errors(tmp_path, file):
    folder = shutil.copytree(builtin_path("emoji-sd") / "tokenizer", tmp_path / "tokenizer")
    (folder / file).write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="fetch"):
        ClipTextLimit(folder).cuts(["cat " * 100])


def test_length_that_is_not_told_is_that_of_clip(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}), encoding="utf-8")
    assert ClipTextLimit(tmp_path).max_tokens == ClipTextLimit(tmp_path / "none").max_tokens == 75


def test_reading_the_table_does_not_import_torch():
    code = "import sys; from lora_diffusion.architectures.clip_tokenizer import ClipTextLimit as Limit; "
    code += "Limit().cuts(['cat ' * 100]); "
    subprocess.run(
        [sys.executable, "-c", f"{code}assert not {{'torch', 'transformers'}} & sys.modules.keys()"], check=True
    )
    assert len(clip_tokenizer.merges()) == 48894
