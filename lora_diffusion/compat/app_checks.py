"""What only one client does with a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

from lora_diffusion.compat import app_rules as rules
from lora_diffusion.compat import shared_checks as shared
from lora_diffusion.compat.adapter_file import FileModule
from lora_diffusion.compat.app_rules import HIDDEN, LOST, WRONG, Client, Fate
from lora_diffusion.compat.simulation import Trial, unused
from lora_diffusion.core.files import parse_json
from lora_diffusion.tensorfile.safetensors_file import content_hash

_PUBLISHED_NAMES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_JSON_TEXTS = ("ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info")
_VERSION_REMEDY = "lora-diffusion metadata edit FILE --set ss_base_model_version={} --set ss_v2={}"
_CONVERT = "write it anew: lora-diffusion convert FILE NEW --to {}"
_ADD_ZEROS = "add the missing ones as zeros: lora-diffusion compose FILE:1 --output NEW.safetensors"
_COMMON = (
    shared.find_beside,
    shared.find_odd_alpha,
    shared.find_double_names,
    shared.find_missing_alpha,
    shared.find_dora,
    shared.find_bad_numbers,
)


def _view_header(trial: Trial) -> None:
    num_bytes = trial.file.headers[0].num_bytes
    if num_bytes > rules.LARGEST_VIEWED_HEADER:
        text = f"a header of {num_bytes:,} bytes, above {rules.LARGEST_VIEWED_HEADER:,} ComfyUI shows no metadata"
        trial.report("large header", HIDDEN, text, "lora-diffusion metadata strip FILE")


def _count_unmatched(trial: Trial) -> None:
    """Applies nothing where too many tensors are left over, as Forge does."""
    file = trial.file
    unmatched = len(file.strays) + len(file.embeddings)
    for module in trial.modules:
        is_known = module.key is not None and module.spelling in trial.client.spellings[trial.base.family]
        num = len(module.roles) + sum(map(len, module.beside.values()))
        unmatched += len(unused(trial.client, module)) if is_known else num
    if unmatched > rules.FORGE_MOST_UNMATCHED:
        fate = Fate("file", LOST, f"applies nothing at all once more than {rules.FORGE_MOST_UNMATCHED} are left over")
        remedy = _CONVERT.format("kohya")
        what = f"module(s) with {unmatched} tensors that find no place"
        names = [module.name for module in file.modules if trial.factors[module.name] == 0]
        trial.suffer("unmatched", fate, what, remedy, names or list(file.strays) or list(trial.factors))


def _drop_what_fits_no_type(trial: Trial) -> None:
    """Drops the file where a module that A1111 finds has tensors that make no kind of adapter there."""
    names = [
        module.name
        for module in trial.modules
        if module.spelling == "diffusion_model."
        or (module.style == "norm" and not {"w_norm", "b_norm"} <= module.roles.keys() and module.key)
        or (module.style == "glora" and "alpha" not in module.roles and module.key)
    ]
    what, remedy = "module(s) with tensors that make no kind it knows", _CONVERT.format("kohya")
    trial.suffer("no type", trial.client.fates["style"], what, remedy, names)


def _miss_upsampler(trial: Trial) -> None:
    family, spelling, path = rules.A1111_MISSED
    missed = [
        module.name
        for module in trial.applied()
        if trial.base.family == family
        and module.spelling == spelling
        and module.key
        and re.fullmatch(path, module.key.path)
    ]
    what = "module(s) that A1111's table for SD1 calls otherwise in SDXL"
    trial.suffer("missed", trial.client.fates["unknown"], what, _CONVERT.format("kohya"), missed)


def _forget_alpha(trial: Trial) -> None:
    """Forgets alpha, as A1111 does, where the factors are called lora_A and lora_B."""
    factors = {
        module.name: 1 / module.scale
        for module in trial.applied()
        if module.style == "peft" and module.alpha is not None and module.scale
    }
    shared.report_scales(trial, factors, "alpha forgotten", "lora_A and lora_B, with which A1111 forgets alpha")
    turned = [module.name for module in trial.applied() if module.style == "peft" and "dora_scale" in module.roles]
    if turned:
        text = f"{len(turned)} module(s) with lora_A and lora_B, with which A1111 forgets the DoRA magnitude"
        trial.report("dora forgotten", WRONG, text, _CONVERT.format("kohya"), turned)
        trial.scale(dict.fromkeys(turned))


def _take_scale(trial: Trial) -> None:
    """Takes a scale that stands in the file in place of alpha / rank, as A1111 does."""
    factors = {
        module.name: float(scale.float().flatten()[0]) / module.scale
        for module in trial.applied()
        if (scale := module.roles.get("scale")) is not None and scale.numel() and module.scale
        if module.style != "peft"
    }
    shared.report_scales(
        trial, factors, "own scale", "a scale of their own, which A1111 takes in place of alpha / rank"
    )


def _fuse_attention(trial: Trial) -> None:
    """Loses attention of OpenCLIP towers, where A1111 wants q, k, v and out together."""
    part = rules.A1111_FUSED.get(trial.base.family)
    layers: dict[str, list[str]] = {}
    for module in trial.applied():
        if module.key and module.key.part == part and ".self_attn." in module.key.path:
            layers.setdefault(module.key.path.rsplit(".", 1)[0], []).append(module.name)
    names = [name for own in layers.values() if len(own) < len(("q", "k", "v", "out")) for name in own]
    fate = Fate("module", LOST, "joins q, k and v of this text encoder and applies them only if out is there too")
    what = "attention module(s) of layers without all of q, k, v and out"
    trial.suffer("fused attention", fate, what, _ADD_ZEROS, names)


def _start_of_header(trial: Trial) -> None:
    if trial.file.headers[0].start not in (b'{"', b"{'"):
        text = 'a header that does not begin with {", without which A1111 reads no metadata'
        trial.report("header start", HIDDEN, text, "write it anew: lora-diffusion metadata edit FILE")


def _a1111_version(metadata: Mapping[str, str]) -> str:
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    return "sd2" if metadata.get("ss_v2") == "True" else "sd1" if metadata else ""


def _forge_version(metadata: Mapping[str, str]) -> str:
    architecture = metadata.get("modelspec.architecture")
    if architecture == "stable-diffusion-xl-v1-base/lora" or _a1111_version(metadata) == "sdxl":
        return "sdxl"
    if metadata.get("ss_v2") == "True":
        return "sd2"
    return "sd1" if architecture == "stable-diffusion-v1/lora" else ""


def _listed_as(version: Callable[[Mapping[str, str]], str]) -> Callable[[Trial], None]:
    """Returns the check that a file is listed beside checkpoints of its own kind, by the client's rule."""

    def check(trial: Trial) -> None:
        found, family = version(trial.file.metadata), trial.base.family
        if found and found != family:
            text = f"{trial.client.title} lists it for {_PUBLISHED_NAMES[found]} by its metadata, and hides it beside "
            text += f"{_PUBLISHED_NAMES[family]} checkpoints"
            remedy = _VERSION_REMEDY.format(_VERSIONS[family], family == "sd2")
            trial.report("version", HIDDEN, text, remedy)

    return check


def _shown_details(trial: Trial) -> None:
    """Looks at the metadata that A1111 and Forge show and trust."""
    metadata = trial.file.metadata
    broken = [name for name in _JSON_TEXTS if name in metadata and not _is_json(metadata[name])]
    if broken:
        text = f"{', '.join(broken)} hold no JSON, on which the details page of {trial.client.title} fails"
        remedy = f"lora-diffusion metadata edit FILE {' '.join(f'--unset {name}' for name in broken)}"
        trial.report("details", HIDDEN, text, remedy)
    told = metadata.get("sshs_model_hash")
    if told and told != content_hash(trial.file.path, trial.file.headers[0]):
        text = (
            f"sshs_model_hash is not that of its tensors, so {trial.client.title} and model sites take it for another"
        )
        trial.report("hash", HIDDEN, text, "lora-diffusion metadata edit FILE computes it anew")


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _refuse_record_beside_alphas(trial: Trial) -> None:
    """Refuses a file of kohya's that also holds diffusers' own record."""
    with_alpha = [module.name for module in trial.applied() if module.alpha is not None]
    if "lora_adapter_metadata" in trial.file.metadata:
        fate = trial.client.fates["style"]
        what = "module(s) with alpha beside diffusers' own record of alphas"
        trial.suffer("two records", fate, what, _CONVERT.format("kohya"), with_alpha)


def _refuse_unconverted(trial: Trial) -> None:
    """Refuses a file of kohya's of which the conversion leaves a tensor over or misses one, as diffusers does."""
    names = {name for name in trial.file.names if "dora_scale" not in name}
    downs = [name for name in names if name.endswith("lora_down.weight")]
    stems = {name: name.partition(".")[0] for name in downs}
    lacking = [name for name, stem in stems.items() if f"{stem}.lora_up.weight" not in names]
    read = {*downs, *(f"{stem}.{end}" for stem in stems.values() for end in ("lora_up.weight", "alpha"))}
    left = [*lacking, *(name for name in trial.file.names if name in names - read)]
    if left:
        fate = trial.client.fates["style"]
        what, remedy = "tensor(s) that it does not convert, or whose pair it misses", _CONVERT.format("kohya")
        trial.suffer("not converted", fate, what, remedy, left)


def _drop_broken_embedding(trial: Trial) -> None:
    """Drops a file with an embedding that is neither one tensor nor the two of SDXL, as A1111 does."""
    found: dict[str, set[str]] = {}
    for name in trial.file.embeddings:
        _, _, rest = name.partition(".")
        owner, _, vector = rest.partition(".")
        found.setdefault(owner, set()).add(vector.partition(".")[0])
    broken = [
        own
        for own, names in found.items()
        if not (names & {"string_to_param"} or {"clip_l", "clip_g"} <= names or len(names) == 1) or "" in names
    ]
    what, remedy = "embedding(s) of a kind that it does not know", "take them out: lora-diffusion convert FILE NEW"
    trial.suffer("embedding", trial.client.fates["style"], what, remedy, broken)


def _drop_ldm_names(trial: Trial) -> None:
    """Drops all LDM names of an SDXL file that also holds others, as diffusers does."""
    ldm = [module.name for module in trial.applied() if module.spelling == "lora_unet_ ldm"]
    if any(re.search(r"(down|up)_blocks|mid_block", name) for name in trial.file.names):
        fate = Fate("module", LOST, "drops those in LDM spelling without a word")
        remedy = _CONVERT.format("kohya")
        trial.suffer("two spellings", fate, "module(s) in LDM spelling beside others in diffusers'", remedy, ldm)


def _misplace_upsampler(trial: Trial) -> None:
    """Loses an upsampler behind a block without attention, whose LDM number diffusers takes for an attention's."""
    names = [
        module.name
        for module in trial.applied()
        if module.spelling == "lora_unet_ ldm" and module.key and re.search(r"upsamplers", module.key.path)
        if module.name.endswith("_1_conv")
    ]
    what = "upsampler(s) behind a block without attention, in LDM spelling"
    trial.suffer("misplaced", trial.client.fates["unknown"], what, _CONVERT.format("diffusers"), names)


def _refuse_unmatched_part(trial: Trial) -> None:
    """Stops where a network has an adapter, but none of its modules is found, as diffusers does."""
    unet = [module for module in trial.modules if module.name.startswith(("lora_unet_", "unet."))]
    if unet and not any(trial.factors[module.name] for module in unet):
        names = [module.name for module in unet]
        what = "names, none of which the UNet has"
        trial.suffer("no module", trial.client.fates["shape"], what, _CONVERT.format("diffusers"), names)


def _share_alphas(trial: Trial) -> None:
    """Gives attention and text encoders the commonest alpha of a part, and so all that have none, as diffusers does."""
    factors: dict[str, float] = {}
    for part in {module.key.part for module in trial.applied() if module.key}:
        own = [module for module in trial.applied() if module.key and module.key.part == part]
        counted = Counter(module.alpha for module in own if module.alpha is not None)
        if not counted:
            continue
        commonest = counted.most_common(1)[0][0]
        for module in own:
            if module.rank and module.scale and (module.alpha is None or _takes_commonest(module)):
                factors[module.name] = commonest / module.rank / module.scale
    what = "an alpha other than the commonest, which diffusers gives to attention and text encoders"
    shared.report_scales(trial, factors, "alphas differ", what)


def _takes_commonest(module: FileModule) -> bool:
    """Says whether diffusers spells a module's own alpha so that PEFT does not find it."""
    assert module.key, "an applied module is one of the base"
    if module.key.part == "unet":
        return bool(re.search(r"\.attn[12]\.", module.key.path))
    # It looks for text_model.encoder..., which CLIPTextModel of transformers 5.6 does not have any more.
    return ".mlp." not in module.key.path or not module.key.path.startswith("text_model.")


def _tells_text_encoder(mark: str, named: str, remedy: str) -> Callable[[Trial], None]:
    """Returns the check that names of a text encoder tell diffusers their spelling.

    Args:
        mark: regular expression of the names that do.
        named: what they hold, for people.
        remedy: what adds such a module.
    """

    def check(trial: Trial) -> None:
        parts = {module.key.part for module in trial.applied() if module.key} - {"unet"}
        for part in sorted(parts):
            own = [module for module in trial.applied() if module.key and module.key.part == part]
            if not any(re.search(mark, module.name) or module.style == "linear_layer" for module in own):
                fate = Fate("file", LOST, "stops: it cannot tell the spelling of the text encoder")
                what = f"text encoder module(s), but no {named}"
                trial.suffer("text encoder", fate, what, remedy, [module.name for module in own])

    return check


def _lose_attention_of_text(trial: Trial) -> None:
    """Loses q, k and v of a text encoder without any out, whose names diffusers then takes for newer ones."""
    parts = {module.key.part for module in trial.applied() if module.key} - {"unet"}
    for part in sorted(parts):
        own = [module.name for module in trial.applied() if module.key and module.key.part == part]
        lost = [name for name in own if "self_attn" in name]
        if not any("out_proj" in name for name in own):
            what = "attention module(s) of a text encoder that has no out_proj"
            trial.suffer("text encoder", trial.client.fates["unknown"], what, _ADD_ZEROS, lost)


def _take_for_own(trial: Trial) -> None:
    """Loads nothing of a kohya file with one tensor called otherwise, which diffusers takes for one of its own."""
    others = [name for name in trial.file.names if not name.startswith(rules.DIFFUSERS_KOHYA_STARTS)]
    if 2 * len(others) < len(trial.file.names):
        fate = Fate("file", LOST, "takes the file for one of its own because of these, and loads nothing")
        what = "tensor(s) that are not called as kohya calls them, unlike the others"
        trial.suffer("stray", fate, what, _CONVERT.format("kohya"), others)


def _refuse_names_without_lora(trial: Trial) -> None:
    names = [name for name in trial.file.names if "lora" not in name and "dora_scale" not in name]
    what = "tensor(s) whose names do not hold 'lora'"
    trial.suffer("no lora", trial.client.fates["shape"], what, _CONVERT.format("diffusers"), names)


def _read_first_style(trial: Trial) -> None:
    """Lets the first UNet name decide whether older names are converted, as diffusers does."""
    first = next((name for name in trial.file.names if name.startswith("unet.")), "")
    older = "lora_A" not in first
    dropped = ("linear_layer",) if older else ("diffusers", "linear_layer", "processor")
    names = [
        module.name
        for module in trial.applied()
        if module.key and module.key.part == "unet" and module.style in dropped
    ]
    fate = Fate("module", LOST, "looks at the first name only and drops these without an error")
    remedy = _CONVERT.format("diffusers")
    trial.suffer("mixed styles", fate, "module(s) called otherwise than the first", remedy, names)


CHECKS: Mapping[Client, tuple[Callable[[Trial], None], ...]] = {
    rules.COMFYUI: (shared.find_lost, *_COMMON, shared.find_ignored_record, _view_header),
    rules.FORGE: (
        *(shared.find_lost, _count_unmatched, *_COMMON, shared.find_ignored_record),
        *(_listed_as(_forge_version), _shown_details),
    ),
    rules.A1111: (
        *(
            shared.find_lost,
            _drop_what_fits_no_type,
            _drop_broken_embedding,
            _miss_upsampler,
            _fuse_attention,
            *_COMMON,
            _take_scale,
            _forget_alpha,
        ),
        *(shared.find_ignored_record, shared.find_small_numbers),
        *(_start_of_header, _listed_as(_a1111_version), _shown_details),
    ),
    rules.KOHYA: (shared.find_lost, *_COMMON, shared.find_ignored_record),
    rules.DIFFUSERS: (
        *(shared.find_lost, _refuse_unconverted, _refuse_record_beside_alphas, _drop_ldm_names, _misplace_upsampler),
        *(_refuse_unmatched_part, _tells_text_encoder("out_proj|mlp", "out_proj and no mlp", _ADD_ZEROS)),
        _lose_attention_of_text,
        *(*_COMMON, _share_alphas),
    ),
    rules.DIFFUSERS_DOTTED: (
        *(_take_for_own, _refuse_names_without_lora, shared.find_lost, _read_first_style, _refuse_unmatched_part),
        _tells_text_encoder(r"self_attn\.(q|k|v|out)_proj", "attention", _CONVERT.format("diffusers")),
        *(shared.find_other_ranks, shared.find_made_magnitudes, *_COMMON),
    ),
    rules.PEFT_FOLDER: (shared.find_lost, shared.find_other_ranks, shared.find_made_magnitudes, *_COMMON),
}
"""What is looked for in turn, until nothing of the file is left."""
