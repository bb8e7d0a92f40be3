"""ImageReward (Xu et al. 2023): BLIP-L reads a prompt and a picture together, and a linear head scores what it read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftplus.distributed import sent
from draftplus.errors import UserError
from draftplus.rewards.captions import Captions, load_tokenizer, tokenizer_beside
from draftplus.rewards.checkpoints import fit, load_weights_file
from draftplus.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, preprocess
from draftplus.types import Reward

WEIGHTS = "zai-org/ImageReward"
FILE = "ImageReward.pt"
TOKENIZER = "bert-base-uncased"
ADDED = ("[DEC]", "[ENC]")  # BLIP's, behind BERT's vocabulary: only a prompt that spells them out has them
LENGTH = 35  # tokens
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the training pictures
HEAD = (1024, 128, 64, 16, 1)  # linear layers of these widths, with dropouts between the first four
HEAD_DIM = 64  # of every attention head, in ViT-L/16 and in BERT: the file does not say how many heads there are

_NAMES = (
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    ("blip.text_encoder.", "text."),
)  # of the published file, and of transformers' classes
# what the file has and the score does not use: BLIP's contrastive projections, and a buffer that counts positions
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")

_PATCHES = "vision.embeddings.patch_embedding.weight"
_POSITIONS = "vision.embeddings.position_embedding"
_MLP = "vision.encoder.layers.0.mlp.fc1.weight"
_WORDS = "text.embeddings.word_embeddings.weight"
_TEXT_POSITIONS = "text.embeddings.position_embeddings.weight"
_TEXT_MLP = "text.encoder.layer.0.intermediate.dense.weight"


class Network(nn.Module):
    """The published network in transformers' classes; its sizes are those of the published tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        (width, _, patch, _), positions = tensors[_PATCHES].shape, tensors[_POSITIONS].shape[1]
        self.image_size = round((positions - 1) ** 0.5) * patch
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width, num_attention_heads=width // HEAD_DIM, image_size=self.image_size, patch_size=patch,
                num_hidden_layers=_layers(tensors, "vision.encoder.layers"), intermediate_size=len(tensors[_MLP]),
                layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        words, text_width = tensors[_WORDS].shape
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=words, hidden_size=text_width, num_attention_heads=text_width // HEAD_DIM,
                encoder_hidden_size=width, max_position_embeddings=len(tensors[_TEXT_POSITIONS]),
                num_hidden_layers=_layers(tensors, "text.encoder.layer"), intermediate_size=len(tensors[_TEXT_MLP]),
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        first, *others, last = [nn.Linear(*sizes) for sizes in zip((text_width, *HEAD), HEAD, strict=False)]
        between = [layer for linear in others for layer in (nn.Dropout(), linear)]
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(first, *between, last)})

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """pixels: (b, 3, h, w) normalised; ids, mask: (b, n). Returns (b,), in float32 or wider."""
        picture = self.vision(pixels).last_hidden_state  # (b, patches + 1, d)
        read = self.text(ids, attention_mask=mask, encoder_hidden_states=picture).last_hidden_state  # (b, n, e)
        return self.mlp["layers"](read[:, 0])[:, 0]


class ImageReward:
    """(head − mean) / deviation of BLIP's [CLS] state, about −2 to 2."""

    differentiable = True

    def __init__(self, network: Network, captions: Captions) -> None:
        size = network.image_size
        self.network = network
        self.divisible = [network]
        self.captions = captions
        self.preprocessing = Preprocessing(size, "bicubic", (size, size), 1.0, CLIP_MEAN, CLIP_STD, torchvision=True)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (b, 3, H, W) in [0, 1]; prompts: b strings. Returns (b,) in float32, or wider if the weights are."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        weight = self.network.vision.embeddings.patch_embedding.weight
        pixels = preprocess(images, self.preprocessing).to(weight.dtype)  # (b, 3, h, w)
        tokens = [self.captions(prompt) for prompt in prompts]
        ids, mask = (sent(torch.stack(one), weight.device) for one in zip(*tokens, strict=True))  # (b, 35) each
        score = self.network(pixels, ids, mask)
        return (score.to(torch.promote_types(score.dtype, torch.float32)) - MEAN) / STD


def load_image_reward(
    path: str | Path = WEIGHTS,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    processor: str | None = None,
    revision: str | None = None,
) -> Reward:
    """ImageReward v1.0, about −2 to 2.

    path: the published file, a directory that contains it, or a hub id, at `revision`. processor: directory or hub id
    of BERT's tokenizer; None: the one beside the weights, else bert-base-uncased. dtype: of the weights,
    float32 unless given. UserError if files are missing, damaged or another reward's.
    """
    where = f"reward.image_reward.path '{path}'"
    tensors = renamed(load_weights_file(path, FILE, revision, "image_reward"))
    if not {_PATCHES, _POSITIONS, _MLP, _WORDS, _TEXT_POSITIONS, _TEXT_MLP} <= tensors.keys():
        raise UserError(f"{where} has not the weights of ImageReward: they are another model's, or incomplete.")
    network = fit(partial(Network, tensors), tensors, where, dtype).to(device)
    source = processor or tokenizer_beside(path) or TOKENIZER
    tokenizer = load_tokenizer("image_reward", source, added=ADDED)
    words = len(network.text.embeddings.word_embeddings.weight)
    if len(tokenizer) != words:
        raise UserError(
            f"the tokenizer in '{source}' has {len(tokenizer):,} tokens, but the network in '{path}' has {words:,}; "
            f"set reward.image_reward.args.processor to the one that goes with it, such as {TOKENIZER}."
        )
    return ImageReward(network, Captions("image_reward", tokenizer, LENGTH))


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published file's tensors by the names of `Network`; what the score does not use is left out."""
    return {_rename(name): tensor for name, tensor in tensors.items() if not _UNUSED.fullmatch(name)}


def _rename(name: str) -> str:
    for published, ours in _NAMES:
        name = name.replace(published, ours)
    return name


def _layers(tensors: Mapping[str, Any], prefix: str) -> int:
    """How many layers there are, counted from 0 as far as there is no gap."""
    numbers = {int(found[1]) for name in tensors if (found := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
    return next(count for count in range(len(numbers) + 1) if count not in numbers)
