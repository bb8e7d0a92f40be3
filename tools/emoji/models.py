"""The shapes of the embedded models, and the two directories they are installed as."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers import CLIPVisionConfig as VisionConfig

IMAGE_SIZE = 64
CONTEXT = 16
WIDTH = 192
VOCABULARY = 1536
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def make_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE, so that it encodes any string) with merges learned from the texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [a + b for a, b in merges]
    tokens = list(dict.fromkeys(tokens))[: VOCABULARY - 2]
    known = set(tokens)
    merges = [pair for pair in merges if pair[0] + pair[1] in known]
    vocabulary = {token: i for i, token in enumerate([*tokens, BOS, EOS])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The image-text model; its text tower becomes the text encoder of the pipeline."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=CONTEXT,
        projection_dim=128,
        pad_token_id=tokenizer.pad_token_id,
        **ends,
    )
    vision = VisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=5,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=128,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def make_vae() -> AutoencoderKL:
    """An autoencoder of factor 4 into eight channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def make_unet() -> UNet2DConditionModel:
    """The denoiser: text by cross-attention as in Stable Diffusion, and pooled text added to the time embedding."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels, sampled from the last one down.

    At that level the mean of 16x16 noise is about as large as that of the faint image in it, so backgrounds vary as
    they should; levels closer to pure noise were tried, and ask more precision than a prediction of noise has.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="trailing",
    )


def install_pipeline(
    target: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer
) -> None:
    """Write a Stable Diffusion directory with half-precision weights that load as float32."""
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())

    def save(folder: Path) -> None:
        StableDiffusionPipeline(
            unet=unet.eval(),
            vae=vae.eval(),
            text_encoder=encoder.eval(),
            tokenizer=tokenizer,
            scheduler=make_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)

    _install(target, save)


def install_clip(target: Path, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Write a CLIPModel directory in PickScore's shape: model, tokenizer, image processor."""

    def save(folder: Path) -> None:
        clip.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=MEAN, image_std=STD
        ).save_pretrained(folder)

    _install(target, save)


def _install(target: Path, save: Callable[[Path], None]) -> None:
    """Save beside the target, halve the weights, and move the files in one by one."""
    from safetensors.torch import load_file, save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as temporary:
        folder = Path(temporary)
        save(folder)
        for path in folder.rglob("*.safetensors"):
            halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
            save_file(halves, path, metadata={"format": "pt"})
            path.chmod(0o644)
        for path in folder.rglob("config.json"):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)
            for part in [config, config.get("text_config"), config.get("vision_config")]:
                if part is not None and "transformers_version" in config:
                    part["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2) + "\n")
        new = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for name in sorted(new):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder / name, target / name)
        for path in [p for p in target.rglob("*") if p.is_file() and p.relative_to(target) not in new]:
            path.unlink()


def encode(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (n, 16, width) as the pipeline sees them, and those at the end of each text (n, width)."""
    tokens = tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    output = clip.text_model(input_ids=tokens.input_ids)
    return output.last_hidden_state, output.pooler_output
