"""Names that configs used before 0.2, and what they are called now.

An old name is taken only where the constructor that the config describes has no field of that name and has the new one,
so a name may have meant different things in different places. Workdirs and config files of earlier versions open with a
warning that names the new word.
"""

from collections.abc import Mapping

FIELDS: Mapping[str, tuple[str, ...]] = {
  'align': ('repa',),
  'bank': ('train_data',),
  'batch': ('batch_size',),
  'beside': ('extra_in_channels',),
  'canonical': ('first_caption_only',),
  'classes': ('num_classes',),
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
  'holes': ('inpainting',),
  'judge': ('feature_extractor',),
  'keep': ('patch_keep_ratio',),
  'latent': ('latent_channels',),
  'latents': ('precomputed_latents',),
  'lengths': ('learn_prototype_norms',),
  'local_views': ('local_crops_number',),
  'max_streak': ('max_nonfinite_steps',),
  'microbatches': ('grad_accum_steps',),
  'multipliers': ('lr_multipliers',),
  'norm_pooled': ('fc_norm',),
  'normalized': ('norm_pix_loss',),
  'only': ('name_filter',),
  'outputs': ('num_classes', 'out_channels'),
  'outputs_bias': ('head_bias',),
  'patch': ('patch_size',),
  'patch_weight': ('ibot_loss_weight',),
  'peak': ('peak_lr',),
  'place_class_token': ('class_token_has_position',),
  'positions': ('pos_embed',),
  'prompts': ('caption_templates',),
  'strength': ('weighting_gamma',),
  'targets': ('centering',),
  'text': ('text_encoder',),
  'times': ('timestep_sampling',),
  'times_mean': ('timestep_mean',),
  'times_std': ('timestep_std',),
  'trained': ('trainable',),
  'whole': ('full_mask_probability',),
  'widths': ('block_out_channels',),
  'words': ('precomputed_text',),
}

# Names of constructors, by the name that a config gave them.
CONSTRUCTORS: Mapping[str, str] = {'adapted': 'finetune', 'coarse': 'pixelate'}

# Values of fields, by the field's present name: what was written -> what is written now.
VALUES: Mapping[str, Mapping[str, str]] = {
  'centering': {'centre': 'centering', 'sinkhorn': 'sinkhorn_knopp'},
  'on_truncated': {'refuse': 'error', 'cut': 'skip_tail'},
}


def renamed_field(name: str, parameters: Mapping[str, object]) -> str | None:
  """The present name of a field that a constructor with these parameters once called `name`; None if it never did."""
  if name in parameters:
    return None
  return next((new for new in FIELDS.get(name, ()) if new in parameters), None)
