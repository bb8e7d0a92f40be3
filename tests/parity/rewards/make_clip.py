"""Runs the original packages of CLIP-shaped rewards, in an environment of their own, and keeps their scores.

    python tests/parity/rewards/make_clip.py [DIRECTORY]     writes clip.json beside this file; some minutes, 1.5 GB

DIRECTORY: where the environment is made; a temporary one, if not given. `hpsv2` 1.2.0 asks for packages of 2022, and
lacks a vocabulary that its code reads, so it is installed without them and the vocabulary taken from open_clip, whose
file it is. No weights are downloaded: all are drawn, by `drawn.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
PLAIN = ["torch==2.13.0", "numpy", "pillow", "regex", "ftfy", "tqdm", "safetensors", "huggingface_hub"]
ALONE = ["torchvision==0.28.0", "open_clip_torch==3.3.0", "timm==1.0.31", "hpsv2==1.2.0"]  # without what they ask for
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


def main(directory: Path) -> None:
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PLAIN], check=True)
    subprocess.run([*pip, "--no-deps", *ALONE], check=True)
    packages = next((directory / "lib").glob("python*/site-packages"))
    shutil.copy(packages / "open_clip" / VOCABULARY, packages / "hpsv2" / "src" / "open_clip")
    subprocess.run([str(python), str(HERE / "clip_originals.py"), str(directory), str(HERE / "clip.json")], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
