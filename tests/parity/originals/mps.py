"""Makes mps.json: what the package `imscore` 0.0.11 scores with `tests.support.published.mps`.

    python tests/parity/originals/mps.py

MPS was published as a repository, not as a package; imscore has its network and its score, and differs in that it
scores pictures, not pairs. Pictures and prompts are prepared as in the authors' README, by transformers' processor and
tokenizer. What is put in are small sizes; and rounding to half precision is left out, since ours computes in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.parity.originals.environment import ROOT, inside, run_apart

PACKAGES = ["torch==2.13.0", "transformers==4.49.0", "einops", "numpy", "pillow"]
ALONE = ["torchvision==0.28.0", "imscore==0.0.11"]


def main() -> None:
    import torch
    from PIL import Image

    torch.library.register_fake = lambda *a, **k: lambda f: f  # PyPI's torchvision has no operators on the CPU build
    from imscore.mps import model as original
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPTokenizerFast

    from tests.support import published

    tokenizer = CLIPTokenizerFast.from_pretrained(ROOT / "src" / "draftplus" / "assets" / "emoji_clip")
    tokenizer.model_max_length = 77
    torch.Tensor.half = torch.Tensor.float
    original.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *a, **k: tokenizer)
    network, cross = original.XCLIPModel(CLIPConfig(**published.MPS_CONFIG)), original.CrossModel
    original.XCLIPModel = SimpleNamespace(from_pretrained=lambda name: network)
    original.CrossModel = lambda **k: cross(dim=128, layer_num=2, heads=2)
    model = original.MPS()
    model.load_state_dict(published.mps(), strict=True)  # which shows that the layout is the package's own
    model.eval()
    processor = CLIPImageProcessor(**published.MPS_PREPROCESSING)
    condition = model._tokenize(model.condition)
    scores: list[list[float]] = []
    for picture in published.pictures():
        pixels = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
        scores.append([])
        for prompt in published.PROMPTS:
            with torch.no_grad():
                text, seen = (one[0] for one in model.mps(model._tokenize([prompt]), pixels, condition))
                scores[-1].append(float(model.mps.logit_scale.exp() * torch.cosine_similarity(text, seen, dim=0)))
    found = {
        "sizes": published.SIZES,
        "scores": scores,
        "tokens": model._tokenize(published.PROMPTS).tolist(),
        "condition": model.condition,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main() if inside() else run_apart(__file__, PACKAGES, ALONE)
