"""What only one app does with a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.base import DiffusionArchitecture
from lora_diffusion.compat import app_rules as rules
from lora_diffusion.compat import shared_checks as shared
from lora_diffusion.compat.app_rules import HIDDEN, LOST, WRONG, App, Consequence
from lora_diffusion.compat.matched_file import MatchedModule
from lora_diffusion.compat.simulation import Simulation, unused
from lora_diffusion.core.files import parse_json

_JSON_TEXTS = ("ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info")
_VERSION_REMEDY = "lora-diffusion metadata edit FILE --set ss_base_model_version={} --set ss_v2={}"
_CONVERT = "write it again: lora-diffusion convert FILE NEW --to {}"
_ADD_ZEROS = "add the missing ones as zeros: lora-diffusion compose FILE:1 --output NEW.safetensors"
_COMMON = (
    shared.find_beside,
    shared.find_odd_alpha,
    shared.find_double_names,
    shared.find_missing_alpha,
    shared.find_dora,
    shared.find_bad_numbers,
)


def _view_header(sim: Simulation) -> None:
    num_bytes = sim.file.parsed.headers[0].num_bytes
    if num_bytes > rules.LARGEST_VIEWED_HEADER:
        text = f"a header of {num_bytes:,} bytes, above {rules.LARGEST_VIEWED_HEADER:,} ComfyUI shows no metadata"
        sim.report("large header", HIDDEN, text, "lora-diffusion metadata strip FILE")


def _count_unmatched(sim: Simulation) -> None:
    """Applies nothing where too many tensors are left over, as Forge does."""
    file = sim.file
    num_unmatched = len(file.unmatched) + len(file.embeddings)
    for module in sim.modules:
        is_known = module.key is not None and sim.app.finds(module.naming, sim.base.architecture)
        num = len(module.roles) + sum(map(len, module.beside.values()))
        num_unmatched += len(unused(sim.app, module)) if is_known else num
    if num_unmatched > rules.FORGE_MOST_UNMATCHED:
        consequence = Consequence(
            "file", LOST, f"applies nothing at all once more than {rules.FORGE_MOST_UNMATCHED} are left over"
        )
        remedy = _CONVERT.format("kohya")
        what = f"module(s) with {num_unmatched} tensors that find no place"
        names = [module.name for module in file.modules if sim.factors[module.name] == 0]
        sim.fail("unmatched", consequence, what, remedy, names or list(file.unmatched) or list(sim.factors))


def _drop_what_fits_no_type(sim: Simulation) -> None:
    """Drops the file where a module that A1111 finds has tensors that make no variant there."""
    names = [
        module.name
        for module in sim.modules
        if module.naming == "diffusion_model."
        or (module.style == "norm" and not {"w_norm", "b_norm"} <= module.roles.keys() and module.key)
        or (module.style == "glora" and "alpha" not in module.roles and module.key)
    ]
    what, remedy = "module(s) with tensors that make no kind it knows", _CONVERT.format("kohya")
    sim.fail("no type", sim.app.consequences["style"], what, remedy, names)


def _miss_upsampler(sim: Simulation) -> None:
    path = sim.base.architecture.a1111_misnamed
    missed = [
        module.name
        for module in sim.applied()
        if module.naming == "lora_unet_" and module.key and re.fullmatch(path, module.key.path)
    ]
    what = "module(s) that A1111's table for SD1 calls otherwise in SDXL"
    sim.fail("missed", sim.app.consequences["unknown"], what, _CONVERT.format("kohya"), missed)


def _forget_alpha(sim: Simulation) -> None:
    """Forgets alpha, as A1111 does, where the factors are called lora_A and lora_B."""
    factors = {
        module.name: 1 / module.scale
        for module in sim.applied()
        if module.style == "peft" and module.alpha is not None and module.scale
    }
    shared.report_scales(sim, factors, "alpha forgotten", "lora_A and lora_B, with which A1111 forgets alpha")
    turned = [module.name for module in sim.applied() if module.style == "peft" and "dora_scale" in module.roles]
    if turned:
        text = f"{len(turned)} module(s) with lora_A and lora_B, with which A1111 forgets the DoRA magnitude"
        sim.report("dora forgotten", WRONG, text, _CONVERT.format("kohya"), turned)
        sim.scale(dict.fromkeys(turned))


def _take_scale(sim: Simulation) -> None:
    """Takes a scale that stands in the file in place of alpha / rank, as A1111 does."""
    factors = {
        module.name: float(scale.float().flatten()[0]) / module.scale
        for module in sim.applied()
        if (scale := module.roles.get("scale")) is not None and scale.numel() and module.scale
        if module.style != "peft"
    }
    shared.report_scales(sim, factors, "own scale", "a scale of their own, which A1111 takes in place of alpha / rank")


def _fuse_attention(sim: Simulation) -> None:
    """Loses attention of OpenCLIP text encoders, where A1111 wants q, k, v and out together."""
    part = next((encoder.part for encoder in sim.base.architecture.text_encoders if encoder.is_open_clip), None)
    layers: dict[str, list[str]] = {}
    for module in sim.applied():
        if module.key and module.key.part == part and ".self_attn." in module.key.path:
            layers.setdefault(module.key.path.rsplit(".", 1)[0], []).append(module.name)
    names = [name for layer in layers.values() if len(layer) < len(("q", "k", "v", "out")) for name in layer]
    consequence = Consequence(
        "module", LOST, "joins q, k and v of this text encoder and applies them only if out is there too"
    )
    what = "attention module(s) of layers without all of q, k, v and out"
    sim.fail("fused attention", consequence, what, _ADD_ZEROS, names)


def _start_of_header(sim: Simulation) -> None:
    if sim.file.parsed.headers[0].start not in (b'{"', b"{'"):
        text = 'a header that does not begin with {", without which A1111 reads no metadata'
        sim.report("header start", HIDDEN, text, "write it again: lora-diffusion metadata edit FILE")


def _a1111_lists(metadata: Mapping[str, str]) -> DiffusionArchitecture | None:
    version, is_v2 = metadata.get("ss_base_model_version", ""), metadata.get("ss_v2") == "True"
    by_version = (
        architecture
        for architecture in DIFFUSION.values()
        if architecture.version_start and version.startswith(architecture.version_start)
    )
    others = (
        architecture
        for architecture in DIFFUSION.values()
        if not architecture.version_start and architecture.is_v2 == is_v2 and metadata
    )
    return next(by_version, None) or next(others, None)


def _forge_lists(metadata: Mapping[str, str]) -> DiffusionArchitecture | None:
    modelspec, listed = metadata.get("modelspec.architecture", ""), _a1111_lists(metadata)
    named = next(
        (
            architecture
            for architecture in DIFFUSION.values()
            if modelspec in (f"{name}/lora" for name in architecture.modelspec.values())
        ),
        None,
    )
    for candidate in (listed, named):
        if candidate and candidate.version_start:
            return candidate
    return listed if listed and listed.is_v2 else None if named and named.is_v2 else named


def _listed_as(lists: Callable[[Mapping[str, str]], DiffusionArchitecture | None]) -> Callable[[Simulation], None]:
    """Returns the check that a file is listed beside checkpoints of its family, by the app's rule."""

    def check(sim: Simulation) -> None:
        listed, architecture = lists(sim.file.metadata), sim.base.architecture
        if listed and listed.app_title != architecture.app_title:
            text = f"{sim.app.title} lists it for {listed.app_title} by its metadata, and hides it beside "
            text += f"{architecture.app_title} checkpoints"
            remedy = _VERSION_REMEDY.format(architecture.kohya_versions["epsilon"], architecture.is_v2)
            sim.report("version", HIDDEN, text, remedy)

    return check


def _shown_details(sim: Simulation) -> None:
    """Looks at the metadata that A1111 and Forge show and trust."""
    metadata = sim.file.metadata
    broken = [name for name in _JSON_TEXTS if name in metadata and not _is_json(metadata[name])]
    if broken:
        text = f"{', '.join(broken)} hold no JSON, on which the details page of {sim.app.title} fails"
        remedy = f"lora-diffusion metadata edit FILE {' '.join(f'--unset {name}' for name in broken)}"
        sim.report("details", HIDDEN, text, remedy)
    recorded = metadata.get("sshs_model_hash")
    if recorded and recorded != sim.file.parsed.parts[0].content_hash:
        text = f"sshs_model_hash is not that of its tensors, so {sim.app.title} and model sites take it for another"
        sim.report("hash", HIDDEN, text, "lora-diffusion metadata edit FILE computes it again")


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _refuse_record_beside_alphas(sim: Simulation) -> None:
    """Refuses a file of kohya's that also holds diffusers' own record."""
    with_alpha = [module.name for module in sim.applied() if module.alpha is not None]
    if "lora_adapter_metadata" in sim.file.metadata:
        consequence = sim.app.consequences["style"]
        what = "module(s) with alpha beside diffusers' own record of alphas"
        sim.fail("two records", consequence, what, _CONVERT.format("kohya"), with_alpha)


def _refuse_unconverted(sim: Simulation) -> None:
    """Refuses a file of kohya's of which the conversion leaves a tensor over or misses one, as diffusers does."""
    names = {name for name in sim.file.names if "dora_scale" not in name}
    downs = [name for name in names if name.endswith("lora_down.weight")]
    stems = {name: name.partition(".")[0] for name in downs}
    lacking = [name for name, stem in stems.items() if f"{stem}.lora_up.weight" not in names]
    read = {*downs, *(f"{stem}.{end}" for stem in stems.values() for end in ("lora_up.weight", "alpha"))}
    left = [*lacking, *(name for name in sim.file.names if name in names - read)]
    if left:
        consequence = sim.app.consequences["style"]
        what, remedy = "tensor(s) that it does not convert, or whose pair it misses", _CONVERT.format("kohya")
        sim.fail("not converted", consequence, what, remedy, left)


def _drop_broken_embedding(sim: Simulation) -> None:
    """Drops a file with an embedding that is neither one tensor nor the two of SDXL, as A1111 does."""
    vectors: dict[str, set[str]] = {}
    for name in sim.file.embeddings:
        _, _, rest = name.partition(".")
        owner, _, vector = rest.partition(".")
        vectors.setdefault(owner, set()).add(vector.partition(".")[0])
    broken = [
        owner
        for owner, names in vectors.items()
        if not (names & {"string_to_param"} or {"clip_l", "clip_g"} <= names or len(names) == 1) or "" in names
    ]
    what, remedy = "embedding(s) of a kind that it does not know", "take them out: lora-diffusion convert FILE NEW"
    sim.fail("embedding", sim.app.consequences["style"], what, remedy, broken)


def _drop_ldm_names(sim: Simulation) -> None:
    """Drops all LDM names of an SDXL file that also holds others, as diffusers does."""
    ldm = [module.name for module in sim.applied() if module.naming == "lora_unet_ ldm"]
    if any(re.search(r"(down|up)_blocks|mid_block", name) for name in sim.file.names):
        consequence = Consequence("module", LOST, "drops those in LDM names without a word")
        remedy = _CONVERT.format("kohya")
        sim.fail("two spellings", consequence, "module(s) in LDM names beside others", remedy, ldm)


def _misplace_upsampler(sim: Simulation) -> None:
    """Loses an upsampler behind a block without attention, whose LDM number diffusers takes for an attention's."""
    names = [
        module.name
        for module in sim.applied()
        if module.naming == "lora_unet_ ldm" and module.key and re.search(r"upsamplers", module.key.path)
        if module.name.endswith("_1_conv")
    ]
    what = "upsampler(s) behind a block without attention, in LDM names"
    sim.fail("misplaced", sim.app.consequences["unknown"], what, _CONVERT.format("diffusers"), names)


def _refuse_unmatched_part(sim: Simulation) -> None:
    """Stops where a network has an adapter, but none of its modules is found, as diffusers does."""
    unet = [module for module in sim.modules if module.name.startswith(("lora_unet_", "unet."))]
    if unet and not any(sim.factors[module.name] for module in unet):
        names = [module.name for module in unet]
        what = "names, none of which the UNet has"
        sim.fail("no module", sim.app.consequences["shape"], what, _CONVERT.format("diffusers"), names)


def _share_alphas(sim: Simulation) -> None:
    """Gives attention and text encoders the commonest alpha of a part, and so all that have none, as diffusers does."""
    factors: dict[str, float] = {}
    for part in dict.fromkeys(module.key.part for module in sim.applied() if module.key):
        modules = [module for module in sim.applied() if module.key and module.key.part == part]
        counted = Counter(module.alpha for module in modules if module.alpha is not None)
        if not counted:
            continue
        commonest = counted.most_common(1)[0][0]
        for module in modules:
            if module.rank and module.scale and (module.alpha is None or _takes_commonest(module)):
                factors[module.name] = commonest / module.rank / module.scale
    what = "an alpha other than the commonest, which diffusers gives to attention and text encoders"
    shared.report_scales(sim, factors, "alphas differ", what)


def _takes_commonest(module: MatchedModule) -> bool:
    """Says whether diffusers renames a module's alpha so that PEFT does not find it."""
    assert module.key, "an applied module is one of the base"
    if module.key.part == "unet":
        return bool(re.search(r"\.attn[12]\.", module.key.path))
    # It looks for text_model.encoder..., which CLIPTextModel of transformers 5.6 does not have any more.
    return ".mlp." not in module.key.path or not module.key.path.startswith("text_model.")


def _tells_text_encoder(mark: str, named: str, remedy: str) -> Callable[[Simulation], None]:
    """Returns the check that names of a text encoder tell diffusers their format.

    Args:
        mark: regular expression of the names that do.
        named: what they hold, for people.
        remedy: what adds such a module.
    """

    def check(sim: Simulation) -> None:
        parts = {module.key.part for module in sim.applied() if module.key} - {"unet"}
        for part in sorted(parts):
            modules = [module for module in sim.applied() if module.key and module.key.part == part]
            if not any(re.search(mark, module.name) or module.style == "linear_layer" for module in modules):
                consequence = Consequence("file", LOST, "stops: it cannot tell the format of the text encoder")
                what = f"text encoder module(s), but no {named}"
                sim.fail("text encoder", consequence, what, remedy, [module.name for module in modules])

    return check


def _lose_attention_of_text(sim: Simulation) -> None:
    """Loses q, k and v of a text encoder without any out, whose names diffusers then takes for newer ones."""
    parts = {module.key.part for module in sim.applied() if module.key} - {"unet"}
    for part in sorted(parts):
        modules = [module.name for module in sim.applied() if module.key and module.key.part == part]
        lost = [name for name in modules if "self_attn" in name]
        if not any("out_proj" in name for name in modules):
            what = "attention module(s) of a text encoder that has no out_proj"
            sim.fail("text encoder", sim.app.consequences["unknown"], what, _ADD_ZEROS, lost)


def _take_for_its_format(sim: Simulation) -> None:
    """Loads nothing of a kohya file with one tensor called otherwise, which diffusers takes for one of its own."""
    others = [name for name in sim.file.names if not name.startswith(rules.DIFFUSERS_KOHYA_STARTS)]
    if 2 * len(others) < len(sim.file.names):
        consequence = Consequence("file", LOST, "takes the file for one of its own because of these, and loads nothing")
        what = "tensor(s) that are not called as kohya calls them, unlike the others"
        sim.fail("stray", consequence, what, _CONVERT.format("kohya"), others)


def _refuse_names_without_lora(sim: Simulation) -> None:
    names = [name for name in sim.file.names if "lora" not in name and "dora_scale" not in name]
    what = "tensor(s) whose names do not hold 'lora'"
    sim.fail("no lora", sim.app.consequences["shape"], what, _CONVERT.format("diffusers"), names)


def _read_first_style(sim: Simulation) -> None:
    """Lets the first UNet name decide whether older names are converted, as diffusers does."""
    first = next((name for name in sim.file.names if name.startswith("unet.")), "")
    older = "lora_A" not in first
    dropped = ("linear_layer",) if older else ("diffusers", "linear_layer", "processor")
    names = [
        module.name for module in sim.applied() if module.key and module.key.part == "unet" and module.style in dropped
    ]
    consequence = Consequence("module", LOST, "looks at the first name only and drops these without an error")
    remedy = _CONVERT.format("diffusers")
    sim.fail("mixed styles", consequence, "module(s) called otherwise than the first", remedy, names)


CHECKS: Mapping[App, tuple[Callable[[Simulation], None], ...]] = {
    rules.COMFYUI: (shared.find_lost, *_COMMON, shared.find_ignored_record, _view_header),
    rules.FORGE: (
        *(shared.find_lost, _count_unmatched, *_COMMON, shared.find_ignored_record),
        *(_listed_as(_forge_lists), _shown_details),
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
        *(_start_of_header, _listed_as(_a1111_lists), _shown_details),
    ),
    rules.KOHYA: (shared.find_lost, *_COMMON, shared.find_ignored_record),
    rules.DIFFUSERS: (
        *(shared.find_lost, _refuse_unconverted, _refuse_record_beside_alphas, _drop_ldm_names, _misplace_upsampler),
        *(_refuse_unmatched_part, _tells_text_encoder("out_proj|mlp", "out_proj and no mlp", _ADD_ZEROS)),
        _lose_attention_of_text,
        *(*_COMMON, _share_alphas),
    ),
    rules.DIFFUSERS_DOTTED: (
        *(
            _take_for_its_format,
            _refuse_names_without_lora,
            shared.find_lost,
            _read_first_style,
            _refuse_unmatched_part,
        ),
        _tells_text_encoder(r"self_attn\.(q|k|v|out)_proj", "attention", _CONVERT.format("diffusers")),
        *(shared.find_other_ranks, shared.find_created_magnitudes, *_COMMON),
    ),
    rules.PEFT_FOLDER: (shared.find_lost, shared.find_other_ranks, shared.find_created_magnitudes, *_COMMON),
}
"""What is looked for in turn, until nothing of the file is left."""
