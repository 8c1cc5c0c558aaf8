"""What LLaVA takes and gives: its parts, features of images, embeddings of conversations, and answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.architectures.base import TextOutputArchitecture
from lora_diffusion.core.base_model import ChatInfo, Loaded
from lora_diffusion.core.samples import Chat, Request, Turn
from lora_diffusion.families.language import loading
from lora_diffusion.families.language.conversation import expand, read_processor, render, tokenize, tokens_and_labels
from lora_diffusion.families.language.options import LlavaOptions
from lora_diffusion.families.model_files import read_json
from lora_diffusion.runtime.device import frozen_name, pick_device

if TYPE_CHECKING:
    from torch import Tensor, nn


_PROCESSOR_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)


def model_class(folder: Path, architecture: TextOutputArchitecture) -> Any:
    """Returns the class of transformers that a base is of."""
    import transformers

    return getattr(transformers, architecture.model_classes[read_json(folder / "config.json")["model_type"]])


def parts_of(model: Any) -> dict[str, nn.Module]:
    """Returns the networks that can hold adapters."""
    inner = model.model
    return {
        "language_model": inner.language_model,
        "projector": inner.multi_modal_projector,
        "vision_tower": inner.vision_tower,
    }


def describe(folder: Path, options: LlavaOptions) -> ChatInfo:
    """Returns what is known of a base.

    Raises:
        ModelError: its processor cannot be used.
    """
    read_processor(folder, options.chat_template)
    config = read_json(folder / "config.json")
    return ChatInfo(
        resolution=config["vision_config"].get("image_size", 0),
        architecture=config["model_type"].replace("_", "-"),
        source=options.path,
        path=folder,
        files=loading.weight_files(folder),
        max_tokens=config["text_config"].get("max_position_embeddings", ChatInfo.max_tokens),
        count_tokens=partial(_count_tokens, folder, options.chat_template),
        unread={"vision_tower": _unread(folder)},
    )


def _unread(folder: Path) -> tuple[str, ...]:
    """Returns patterns of what stands behind the last layer of the image encoder that the base reads."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    depth, read = config.vision_config.num_hidden_layers, config.vision_feature_layer
    # State 0 is what goes into the first layer.
    last = max(layer % (depth + 1) for layer in ([read] if isinstance(read, int) else read))
    layers = "|".join(map(str, range(last, depth)))
    behind = rf"|encoder\.layers\.({layers})\..*" if layers else ""
    return (rf"(vision_model\.)?(post_layernorm|head\..*{behind})",)


def _count_tokens(folder: Path, chat_template: str | None, samples: Sequence[Chat]) -> list[int | str]:
    processor = read_processor(folder, chat_template)
    counts: list[int | str] = []
    for sample in samples:
        try:
            counts.append(len(tokens_and_labels(processor, sample)[0]))
        except ValueError as error:
            counts.append(str(error))
    return counts


def fingerprint(folder: Path, options: LlavaOptions, is_encoder_trained: bool, pieces: frozenset[str]) -> str:
    """Names by content all that pieces of a prepared item depend on besides the sample."""
    named = loading.fingerprint(folder, _PROCESSOR_FILES)
    if "texts" in pieces:
        template = read_processor(folder, options.chat_template).chat_template
        named += f" {hashlib.sha256(template.encode()).hexdigest()}"
    if is_encoder_trained or "views" not in pieces:
        return named
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted({file for name, file in read_json(index)["weight_map"].items() if "vision_tower" in name})
    dtype = frozen_name(options.dtype, pick_device())
    return f"{named} {loading.fingerprint(folder, files)} {dtype} {options.quantization}"


def pixels(loaded: Loaded, images: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Returns what the image encoder takes for images, and how many tiles each has.

    Returns:
        [tiles, 3, height, width] float32, those of all images joined; [images].
    """
    import torch

    encoder: Any = loaded.parts["vision_tower"]
    size = encoder.config.image_size
    tiles, processor = [torch.empty(0, 3, size, size)], loaded.modules["processor"].image_processor
    for image in images:
        values: Tensor = processor(images=[image], return_tensors="pt")["pixel_values"]
        tiles.append(values.flatten(0, 1).float() if values.dim() == 5 else values.float())
    return torch.cat(tiles), torch.tensor([len(image_tiles) for image_tiles in tiles[1:]], dtype=torch.int64)


def encode(loaded: Loaded, tiles: Tensor) -> Tensor:
    """Returns what the projector takes, [tiles, patches, width]: the layers that the base reads, joined."""
    import torch

    config = loaded.modules["model"].config
    encoder: Any = loaded.parts["vision_tower"]
    projector: Any = loaded.parts["projector"]
    dtype = loaded.modules["model"].dtype
    if not len(tiles):
        whole = config.vision_feature_select_strategy != "default"
        patches = (encoder.config.image_size // encoder.config.patch_size) ** 2 + whole
        width = projector.linear_1.in_features
        return torch.empty(0, patches, width, dtype=dtype, device=loaded.device)
    output = encoder(tiles.to(loaded.device, dtype), output_hidden_states=True)
    layers = config.vision_feature_layer
    chosen = [output.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [states[:, 1:] for states in chosen]
    return torch.cat(chosen, dim=-1)


def prepare_views(loaded: Loaded, sample: Chat, is_encoder_trained: bool) -> dict[str, Tensor]:
    """Returns the view tensors of an opened sample, as `VisualQuestionAnswering.prepare` describes them.

    "pixels" are [views, tiles, 3, height, width], "features" [views, tiles, patches, width].
    """
    import torch

    assert sample.views, f"{sample.key} was not opened"
    views = [pixels(loaded, view) for view in sample.views]
    stacked = torch.stack([tiles for tiles, _ in views])
    sizes = torch.tensor([image.size[::-1] for image in sample.views[0]]).reshape(-1, 2)
    tensors = {"image_size": sizes, "num_tiles": views[0][1]}
    if is_encoder_trained:
        return {**tensors, "pixels": stacked}
    with torch.no_grad():
        features = encode(loaded, stacked.flatten(0, 1))
    return {**tensors, "features": features.unflatten(0, stacked.shape[:2]).cpu()}


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors of a batch: "input_ids" and "labels" [batch, tokens], "num_tiles" [images] and others.

    Tiles of all samples are joined along dimension 1, behind the views.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    looks = "pixels" if "pixels" in rows[0] else "features"
    # Items of older caches hold one image, without the number of its tiles.
    num_tiles = [row["num_tiles"] if "num_tiles" in row else torch.tensor([row[looks].shape[1]]) for row in rows]
    return {
        "input_ids": pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=0),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=loading.IGNORED),
        "image_size": torch.cat([row["image_size"].reshape(-1, 2) for row in rows]),
        "num_tiles": torch.cat(num_tiles),
        "num_images": torch.tensor([len(counts) for counts in num_tiles]),
        looks: torch.cat([row[looks] for row in rows], dim=1),
    }


def zero_with_gradient(loaded: Loaded) -> Tensor | float:
    """Returns 0 with a gradient of 0 for what a text without images never reaches, a scalar."""
    parts = [loaded.parts[name] for name in ("projector", "vision_tower") if name in loaded.parts]
    return sum(0 * parameter.sum() for part in parts for parameter in part.parameters() if parameter.requires_grad)


def embed(loaded: Loaded, ids: Tensor, features: Sequence[Tensor], image_sizes: Tensor) -> Tensor:
    """Returns embeddings of tokens, with the projected features in the places of the images, [batch, tokens, width].

    Args:
        loaded: the base.
        ids: [batch, tokens].
        features: of each image [tiles, patches, width], in the order of the samples.
        image_sizes: [images, 2], height and width of each.
    """
    import torch

    model = loaded.modules["model"]
    ids = ids.to(loaded.device)
    embedded: Tensor = model.get_input_embeddings()(ids)
    if not len(features):
        return embedded
    projector = loaded.parts["projector"]
    projected = list(
        projector(torch.cat(list(features)).to(model.dtype)).split([len(image_features) for image_features in features])
    )
    if hasattr(model.model, "pack_image_features"):
        newline = model.model.image_newline
        strategy = model.config.vision_feature_select_strategy
        packed = model.model.pack_image_features(projected, image_sizes, strategy, image_newline=newline)[0]
        projected = list(packed) if not isinstance(packed, torch.Tensor) else [packed]
    flat = torch.cat([one.flatten(0, -2) for one in projected])
    is_image = (ids == model.config.image_token_id)[..., None]
    return embedded.masked_scatter(is_image, flat.to(embedded.dtype))


def answer(loaded: Loaded, requests: Sequence[Request]) -> list[str]:
    """Returns the answers to requests with equal adapter weights; drawn tokens depend on the seed of the first."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    model, processor, options = loaded.modules["model"], loaded.modules["processor"], loaded.options
    if requests[0].weights is not None:
        assert loaded.adapters is not None, "a request gives adapter weights, but no adapter was loaded"
        loaded.adapters.set_weights(requests[0].weights)
    with torch.no_grad(), _evaluating(loaded.parts["language_model"]):
        rows = [_embed_question(loaded, request) for request in requests]
        embedded = pad_sequence(rows, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True, padding_side="left")
        with torch.random.fork_rng(devices=[loaded.device] if loaded.device.type == "cuda" else []):
            torch.manual_seed(requests[0].seed)
            ids = model.generate(
                inputs_embeds=embedded,
                attention_mask=mask.long().to(loaded.device),
                max_new_tokens=options.max_new_tokens,
                do_sample=options.temperature > 0,
                temperature=options.temperature or None,
                top_p=None,
                top_k=None,
                num_beams=1,
                eos_token_id=processor.tokenizer.eos_token_id,
                pad_token_id=processor.tokenizer.eos_token_id,
            )
    return [" ".join(text.split()) for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Keeps a network that recomputes activations while it is trained from doing so, which rules out its key cache."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def _embed_question(loaded: Loaded, request: Request) -> Tensor:
    """Returns the embeddings of a request's question and image, [tokens, width]."""
    import torch

    sample, processor = request.sample, loaded.modules["processor"]
    assert isinstance(sample, Chat), "a request of LLaVA is about a conversation"
    num_images = sample.first_question().num_images
    images = sample.views[0][:num_images]
    system = tuple(turn for turn in sample.turns if turn.role == "system")
    ids, _ = tokenize(processor.tokenizer, render(processor, (*system, Turn("user", request.prompt, num_images))))
    ids, _ = expand(processor, ids, ids, [image.size for image in images])
    tiles, num_tiles = pixels(loaded, images)
    features = encode(loaded, tiles).split(num_tiles.tolist()) if images else ()
    sizes = torch.tensor([image.size[::-1] for image in images]).reshape(-1, 2)
    row: Tensor = embed(loaded, torch.tensor([ids]), features, sizes)[0]
    return row
