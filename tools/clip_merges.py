"""Makes assets/configs/clip_merges.txt.gz of the file bpe_simple_vocab_16e6.txt.gz in the package open_clip_torch.

pip download --no-deps open_clip_torch && unzip open_clip_torch-*.whl
python tools/clip_merges.py open_clip/bpe_simple_vocab_16e6.txt.gz
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

TARGET = Path(__file__).parents[1] / "src" / "draftplus" / "assets" / "configs" / "clip_merges.txt.gz"
USED = 49408 - 2 * 256 - 2  # CLIP's vocabulary without letters, with and without the end of a word, and two markers

if __name__ == "__main__":
    lines = gzip.decompress(Path(sys.argv[1]).read_bytes()).decode("utf-8").split("\n")
    text = "\n".join([*lines[1 : 1 + USED], ""])  # the first line is a heading
    TARGET.write_bytes(gzip.compress(text.encode("utf-8"), 9, mtime=0))
