"""What a kohya file says of itself in its header: read by A1111, Forge, ComfyUI and model sites.

Names and texts follow sd-scripts (`train_network.py`, `library/train_util.py`, `library/sai_model_spec.py`).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from lora_diffusion.architectures import ARCHITECTURES, DIFFUSION
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import suggestion
from lora_diffusion.tensorfile.arrays import Array, raw
from lora_diffusion.tensorfile.safetensors_file import TensorInfo, encode, layout

if TYPE_CHECKING:
    from PIL import Image as Images

    from lora_diffusion.core.adapter_state import AdapterState
    from lora_diffusion.core.base_model import Architecture


LEGACY_START, LEGACY_BYTES = 0x100000, 0x10000
"""Place and length of what the older hash of a file covers."""


def base_of(metadata: Mapping[str, str]) -> Architecture | None:
    """Returns the architecture of the base if the metadata tell it, in the words of kohya, ai-toolkit or modelspec."""
    texts = [metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture")]
    known = ((text, architecture) for text in texts for architecture in ARCHITECTURES.values())
    return next((architecture for text, architecture in known if text.startswith(architecture.metadata_starts)), None)


def other_base_of(metadata: Mapping[str, str]) -> str | None:
    """Returns what the metadata call the base, if that is none of the published diffusion bases."""
    modelspec, version = metadata.get("modelspec.architecture", ""), metadata.get("ss_base_model_version", "")
    if modelspec and not base_of({"modelspec.architecture": modelspec}):
        return modelspec
    return version if re.search(_OTHER_VERSIONS, version, re.IGNORECASE) else None


_OTHER_VERSIONS = (
    r"flux|sd_?3|stable.?cascade|chroma|qwen|wan\d|z.?image|hunyuan|hidream|lumina|pixart|aura|sana|ltx|cosmos|anima"
)
"""Expression in `ss_base_model_version` of bases of other architectures, as their trainers write it."""


def prediction_of(metadata: Mapping[str, str]) -> str | None:
    """Returns epsilon or v_prediction if the words for the base tell it."""
    version, modelspec = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    predictions = {_distinct(architecture.kohya_versions, version) for architecture in DIFFUSION.values()}
    predictions |= {_distinct(architecture.modelspec, modelspec.split("/")[0]) for architecture in DIFFUSION.values()}
    # kohya appends it to the version of any base.
    if version.endswith("_v") or "v_prediction" in predictions:
        return "v_prediction"
    return "epsilon" if "epsilon" in predictions else None


def _distinct(words: Mapping[str, str], text: str) -> str | None:
    """Returns the prediction that a word stands for, if it does not stand for several."""
    predictions = [prediction for prediction, word in words.items() if word == text]
    return predictions[0] if len(predictions) == 1 else None


def base_and_prediction(metadata: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Returns family and prediction, as far as the metadata tell them; another architecture as they call it."""
    base = base_of(metadata)
    return base.name if base else metadata.get("modelspec.architecture"), prediction_of(metadata)


def with_base(metadata: Mapping[str, str], architecture: Architecture) -> dict[str, str]:
    """Returns metadata that also hold what A1111 and Forge list a file by; what is there stays.

    Nothing is added for bases that kohya has no name for, nor where the name depends on a prediction that is not told.
    """
    missing = [key for key in VISIBLE if key not in metadata]
    word = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key", "")
    prediction = prediction_of(metadata) or {"epsilon": "epsilon", "v": "v_prediction"}.get(word)
    if not missing or not architecture.kohya_versions:
        return dict(metadata)
    if architecture.is_distinguished_by_prediction and prediction is None:
        epsilon, velocity = (architecture.kohya_versions[key] for key in ("epsilon", "v_prediction"))
        logger.warning(
            "The metadata do not tell whether the base predicts epsilon (%s) or v (%s), so that A1111 and Forge may "
            "hide the new file: lora-diffusion metadata edit FILE --set ss_base_model_version=%s --set ss_v2=%s",
            *(epsilon, velocity, velocity, architecture.is_v2),
        )
        return dict(metadata)
    prediction = prediction or "epsilon"
    known = {
        **_version_of(architecture, prediction),
        "modelspec.architecture": f"{architecture.modelspec[prediction]}/lora",
    }
    return {**metadata, **{key: known[key] for key in missing}}


def build(
    state: AdapterState,
    *,
    architecture: Architecture,
    modelspec: str,
    name: str,
    written_at: float,
    resolution: tuple[int, int] | None = None,
    prediction_type: str = "epsilon",
    trigger: str = "",
    training: Mapping[str, Any] | None = None,
    about: Mapping[str, str | None] | None = None,
) -> dict[str, str]:
    """Returns the metadata of a file, without the hashes, which `kohya.FORMAT.write` adds.

    Args:
        state: gives `ss_network_dim` and `ss_network_alpha`; where modules differ, the largest.
        architecture: that of the family.
        modelspec: `BaseInfo.architecture`, say stable-diffusion-v1.
        name: how users call the adapter in prompts: the file name without ending.
        written_at: seconds since 1970.
        resolution: width and height in pixels of the images it was trained on, if it was images.
        prediction_type: epsilon or v_prediction; "" where nothing of the kind is predicted.
        trigger: words that call up what was trained, "" for none.
        training: what else kohya tells, by its names without ss_ (learning_rate, steps, seed, clip_skip, ...): numbers,
            texts, or tables, which are written as JSON. None values are left out. `tag_frequency` and `dataset_dirs`
            publish caption words and folder names.
        about: what else modelspec tells, by its names without modelspec. (title, author, description, license,
            thumbnail, unet_dtype, ...). None values are left out; the title is otherwise the name.
    """
    values: dict[str, Any] = {
        **_version_of(architecture, prediction_type),
        "ss_network_module": _module_of(state),
        "ss_network_dim": max(adapter.rank for _, adapter in state),
        "ss_network_alpha": max(adapter.alpha for _, adapter in state),
        "ss_output_name": name,
        **{f"ss_{key}": value for key, value in (training or {}).items() if value is not None},
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{modelspec}/lora",
        "modelspec.implementation": architecture.implementation,
        "modelspec.title": name,
        "modelspec.date": spec_date(written_at),
    }
    if resolution:
        values["modelspec.resolution"] = f"{resolution[0]}x{resolution[1]}"
    if prediction_type:
        # The first is modelspec's word, the second that of ComfyUI.
        predicted = "v" if prediction_type == "v_prediction" else "epsilon"
        values |= {"modelspec.prediction_type": predicted, "modelspec.predict_key": predicted}
    if trigger:
        values["modelspec.trigger_phrase"] = trigger
    values |= {f"modelspec.{key}": value for key, value in (about or {}).items() if value is not None}
    return {key: _text(value) for key, value in values.items()}


def spec_date(written_at: float) -> str:
    """Returns modelspec's form of a time in seconds since 1970: the local one, without a zone."""
    return datetime.fromtimestamp(int(written_at)).isoformat()


def _version_of(architecture: Architecture, prediction: str) -> dict[str, str]:
    """Returns kohya's words for a base; none where it has none."""
    version = architecture.kohya_versions.get(prediction)
    return {"ss_base_model_version": version, "ss_v2": str(architecture.is_v2)} if version else {}


def _module_of(state: AdapterState) -> str:
    """Returns the Python module by which sd-scripts makes such adapters."""
    return "networks.lora" if {adapter.variant for _, adapter in state} == {"lora"} else "lycoris.kohya"


def count_tags(captions: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """Returns how often each tag of each folder occurs, for `tag_frequency`.

    >>> count_tags({"10_cat": ["A cat, red", "a cat"]})
    {'10_cat': {'a cat': 2, 'red': 1}}
    """
    counts: dict[str, dict[str, int]] = {}
    for folder, texts in captions.items():
        of_folder = counts.setdefault(folder, {})
        for tag in (tag.strip().lower() for text in texts for tag in text.split(",")):
            if tag:
                of_folder[tag] = of_folder.get(tag, 0) + 1
    return counts


BASE = "base_model_name_or_path"
"""Key of the hub id of the base, or of its name after builtin:, as PEFT calls it."""
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""What depends on the tensors, and the second on the ss_ metadata too."""
VISIBLE = ("ss_base_model_version", "ss_v2", "modelspec.architecture")
"""What A1111 and Forge tell the base from; without it they hide a file, or list it with the wrong ones."""


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns metadata for a file with other tensors."""
    return {key: value for key, value in metadata.items() if key not in HASHES}


def hashes(
    tensors: Mapping[str, Array], metadata: Mapping[str, str], places: Mapping[str, TensorInfo] | None = None
) -> dict[str, str]:
    """Returns `sshs_model_hash`, `sshs_legacy_hash` and modelspec's hash of a file with these tensors, of any shape.

    Args:
        tensors: by name.
        metadata: of the file.
        places: where the tensors stand in the file, in that order; those of the safetensors library without them.

    The first two are taken from the file as it would be with only the ss_ metadata: the first over all that follows the
    header, the second over 64 KiB at 1 MiB (of a smaller file: over nothing). The third, over the bytes of the tensors
    by name, is left out where no other modelspec text stands.

    Source: precalculate_safetensors_hashes in library/train_util.py of sd-scripts; modelspec 1.0.1.
    """
    places = places or layout(tensors)
    header = encode(places, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    digest, legacy, position = hashlib.sha256(), bytearray(), len(header)
    legacy += header[LEGACY_START : LEGACY_START + LEGACY_BYTES]
    for name in places:
        piece = raw(tensors[name])
        digest.update(piece)
        legacy += piece[max(0, LEGACY_START - position) : max(0, LEGACY_START + LEGACY_BYTES - position)]
        position += len(piece)
    values = {
        "sshs_model_hash": digest.hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }
    if any(key.startswith("modelspec.") for key in metadata):
        by_name = hashlib.sha256()
        for name in sorted(tensors):
            by_name.update(raw(tensors[name]))
        values["modelspec.hash_sha256"] = f"0x{by_name.hexdigest()}"
    return values


def change(metadata: Mapping[str, str], values: Mapping[str, str], removed: Iterable[str] = ()) -> dict[str, str]:
    """Returns metadata with some texts set and others taken out; hashes are left as they are.

    Raises:
        ConfigError: a text that is not there, is computed, or decides what the adapter does.
    """
    removed = list(removed)
    errors = [f"{key}: is computed from the tensors" for key in (*values, *removed) if key in HASHES]
    errors += [f"{key}: decides how strong the adapter is" for key in (*values, *removed) if key in _DECIDING]
    errors += [f"{key}: is not there{suggestion(key, metadata)}" for key in removed if key not in metadata]
    errors += [f"{key}: is both set and taken out" for key in removed if key in values]
    if errors:
        raise ConfigError("These metadata cannot be changed so:", errors)
    return {key: value for key, value in {**metadata, **values}.items() if key not in removed}


def strip(metadata: Mapping[str, str], kept: Iterable[str] = ()) -> dict[str, str]:
    """Returns the least metadata: what decides how strong the adapter is and where apps list it, and hashes.

    Args:
        metadata: all.
        kept: more to keep; a name that ends in "*" means all that begin so.

    Raises:
        ConfigError: a name in `kept` fits nothing.
    """
    patterns = [*_DECIDING, *VISIBLE, *HASHES, *kept]
    for pattern in kept:
        if not any(_fits(key, pattern) for key in metadata):
            raise ConfigError(f"--keep {pattern}: the file has no such metadata{suggestion(pattern, metadata)}.")
    return {key: value for key, value in metadata.items() if any(_fits(key, pattern) for pattern in patterns)}


_DECIDING = ("lora_adapter_metadata", "format")
"""The first is diffusers' record of ranks and alphas; the second says that the tensors are torch's."""


def _fits(key: str, pattern: str) -> bool:
    return key.startswith(pattern[:-1]) if pattern.endswith("*") else key == pattern


def _text(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) and value == round(value) and abs(value) < 1e6 else str(value)


LONGEST_SIDE = 256
"""Pixels."""
MOST_CHARACTERS = 64 * 2**10
"""Keeps the header far below the 1 MiB above which ComfyUI shows no metadata."""
_QUALITIES = (85, 70, 50, 30)


def data_url(image: Images.Image) -> str:
    """Returns an RGB image, which is made small in place, as a data URL.

    It is a JPEG of at most LONGEST_SIDE pixels and MOST_CHARACTERS characters.
    """
    from PIL import Image

    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    # Noise of this size takes 30,000 characters at the lowest quality.
    return next(url for quality in _QUALITIES if len(url := _encoded(image, quality)) <= MOST_CHARACTERS)


def _encoded(image: Images.Image, quality: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
