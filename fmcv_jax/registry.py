"""Every name that a config may use, by kind."""

import flax.linen as nn

from fmcv_jax import config as config_lib
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.control_maps import Control, Edges, Gray, Pixelate
from fmcv_jax.augment.registry import AUGMENTS
from fmcv_jax.data.pillow_resize import PillowResize, ResizeToMultiple
from fmcv_jax.data.prompts import Prompted
from fmcv_jax.data.sources.array_record import ArrayRecord
from fmcv_jax.data.sources.base import NoData, Source
from fmcv_jax.data.sources.coco_captions import CocoCaptions
from fmcv_jax.data.sources.depth_folder import DepthFolder
from fmcv_jax.data.sources.detection.coco import Coco
from fmcv_jax.data.sources.detection.coco_panoptic import CocoPanoptic
from fmcv_jax.data.sources.detection.parquet_objects import ParquetObjects
from fmcv_jax.data.sources.detection.voc import Voc
from fmcv_jax.data.sources.detection.yolo import Yolo
from fmcv_jax.data.sources.digits import Digits
from fmcv_jax.data.sources.emoji import Emoji
from fmcv_jax.data.sources.emoji_scenes import EmojiScenes
from fmcv_jax.data.sources.image_folder import ImageFolder
from fmcv_jax.data.sources.mixture import Mixture
from fmcv_jax.data.sources.parquet import Parquet
from fmcv_jax.data.sources.random_split import RandomSplit
from fmcv_jax.data.sources.recolored_emoji import RecoloredEmoji
from fmcv_jax.data.sources.scattered_digits import Scattered
from fmcv_jax.data.sources.tfds import Tfds
from fmcv_jax.data.sources.vqa import Vqa
from fmcv_jax.data.sources.webdataset import WebDataset
from fmcv_jax.data.tokenizers import Bpe, ClipBpe, SentencePiece, Tokenizer, TokenizerJson
from fmcv_jax.data.transforms import IMAGE_TRANSFORMS, ImageTransform
from fmcv_jax.evaluate.accuracy import Accuracy
from fmcv_jax.evaluate.average_precision import AveragePrecision
from fmcv_jax.evaluate.base import Evaluator
from fmcv_jax.evaluate.captioning import Captioning
from fmcv_jax.evaluate.denoising import Denoising
from fmcv_jax.evaluate.depth import Depth
from fmcv_jax.evaluate.few_shot import FewShot
from fmcv_jax.evaluate.generation import Generation
from fmcv_jax.evaluate.knn import Knn
from fmcv_jax.evaluate.linear_probe import LinearProbe
from fmcv_jax.evaluate.object_masks import ObjectMasks
from fmcv_jax.evaluate.panoptic import PanopticQuality
from fmcv_jax.evaluate.question_answering import QuestionAnswering
from fmcv_jax.evaluate.reconstruction import Reconstruction
from fmcv_jax.evaluate.retrieval import Retrieval
from fmcv_jax.evaluate.segmentation import MeanIou
from fmcv_jax.evaluate.zero_shot import ZeroShot
from fmcv_jax.models.backbones.cross_decoder import caption_decoder, cross_decoder
from fmcv_jax.models.backbones.decoder import text_decoder
from fmcv_jax.models.backbones.efficientnet import efficientnet
from fmcv_jax.models.backbones.inception import inception
from fmcv_jax.models.backbones.swin import swin
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.dense.dpt import depth_anything, dpt
from fmcv_jax.models.dense.eomt import eomt
from fmcv_jax.models.dense.owl import owl, owl_detector
from fmcv_jax.models.dense.sam import sam
from fmcv_jax.models.dense.segmenter import segmenter
from fmcv_jax.models.generative.autoencoder import autoencoder
from fmcv_jax.models.generative.dit import dit
from fmcv_jax.models.generative.mmdit import mmdit
from fmcv_jax.models.generative.unet import unet
from fmcv_jax.models.multimodal.captioner import cappa, captioner, coca, contrastive_captioner
from fmcv_jax.models.multimodal.dual_encoder import align, clip, dual_encoder, siglip
from fmcv_jax.models.multimodal.prefix_lm import paligemma, prefix_lm
from fmcv_jax.models.self_supervised.dino import dino
from fmcv_jax.models.self_supervised.mae import mae
from fmcv_jax.objectives.adapted import PartialFineTuning
from fmcv_jax.objectives.autoencoder import Autoencoding
from fmcv_jax.objectives.base import Objective
from fmcv_jax.objectives.classification import Classification
from fmcv_jax.objectives.contrastive import Contrastive
from fmcv_jax.objectives.contrastive_captioning import ContrastiveCaptioning
from fmcv_jax.objectives.depth import DepthEstimation
from fmcv_jax.objectives.detection import Detection
from fmcv_jax.objectives.diffusion import Diffusion
from fmcv_jax.objectives.dino import SelfDistillation
from fmcv_jax.objectives.encoder import PretrainedEncoder
from fmcv_jax.objectives.language import Language
from fmcv_jax.objectives.mae import MaskedAutoencoding
from fmcv_jax.objectives.mask_prediction import MaskPrediction
from fmcv_jax.objectives.prompted_segmentation import PromptedSegmentation
from fmcv_jax.objectives.segmentation import Segmentation
from fmcv_jax.objectives.text_encoder import TextEncoder
from fmcv_jax.train.optim import Adafactor, AdamW, Lamb, Lion, Muon, UpdateRule
from fmcv_jax.train.schedules import Cosine, Linear, Rsqrt, Schedule

# What a config may name, by kind. A name of the form 'package.module:attribute' reaches code outside this package.
KINDS: config_lib.Kinds = {
  Objective: {
    'finetune': PartialFineTuning,
    'autoencoding': Autoencoding,
    'classification': Classification,
    'contrastive': Contrastive,
    'contrastive_captioning': ContrastiveCaptioning,
    'depth': DepthEstimation,
    'detection': Detection,
    'diffusion': Diffusion,
    'dino': SelfDistillation,
    'encoder': PretrainedEncoder,
    'language': Language,
    'mae': MaskedAutoencoding,
    'mask_prediction': MaskPrediction,
    'prompted_segmentation': PromptedSegmentation,
    'segmentation': Segmentation,
    'text_encoder': TextEncoder,
  },
  nn.Module: {
    'align': align,
    'autoencoder': autoencoder,
    'cappa': cappa,
    'caption_decoder': caption_decoder,
    'captioner': captioner,
    'clip': clip,
    'coca': coca,
    'contrastive_captioner': contrastive_captioner,
    'cross_decoder': cross_decoder,
    'depth_anything': depth_anything,
    'dino': dino,
    'dit': dit,
    'dpt': dpt,
    'dual_encoder': dual_encoder,
    'efficientnet': efficientnet,
    'eomt': eomt,
    'inception': inception,
    'mae': mae,
    'mmdit': mmdit,
    'owl': owl,
    'owl_detector': owl_detector,
    'paligemma': paligemma,
    'prefix_lm': prefix_lm,
    'sam': sam,
    'segmenter': segmenter,
    'siglip': siglip,
    'swin': swin,
    'text_decoder': text_decoder,
    'text_transformer': text_transformer,
    'unet': unet,
    'vit': vit,
  },
  Source: {
    'none': NoData,
    'array_record': ArrayRecord,
    'coco': Coco,
    'coco_captions': CocoCaptions,
    'coco_panoptic': CocoPanoptic,
    'depth_folder': DepthFolder,
    'digits': Digits,
    'emoji': Emoji,
    'emoji_scenes': EmojiScenes,
    'image_folder': ImageFolder,
    'mixture': Mixture,
    'parquet': Parquet,
    'parquet_objects': ParquetObjects,
    'random_split': RandomSplit,
    'recolored_emoji': RecoloredEmoji,
    'scattered': Scattered,
    'tfds': Tfds,
    'voc': Voc,
    'vqa': Vqa,
    'webdataset': WebDataset,
    'yolo': Yolo,
  },
  ImageTransform: {**IMAGE_TRANSFORMS, 'pillow_resize': PillowResize, 'resize_to_multiple': ResizeToMultiple},
  Tokenizer: {
    'bpe': Bpe,
    'clip_bpe': ClipBpe,
    'prompted': Prompted,
    'sentencepiece': SentencePiece,
    'tokenizer_json': TokenizerJson,
  },
  Augment: AUGMENTS,
  Control: {'pixelate': Pixelate, 'edges': Edges, 'gray': Gray},
  Schedule: {'cosine': Cosine, 'linear': Linear, 'rsqrt': Rsqrt},
  UpdateRule: {'adafactor': Adafactor, 'adamw': AdamW, 'lamb': Lamb, 'lion': Lion, 'muon': Muon},
  Evaluator: {
    'accuracy': Accuracy,
    'average_precision': AveragePrecision,
    'captioning': Captioning,
    'denoising': Denoising,
    'depth': Depth,
    'few_shot': FewShot,
    'generation': Generation,
    'knn': Knn,
    'linear_probe': LinearProbe,
    'mean_iou': MeanIou,
    'object_masks': ObjectMasks,
    'panoptic_quality': PanopticQuality,
    'reconstruction': Reconstruction,
    'retrieval': Retrieval,
    'vqa': QuestionAnswering,
    'zero_shot': ZeroShot,
  },
}
