"""Makes the built-in prompt set `parti` from PartiPrompts.tsv (Yu et al. 2022, https://github.com/google-research/parti).

    python tools/parti.py PartiPrompts.tsv

Repeated prompts are left out, and a tenth is held out, as `draftplus data pack --held-out 0.1` does it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from draftplus.data.pack import PackRules, pack_prompts
from draftplus.data.prompts import load_prompts

PROMPTS = Path(__file__).parents[1] / "src" / "draftplus" / "assets" / "prompts"


def main(table: Path) -> None:
    # its quotes are text: they do not enclose cells
    lines = table.read_text(encoding="utf-8").splitlines()[1:]
    with tempfile.TemporaryDirectory() as directory:
        text, packed = Path(directory) / "parti.txt", Path(directory) / "packed"
        text.write_text("".join(line.split("\t")[0].strip() + "\n" for line in lines), encoding="utf-8")
        told = pack_prompts([text], packed, rules=PackRules(held_out=0.1))
        prompts = load_prompts(packed)
        for suffix, some in (("", prompts.train), ("_held_out", prompts.held_out)):
            (PROMPTS / f"parti{suffix}.txt").write_text("".join(f"{one}\n" for one in some), encoding="utf-8")
    print(f"{told['train']} to train on, {told['held_out']} held out; {told['dropped']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
