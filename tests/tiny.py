"""A CLIP of open_clip's own architecture and a set of real scenes, both small, for tests to train on."""

import patchsae.runs.compat  # noqa: F401  (before open_clip)

# isort: split
import open_clip
import torch
from open_clip.model import CLIP

from patchbook.scenes.embedded import SINGLE, SceneSet
from patchsae.clip.backbone import Backbone
from patchsae.training.trainer import TrainConfig

# 96 images of 50 tokens in 4 chunks of 1,200 tokens; uneven lanes, two epochs and a half
CONFIG = TrainConfig(
    images=96, chunk_images=24, lanes=4, image_batch=4, token_batch=128, warmup_steps=5, log_every=1,
    checkpoint_share=1e9, lr=3e-3, dead_window=3, bias_tokens=1000,
)  # fmt: skip


def tiny_backbone() -> Backbone:
    torch.manual_seed(0)
    vision = {"image_size": 112, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    clip = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    return Backbone(clip, 1, name="tiny", tokenizer=lambda: tokenizer)


def tiny_images() -> SceneSet:
    return SceneSet("tiny", "train", range(0, 20, 2), (0, 1), 4, SINGLE)  # 40 scenes of 10 classes
