"""Keys and values of other trainers: what a user who writes them means here.

These are the only tables of such hints; config files, overrides and files of other programs are answered from them.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from lora_diffusion.core.text import question, suggestion

_NAMES: Mapping[str, str] = {
    "model.path": "pretrained_model_name_or_path model_name_or_path name_or_path base_model base_model_name "
    "base_model_name_or_path pretrained_model ckpt ckpt_path checkpoint checkpoint_path model_path",
    "model.family": "model_type arch architecture is_xl is_sdxl sdxl v2 is_v2",
    "model.prediction": "v_parameterization v_pred is_v_pred prediction_type",
    "model.quantization": "quantize qtype load_in_4bit load_in_8bit fp8_base bits quantization_bit",
    "model.dtype": "weight_dtype torch_dtype",
    "model.min_snr_gamma": "snr_gamma min_snr",
    "model.caption_dropout": "caption_dropout_rate caption_dropout_probability proportion_empty_prompts",
    "model.prior_weight": "prior_loss_weight prior_preservation_weight",
    "model.noise_offset": "offset_noise_weight offset_noise",
    "model.chat_template": "template conv_version",
    "data.path": "train_data_dir image_dir folder_path instance_data_dir data_dir dataset dataset_name dataset_path "
    "dataset_dir image_directory images_dir train_file dataset_config in_json concept_file_name",
    "data.resolution": "max_resolution train_resolution image_size max_image_size",
    "data.buckets": "enable_bucket bucket_no_upscale min_bucket_reso max_bucket_reso bucket_reso_steps",
    "data.flip": "flip_aug flip_x random_flip hflip",
    "data.trigger": "trigger_word trigger_words trigger_phrase metadata_trigger_phrase instance_prompt class_tokens "
    "instance_token token_string activation_text",
    "data.images": "image_folder image_folder_path",
    "data.max_tokens": "model_max_length max_seq_length cutoff_len sequence_len",
    "adapter.rank": "network_dim network_rank lora_rank lora_r lora_dim linear dim r",
    "adapter.alpha": "network_alpha lora_alpha linear_alpha",
    "adapter.conv_rank": "conv_dim conv",
    "adapter.dropout": "network_dropout lora_dropout dropout_probability",
    "adapter.variant": "network_module network_type network_args lora_type peft_type algo lycoris_preset use_dora "
    "dora_wd lora_decompose use_rslora rs_lora",
    "adapter.targets": "target_modules lora_target_modules layer_filter lora_target",
    "adapter.full": "modules_to_save additional_target tune_mm_mlp_adapter",
    "adapter.parts": "network_train_unet_only network_train_text_encoder_only train_text_encoder train_unet "
    "freeze_encoder freeze_vision_tower",
    "adapter.lokr_factor": "factor",
    "train.learning_rate": "lr unet_lr base_lr learning_rate_unet",
    "train.text_encoder_learning_rate": "text_encoder_lr text_encoder_lr1 text_encoder_lr2 te_lr text_lr "
    "learning_rate_te learning_rate_te1 learning_rate_te2",
    "train.part_learning_rates": "mm_projector_lr",
    "train.batch_size": "train_batch_size per_device_train_batch_size micro_batch_size batch bs",
    "train.gradient_accumulation": "gradient_accumulation_steps grad_accum",
    "train.max_steps": "max_train_steps steps num_train_steps iterations total_steps",
    "train.epochs": "max_train_epochs num_train_epochs num_epochs epoch max_epochs",
    "train.schedule": "lr_scheduler lr_scheduler_type learning_rate_scheduler scheduler",
    "train.warmup_steps": "lr_warmup_steps warmup learning_rate_warmup_steps",
    "train.warmup_steps, which counts steps and is no share": "lr_warmup warmup_ratio",
    "train.optimizer": "optimizer_type optim use_8bit_adam use_lion_optimizer",
    "train.weight_decay": "optimizer_args optimizer_params adam_weight_decay decay",
    "train.max_grad_norm": "max_gradient_norm gradient_clipping clip_grad_norm",
    "train.precision": "mixed_precision train_dtype full_fp16 full_bf16 fp16 bf16 amp",
    "train.gradient_checkpointing": "grad_checkpointing use_gradient_checkpointing",
    "train.threads": "num_cpu_threads_per_process max_data_loader_n_workers num_workers dataloader_num_workers",
    "train.save_adapter_every_epochs or train.save_every_steps": "save_every_n_epochs save_n_epoch_ratio",
    "train.save_adapter_every_steps or train.save_every_steps": "save_every_n_steps save_every save_steps "
    "checkpointing_steps",
    "train.keep_checkpoints": "save_last_n_steps save_last_n_epochs max_step_saves_to_keep checkpoints_total_limit "
    "save_total_limit",
    "train.tracker": "logging_dir log_with report_to logger",
    "train.preview_every_steps": "sample_every_n_steps sample_every_n_epochs sample_every sample_at_first "
    "validation_steps",
    "preview.prompts": "sample_prompts sample_prompt validation_prompt validation_prompts",
    "preview.num_steps": "sample_steps num_inference_steps",
    "preview.guidance": "guidance_scale cfg cfg_scale",
    "preview.negative": "negative_prompt neg",
    "evaluate.class_words": "class_prompt class_word class_name",
    "cache.path": "cache_dir cache_directory",
    "output.path": "output_dir training_folder output_model_destination save_dir workspace_dir",
    "output.name": "output_name lora_name job_name",
    "output.formats": "save_model_as output_model_format save_format",
    "output.dtype": "save_precision output_dtype save_dtype",
    "output.publish_tags": "no_metadata",
    "output.title": "metadata_title",
    "output.author": "metadata_author",
    "output.description": "metadata_description training_comment",
    "output.license": "metadata_license",
    "output.thumbnail": "metadata_thumbnail",
    'repeats are the number in front of a folder\'s name, as in "10_sks dog"': "repeats num_repeats dataset_repeats",
    "captions are read from name.txt or name.caption beside each image": "caption_extension caption_extention "
    "caption_ext",
    "captions are shown as they stand": "shuffle_caption shuffle_tokens keep_tokens enable_wildcard",
    "prepared samples are always kept; cache.path says where": "cache_latents cache_latents_to_disk "
    "cache_text_encoder_outputs cache_text_embeddings",
    "model.prior_weight keeps what the base makes of the class": "with_prior_preservation reg_data_dir class_data_dir",
    "PyTorch's own attention is always used; drop this key": "xformers sdpa mem_eff_attn flash_attention "
    "attn_implementation",
    "checkpoints always hold the whole state; drop this key": "save_state save_state_on_train_end",
    "--resume on the command line continues the run in output.path": "resume resume_from_checkpoint",
    "training cannot start from an adapter file; --resume continues a run": "network_weights",
    "training never publishes; use 'lora-diffusion push' on the finished run": "push_to_hub hub_model_id "
    "huggingface_repo_id",
    "there is nothing like it here; drop this key": "multires_noise_iterations multires_noise_discount ip_noise_gamma "
    "adaptive_noise_scale debiased_estimation_loss scale_weight_norms loss_type huber_schedule huber_c masked_loss "
    "lr_scheduler_num_cycles lr_scheduler_power rank_dropout module_dropout color_aug random_crop face_crop_aug_range "
    "weighted_captions max_token_length vae vae_path ema use_ema min_timestep max_timestep noise_scheduler "
    "base_weights dim_from_weights",
}
"""Our key, the first of them that there is, or what to know where there is none -> what others call it."""
KEYS: Mapping[str, str] = {name: ours for ours, names in _NAMES.items() for name in names.split()}

_DTYPES = {"fp32": "no none float float32 32 full", "fp16": "float16 half 16", "bf16": "bfloat16"}
_CHOICES: Mapping[str, Mapping[str, str]] = {
    "model.dtype": _DTYPES,
    "output.dtype": _DTYPES,
    "train.precision": _DTYPES,
    "model.quantization": {"nf4": "4bit 4-bit int4 fp4 4", "8bit": "8-bit int8 8 fp8 float8 qfloat8"},
    "model.prediction": {"v_prediction": "v v_pred vpred", "epsilon": "eps"},
    "train.optimizer": {
        "adamw": "adam adamw_torch torch.optim.adamw",
        "adamw8bit": "adam8bit adamw_8bit adamw-8bit adamw_bnb_8bit",
        "paged_adamw8bit": "pagedadamw8bit paged_adamw_8bit pagedadamw",
    },
    "train.schedule": {
        "cosine": "cosine_with_restarts cosine_with_min_lr",
        "constant with train.warmup_steps": "constant_with_warmup",
        "linear": "polynomial",
    },
    "output.formats": {
        "kohya": "safetensors comfy comfyui a1111 automatic1111 forge lora kohya_lora comfy_lora",
        "diffusers": "diffusers_lora",
    },
}
"""Setting -> value of ours -> what others call it."""


def key_hint(written: str, known: Collection[str]) -> str:
    """Returns what to write instead of an unknown key, in brackets; nothing where nobody can say.

    Args:
        written: "section.key", or a key without section.
        known: our keys, "section.key".
    """
    section, _, key = written.lower().replace("-", "_").rpartition(".")
    # Keys of the same section come last, so that they win over equal ones of others.
    ordered = sorted(known, key=lambda name: (name.startswith(f"{section}."), name))
    by_key = {name.split(".", 1)[1]: name for name in ordered}
    if key in by_key:
        return question([by_key[key]])
    meant = KEYS.get(key, "")
    ours = next((name for name in meant.split(" or ") if name.partition(",")[0] in known), "")
    if ours:
        return f" (write {ours})"
    if " " in meant and not meant.startswith("train."):
        return f" ({meant})"
    close = difflib.get_close_matches(key, list(by_key), n=2, cutoff=0.7)
    return question(by_key[match] for match in close)


def section_hint(written: str, sections: Collection[str], known: Collection[str]) -> str:
    """Returns what to write instead of an unknown section, in brackets; often a key stands there without one."""
    is_foreign = written.lower().replace("-", "_") in KEYS
    return key_hint(written, known) if is_foreign else suggestion(written, sections) or key_hint(written, known)


def value_hint(key: str, value: str, choices: Collection[str]) -> str:
    """Returns what to write instead of a value that is none of the choices, behind a semicolon, or nothing."""
    small = value.lower()
    others = {name: ours for ours, names in _CHOICES.get(key, {}).items() for name in names.split()}
    close = difflib.get_close_matches(small, choices, n=1)
    meant = small if small in choices else others.get(small, close[0] if close else "")
    return f"; write {meant}" if meant else ""
