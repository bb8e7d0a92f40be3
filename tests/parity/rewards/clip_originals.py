"""Scores of the original packages for CLIP-shaped rewards. `make_clip.py` runs it in an environment that has them.

- HPSv2: the package `hpsv2` itself, its `score`, from a checkpoint file as its authors publish it.
- CLIP-H, PickScore: open_clip's network and tokenizer, the formulas of PickScore's model card; images as transformers'
  processor does it, which these two are published with: it differs from torchvision by a pixel where the crop's
  remainder is odd.
- aesthetic: open_clip's ViT with quick GELU, which is OpenAI's, and its preprocessing; the few lines of
  `simple_inference.py` in github.com/christophschuhmann/improved-aesthetic-predictor are written out here.
"""

from __future__ import annotations

import json
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from drawn import CLIP, PROMPTS, SIZES, pictures, weights


def without_what_is_not_needed() -> None:
    """Makes imports work: torchvision's compiled part is for another build of torch, the rest is never called."""
    register = torch.library.register_fake
    torch.library.register_fake = lambda op, *rest, **more: (  # type: ignore[assignment]
        (lambda function: function) if str(op).startswith("torchvision::") else register(op, *rest, **more)
    )
    for name in ("turtle", "clint", "clint.textui", "requests"):
        module: Any = types.ModuleType(name)
        module.forward = module.progress = module.textui = None
        sys.modules[name] = module


def drawn(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors for a network, by the names and shapes that it has itself."""
    return {name: torch.from_numpy(weights(name, tensor.shape)) for name, tensor in model.state_dict().items()}


def cases(score: Any) -> list[dict[str, Any]]:
    """score: (picture, prompt) to a number. The scores of each size's pictures with their prompts."""
    found = []
    for size in SIZES:
        pils = [Image.fromarray(picture) for picture in pictures(*size)]
        with torch.no_grad():
            scores = [float(score(pil, prompt)) for pil, prompt in zip(pils, PROMPTS, strict=True)]
        found.append({"size": size, "scores": scores})
    return found


def hpsv2_scores(directory: Path) -> tuple[list[dict[str, Any]], Any]:
    from hpsv2 import img_score
    from hpsv2.src.open_clip.model import CLIP as Network
    from hpsv2.src.open_clip.transform import image_transform

    network = Network(embed_dim=64, **CLIP, output_dict=True)
    torch.save({"state_dict": drawn(network)}, directory / "HPS_v2.1_compressed.pt")
    # what `initialize_model` would make at the published size
    img_score.model_dict["model"] = network
    img_score.model_dict["preprocess_val"] = image_transform(224, is_train=False, resize_longest_max=True)
    file = str(directory / "HPS_v2.1_compressed.pt")
    return cases(lambda pil, prompt: img_score.score(pil, prompt, cp=file)[0]), network


def published_names() -> dict[str, list[int]]:
    """Names and shapes of the tensors of HPSv2 at its true size; those of the first block stand for all."""
    from hpsv2.src.open_clip.model import CLIP as Network

    config = json.loads(
        (Path(sys.modules["hpsv2"].__file__).parent / "src/open_clip/model_configs/ViT-H-14.json").read_text()
    )
    with torch.device("meta"):
        network = Network(**config)
    names = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    return {name: shape for name, shape in names.items() if ".resblocks." not in name or ".resblocks.0." in name}


def open_clip_scores() -> dict[str, list[dict[str, Any]]]:
    import open_clip
    from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

    def crop(pil: Image.Image) -> Image.Image:
        left, top = ((side - 224) // 2 for side in pil.size)
        return pil.crop((left, top, left + 224, top + 224))

    network = open_clip.CLIP(embed_dim=64, **CLIP)
    network.load_state_dict({name: tensor.float() for name, tensor in drawn(network).items()})
    network.eval()
    normalize = Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    preprocess = Compose([Resize(224, InterpolationMode.BICUBIC), crop, ToTensor(), normalize])
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def cosine(pil: Image.Image, prompt: str) -> torch.Tensor:
        image = network.encode_image(preprocess(pil)[None], normalize=True)
        return (image * network.encode_text(tokenizer([prompt]), normalize=True)).sum()

    return {
        "clip_h": cases(lambda pil, prompt: 100 * cosine(pil, prompt).clamp(min=0)),
        "pickscore": cases(lambda pil, prompt: network.logit_scale.exp() * cosine(pil, prompt)),
    }


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip


def aesthetic_scores() -> tuple[list[dict[str, Any]], Any]:
    import open_clip
    from open_clip.transform import image_transform

    network = open_clip.CLIP(embed_dim=768, **CLIP, quick_gelu=True)
    network.load_state_dict({name: tensor.float() for name, tensor in drawn(network).items()})
    head = MLP()
    head.load_state_dict({name: tensor.float() for name, tensor in drawn(head).items()})
    network.eval(), head.eval()
    preprocess = image_transform(224, is_train=False)

    def score(pil: Image.Image, prompt: str) -> torch.Tensor:
        features = network.encode_image(preprocess(pil)[None])
        return head.layers(features / features.norm(dim=-1, keepdim=True))[0, 0]

    return cases(score), head


def main(directory: Path, target: Path) -> None:
    without_what_is_not_needed()
    hpsv2, network = hpsv2_scores(directory)
    aesthetic, head = aesthetic_scores()
    from hpsv2.src.open_clip.tokenizer import tokenize

    def shapes(model: nn.Module) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}

    packages = ("hpsv2", "open_clip_torch", "torch", "torchvision", "pillow")
    found = {
        "made with": {name: version(name) for name in packages},
        "names": {"clip": shapes(network), "aesthetic": shapes(head)},
        "published": published_names(),
        "tokens": [row[: row.argmax() + 1].tolist() for row in tokenize(PROMPTS)],  # up to the token that ends a text
        "scores": {"hpsv2": hpsv2, "aesthetic": aesthetic, **open_clip_scores()},
    }
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
