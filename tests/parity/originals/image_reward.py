"""Makes image_reward.json: what the package `image-reward` 1.5 scores with `tests.support.published.image_reward`.

    python tests/parity/originals/image_reward.py

Its networks and its procedure are run as they are; what is put into it are small sizes and a small vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.parity.originals.environment import inside, run_apart

PACKAGES = ["torch==2.13.0", "transformers==4.41.2", "timm==0.6.13", "numpy", "pillow", "setuptools<81"]
ALONE = ["torchvision==0.28.0", "fairscale==0.4.13", "--no-build-isolation", "image-reward==1.5"]


def main() -> None:
    import torch
    from PIL import Image

    torch.library.register_fake = lambda *a, **k: lambda f: f  # PyPI's torchvision has no operators on the CPU build
    where = Path(importlib.util.find_spec("ImageReward").origin).parent  # type: ignore[union-attr, arg-type]
    for name, folder in (("ImageReward", where), ("ImageReward.models", where / "models")):
        sys.modules[name] = types.ModuleType(name)  # without what training and the other scores need
        sys.modules[name].__path__ = [str(folder)]
    from ImageReward import ImageReward as original
    from ImageReward.models.BLIP import blip, blip_pretrain, vit
    from transformers import BertTokenizer

    from tests.support import published

    weights = published.image_reward()
    with tempfile.TemporaryDirectory() as directory:
        vocabulary = published.save_bert_vocabulary(Path(directory))
        blip.BertTokenizer = SimpleNamespace(from_pretrained=lambda name: BertTokenizer(str(vocabulary)))
        tiny = vit.VisionTransformer(img_size=64, patch_size=16, embed_dim=128, depth=2, num_heads=2)
        blip_pretrain.create_vit = lambda *arguments: (tiny, 128)
        settings = {
            "hidden_act": "gelu", "hidden_size": 64, "intermediate_size": 256, "layer_norm_eps": 1e-12,
            "max_position_embeddings": 40, "num_attention_heads": 1, "num_hidden_layers": 2, "pad_token_id": 0,
            "type_vocab_size": 2, "vocab_size": len(published.BERT_VOCABULARY) + 2, "add_cross_attention": True,
        }  # fmt: skip
        (Path(directory) / "med_config.json").write_text(json.dumps(settings))
        model = original.ImageReward(str(Path(directory) / "med_config.json"))
    model.mlp, model.preprocess = original.MLP(64), original._transform(64)
    model.load_state_dict(weights, strict=True)  # which shows that the layout is the package's own
    model.eval()
    scores = [
        [model.score(prompt, Image.fromarray(picture)) for prompt in published.PROMPTS]
        for picture in published.pictures()
    ]
    tokens = model.blip.tokenizer(published.PROMPTS, padding="max_length", truncation=True, max_length=35)
    found = {"sizes": published.SIZES, "scores": scores, "tokens": tokens.input_ids}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main() if inside() else run_apart(__file__, PACKAGES, ALONE)
