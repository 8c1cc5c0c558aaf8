"""Bases that are not known here, told by the names and sizes of the modules that an adapter file changes (data).

Names are those of the published networks as diffusers, their authors and ComfyUI call them, after the prefixes of
kohya, diffusers, PEFT, LyCORIS, OneTrainer and SimpleTuner are taken off and every dot is made "_".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Sizes = tuple[int, int]
"""Outputs and inputs of a weight, 0 for what a file does not tell."""

_PREFIXES = re.compile(
    r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\.|net\.|dit\.|pipe\.|prior\.|"
    r"text_encoders\.\w+\.transformer\.|text_encoder(_\d)?\.|lora_unet_|lora_transformer_|lora_te\d?_|lycoris_|lora_)+"
)
_ANY = frozenset[int]()


class OtherBase(NamedTuple):
    """A kind of base and what tells it."""

    family: str
    """As a family of a plugin would be called."""
    title: str
    names: str
    """Regular expression that is searched in names without prefix."""
    widths: frozenset[int] = _ANY
    """Inputs that one of these modules must have, where the file tells sizes; any without."""
    name_pattern: str = ""
    """Regular expression of what metadata call it, to choose between kinds of the same names and sizes."""
    outputs: frozenset[int] = _ANY
    """The same of their outputs."""
    lacks: str = ""
    """Regular expression of what must not be there."""


def _of(*widths: int) -> frozenset[int]:
    return frozenset(widths)


_FLUX_BLOCKS = r"^(double_blocks_\d+_|single_blocks_\d+_(linear|modulation)|(vector|guidance)_in_)"
_SINGLE = r"^single_transformer_blocks_\d+_(attn_to_[qkv]$|norm_linear|proj_)"
_MMDIT = rf"^transformer_blocks_\d+_(attn_(to_|add_)|ff_context|norm1_context)|{_SINGLE}"
_DIT = r"^transformer_blocks_\d+_attn[12]_to_"
_JOINT = r"^transformer_blocks_\d+_attn_"
_COSMOS_BLOCKS = r"^blocks_\d+_((self|cross)_attn_(q|k|v|output)_proj|adaln_modulation|mlp_layer[12])"
_LAYERS = r"^(layers|noise_refiner|context_refiner)_\d+_(attention|attn|feed_forward|adaLN)"
_LLM = (
    r"^(language_model_|llm_|qwen\w*_|gemma\w*_|llama_|model_)*layers_\d+_"
    r"(self_attn_(q|k|v|o|qkv)_proj|mlp_(gate|up|down|gate_up)_proj)|^(transformer_)?h_\d+_(attn|mlp|self_attention)_|"
    r"^gpt_neox_layers_\d+_"
)

OTHER_BASES: tuple[OtherBase, ...] = (
    OtherBase("animatediff", "AnimateDiff (a motion module)", r"motion_modules?_|temporal_transformer_(trans|proj)"),
    OtherBase(
        "svd",
        "Stable Video Diffusion",
        r"temporal_transformer_blocks|(spatial|temporal)_res_block|_time_stack_|_time_mixer_",
    ),
    OtherBase("modelscope", "ModelScope text-to-video", r"_temp_(convs|attentions)_|^transformer_in_"),
    OtherBase(
        "cascade",
        "Stable Cascade",
        r"^(down|up)_blocks_\d+_\d+_(attention|channelwise|kv_mapper|mapper|depthwise)|^clip_(txt|img)(_pooled)?_mapper|"
        r"^(down_down|up_up)scalers_|^prior_(unet|te)_",
    ),
    OtherBase("kandinsky5", "Kandinsky 5", r"(visual|text)_transformer_blocks_\d+_"),
    OtherBase(
        "kandinsky2",
        "Kandinsky 2 or DeepFloyd IF",
        r"^((down|up)_blocks_\d+|mid_block)_attentions_\d+_(to_[qkv]|to_out|add_[kv]_proj)",
    ),
    OtherBase("chroma", "Chroma", r"distilled_guidance_layer"),
    OtherBase("anima", "Anima", r"^llm_adapter_"),
    OtherBase(
        "flux2",
        "FLUX.2",
        r"(double|single)_stream_modulation_|attn_to_qkv_mlp_proj|^transformer_blocks_\d+_ff(_context)?_linear_(in|out)",
    ),
    OtherBase("flux2", "FLUX.2", _FLUX_BLOCKS, _of(6144, 4096)),
    OtherBase(
        "flux2",
        "FLUX.2",
        r"^single_blocks_\d+_linear1|^double_blocks_\d+_(img|txt)_mlp_0",
        _of(3072),
        outputs=_of(27648, 18432),
    ),
    OtherBase(
        "hunyuan_video",
        "Hunyuan Video",
        r"txt_in_individual_token_refiner|context_embedder_token_refiner|^double_blocks_\d+_(img|txt)_(mod_linear|mlp_fc)|"
        r"^single_blocks_\d+_modulation_linear",
        _of(3072),
    ),
    OtherBase(
        "hunyuan_image",
        "Hunyuan Image 2.1",
        rf"txt_in_individual_token_refiner|context_embedder_token_refiner|{_FLUX_BLOCKS}|{_MMDIT}",
        _of(3584),
    ),
    OtherBase(
        "hunyuan_video",
        "Hunyuan Video 1.5",
        rf"txt_in_individual_token_refiner|context_embedder_token_refiner|^double_blocks_\d+_|{_MMDIT}",
        _of(2048),
    ),
    OtherBase("hunyuan3d", "Hunyuan3D", r"^(double|single)_blocks_\d+_", _of(1024)),
    OtherBase(
        "hunyuan_video",
        "Hunyuan Video",
        r"^(double_blocks_19|single_blocks_(38|39)|single_transformer_blocks_(38|39))_",
        _of(3072),
    ),
    OtherBase(
        "flux1",
        "FLUX.1",
        r"^double_blocks_\d+_((img|txt)_mod_lin(?!ear)|processor_)|^single_blocks_\d+_modulation_lin(?!ear)|"
        r"^(vector|guidance)_in_|^transformer_blocks_\d+_norm1_context_linear|^single_transformer_blocks_\d+_norm_linear",
        _of(3072),
        r"flux(?!.?2)",
        lacks="_attn1_",
    ),
    OtherBase("flux1", "FLUX.1", _FLUX_BLOCKS, _ANY, r"flux(?!.?2)"),
    OtherBase("chroma", "Chroma", _FLUX_BLOCKS, _of(3072), r"chroma"),
    OtherBase("flux2", "FLUX.2 klein", _FLUX_BLOCKS, _of(3072), r"flux.?2|klein"),
    OtherBase("sd3", "Stable Diffusion 3", r"^joint_blocks_\d+_(x|context)_block_"),
    OtherBase("flux3", "FLUX.3", r"^(txt_)?mode_blocks_|^(early|single)_stream_modulations_"),
    OtherBase(
        "auraflow",
        "AuraFlow",
        r"^joint_transformer_blocks_\d+_|^(double|single)_layers_\d+_(attn_w|mlp|mod)|"
        r"^single_transformer_blocks_\d+_(attn_to_out_0|ff_(linear_\d|out_projection)|norm1_linear)",
    ),
    OtherBase("hidream", "HiDream", r"^(double|single)_stream_blocks_\d+_"),
    OtherBase("qwen_image", "Qwen-Image", r"^transformer_blocks_\d+_(img|txt)_(mod|mlp)_"),
    OtherBase("ace_step", "ACE-Step", r"^transformer_blocks_\d+_cross_attn_|^lyric_(encoder|proj)|_ff_inverted_conv_"),
    OtherBase(
        "mochi",
        "Mochi",
        r"^blocks_\d+_attn_(qkv|proj)_[xy]|^blocks_\d+_(mod|mlp)_[xy]|^transformer_blocks_\d+_attn1_(add_|to_add_out)",
    ),
    OtherBase("krea2", "Krea 2", r"^transformer_blocks_\d+_(attn_to_gate|ff_(gate|up|down)$)|^text_fusion_"),
    OtherBase("sana", "Sana", r"_(mlp|ff)_(conv_(inverted|depth|point)|(inverted|depth|point)_conv)"),
    OtherBase("sana", "Sana", rf"{_DIT}|^blocks_\d+_(attn|cross_attn)_", _of(2240)),
    OtherBase(
        "stable_audio", "Stable Audio or ACE-Step", r"^(transformer_)?layers_\d+_(self|cross)_attn_to_(qkv|q|kv|out)"
    ),
    OtherBase("sd3", "Stable Diffusion 3", _MMDIT, _of(1152, 1536, 2432), lacks=r"_attn1_|^single_"),
    OtherBase("mochi", "Mochi", _MMDIT, _of(1536)),
    OtherBase("flux2", "FLUX.2", _MMDIT, _of(4096, 6144), r"flux.?2|klein"),
    OtherBase("qwen_image", "Qwen-Image", r"^transformer_blocks_(19|[2-5]\d)_attn_", _of(3072), r"qwen"),
    OtherBase("flux1", "FLUX.1", r"^single_transformer_blocks_", _ANY, r"flux(?!.?2)"),
    OtherBase("chroma", "Chroma", r"^single_transformer_blocks_", _of(3072), r"chroma"),
    OtherBase("flux1", "FLUX.1", _MMDIT, _of(3072), r"flux(?!.?2)"),
    OtherBase("qwen_image", "Qwen-Image", _MMDIT, _of(3072, 4096), r"qwen"),
    OtherBase("cosmos2", "Cosmos-Predict2", _COSMOS_BLOCKS, _ANY, r"cosmos"),
    OtherBase("anima", "Anima", _COSMOS_BLOCKS, _of(2048), r"anima"),
    OtherBase("cosmos1", "Cosmos 1", r"^blocks_block\d+_blocks_\d+_"),
    OtherBase(
        "wan",
        "Wan",
        r"^(vace_)?blocks_\d+_((self|cross)_attn_([qkvo]|[kv]_img|norm_[qk])$|ffn_)|^condition_embedder_|^time_projection_|"
        r"^head_head",
    ),
    OtherBase(
        "hunyuan_dit",
        "Hunyuan-DiT",
        r"^blocks_\d+_(attn[12]_(Wqkv|q_proj|kv_proj|out_proj)|default_modulation|skip_linear)",
    ),
    OtherBase("hunyuan_dit", "Hunyuan-DiT", r"^blocks_\d+_attn[12]_to_", _of(1408)),
    OtherBase("wan", "Wan", r"^(vace_)?blocks_\d+_attn[12]_(to_|add_)"),
    OtherBase(
        "pixart", "PixArt", r"^blocks_\d+_(attn_(qkv|proj)|cross_attn_(q_linear|kv_linear|proj))|^csize_embedder"
    ),
    OtherBase("pixart", "PixArt", r"^blocks_\d+_mlp_fc", _of(1152)),
    OtherBase("hunyuan_dit", "Hunyuan-DiT", r"^blocks_\d+_mlp_fc", _of(1408)),
    OtherBase("ltx", "LTX-Video", r"^patchify_proj|_audio_attn|_audio_to_video_|_video_to_audio_"),
    OtherBase("pixart", "PixArt", _DIT, _of(1152), lacks=_JOINT),
    OtherBase("hunyuan_dit", "Hunyuan-DiT", _DIT, _of(1408), lacks=_JOINT),
    OtherBase("cogvideox", "CogVideoX", _DIT, _of(1920, 3072), r"cogvideo", lacks=_JOINT),
    OtherBase("mochi", "Mochi", _DIT, _of(3072), r"mochi", lacks=_JOINT),
    OtherBase("ltx", "LTX-Video", _DIT, _of(2048, 4096), r"ltx", lacks=_JOINT),
    OtherBase("cosmos1", "Cosmos 1", _DIT, _of(4096), r"cosmos", lacks=_JOINT),
    OtherBase("cogview4", "CogView", _DIT, _of(2560, 4096), r"cogview", lacks=_JOINT),
    OtherBase("omnigen2", "OmniGen 2", r"^ref_image_(refiner|patch)"),
    OtherBase("zimage", "Z-Image", _LAYERS, _of(3840), r"z.?image"),
    OtherBase("lumina2", "Lumina 2", _LAYERS, _of(2304), r"lumina"),
    OtherBase("omnigen2", "OmniGen 2", _LAYERS, _of(2520), r"omnigen"),
    OtherBase("zimage", "a transformer such as Z-Image or Lumina", _LAYERS),
    OtherBase("t5", "a T5 text encoder, as Stable Diffusion 3 and FLUX have", r"^encoder_block_\d+_layer_\d+_"),
    OtherBase(
        "bert", "a BERT or ViT, as Hunyuan-DiT has", r"^(bert_|vit_)?encoder_layer_\d+_(attention|intermediate|output)_"
    ),
    OtherBase("llm", "a language model", _LLM),
    OtherBase("dit", "a diffusion transformer of an unknown kind", rf"{_MMDIT}|^transformer_blocks_|^blocks_\d+_"),
)
"""In the order in which they are tried."""
_OF_TEXT = frozenset({"t5", "bert", "llm"})
_AROUND_UNETS = frozenset({"animatediff", "svd", "modelscope"})
"""Kinds that also change modules of a Stable Diffusion's names."""
_IN_UNETS = re.compile(
    r"^((down|up)_blocks_\d+_(attentions|resnets|downsamplers|upsamplers)_\d+_|mid_block_(attentions|resnets)_|"
    r"(in|out)put_blocks_\d+_\d+_|middle_block_\d_|time_embed|label_emb|add_embedding)"
)
_REFINER = OtherBase("sdxl_refiner", "the refiner of Stable Diffusion XL", "")


def bare_name(name: str) -> str:
    """Returns a module's name without the prefixes of the programs, flat.

    >>> bare_name("lora_unet_double_blocks_0_img_attn_qkv")
    'double_blocks_0_img_attn_qkv'
    """
    return _PREFIXES.sub("", name).replace(".", "_")


def find_other_base(modules: Mapping[str, Sizes], base_name: str) -> OtherBase | None:
    """Returns the kind of base of another architecture that modules are of, if there is one.

    Kinds of the same names and sizes are told apart by the metadata, else the title names all of them.

    Args:
        modules: name -> outputs and inputs of its weight, 0 where nothing tells them.
        base_name: what the metadata call the base; empty without.
    """
    bare = {bare_name(name): sizes for name, sizes in modules.items()}
    num_of_unets = sum(bool(_IN_UNETS.search(name)) for name in bare)
    for of_text in (False, True):
        rows = [row for row in OTHER_BASES if (row.family in _OF_TEXT) is of_text and _fits(row, bare, num_of_unets)]
        if rows:
            return _choose(rows, base_name)
    return _REFINER if _is_refiner(bare) else None


def _fits(row: OtherBase, bare: Mapping[str, Sizes], num_of_unets: int) -> bool:
    search = re.compile(row.names).search
    matching = [sizes for name, sizes in bare.items() if search(name)]
    if not matching or (len(matching) < num_of_unets and row.family not in _AROUND_UNETS):
        return False
    if row.lacks and any(re.search(row.lacks, name) for name in bare):
        return False
    return _has(row.widths, (inner for _, inner in matching)) and _has(row.outputs, (outer for outer, _ in matching))


def _has(wanted: frozenset[int], sizes: Iterable[int]) -> bool:
    known = set(sizes) - {0}
    return not wanted or not known or bool(wanted & known)


def _choose(rows: Sequence[OtherBase], base_name: str) -> OtherBase:
    """Returns the first kind, with the titles of those that nothing tells from it."""
    first = rows[0]
    if not first.name_pattern:
        return first
    named = [
        row for row in rows if row.name_pattern and base_name and re.search(row.name_pattern, base_name, re.IGNORECASE)
    ]
    if named:
        return named[0]
    titles = dict.fromkeys(row.title for row in rows if row.name_pattern and row.names == first.names)
    return first._replace(title=" or ".join(titles))


def _is_refiner(bare: Mapping[str, Sizes]) -> bool:
    """Says whether widths are those of the refiner, whose names are SDXL's."""
    inputs = {name: inner for name, (_, inner) in bare.items() if _IN_UNETS.search(name) and inner}
    context = {inner for name, inner in inputs.items() if re.search(r"attn2_to_[kv]$", name)}
    widths = {inner for name, inner in inputs.items() if re.search(r"attn1_to_[qkv]$", name)}
    return context <= {1280} and widths <= {384, 768, 1536} and bool(widths)
