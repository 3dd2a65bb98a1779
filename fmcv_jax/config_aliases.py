"""Config names from before version 0.2, and their replacements.

An old name is accepted only where the constructor lacks a field of that name and has the new one, so an old name may
have several replacements. A replacement with dots is a field that moved into a nested config. Workdirs and config files
of earlier versions still open, with a warning that states the new name.
"""

from collections.abc import Mapping

FIELDS: Mapping[str, tuple[str, ...]] = {
  'align': ('repa',),
  'autoencoder': ('latent_space.autoencoder',),
  'bank': ('train_data',),
  'batch': ('batch_size',),
  'beside': ('extra_in_channels',),
  'canonical': ('first_caption_only',),
  'classes': ('num_classes',),
  'control': ('image_condition.control',),
  'context': ('cross_attention_dim',),
  'damaged': ('on_truncated',),
  'decayed': ('weight_decay_mask',),
  'drop': ('condition_dropout',),
  'ema': ('ema_decay',),
  'freeze_steps': ('freeze_last_layer_steps',),
  'fsdp_at_most': ('max_fsdp',),
  'gated': ('gated_mlp',),
  'heads': ('num_heads',),
  'hidden': ('mask_ratio', 'mask_ratio_min_max'),
  'hidden_images': ('mask_sample_probability',),
  'holes': ('image_condition.inpainting',),
  'inpainting': ('image_condition.inpainting',),
  'judge': ('feature_extractor',),
  'keep': ('patch_keep_ratio',),
  'latent': ('latent_channels',),
  'latent_scale': ('latent_space.scale',),
  'latent_shift': ('latent_space.shift',),
  'latents': ('latent_space.precomputed',),
  'lengths': ('learn_prototype_norms',),
  'local_views': ('local_crops_number',),
  'max_streak': ('max_nonfinite_steps',),
  'microbatches': ('grad_accum_steps',),
  'multipliers': ('lr_multipliers',),
  'norm_pooled': ('fc_norm',),
  'normalized': ('norm_pix_loss',),
  'only': ('name_filter',),
  'outputs': ('out_channels', 'num_classes'),  # a denoiser has both, and its `outputs` were channels
  'outputs_bias': ('head_bias',),
  'padding': ('text_condition.padding',),
  'patch': ('patch_size',),
  'patch_weight': ('ibot_loss_weight',),
  'peak': ('peak_lr',),
  'place_class_token': ('class_token_has_position',),
  'positions': ('pos_embed',),
  'precomputed_latents': ('latent_space.precomputed',),
  'precomputed_text': ('text_condition.precomputed',),
  'prompts': ('caption_templates',),
  'strength': ('weighting_gamma',),
  'targets': ('centering',),
  'text': ('text_condition.encoder',),
  'text_encoder': ('text_condition.encoder',),
  'times': ('timestep_sampling',),
  'times_mean': ('timestep_mean',),
  'times_std': ('timestep_std',),
  'train_text': ('text_condition.train',),
  'trained': ('trainable',),
  'whole': ('full_mask_probability',),
  'widths': ('block_out_channels',),
  'words': ('text_condition.precomputed',),
}

# Old -> new constructor name.
CONSTRUCTORS: Mapping[str, str] = {'adapted': 'finetune', 'coarse': 'pixelate'}

# New field name -> {old value: new value}.
VALUES: Mapping[str, Mapping[str, str]] = {
  'centering': {'centre': 'centering', 'sinkhorn': 'sinkhorn_knopp'},
  'on_truncated': {'refuse': 'error', 'cut': 'skip_tail'},
}

# Old switch -> the list field that now has an entry of its own for it, and that entry.
SWITCHES: Mapping[str, tuple[str, str]] = {'flip': ('augment', 'flip')}


def renamed_field(name: str, parameters: Mapping[str, object]) -> str | None:
  """The current name of the field once called `name`, for a constructor with these parameters; None if there is none.

  May be a path into a nested config, such as 'latent_space.scale'.
  """
  if name in parameters:
    return None
  return next((new for new in FIELDS.get(name, ()) if new.split('.')[0] in parameters), None)
