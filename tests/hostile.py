"""Reads damaged files of one sort in this process, and prints what became of it: `python -m tests.hostile SORT`.

A reader gives a result or a LoraDiffusionError, soon, in little memory. Whatever else happens is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import LoraDiffusionError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import printable
from tests.mutations import mutate, remove

TIMEOUT_S = 20
MEMORY_BYTES = 1024**3
_LONGEST_LINE = 4000
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sort:
    """A sort of input."""

    make: Callable[[Path], None]
    """Writes good examples into a folder."""
    read: Callable[[Path], None]
    """Reads what lies in a folder of the examples, as the commands do."""
    names: tuple[str, ...] = ("*",)
    """Patterns of the files that are damaged."""
    needs_torch: bool = False


class _TimeoutError(BaseException):
    pass


@dataclass
class Outcome:
    """What became of the mutations."""

    num_read: int = 0
    num_refused: int = 0
    failures: list[str] = field(default_factory=list)
    peak_bytes: int = 0
    """Memory that the process took beyond what reading the good examples took."""
    cpu_s: float = 0.0
    longest_s: float = 0.0


def _tone(path: Path, seconds: float = 0.3, rate: int = 16000) -> None:
    import numpy as np
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(np.arange(int(seconds * rate)) / 9).astype("f4"), rate)


def _picture(path: Path, **settings: Any) -> None:
    import numpy as np
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 30)).save(path, **settings)


def _text(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


_NEEDED = ["model.path=builtin:emoji", "data.path=pictures", "output.path=runs/a"]


def _make_configs(root: Path) -> None:
    for name in ("sd1/style", "sdxl/style_8gb", "llava/llava15_7b_nf4", "whisper/base"):
        folder = root / name.replace("/", "-")
        folder.mkdir(parents=True)
        shutil.copy(_ROOT / "configs" / f"{name}.yaml", folder / "config.yaml")
    from lora_diffusion.config.load import load, to_yaml

    _text(root / "resolved" / "config.yaml", to_yaml(load(None, _NEEDED)))
    _text(
        root / "other-toml" / "config.toml",
        'output_name = "a"\nnetwork_dim = 8\n[general]\nlr = 1e-4\n',
    )
    _text(
        root / "other-kohya" / "config.json", {"LoRA_type": "Standard", "network_dim": 8, "unet_lr": 1e-4, "epoch": 3}
    )


def _read_config(folder: Path) -> None:
    from lora_diffusion.config.describe import explained_yaml
    from lora_diffusion.config.load import load
    from lora_diffusion.workflows.config import check_config

    path = folder / {"other-toml": "config.toml", "other-kohya": "config.json"}.get(folder.name, "config.yaml")
    config = load(path, _NEEDED[1:])
    check_config(config)
    explained_yaml(config)


def _make_suites(root: Path) -> None:
    for name in ("style", "composition-subjects", "dreambooth-live"):
        (root / name).mkdir(parents=True)
        shutil.copy(_ROOT / "configs" / "evaluate" / f"{name}.yaml", root / name / "suite.yaml")


def _read_suite(folder: Path) -> None:
    from lora_diffusion.evaluation import suites

    words = ["zwx", "blob style"], ["dog", "cat"]
    suites.check_used(folder / "suite.yaml", *words)
    suites.read_cases(folder / "suite.yaml", *words)


def _make_manifests(root: Path) -> None:
    names = [f"{index}.png" for index in range(3)]
    rows = [{"file_name": name, "text": f"a cat {name[0]}, blob style"} for name in names]
    for layout in ("pictures-jsonl", "pictures-csv", "pictures-txt", "chats-json", "chats-jsonl"):
        for name in names:
            _picture(root / layout / name)
    _text(root / "pictures-jsonl" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    table = "\n".join(f'{row["file_name"]},"{row["text"]}"' for row in rows)
    _text(root / "pictures-csv" / "metadata.csv", f"file_name,text\n{table}\n")
    for row in rows:
        _text(root / "pictures-txt" / row["file_name"].replace("png", "txt"), f"{row['text']}\n(an {{old}} cat:1.2)")
    chats: list[dict[str, Any]] = [
        {
            "image": names[0],
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "path": names[1]}, {"type": "text", "text": "What is it?"}],
                },
                {"role": "assistant", "content": "a dog"},
            ]
        },
        {"conversations": [{"from": "user", "value": "Hello"}, {"from": "assistant", "value": "Good day"}]},
    ]
    _text(root / "chats-json" / "chats.json", chats)
    _text(root / "chats-jsonl" / "chats.jsonl", "\n".join(map(json.dumps, chats)))
    tables = {
        "recordings-jsonl/metadata.jsonl": '{"path": "a.wav", "text": "one, two", "language": "en"}\n'
        '{"audio": "b.wav", "transcription": "three", "task": "translate"}\n',
        "recordings-csv/metadata.csv": 'file_name,transcription,language\na.wav,"one, two",en\nb.wav,three,de\n',
        "recordings-tsv/metadata.tsv": "path\tsentence\tlanguage\na.wav\tone, two\tde\nb.wav\tthree\ten\n",
        "recordings-voice/train.tsv": "client_id\tpath\tsentence\tlocale\nx\ta.wav\tone\ten\nx\tb.wav\tthree\tde\n",
        "recordings-speech/x.trans.txt": "a ONE TWO\nb THREE\n",
        "recordings-lj/metadata.csv": "a|One 2|One two\nb|Three|Three\n",
        "recordings-txt/a.txt": "<|0.00|> one<|0.10|><|0.10|> two<|0.30|>",
    }
    for name, content in tables.items():
        _text(root / name, content)
        for own in "ab":
            _tone((root / name).with_name(f"{own}.wav"))
    _text(root / "recordings-txt" / "b.txt", "three")


def _read_data(folder: Path) -> None:
    from lora_diffusion.architectures.clip_tokenizer import ClipTextLimit
    from lora_diffusion.config.schema import ChatDataConfig, ImageDataConfig, RecordingDataConfig
    from lora_diffusion.core.base_model import BaseInfo, ChatInfo, SpeechInfo
    from lora_diffusion.data.sample_types import CHATS, IMAGES, RECORDINGS

    kind: Any
    config: Any
    info: Any
    path = str(folder)
    if folder.name.startswith("pictures"):
        kind, config = IMAGES, ImageDataConfig(path=path, caption_lines="each")
        info = BaseInfo(64, 8, "stable-diffusion-v1", "epsilon", "tiny base", text_limit=ClipTextLimit())
    elif folder.name.startswith("chats"):
        kind, config = CHATS, ChatDataConfig(path=path)
        info = ChatInfo(source="a base", max_tokens=400, count_tokens=lambda samples: [9] * len(samples))
    else:
        kind, config = RECORDINGS, RecordingDataConfig(path=path, long="split")
        info = SpeechInfo(
            source="a base", languages=("en", "de"), max_tokens=400, count_tokens=lambda texts: [*map(len, texts)]
        )
    samples = kind.read(config, info)
    kind.describe(samples).lines()
    kind.identity(samples[0], config)


def _make_pictures(root: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("workflow", "x" * 3000)
    told.add_itxt("parameters", "a cat", zip=True)
    settings: dict[str, dict[str, Any]] = {
        "png": {"pnginfo": told},
        "jpg": {"exif": _exif()},
        "webp": {},
        "bmp": {},
        "gif": {},
        "tiff": {},
        "avif": {},
    }
    for ending, own in settings.items():
        folder = root / f"pictures-{ending}"
        _picture(folder / f"a.{ending}", **own)
        _text(folder / "a.txt", "a cat, blob style")


def _exif() -> Any:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _make_recordings(root: Path) -> None:
    for ending in ("wav", "flac", "ogg", "mp3", "aiff"):
        _tone(root / f"recordings-{ending}" / f"a.{ending}")
        _text(root / f"recordings-{ending}" / "a.txt", "one two")
    try:
        import av
    except ImportError:
        return
    _text(root / "recordings-m4a" / "a.txt", "one two")
    with av.open(str(root / "recordings-m4a" / "a.m4a"), "w", format="mp4") as container:
        import numpy as np

        stream = container.add_stream("aac", rate=16000)
        sound = 0.3 * np.sin(np.arange(1024, dtype="f4") / 9)[None]
        for index in range(5):
            frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, index * 1024
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def _pairs(prefix: str, rank: int = 2) -> dict[str, Any]:
    import numpy as np

    modules = (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    )
    shapes = ((320, 320), (1280, 5120))
    return {
        f"{prefix}{module}.lora_{side}.weight": np.full(
            (rank, shape[1]) if side == "A" else (shape[0], rank), 0.01, "f2"
        )
        for module, shape in zip(modules, shapes, strict=True)
        for side in "AB"
    }


def _make_peft(root: Path) -> None:
    from safetensors.numpy import save_file

    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["to_q", "net.2"],
        "use_dora": False,
        "base_model_name_or_path": "runwayml/stable-diffusion-v1-5",
        "task_type": None,
        "bias": "none",
        "alpha_pattern": {"mid_block.attentions.0.transformer_blocks.0.ff.net.2": 2},
        "rank_pattern": {},
        "auto_mapping": {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers.models"},
        "init_lora_weights": True,
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "use_rslora": False,
    }
    for layout in ("peft-parts/unet", "peft-plain"):
        _text(root / layout / "adapter_config.json", config)
        save_file(_pairs("base_model.model."), root / layout / "adapter_model.safetensors", {"format": "pt"})


def _make_adapters(root: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    for name in ("kohya", "diffusers"):
        (root / name).mkdir(parents=True)
    record = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q", "net.2"], "unet.rank_pattern": {}}
    save_file(
        _pairs("unet."),
        root / "diffusers" / "a.safetensors",
        {"lora_adapter_metadata": json.dumps(record), "modelspec.architecture": "stable-diffusion-v1/lora"},
    )
    tensors = {}
    for key, value in _pairs("").items():
        module, side, _ = key.rsplit(".", 2)
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{name}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = value
        tensors[f"{name}.alpha"] = np.array(1.0, "f2")
    told = {
        "ss_base_model_version": "sd_v1-5",
        "ss_network_dim": "2",
        "ss_output_name": "a",
        "ss_network_alpha": "1",
        "ss_tag_frequency": '{"10_a": {"cat": 3}}',
        "ss_dataset_dirs": '{"10_a": {"n_repeats": 10}}',
        "modelspec.title": "a",
        "modelspec.trigger_phrase": "zwx",
        "ss_bucket_info": '{"buckets": {}}',
    }
    save_file(tensors, root / "kohya" / "a.safetensors", told)


def _read_adapter(folder: Path) -> None:
    from lora_diffusion.workflows.convert import convert
    from lora_diffusion.workflows.inspect import inspect
    from lora_diffusion.workflows.metadata import show_metadata
    from lora_diffusion.workflows.verify import verify

    path = folder if folder.name.startswith("peft") else folder / "a.safetensors"
    with tempfile.TemporaryDirectory() as target:
        _each(
            lambda: inspect(path).text(),
            lambda: verify(path, base="sd1").text(),
            *([lambda: show_metadata(path)] if path != folder else []),
            lambda: convert(path, Path(target) / "b.safetensors", "kohya"),
        )


def _each(*actions: Callable[[], object]) -> None:
    """Does all; raises the last error of those that are refused."""
    refused: list[LoraDiffusionError] = []
    for action in actions:
        try:
            action()
        except LoraDiffusionError as error:
            _check_message(error)
            refused.append(error)
    if refused:
        raise refused[-1]


def _make_models(root: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

    from tests.tiny import save_tiny_pipeline, save_tiny_sdxl_pipeline, tiny_tokenizer
    from tests.tiny_llava import save_tiny_llava, save_tiny_llava_next
    from tests.tiny_whisper import save_tiny_whisper

    for name, save in (
        *(("sd1", save_tiny_pipeline), ("sdxl", save_tiny_sdxl_pipeline), ("whisper", save_tiny_whisper)),
        *(("llava", save_tiny_llava), ("llava-next", save_tiny_llava_next)),
    ):
        save(root / name)
    tokenizer = tiny_tokenizer()
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id}
    vision = {**layers, "image_size": 24, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config={**layers, **text}, vision_config=vision, projection_dim=16))
    for piece in (clip, tokenizer, CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24)):
        piece.save_pretrained(root / "scorer-clip")
    Dinov2Model(Dinov2Config(**layers, image_size=28)).save_pretrained(root / "scorer-dino")
    shutil.copytree(_ROOT / "lora_diffusion" / "builtin" / "emoji-clip", root / "scorer-open_clip")


def _read_model(folder: Path) -> None:
    import torch

    from lora_diffusion.config.load import load
    from lora_diffusion.core import registry
    from lora_diffusion.scoring.scorers import LOADERS

    name = folder.name
    if name.startswith("scorer"):
        LOADERS["dino" if name.endswith("dino") else "clip"](str(folder))
        return
    family: Any = registry.find("families", name.partition("-")[0])
    options = load(None, [f"model.family={family.architecture.name}", f"model.path={folder}"], required=False).model
    family.check(options)
    family.meta_modules(options)
    family.load(options, torch.device("cpu"))


def _make_runs(root: Path) -> None:
    import torch

    from lora_diffusion.config.load import load, to_yaml
    from lora_diffusion.training import checkpoint
    from lora_diffusion.training.checkpoint import TrainState
    from tests.evaluation.sample import make_sample

    run = root / "run"
    make_sample(root / "evaluation")
    shutil.rmtree(root / "evaluation" / "pictures")
    _text(run / "config.yaml", to_yaml(load(None, [*_NEEDED[:2], f"output.path={run}"])))
    lines = [{"step": step, "loss": 1 / step, "lr": 1e-4, "seconds": 0.1, "samples": 4} for step in range(1, 9)]
    _text(run / "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    losses = [
        {"key": f"{index}.png", "path": f"pictures/{index}.png", "caption": "a", "loss": 0.5, "caption_help": 0.1}
        for index in range(3)
    ]
    _text(run / "picture-losses.json", losses)
    _text(run / "files.json", {"started_in": str(root), "files": ["run.safetensors", "config.yaml"]})
    _text(
        run / "selection.json",
        {
            "file": "run-000100@1.0.safetensors",
            "best": "best.safetensors",
            "weight": 1.0,
            "why": "It is best.",
            "candidate": "step-000100@1.0",
            "evaluation": "evaluation",
            "warnings": ["Mind this."],
            "preference": {},
        },
    )
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    for step in (4, 8):
        state = TrainState(step, 8, {"data": "x", "rank": [1, 2]}, {}, {"torch": "2"})
        checkpoint.save(run, state, {"unet": {"a.down": weight}}, optimizer, 0)


def _read_run(folder: Path) -> None:
    from lora_diffusion.evaluation import results
    from lora_diffusion.evaluation.select import choose
    from lora_diffusion.report import page_data
    from lora_diffusion.training import checkpoint, run_files
    from lora_diffusion.training.run_folder import RunFolder
    from lora_diffusion.workflows.report import read_training
    from lora_diffusion.workflows.select import read_selection

    if folder.name == "evaluation":
        choose(results.read(folder))
        return

    def look_at_checkpoints() -> None:
        run_files.written(folder)
        if found := checkpoint.find_latest(folder):
            checkpoint.check_length(found, 100)
            checkpoint.check_fingerprint(found, {"data": "x", "rank": (1, 2)})

    _each(
        look_at_checkpoints,
        lambda: read_selection(folder),
        lambda: read_training(folder),
        lambda: RunFolder(folder).config(),
        lambda: page_data.check_beside(folder / "report.html", [folder / "report.csv"]),
    )


_CONFIGS = ("*.json", "*.jinja", "merges.txt")
SORTS: Mapping[str, Sort] = {
    "configs": Sort(_make_configs, _read_config),
    "suites": Sort(_make_suites, _read_suite),
    "manifests": Sort(_make_manifests, _read_data, ("*.jsonl", "*.json", "*.csv", "*.tsv", "*.txt")),
    "pictures": Sort(_make_pictures, _read_data, ("a.[!t]*", "a.tiff")),
    "recordings": Sort(_make_recordings, _read_data, ("a.[!t]*",)),
    "PEFT folders": Sort(_make_peft, _read_adapter, needs_torch=True),
    "adapter files": Sort(_make_adapters, _read_adapter, needs_torch=True),
    "model folders": Sort(_make_models, _read_model, (*_CONFIGS, *_CONFIGS, "*.safetensors"), needs_torch=True),
    "run folders": Sort(_make_runs, _read_run, ("*.json", "*.jsonl", "*.yaml", "*.csv"), needs_torch=True),
}


def _check_message(error: LoraDiffusionError) -> None:
    for line in str(error).split("\n  - "):
        assert line, "an empty line"
        assert "\n" not in line, f"a line break in {line!r}"
        assert len(line) < _LONGEST_LINE, f"{len(line)} characters: {line[:300]!r}"
    printable(str(error)).encode()


class _Records(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        printable(record.getMessage()).encode()


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise _TimeoutError(f"it took longer than {TIMEOUT_S} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIMEOUT_S)
    faulthandler.dump_traceback_later(2 * TIMEOUT_S, exit=True)  # for what does not come back to Python
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


def _attempt(outcome: Outcome, title: str, read: Callable[[], None]) -> None:
    start = time.monotonic()
    try:
        with _limited():
            try:
                read()
                outcome.num_read += 1
            except LoraDiffusionError as error:
                _check_message(error)
                outcome.num_refused += 1
    except (Exception, _TimeoutError):  # noqa: BLE001 - whatever it is, the next ones are tried too
        outcome.failures.append(f"{title}: {traceback.format_exc()}")
    outcome.longest_s = max(outcome.longest_s, time.monotonic() - start)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _watch_memory(limit: int) -> None:
    """Ends the process before it takes what other programs need."""
    while True:
        if _resident_bytes() > limit:
            faulthandler.dump_traceback(all_threads=True)
            print(f"more than {MEMORY_BYTES:,} bytes were taken", file=sys.stderr, flush=True)
            os._exit(3)
        time.sleep(0.05)


def run(name: str, numbers: range, seed: int, root: Path) -> Outcome:
    """Reads mutations of one sort; the number of each alone decides it."""
    sort, outcome = SORTS[name], Outcome()
    sort.make(root)
    folders = sorted(path for path in root.rglob("*") if path.is_dir() and path.parent == root)
    for folder in folders:
        if not folder.name.startswith("other"):
            sort.read(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    threading.Thread(target=_watch_memory, args=[_resident_bytes() + MEMORY_BYTES], daemon=True).start()
    files = {folder: [*_damaged_files(folder, sort.names)] for folder in folders}
    start = time.process_time()
    for number in numbers:
        rng = random.Random(f"{name} {seed} {number}")
        folder = rng.choice(folders)
        path = rng.choice(files[folder])
        whole = path.read_bytes()
        mutate(path, rng)
        _attempt(outcome, f"{name} {seed} {number}, {path.relative_to(root)}", lambda own=folder: sort.read(own))
        remove(path)
        path.write_bytes(whole)
        if len(outcome.failures) >= 30:
            break
    outcome.cpu_s = time.process_time() - start
    outcome.peak_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    return outcome


def _damaged_files(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    for name in names:
        yield from sorted(path for path in folder.rglob(name) if path.is_file())


def main() -> None:
    """Prints the outcome as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sort", choices=SORTS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logger.handlers, logger.propagate = [_Records()], False
    logger.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(args.sort, range(args.first, args.first + args.number), args.seed, Path(folder))
    print("\n", json.dumps(vars(outcome)))  # in a line of its own, since libraries print too


if __name__ == "__main__":
    main()
