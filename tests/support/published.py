"""Tiny random weights laid out as reward models publish theirs, and pictures to score; NumPy draws alike everywhere.

Read by the tests and, in the environments of the original packages, by the scripts in `tests/parity/originals/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIZES = [(64, 64), (97, 131), (150, 71), (40, 40)]  # the first is what the networks take; the others are resized
PROMPTS = [
    "a red fox, sleeping",
    "a naïve blue-ish zebra on 3 cubes [ENC] 漢 ☃",
    "a very long caption of a zebra and a fox " * 6,
    "",
]


def pictures(sizes: Sequence[tuple[int, int]] = SIZES) -> list[np.ndarray]:
    """(H, W, 3) uint8 pictures of these sizes: waves and a little noise."""
    found = []
    for number, (height, width) in enumerate(sizes):
        draw = np.random.RandomState(number)
        rows, columns = np.mgrid[:height, :width] / 64
        waves = [np.sin(a * rows + b * columns + c) for a, b, c in draw.uniform(1, 8, (3, 3))]
        values = 0.5 + 0.35 * np.stack(waves, -1) + 0.03 * draw.standard_normal((height, width, 3))
        found.append((values.clip(0, 1) * 255).round().astype(np.uint8))
    return found


def drawn(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of these names. Matrices keep the size of what they are applied to; what embeds is small, so that
    the ε of a norm matters; scales of norms are about 1.
    """
    draw = np.random.RandomState(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = 0.03 * draw.standard_normal(shape)
        if len(shape) == 1 and "norm" in name.lower() and name.endswith("weight"):
            values += 1
        elif len(shape) > 1 and "embed" not in name:
            values *= np.prod(shape[1:]) ** -0.5 / 0.03
        tensors[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return tensors


BERT_VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "-", "3", "[", "]", "a", "red", "fox", "sleep", "##ing", "naive",
    "blue", "is", "##h", "zebra", "on", "cube", "##s", "very", "long", "cap", "##tion", "of", "and", "漢", "en", "##c",
]  # fmt: skip


def save_bert_vocabulary(directory: Path, words: int = len(BERT_VOCABULARY)) -> Path:
    """vocab.txt as bert-base-uncased has it, with few words; what else is published there says the defaults."""
    unused = [f"[unused{i}]" for i in range(words - len(BERT_VOCABULARY))]
    (directory / "vocab.txt").write_text("\n".join(BERT_VOCABULARY + unused) + "\n", encoding="utf-8")
    return directory / "vocab.txt"


def save_image_reward(directory: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A directory with the published file and the tokenizer that goes with it."""
    torch.save(dict(tensors), directory / "ImageReward.pt")
    save_bert_vocabulary(directory, len(tensors["blip.text_encoder.embeddings.word_embeddings.weight"]) - 2)
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return directory


def true_size_image_reward() -> dict[str, Tensor]:
    return image_reward(1024, 768, (24, 12), 30524, 14, 512)


def errors(name: str, reward: Callable[[Tensor, Sequence[str]], Tensor]) -> dict[tuple[int, int], float]:
    """By size of the pictures, the first of which is not resized: the largest difference from the original's scores, as
    a share of their range.
    """
    says = json.loads((Path(__file__).parents[1] / "parity" / "originals" / f"{name}.json").read_text())
    prompts = HPSV3_PROMPTS if name == "hpsv3" else PROMPTS
    spread = max(map(max, says["scores"])) - min(map(min, says["scores"]))
    found = {}
    for picture, size, expected in zip(pictures(says["sizes"]), says["sizes"], says["scores"], strict=True):
        pixels = torch.from_numpy(picture).permute(2, 0, 1).expand(len(prompts), -1, -1, -1) / 255
        found[tuple(size)] = (reward(pixels, prompts).detach() - torch.tensor(expected)).abs().max().item() / spread
    return found


def image_reward(
    vision: int = 128, text: int = 64, layers: tuple[int, int] = (2, 2), words: int = len(BERT_VOCABULARY) + 2,
    grid: int = 4, positions: int = 40,
) -> dict[str, Tensor]:  # fmt: skip
    """ImageReward.pt: tensors by name, nothing around them, in float32; of true size but for these numbers.

    vision, text: widths, in heads of 64. layers: of the two. grid: patches of 16 pixels on a side.
    """
    shapes: dict[str, Sequence[int]] = {}

    linear, norm = _into(shapes)
    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    shapes.update({f"{eye}.cls_token": (1, 1, vision), f"{eye}.pos_embed": (1, grid * grid + 1, vision)})
    shapes.update({f"{eye}.patch_embed.proj.weight": (vision, 3, 16, 16), f"{eye}.patch_embed.proj.bias": (vision,)})
    for i in range(layers[0]):
        norm(f"{eye}.blocks.{i}.norm1", vision)
        linear(f"{eye}.blocks.{i}.attn.qkv", 3 * vision, vision)
        linear(f"{eye}.blocks.{i}.attn.proj", vision, vision)
        norm(f"{eye}.blocks.{i}.norm2", vision)
        linear(f"{eye}.blocks.{i}.mlp.fc1", 4 * vision, vision)
        linear(f"{eye}.blocks.{i}.mlp.fc2", vision, 4 * vision)
    norm(f"{eye}.norm", vision)
    shapes[f"{reader}.embeddings.word_embeddings.weight"] = (words, text)
    shapes[f"{reader}.embeddings.position_embeddings.weight"] = (positions, text)
    norm(f"{reader}.embeddings.LayerNorm", text)
    for i in range(layers[1]):
        for attention, width in (("attention", text), ("crossattention", vision)):
            linear(f"{reader}.encoder.layer.{i}.{attention}.self.query", text, text)
            linear(f"{reader}.encoder.layer.{i}.{attention}.self.key", text, width)
            linear(f"{reader}.encoder.layer.{i}.{attention}.self.value", text, width)
            linear(f"{reader}.encoder.layer.{i}.{attention}.output.dense", text, text)
            norm(f"{reader}.encoder.layer.{i}.{attention}.output.LayerNorm", text)
        linear(f"{reader}.encoder.layer.{i}.intermediate.dense", 4 * text, text)
        linear(f"{reader}.encoder.layer.{i}.output.dense", text, 4 * text)
        norm(f"{reader}.encoder.layer.{i}.output.LayerNorm", text)
    linear("blip.vision_proj", 256, vision)
    linear("blip.text_proj", 256, text)
    for i, (into, out) in zip((0, 2, 4, 6, 7), ((text, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True):
        linear(f"mlp.layers.{i}", out, into)
    count = {f"{reader}.embeddings.position_ids": torch.arange(positions)[None]}  # the one that is not float
    return drawn(shapes) | count


def mps(layers: int = 2, width: int = 128, text: int = 64, vision: int = 64, words: int = 1536) -> dict[str, Tensor]:
    """model.safetensors of the conversion that imscore reads: tensors by name, in float32; of the tiny `MPS_CONFIG`.

    layers: of cross-attention. width: of the projections, in heads of 64. text, vision: widths of the two towers.
    """
    shapes: dict[str, Sequence[int]] = {}
    linear, norm = _into(shapes)
    shapes["mps.model.logit_scale"] = ()
    shapes["mps.model.text_model.embeddings.token_embedding.weight"] = (words, text)
    shapes["mps.model.text_model.embeddings.position_embedding.weight"] = (77, text)
    shapes["mps.model.vision_model.embeddings.class_embedding"] = (vision,)
    shapes["mps.model.vision_model.embeddings.patch_embedding.weight"] = (vision, 3, 16, 16)
    shapes["mps.model.vision_model.embeddings.position_embedding.weight"] = (17, vision)
    norm("mps.model.vision_model.pre_layrnorm", vision)
    for tower, wide in (("text_model", text), ("vision_model", vision)):
        for i in range(2):
            layer = f"mps.model.{tower}.encoder.layers.{i}"
            for one in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{layer}.self_attn.{one}", wide, wide)
            norm(f"{layer}.layer_norm1", wide)
            linear(f"{layer}.mlp.fc1", 2 * wide, wide)
            linear(f"{layer}.mlp.fc2", wide, 2 * wide)
            norm(f"{layer}.layer_norm2", wide)
    norm("mps.model.text_model.final_layer_norm", text)
    norm("mps.model.vision_model.post_layernorm", vision)
    shapes["mps.model.visual_projection.weight"] = (width, vision)
    shapes["mps.model.text_projection.weight"] = (width, text)
    for i in range(layers):
        cross, within = (f"mps.cross_model.layers.{i}.{j}.fn" for j in range(2))
        for block in (cross, within):
            norm(f"{block}.norm", width)
        shapes.update({f"{cross}.to_q.weight": (width, width), f"{cross}.to_kv.weight": (128, width)})
        shapes.update({f"{cross}.to_out.weight": (width, width), f"{cross}.ff.0.weight": (8 * width, width)})
        shapes[f"{cross}.ff.2.weight"] = (width, 4 * width)
        shapes[f"{within}.fused_attn_ff_proj.weight"] = (width + 128 + 8 * width, width)
        shapes.update({f"{within}.attn_out.weight": (width, width), f"{within}.ff_out.1.weight": (width, 4 * width)})
    tensors = drawn(shapes) | {"mps.model.logit_scale": torch.tensor(4.6052)}
    # one direction tells most words from some: these are unlike the condition, and not read
    direction = torch.tensor([1.0, -1.0]).repeat(text // 2) / text**0.5
    embeddings = tensors["mps.model.text_model.embeddings.token_embedding.weight"]
    embeddings += 20 * direction
    embeddings[MPS_UNREAD] -= 40 * direction
    bias = tensors["mps.cross_model.layers.0.0.fn.norm.bias"]  # any of this width
    tensors["mps.model.text_projection.weight"] += 3 * torch.outer(bias / bias.norm(), direction)
    for i in range(layers):
        tensors[f"mps.cross_model.layers.{i}.1.fn.rotary_emb.inv_freq"] = 10000 ** -(torch.arange(0, 64, 2) / 64)
    return tensors


MPS_CONFIG = {
    "model_type": "clip",
    "projection_dim": 128,
    "text_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 1536, "max_position_embeddings": 77, "hidden_act": "gelu", "bos_token_id": 0, "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 16, "hidden_act": "gelu",
    },
}  # fmt: skip
MPS_TOKENIZER = Path(__file__).parents[2] / "src" / "draftplus" / "assets" / "emoji_clip"
MPS_UNREAD = [551, 555, 852, 316]  # ids of words of `PROMPTS`, and not of the condition
MPS_PREPROCESSING = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}


def save_mps(directory: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """A directory with the converted file, and what else there is in the directory of the CLIP that it came from."""
    from safetensors.torch import save_file

    save_file(mps() if tensors is None else dict(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(MPS_CONFIG))
    (directory / "preprocessor_config.json").write_text(json.dumps(MPS_PREPROCESSING))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MPS_TOKENIZER / name, directory)
    return directory


def _into(shapes: dict[str, Sequence[int]]) -> tuple[Callable[[str, int, int], None], Callable[[str, int], None]]:
    """Functions that add the shapes of a linear layer, and of a norm."""

    def linear(name: str, out: int, into: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    return linear, norm


HPSV3_SIZES = [(448, 448), (512, 512), (300, 200), (201, 333), (96, 64)]  # the first is not resized
HPSV3_PROMPTS = [PROMPTS[0], "a naïve blue-ish zebra on {3} cubes 漢 ☃", PROMPTS[2], ""]
HPSV3_CONFIG = {
    "model_type": "qwen2_vl", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 32768, "vocab_size": 640,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2},
}  # fmt: skip
QWEN2_VL_CHAT = (  # of the published tokenizer, in as far as a picture and a text need it
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2_VL_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip


def hpsv3_pictures() -> list[np.ndarray]:
    return pictures(HPSV3_SIZES)


# so that the instruction is about as long as by the published vocabulary
_MERGED = """Ġthe Ġimage Ġoverall Ġquality Ġshould Ġand Ġof Ġor Ġnot Ġdescription Ġwith Ġin Ġcontent Ġstyle Ġsuch Ġas
Ġtext Ġto Ġbe Ġa Ġis Ġany Ġif Ġcontain Ġprompt Ġvisual Ġelements Ġsubject ing tion ĊĊ Evaluate Assess""".split()
_MERGES = list(dict.fromkeys((word[:i], word[i]) for word in _MERGED for i in range(1, len(word))))
HPSV3_WORDS = 256 + len(_MERGES) + len(QWEN2_VL_SPECIAL) + 1


def hpsv3() -> dict[str, Tensor]:
    """HPSv3.safetensors: tensors by name, nothing around them, the head in float32 and the others in bfloat16; of the
    tiny `HPSV3_CONFIG`.
    """
    tensors = drawn(_hpsv3_shapes(64, 96, 2, 1, HPSV3_WORDS, 64, 2, (2, 2)))
    return {name: one if name.startswith("rm_head.") else one.bfloat16() for name, one in tensors.items()}


def true_size_hpsv3_shapes() -> dict[str, Sequence[int]]:
    return _hpsv3_shapes(3584, 18944, 28, 4, 151658, 1280, 4, (32, 28))


def _hpsv3_shapes(
    width: int, inner: int, heads: int, pairs: int, words: int, seen: int, ratio: int, layers: tuple[int, int]
) -> dict[str, Sequence[int]]:
    shapes: dict[str, Sequence[int]] = {}
    linear, norm = _into(shapes)
    shapes["visual.patch_embed.proj.weight"] = (seen, 3, 2, 14, 14)
    for i in range(layers[0]):
        block = f"visual.blocks.{i}"
        norm(f"{block}.norm1", seen)
        norm(f"{block}.norm2", seen)
        linear(f"{block}.attn.qkv", 3 * seen, seen)
        linear(f"{block}.attn.proj", seen, seen)
        linear(f"{block}.mlp.fc1", ratio * seen, seen)
        linear(f"{block}.mlp.fc2", seen, ratio * seen)
    norm("visual.merger.ln_q", seen)
    linear("visual.merger.mlp.0", 4 * seen, 4 * seen)
    linear("visual.merger.mlp.2", width, 4 * seen)
    shapes["model.embed_tokens.weight"] = (words, width)
    for i in range(layers[1]):
        layer, side = f"model.layers.{i}", width // heads * pairs
        linear(f"{layer}.self_attn.q_proj", width, width)
        linear(f"{layer}.self_attn.k_proj", side, width)
        linear(f"{layer}.self_attn.v_proj", side, width)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, width)
        shapes.update({f"{layer}.mlp.gate_proj.weight": (inner, width), f"{layer}.mlp.up_proj.weight": (inner, width)})
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes.update(
            {f"{layer}.input_layernorm.weight": (width,), f"{layer}.post_attention_layernorm.weight": (width,)}
        )
    shapes.update({"model.norm.weight": (width,), "lm_head.weight": (words, width)})
    for i, (into, out) in zip((0, 3, 5), ((width, 1024), (1024, 16), (16, 2)), strict=True):
        linear(f"rm_head.{i}", out, into)
    return shapes


def save_hpsv3(directory: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """A directory with the published file, and what is used of the published Qwen2-VL."""
    from safetensors.torch import save_file

    save_file(hpsv3() if tensors is None else dict(tensors), directory / "HPSv3.safetensors")
    tokenizer = _qwen2_vl_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 32768}))
    names = ("image", "video", "vision_start", "vision_end")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    numbers = {f"{name}_token_id": tokenizer.token_to_id(one) for name, one in zip(names, tokens, strict=True)}
    (directory / "config.json").write_text(json.dumps(HPSV3_CONFIG | numbers))
    return directory


def in_double(replace: Callable[[Any, str, Any], None]) -> None:
    """Has Qwen2-VL's norms and rotations compute in the dtype that they are given; transformers' do it in float32.

    replace: sets an attribute, as setattr does.
    """
    from transformers.models.qwen2_vl import modeling_qwen2_vl as stock

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
        return q * cos + stock.rotate_half(q) * sin, k * cos + stock.rotate_half(k) * sin

    replace(stock.Qwen2VLRMSNorm, "forward", norm)
    replace(stock, "apply_rotary_pos_emb_vision", rotate)


def _qwen2_vl_tokenizer() -> Any:
    """Of Qwen2-VL's kind, with few merges: `QWEN2_VL_SPECIAL` and HPSv3's own token come after its vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, _MERGES)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, _MERGES))
    made.normalizer = normalizers.NFC()
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(QWEN2_VL_SPECIAL)
    return made
