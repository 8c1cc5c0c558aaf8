"""No model folder, adapter or setting can run code: what is planted in each kind of folder stays where it is."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_diffusion
from lora_diffusion.config.load import load
from lora_diffusion.core import registry
from lora_diffusion.core.errors import LoraDiffusionError
from lora_diffusion.core.files import builtin_path
from lora_diffusion.formats import peft
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.scoring.clip import load_clip
from lora_diffusion.scoring.dino import load_dino
from lora_diffusion.tensorfile.arrays import in_float32
from tests.tiny import save_tiny_pipeline
from tests.tiny_llava import save_tiny_llava
from tests.tiny_whisper import save_tiny_whisper

SOURCES = sorted(Path(lora_diffusion.__file__).parent.rglob("*.py"))
_AUTO = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor")
AUTO_MAP = {**dict.fromkeys(_AUTO, "evil.Evil"), "AutoTokenizer": ["evil.Evil", "evil.Evil"]}


class TestSources:
    """Each call that loads something says that it trusts nothing."""

    @pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
    def test_loaders(self, path: Path) -> None:
        wrong = [f"{path}:{call.lineno} {name}" for name, call in _calls(path) if not _is_safe(name, call, path)]
        assert wrong == []

    def test_there_are_some(self) -> None:
        names = [name for path in SOURCES for name, _ in _calls(path)]
        assert names.count("from_pretrained") >= 9
        assert names.count("load") > 5


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def _is_safe(name: str, call: ast.Call, path: Path) -> bool:
    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
    function = ast.unparse(call.func)
    if function == "nn.Embedding.from_pretrained":  # takes a tensor
        return True
    if name == "from_pretrained":
        return words.get("trust_remote_code") == "False"
    if function == "torch.load" or name.startswith("create_model"):
        return words.get("weights_only") == "True"
    if function == "yaml.load":
        return path.name == "plain_yaml.py"
    if name in ("Environment", "ImmutableSandboxedEnvironment", "Template", "from_string"):
        return path.name in ("template_worker.py", "rendering.py", "model_card.py")
    forbidden = ("pickle.", "joblib.", "dill.", "marshal.", "OmegaConf.", "torch.hub.", "np.load")
    methods = ("apply_chat_template", "unsafe_load", "full_load", "load_dataset")
    return (
        name not in methods
        and function not in ("eval", "exec")
        and not function.startswith(forbidden)
        and words.get("trust_remote_code") != "True"
    )


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What planted code would write; whatever is asked at the terminal is answered with yes."""
    mark = tmp_path / "RAN"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield mark
    assert not mark.exists()
    assert not [name for name in sys.modules if name.rpartition(".")[2] == "evil"]


def plant(folder: Path, mark: Path) -> Path:
    """Puts a module beside every config of a model, and names it in each."""
    source = (
        f"import pathlib\npathlib.Path({str(mark)!r}).write_text('x')\nfrom transformers import PretrainedConfig\n"
        "class Evil(PretrainedConfig):\n    model_type = 'evil'\ndef generate(*args, **kwargs): pass\n"
    )
    for inner in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for name in ("evil.py", "pipeline.py", "custom_generate/generate.py"):
            (inner / name).parent.mkdir(exist_ok=True)
            (inner / name).write_text(source)
        for file in inner.glob("*config.json"):
            _change(file, auto_map=AUTO_MAP)
    return folder


def _change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text("utf-8")) if file.is_file() else {}) | values))


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def _open(action: Callable[[], object]) -> str | None:
    """Returns what a loader says, None where it loads."""
    try:
        action()
    except LoraDiffusionError as error:
        assert "\n" not in str(error).split("\n  - ", maxsplit=1)[0]
        return str(error)
    return None


def _load_base(name: str, folder: Path) -> None:
    family = registry.find("families", name)
    options = load(None, [f"model.family={name}", f"model.path={folder}"], required=False).model
    family.check(options)
    family.meta_modules(options)
    family.load(options, torch.device("cpu"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a family -> a base of it."""
    root = tmp_path_factory.mktemp("bases")
    savers = {"sd1": save_tiny_pipeline, "whisper": save_tiny_whisper, "llava": save_tiny_llava}
    return {name: save(root / name) or root / name for name, save in savers.items()}


def test_planted_code_runs_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all that follows would say nothing."""
    from transformers import AutoConfig

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "evil"}')
    plant(folder, tmp_path / "RAN")
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "RAN").exists()
    for name in [name for name in sys.modules if name.rpartition(".")[2] == "evil"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["sd1", "whisper", "llava"])
class TestBases:
    def test_modules_in_its_folders(self, name: str, bases: dict[str, Path], tmp_path: Path, mark: Path) -> None:
        assert _open(lambda: _load_base(name, plant(shutil.copytree(bases[name], tmp_path / "base"), mark))) is None

    def test_an_unknown_type_of_model(self, name: str, bases: dict[str, Path], tmp_path: Path, mark: Path) -> None:
        base = plant(shutil.copytree(bases[name], tmp_path / "base"), mark)
        for file in base.rglob("config.json"):
            _change(file, model_type="evil", architectures=["Evil"])
        for file in base.rglob("tokenizer_config.json"):
            _change(file, tokenizer_class="Evil")
        for pattern in ("preprocessor_config.json", "processor_config.json"):
            for file in base.rglob(pattern):
                _change(file, processor_class="Evil", feature_extractor_type="Evil", image_processor_type="Evil")
        _open(lambda: _load_base(name, base))

    def test_pickled_weights(self, name: str, bases: dict[str, Path], tmp_path: Path, mark: Path) -> None:
        base = Path(shutil.copytree(bases[name], tmp_path / "base"))
        for file in [*base.rglob("*.safetensors")]:
            stem = "pytorch_model" if file.stem == "model" else file.stem
            file.with_name(f"{stem}.bin").write_bytes(pickle.dumps(_Bomb(mark)))
            file.unlink()
        assert "pickled weights" in str(_open(lambda: _load_base(name, base)))

    def test_an_adapter_beside_the_weights(self, name: str, bases: dict[str, Path], tmp_path: Path, mark: Path) -> None:
        base = Path(shutil.copytree(bases[name], tmp_path / "base"))
        mapping = {"parent_library": "evil", "base_model_class": "Evil"}
        _change(base / "adapter_config.json", peft_type="LORA", auto_mapping=mapping, base_model_name_or_path="evil")
        told = _open(lambda: _load_base(name, base))
        assert told is None if name == "sd1" else "adapter_config.json" in str(told)


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["evil", "Evil"]},
        {"_class_name": ["pipeline", "Evil"], "custom_pipeline": "pipeline"},
        {"unet": ["evil", "Evil"]},
        {"vae": ["transformers", "AutoModel"]},
        {"text_encoder": ["transformers", "AutoModel"]},
        {"tokenizer": ["transformers", "AutoTokenizer"]},
        {"scheduler": ["evil", "Evil"]},
        {"scheduler": ["os", "system"]},
        {"scheduler": ["diffusers", "DiffusionPipeline"]},
        {"safety_checker": ["evil", "Evil"], "feature_extractor": ["transformers", "AutoImageProcessor"]},
        {"extra": ["evil", "Evil"]},
        {"unet": None},
        {"unet": [None, None]},
        {"unet": "evil"},
    ],
    ids=str,
)
def test_an_index_that_names_other_classes(
    index: dict[str, Any], bases: dict[str, Path], tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = plant(shutil.copytree(bases["sd1"], tmp_path / "base"), mark)
    monkeypatch.syspath_prepend(str(base))
    _change(base / "model_index.json", **index)
    if "text_encoder" in index:
        _change(base / "text_encoder" / "config.json", model_type="evil")
    told = _open(lambda: _load_base("sd1", base))
    (first,) = [*index][:1]
    if first in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        assert f"- {first}: it is" in str(told)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id}
    vision = {**layers, "image_size": 24, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config={**layers, **text}, vision_config=vision, projection_dim=16))
    dino = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    root = tmp_path_factory.mktemp("scorers")
    for piece in (clip, tokenizer, CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24)):
        piece.save_pretrained(root / "clip")
    dino.save_pretrained(root / "dino")
    shutil.copytree(builtin_path("emoji-clip"), root / "open_clip")
    return {name: root / name for name in ("clip", "dino", "open_clip")}


class TestScorers:
    @pytest.mark.parametrize("name", ["clip", "dino", "open_clip"])
    def test_modules_in_its_folder(self, name: str, own: dict[str, Path], tmp_path: Path, mark: Path) -> None:
        folder = plant(shutil.copytree(own[name], tmp_path / "model"), mark)
        loader = load_dino if name == "dino" else load_clip
        assert _open(lambda: loader(str(folder))) is None
        _change(folder / "config.json", model_type="evil", architectures=["Evil"])
        _change(folder / "tokenizer_config.json", tokenizer_class="Evil")
        _change(folder / "preprocessor_config.json", image_processor_type="Evil")
        _open(lambda: loader(str(folder)))

    @pytest.mark.parametrize("name", ["clip", "dino", "open_clip"])
    def test_pickled_weights(self, name: str, own: dict[str, Path], tmp_path: Path, mark: Path) -> None:
        folder = Path(shutil.copytree(own[name], tmp_path / "model"))
        for file in [*folder.glob("*.safetensors")]:
            file.unlink()
        name_ = "open_clip_pytorch_model.bin" if name == "open_clip" else "pytorch_model.bin"
        (folder / name_).write_bytes(pickle.dumps(_Bomb(mark)))
        assert _open(lambda: (load_dino if name == "dino" else load_clip)(str(folder)))
        torch.save({"x": _Bomb(mark)}, folder / name_)
        assert _open(lambda: (load_dino if name == "dino" else load_clip)(str(folder)))

    @pytest.mark.parametrize("name", ["clip", "dino"])
    def test_what_else_would_be_loaded(self, name: str, own: dict[str, Path], tmp_path: Path) -> None:
        loader = load_dino if name == "dino" else load_clip
        folder = Path(shutil.copytree(own[name], tmp_path / "model"))
        _change(folder / "config.json", attn_implementation="evil/kernel")
        assert "evil/kernel" in str(_open(lambda: loader(str(folder))))
        (folder / "adapter_config.json").write_text("{}")
        assert "adapter_config.json" in str(_open(lambda: loader(str(folder))))

    @pytest.mark.parametrize(
        ("section", "values", "told"),
        [
            ("text_cfg", {"hf_model_name": "EVIL"}, "text_cfg.hf_model_name"),
            ("text_cfg", {"hf_model_name": "owner/evil"}, "text_cfg.hf_model_name=owner/evil"),
            ("text_cfg", {"hf_model_name": "roberta-base"}, "roberta-base"),
            ("text_cfg", {"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs has trust_remote_code"),
            ("text_cfg", {"tokenizer_kwargs": {"tokenizer_type": "x"}}, "tokenizer_kwargs has tokenizer_type"),
            ("vision_cfg", {"timm_model_name": "hf-hub:owner/evil"}, "vision_cfg.timm_model_name=hf-hub:owner/evil"),
            ("vision_cfg", {"width": "wide"}, "cannot be loaded"),
        ],
    )
    def test_configs_of_open_clip(
        self,
        section: str,
        values: dict[str, Any],
        told: str,
        own: dict[str, Path],
        tmp_path: Path,
        mark: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = plant(shutil.copytree(own["open_clip"], tmp_path / "model"), mark)
        (tmp_path / "roberta-base").mkdir()
        monkeypatch.chdir(tmp_path)
        file = folder / "open_clip_config.json"
        config = json.loads(file.read_text("utf-8"))
        text = json.dumps(values).replace("EVIL", str(folder))
        config["model_cfg"][section] |= json.loads(text)
        file.write_text(json.dumps(config))
        assert told in str(_open(lambda: load_clip(str(folder))))


def test_adapters_of_peft(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "adapter" / "unet"
    folder.mkdir(parents=True)
    mapping = {"parent_library": "evil", "base_model_class": "Evil"}
    values = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q"],
        "auto_mapping": mapping,
        "custom_modules": "evil",
    }
    _change(folder / "adapter_config.json", **values)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Bomb(mark)))
    plant(folder, mark)
    assert "is a pickle" in str(_open(lambda: parse_file(folder.parent)))
    sd1 = registry.find("families", "sd1")
    options = replace(load(None, [], required=False).model, path="builtin:emoji")
    assert _open(lambda: in_float32(peft.FORMAT.read(parse_file(folder.parent), sd1.key_map("peft", options))))
