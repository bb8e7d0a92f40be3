"""HPSv3 (Ma et al. 2025): Qwen2-VL reads a picture and the instruction to rate it; an MLP scores one token's state."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from draftplus.distributed import sent
from draftplus.errors import UserError
from draftplus.rewards.captions import load_tokenizer, tokenizer_beside
from draftplus.rewards.checkpoints import fit, lacks, load_weights_file, locate, read_json, to_fetch
from draftplus.rewards.hpsv3_instruction import IMAGE, REWARD, TEMPLATE
from draftplus.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, preprocess
from draftplus.types import Reward

WEIGHTS = "MizzenAI/HPSv3"
FILE = "HPSv3.safetensors"
PROCESSOR = "Qwen/Qwen2-VL-7B-Instruct"  # which it was tuned from
SMALL_FILES = "config.json tokenizer.json tokenizer_config.json"
PIXELS = 256 * 28 * 28  # of a resized picture, at least and at most, as far as its sides are multiples of 28
SLENDER = 200  # the longest picture, in widths
HEAD = (1024, 16, 2)  # linear layers of these widths; the last two numbers are mean and log deviation of the score
CACHED = 4096  # prompts, of some 10 kB each
# of the published file, which transformers 4.45 wrote, and of today's class; the words' logits are not used
_NAMES = ((r"^visual\.", "model.visual."), (r"^model\.(?=embed_tokens|layers|norm)", "model.language_model."))
_WORDS = "model.language_model.embed_tokens.weight"


class Rotary(nn.Module):
    """The vision tower's rotary positions, of which the authors' program computes the angles in bfloat16."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    @torch.no_grad()
    def forward(self, x: Any, places: Tensor | None = None) -> Any:
        """places: (n, 2), row and column of each patch. Returns cosines and sines, (n, d) each. Older transformers give
        a number of places alone, and make the angles of each patch from theirs, (x, d / 4).
        """
        inv_freq = cast(Tensor, self.stock.inv_freq).bfloat16()
        if places is None:
            return torch.outer(torch.arange(x, device=inv_freq.device, dtype=torch.bfloat16), inv_freq)
        angles = (places[..., None].bfloat16() * inv_freq).flatten(1).repeat(1, 2)  # (n, d), rounded
        return angles.cos().float(), angles.sin().float()


class Network(nn.Module):
    """The published network in transformers' classes. config: of the Qwen2-VL that it was tuned from."""

    def __init__(self, config: Mapping[str, Any], words: int) -> None:
        from transformers import Qwen2VLConfig, Qwen2VLModel

        super().__init__()
        settings = Qwen2VLConfig.from_dict(dict(config))
        settings.text_config.vocab_size = words
        self.model = Qwen2VLModel(settings)
        width, (first, second, last) = settings.text_config.hidden_size, HEAD
        self.rm_head = nn.Sequential(
            nn.Linear(width, first), nn.ReLU(), nn.Dropout(0.05),
            nn.Linear(first, second), nn.ReLU(), nn.Linear(second, last),
        )  # fmt: skip
        # the authors cast all to bfloat16, these too, and trained so: exact ones put distant tokens elsewhere
        frequencies = self.model.language_model.rotary_emb.inv_freq
        frequencies.copy_(frequencies.bfloat16())
        self.model.visual.rotary_pos_emb = Rotary(self.model.visual.rotary_pos_emb)

    def forward(self, patches: Tensor, grid: Tensor, ids: Tensor, mask: Tensor, read: Tensor) -> Tensor:
        """patches: (b · h · w, 3 · t · p · p); grid: (b, 3), the pictures' (1, h, w); ids, mask: (b, n); read: (b,), of
        which token is scored. Returns (b, 2), in float32 or wider.
        """
        # all three rotary positions of a token are its place in the row, as the authors' program has it: not Qwen2-VL's
        places = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
        states = self.model(
            input_ids=ids, attention_mask=mask, position_ids=places, pixel_values=patches, image_grid_thw=grid,
            use_cache=False,
        ).last_hidden_state  # (b, n, d)  # fmt: skip
        state = states[torch.arange(len(ids), device=ids.device), read]
        return self.rm_head(state.to(self.rm_head[0].weight.dtype))


class HPSv3:
    """The mean of the score's distribution, about 0 to 12."""

    differentiable = True

    def __init__(self, network: Network, tokenizer: Any) -> None:
        config = network.model.config
        self.network = network
        self.divisible = [network]
        self.tokenizer = tokenizer
        self.patch, self.merged = config.vision_config.patch_size, config.vision_config.spatial_merge_size
        self.frames = config.vision_config.temporal_patch_size
        self.image, self.read = (tokenizer.convert_tokens_to_ids(token) for token in (IMAGE, REWARD))
        self._tokens = lru_cache(CACHED)(self._encode)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (b, 3, H, W) in [0, 1]; prompts: b strings. Returns (b,) in float32, or wider if the weights are.

        UserError for pictures that are more than 200 times as long as wide, and prompts with the network's own tokens.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        target = resized(images.shape[-2], images.shape[-1], self.patch * self.merged)
        pixels = preprocess(images, Preprocessing(target, "bicubic", None, 1.0, CLIP_MEAN, CLIP_STD))
        rows, columns = (side // self.patch for side in target)
        count = rows * columns // self.merged**2  # tokens of a picture
        tokens = [self._with_picture(self._tokens(prompt), count) for prompt in prompts]
        device = images.device
        padding = self.tokenizer.pad_token_id
        ids = sent(nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=padding), device)
        mask = sent(nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in tokens], batch_first=True), device)
        grid = sent(torch.tensor([[1, rows, columns]] * len(images)), device)
        read = (ids == self.read).int().argmax(1)  # (b,)
        patches = patched(pixels, self.patch, self.merged, self.frames)
        score = self.network(patches, grid, ids, mask, read)[:, 0]
        return score.to(torch.promote_types(score.dtype, torch.float32))

    def _encode(self, prompt: str) -> Tensor:
        """(n,) ids, with one token in the picture's place."""
        for token in (IMAGE, REWARD):
            if token in prompt:
                raise UserError(f"reward 'hpsv3' cannot score a prompt that has its own token {token}: {prompt[:60]!r}")
        text = TEMPLATE.replace("{text_prompt}", prompt)
        return torch.tensor(self.tokenizer(text, verbose=False).input_ids)

    def _with_picture(self, ids: Tensor, count: int) -> Tensor:
        place = int((ids == self.image).int().argmax())
        return torch.cat((ids[:place], ids.new_full((count,), self.image), ids[place + 1 :]))


def resized(height: int, width: int, step: int) -> tuple[int, int]:
    """The size that a picture is brought to: sides that are multiples of `step`, about `PIXELS` in all."""
    if max(height, width) > SLENDER * min(height, width):
        raise UserError(
            f"reward 'hpsv3' cannot score pictures of {height} × {width}: one side is over {SLENDER} others."
        )
    rounded = [max(step, round(side / step) * step) for side in (height, width)]
    if math.prod(rounded) > PIXELS:
        shrink = math.sqrt(height * width / PIXELS)
        rounded = [math.floor(side / shrink / step) * step for side in (height, width)]
    elif math.prod(rounded) < PIXELS:
        grow = math.sqrt(PIXELS / (height * width))
        rounded = [math.ceil(side * grow / step) * step for side in (height, width)]
    return rounded[0], rounded[1]


def patched(pixels: Tensor, size: int, merged: int, frames: int) -> Tensor:
    """The patches of `size` pixels on a side, a row for each, as Qwen2-VL takes them.

    pixels: (b, c, H, W). Returns (b · H · W / size², c · frames · size²): patches in the order of squares of
    `merged` · `merged` that become one token, the picture repeated as `frames` of a film.
    """
    height, width = (side // (size * merged) for side in pixels.shape[-2:])
    parts = pixels.unflatten(3, (width, merged, size)).unflatten(2, (height, merged, size))
    rows = parts.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (b, height, width, merged, merged, c, size, size)
    return rows.unsqueeze(6).expand(*rows.shape[:6], frames, size, size).flatten(5).flatten(0, 4)


def load_hpsv3(
    path: str | Path = WEIGHTS,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    processor: str | None = None,
    revision: str | None = None,
    bfloat16: bool = False,
) -> Reward:
    """HPSv3, about 0 to 12.

    path: the published file, a directory that contains it, or a hub id, at `revision`. processor: directory or hub id
    of the Qwen2-VL that it was tuned from: its config.json and tokenizer; None: the directory of the weights if it has
    them, else Qwen2-VL-7B-Instruct. dtype: of the weights, float32 unless given. bfloat16: all but the head is in
    bfloat16, as the authors run it. UserError if files are missing, damaged or another reward's.
    """
    where = f"reward.hpsv3.path '{path}'"
    tensors = renamed(load_weights_file(path, FILE, revision, "hpsv3"))
    if not any(name.startswith("rm_head.") for name in tensors) or _WORDS not in tensors:
        raise UserError(f"{where} has not the weights of HPSv3: they are another model's, or without its head rm_head.")
    source = str(processor or tokenizer_beside(path) or PROCESSOR)
    tokenizer = load_tokenizer("hpsv3", source, added=(REWARD,))
    config = read_json(locate(source), "config.json")
    if config is None or config.get("model_type") != "qwen2_vl":
        raise UserError(
            f"{lacks(locate(source), 'config.json')} of a Qwen2-VL: set reward.hpsv3.args.processor to one that has."
            + to_fetch(locate(source), "reward.hpsv3.args.processor", SMALL_FILES)
        )
    words = len(tensors[_WORDS])
    if len(tokenizer) != words:
        raise UserError(
            f"the tokenizer in '{source}' has {len(tokenizer):,} tokens, but the network in '{path}' has {words:,}; "
            f"set reward.hpsv3.args.processor to the one that goes with it, such as {PROCESSOR}."
        )
    network = fit(partial(Network, config, words), tensors, where, torch.bfloat16 if bfloat16 else dtype)
    if bfloat16:
        head = {name.removeprefix("rm_head."): one for name, one in tensors.items() if name.startswith("rm_head.")}
        network.rm_head.float().load_state_dict(head)
    recompute(network)
    return HPSv3(network.to(device), tokenizer)


def recompute(network: Network) -> None:
    """Has the backward pass compute a layer's inner values again, instead of keeping them: GiBs for each picture."""
    for layer in (*network.model.visual.blocks, *network.model.language_model.layers):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published file's tensors by the names of `Network`; what the score does not use is left out."""
    return {_rename(name): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def _rename(name: str) -> str:
    for published, ours in _NAMES:
        name = re.sub(published, ours, name)
    return name
