"""One small objective for each network of the registry, with all that makes parameters switched on."""

from fmcv_jax.augment.control_maps import Edges
from fmcv_jax.augment.inpaint_masks import RandomInpaintMask
from fmcv_jax.diffusion.process import Process
from fmcv_jax.models.backbones.efficientnet import efficientnet
from fmcv_jax.models.backbones.inception import inception
from fmcv_jax.models.backbones.swin import swin
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.dense.dpt import dpt
from fmcv_jax.models.dense.eomt import eomt
from fmcv_jax.models.dense.owl import owl_detector
from fmcv_jax.models.dense.sam import sam
from fmcv_jax.models.dense.segmenter import segmenter
from fmcv_jax.models.generative.autoencoder import autoencoder
from fmcv_jax.models.generative.dit import dit
from fmcv_jax.models.generative.mmdit import mmdit
from fmcv_jax.models.generative.unet import unet
from fmcv_jax.models.multimodal.captioner import cappa, coca
from fmcv_jax.models.multimodal.dual_encoder import dual_encoder
from fmcv_jax.models.multimodal.prefix_lm import paligemma
from fmcv_jax.models.self_supervised.dino import dino
from fmcv_jax.models.self_supervised.mae import mae
from fmcv_jax.objectives.adapted import Lora, PartialFineTuning
from fmcv_jax.objectives.autoencoder import Autoencoding
from fmcv_jax.objectives.classification import Classification
from fmcv_jax.objectives.contrastive import Contrastive
from fmcv_jax.objectives.contrastive_captioning import ContrastiveCaptioning
from fmcv_jax.objectives.depth import DepthEstimation
from fmcv_jax.objectives.detection import Detection
from fmcv_jax.objectives.diffusion import Diffusion
from fmcv_jax.objectives.dino import SelfDistillation
from fmcv_jax.objectives.distillation import Distillation
from fmcv_jax.objectives.encoder import PretrainedEncoder
from fmcv_jax.objectives.image_condition import ImageCondition
from fmcv_jax.objectives.language import Language
from fmcv_jax.objectives.latent_space import LatentSpace
from fmcv_jax.objectives.mae import MaskedAutoencoding
from fmcv_jax.objectives.mask_prediction import MaskPrediction
from fmcv_jax.objectives.prompted_segmentation import PromptedSegmentation
from fmcv_jax.objectives.repa import REPA
from fmcv_jax.objectives.segmentation import Segmentation
from fmcv_jax.objectives.text_condition import TextCondition

FLOW = Process('flow', 'flow')


def small_vit(**options):
  return vit('mu/8', image_size=16, **options)


def texts(**options):
  return text_transformer(64, 8, 16, 1, 2, **options)


def latents():
  return autoencoder(channels=(4, 8), layers=1, latent_channels=4, image_size=16)


def rich_vit():
  return small_vit(num_classes=10, registers=4, layer_scale=0.1, gated_mlp=True, distilled=True)


CASES = {
  'vit': lambda: Classification(rich_vit(), distillation=Distillation(small_vit(num_classes=10))),
  'vit, attention pooling': lambda: Classification(small_vit(num_classes=10, pool='map')),
  'swin': lambda: Classification(swin('mu', image_size=32, num_classes=10)),
  'efficientnet': lambda: Classification(efficientnet('mu', num_classes=10)),
  'inception': lambda: PretrainedEncoder(inception()),
  'dual_encoder': lambda: Contrastive(
    dual_encoder(small_vit(num_classes=16), texts(num_classes=16), initial_bias=-10.0)
  ),
  'dino': lambda: SelfDistillation(
    dino(
      small_vit(mask_token=True),
      prototypes=16,
      hidden=32,
      bottleneck=16,
      learn_prototype_norms=True,
      separate_patch_head=True,
    ),
    local_size=8,
    ibot_loss_weight=1.0,
  ),
  'prefix_lm': lambda: Language(paligemma('paligemma2_mu', image_size=16, vocab_size=64)),
  'captioner': lambda: Language(cappa('mu/8', image_size=16, vocab_size=64)),
  'contrastive_captioner': lambda: ContrastiveCaptioning(coca('mu/8', image_size=16, vocab_size=64)),
  'mae': lambda: MaskedAutoencoding(mae(small_vit(), width=16, depth=1, num_heads=2)),
  'owl_detector': lambda: Detection(
    owl_detector(dual_encoder(small_vit(num_classes=16, pool='cls'), texts(num_classes=16))), max_boxes=2, num_queries=3
  ),
  'eomt': lambda: MaskPrediction(
    eomt(small_vit(registers=4, layer_scale=1.0), 3, queries=5, blocks=1, upscales=1), max_segments=2
  ),
  'dpt': lambda: DepthEstimation(dpt(small_vit(depth=4), (1, 2, 3, 4), (4, 4, 8, 8), 8, hidden=4)),
  'sam': lambda: PromptedSegmentation(sam('mu', image_size=64, window=3, channels=16)),
  'segmenter': lambda: Segmentation(segmenter(small_vit(), 3)),
  'autoencoder': lambda: Autoencoding(latents(), perceptual=0.1, features=small_vit()),
  'dit': lambda: Diffusion(
    dit('mu/2', image_size=8, channels=4, cross_attention=True, pooled_text=True),
    FLOW,
    LatentSpace(latents()),
    TextCondition(texts(), train=True),
    repa=REPA(small_vit(), layer=1, hidden=16),
  ),
  'dit, classes': lambda: Diffusion(dit('mu/2', image_size=8, channels=3, num_classes=10), FLOW),
  'mmdit': lambda: Diffusion(mmdit('mu/2', image_size=8, channels=3), FLOW, text_condition=TextCondition(texts())),
  'unet': lambda: Diffusion(
    unet('mu', image_size=8, channels=3, layers=1, pooled_text=True, extra_in_channels=4),
    FLOW,
    text_condition=TextCondition(texts()),
    image_condition=ImageCondition(inpainting=RandomInpaintMask()),
  ),
  'controlnet': lambda: Diffusion(
    unet('mu', image_size=8, channels=4, layers=1),
    FLOW,
    LatentSpace(latents()),
    TextCondition(texts()),
    ImageCondition(control=Edges()),
  ),
  'lora': lambda: PartialFineTuning(Classification(small_vit(num_classes=10)), lora=Lora(2)),
}
