"""Makes hpsv3.json: what the package `hpsv3` 1.0.0 scores with `tests.support.published.hpsv3`.

    python tests/parity/originals/hpsv3.py

Its network, its preparation of pictures and prompts and its loading are run as they are, with the transformers that it
asks for. What is put in are a small Qwen2-VL, its tokenizer, and for most scores the arithmetic: `scores` are computed
in float32, from weights and positions that the package has rounded to bfloat16; `bfloat16` as it does itself.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.parity.originals.environment import inside, run_apart

PACKAGES = ["torch==2.13.0", "transformers==4.45.2", "numpy", "pillow", "requests"]
ALONE = ["torchvision==0.28.0", "hpsv3==1.0.0"]
# what training alone needs
UNUSED = {
    "matplotlib": [], "matplotlib.pyplot": [], "matplotlib.patches": [], "pandas": [], "fire": [], "datasets": [],
    "torch.utils.tensorboard": ["SummaryWriter"], "peft": ["PeftModel", "LoraConfig", "get_peft_model"],
    "trl": ["RewardTrainer", "get_kbit_device_map", "get_quantization_config"], "omegaconf": ["OmegaConf"],
    "hpsv3.dataset.pairwise_dataset": ["PairwiseOriginalDataset"],
    "hpsv3.utils.parser": ["ModelConfig", "PEFTLoraConfig", "TrainingConfig", "DataConfig", "parse_args_with_yaml"],
    "hpsv3.utils.training_utils": [
        "get_peft_state_non_lora_maybe_zero_3", "load_model_from_checkpoint", "find_target_linear_names",
    ],
}  # fmt: skip


def main() -> None:
    sys.path.remove(str(Path(__file__).parent))  # where this file would be the package
    import torch

    torch.library.register_fake = lambda *a, **k: lambda f: f  # PyPI's torchvision has no operators on the CPU build
    from PIL import Image
    from transformers import Qwen2TokenizerFast, Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor

    from tests.support import published

    importlib.import_module("transformers.trainer")  # which looks for them
    importlib.import_module("transformers.models.qwen2_vl.modeling_qwen2_vl")
    for name, contents in UNUSED.items():
        module: Any = types.ModuleType(name)
        for one in contents:
            setattr(module, one, type(one, (), {}))
        sys.modules[name] = module
    sys.modules["trl"].get_quantization_config = lambda config: None  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as directory:
        published.save_hpsv3(Path(directory))
        tokenizer = Qwen2TokenizerFast.from_pretrained(directory, padding_side="right")
        processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=published.QWEN2_VL_CHAT)
        from hpsv3 import inference, train

        train.AutoProcessor = SimpleNamespace(from_pretrained=lambda *a, **k: processor)

        original = train.Qwen2VLRewardModelBT
        tiny = Qwen2VLConfig(**json.loads((Path(directory) / "config.json").read_text()))
        train.Qwen2VLRewardModelBT = SimpleNamespace(
            from_pretrained=lambda name, revision, device_map, quantization_config, use_cache, torch_dtype,
            attn_implementation, cache_dir, **head: original(tiny, **head)
        )  # fmt: skip
        # the published configuration, whose reader needs trl
        settings = {
            "model_name_or_path": "", "torch_dtype": "bfloat16", "model_revision": "main", "use_special_tokens": True,
            "reward_token": "special", "output_dim": 2, "rm_head_type": "ranknet", "rm_head_kwargs": None,
        }  # fmt: skip
        told = (
            SimpleNamespace(),
            SimpleNamespace(output_dir="", bf16=True, fp16=False, disable_flash_attn2=False),
            SimpleNamespace(**settings),
            SimpleNamespace(lora_enable=False),
        )
        inference.parse_args_with_yaml = lambda *a, **k: (told, "HPSv3_7B.yaml")
        file = str(Path(directory) / "HPSv3.safetensors")
        model = inference.HPSv3RewardInferencer(checkpoint_path=file, device="cpu")  # strict: the layout is its own

    def scores() -> list[list[float]]:
        found = []
        for picture in published.hpsv3_pictures():
            pil = [Image.fromarray(picture)] * len(published.HPSV3_PROMPTS)
            with torch.no_grad():
                found.append([score[0].item() for score in model.reward(pil, published.HPSV3_PROMPTS)])
        return found

    # what autocast to float32, which the package asks for, does on a GPU and does not on a CPU
    model.model.rm_head.register_forward_pre_hook(lambda head, inputs: (inputs[0].float(),))
    rounded = scores()
    model.model.float()
    model.model.visual.rotary_pos_emb.bfloat16()
    exact = scores()
    picture = Image.fromarray(published.hpsv3_pictures()[0])
    batch = model.prepare_batch([picture], published.HPSV3_PROMPTS[:1])
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _said(inference)}]}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    found = {
        "sizes": published.HPSV3_SIZES,
        "scores": exact,
        "bfloat16": rounded,
        "text": text,
        "tokens": batch["input_ids"][0].tolist(),
        "grids": [model.prepare_batch([Image.fromarray(one)], [""])["image_grid_thw"][0].tolist()
                  for one in published.hpsv3_pictures()],
        "pixels": batch["pixel_values"][::97, ::101].tolist(),
        "names": {name: [list(one.shape), str(one.dtype)] for name, one in _as_authors_cast(model).items()},
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def _said(inference: Any) -> str:
    return inference.INSTRUCTION + inference.prompt_with_special_token


def _as_authors_cast(model: Any) -> Any:
    import torch

    network = model.model.to(torch.bfloat16)
    network.rm_head.to(torch.float32)
    return network.state_dict()


if __name__ == "__main__":
    main() if inside() else run_apart(__file__, PACKAGES, ALONE)
