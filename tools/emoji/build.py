"""Build the embedded model from nothing: pictures, autoencoder, text tower, denoiser, reward, judge; then install it.

    python tools/emoji/build.py                      # everything, about five hours on two CPU cores
    python tools/emoji/build.py --unet-minutes 480   # the same command again, with more time, continues the training

Every stage continues from its last checkpoint in the build directory and is over once its minutes are used up. With
--warm-start, a build directory without checkpoints begins from the installed weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import clip
import judge
import perceptual
import torch
import unet
import vae
from data import Pictures, vocabulary
from diffusers import AutoencoderKL, UNet2DConditionModel
from fetch import LPIPS, fetch
from models import install_clip, install_pipeline, make_clip, make_tokenizer, make_unet, make_vae
from render import render
from subjects import HELD_OUT, PROTOCOL, prompt
from training import restore, save
from transformers import CLIPModel, CLIPTokenizer

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "src" / "draftplus" / "assets"
STAGES = ("fetch", "render", "lpips", "vae", "clip", "unet", "decoder", "judge", "install")
MINUTES = {"vae": 20, "text": 3, "clip": 60, "unet": 180, "decoder": 30, "judge": 6}


class Build:
    """The files of a build directory, and one method per stage."""

    def __init__(self, folder: Path, assets: Path, minutes: dict[str, float]) -> None:
        self.folder, self.assets = folder, assets
        self.seconds = {stage: 60 * value for stage, value in minutes.items()}
        self.lpips_path = assets / "lpips" / "alexnet.safetensors"

    def file(self, name: str) -> Path:
        return self.folder / name

    def pictures(self) -> Pictures:
        return Pictures.load(self.file("pictures.safetensors"))

    def tokenizer(self) -> CLIPTokenizer:
        if not self.file("tokenizer").exists():
            make_tokenizer(vocabulary(self.pictures())).save_pretrained(self.file("tokenizer"))
        return CLIPTokenizer.from_pretrained(self.file("tokenizer"))

    def module(self, name: str, module: torch.nn.Module, key: str) -> torch.nn.Module:
        """The module with the weights of a checkpoint."""
        state = restore(self.file(name))
        if state is None:
            raise FileNotFoundError(f"{self.file(name)} is missing: run the stage that makes it first")
        module.load_state_dict(state[key])
        return module.eval()

    def autoencoder(self) -> AutoencoderKL:
        return self.module("vae-average.pt", make_vae(), "vae")

    def text_tower(self) -> CLIPModel:
        return self.module("text.pt", make_clip(self.tokenizer()), "clip")

    def warm_start(self) -> None:
        """Take the installed weights where the build directory has none."""
        pipeline = self.assets / "emoji"
        if not self.file("tokenizer").exists():
            CLIPTokenizer.from_pretrained(self.assets / "emoji_clip").save_pretrained(self.file("tokenizer"))
        if not self.file("vae.pt").exists():
            weights = AutoencoderKL.from_pretrained(pipeline / "vae").state_dict()
            save(self.file("vae.pt"), {"vae": weights, "whitened": True})
            save(self.file("vae-average.pt"), {"vae": weights})
        if not self.file("text.pt").exists():
            installed = CLIPModel.from_pretrained(self.assets / "emoji_clip")
            save(self.file("text.pt"), {"clip": installed.state_dict()})
            save(self.file("clip-average.pt"), {"clip": installed.state_dict()})
        if not self.file("unet.pt").exists():
            weights = UNet2DConditionModel.from_pretrained(pipeline / "unet").state_dict()
            save(self.file("unet-start.pt"), {"unet": weights})

    def fetch(self) -> None:
        fetch(self.file("packages"))

    def render(self) -> None:
        if not self.file("pictures.safetensors").exists():
            render(self.file("packages"), self.file("pictures.safetensors"))

    def lpips(self) -> None:
        perceptual.convert(self.file("packages") / LPIPS, self.lpips_path)

    def vae(self) -> None:
        vae.train(self.pictures(), self.lpips_path, self.file("vae.pt"), self.seconds["vae"])

    def decoder(self) -> None:
        vae.train_decoder(self.pictures(), self.lpips_path, self.file("vae.pt"), self.seconds["decoder"])

    def clip(self) -> None:
        tokenizer = self.tokenizer()
        clip.train_text(self.pictures(), tokenizer, self.file("text.pt"), self.seconds["text"])
        clip.train_images(
            self.pictures(), self.lpips_path, self.text_tower(), tokenizer, self.file("clip.pt"), self.seconds["clip"]
        )

    def unet(self) -> None:
        unet.train(
            self.pictures(),
            self.autoencoder(),
            self.text_tower(),
            self.tokenizer(),
            self.file("unet.pt"),
            self.seconds["unet"],
        )

    def judge(self) -> None:
        judge.train(self.pictures(), self.file("judge.pt"), self.seconds["judge"])

    def install(self) -> None:
        tokenizer, text = self.tokenizer(), self.text_tower()
        denoiser = self.module("unet-average.pt", make_unet(), "unet")
        install_pipeline(self.assets / "emoji", denoiser, self.autoencoder(), text, tokenizer)
        scorer = self.module("clip-average.pt", make_clip(tokenizer), "clip")
        install_clip(self.assets / "emoji_clip", scorer, tokenizer)
        for name, animals in {"animals": PROTOCOL, "animals_held_out": HELD_OUT}.items():
            path = self.assets / "prompts" / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(prompt(animal) + "\n" for animal in animals))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-dir", type=Path, default=Path("build/emoji"), help="caches and checkpoints")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the result goes")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm-start", action="store_true", help="begin from the installed weights")
    for stage, minutes in MINUTES.items():
        parser.add_argument(f"--{stage}-minutes", type=float, default=minutes, help="in all, default %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "WORLD_SIZE" in os.environ:
        if arguments.stages != ["unet"]:
            parser.error("under torchrun only the unet stage runs: add --stages unet")
        torch.distributed.init_process_group("gloo")
    minutes = {stage: getattr(arguments, f"{stage}_minutes") for stage in MINUTES}
    build = Build(arguments.build_dir.resolve(), arguments.assets.resolve(), minutes)
    build.folder.mkdir(parents=True, exist_ok=True)
    if arguments.warm_start:
        build.warm_start()
    for stage in STAGES:
        if stage in arguments.stages:
            print(f"{time.strftime('%H:%M:%S')} {stage}", file=sys.stderr, flush=True)
            getattr(build, stage)()


if __name__ == "__main__":
    main()
