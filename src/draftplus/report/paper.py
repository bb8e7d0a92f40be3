"""Figures as files: PNG and SVG, in which every letter can be read."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

SVG_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
OURS = re.compile(r"(\d+-)?(trade-off|diversity-kl|reward-kl|training-|same-seed-|base-against-tuned).*\.(png|svg)")

# families with letters that matplotlib's own DejaVu Sans lacks, the best first; those that are installed are used
FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "PingFang SC", "Hiragino Sans", "Heiti TC", "Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic",
    "Droid Sans Fallback", "Arial Unicode MS", "Noto Sans", "Noto Sans Arabic", "Noto Sans Hebrew",
    "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Segoe UI Symbol", "Symbola", "Unifont",
)  # fmt: skip


@lru_cache(maxsize=1)
def families() -> list[str]:
    """The fonts of a figure, in the order in which a letter is looked for."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["sans-serif", *(name for name in FALLBACKS if name in installed)]


@lru_cache(maxsize=1)
def _letters() -> frozenset[int]:
    paths = [font_manager.findfont(font_manager.FontProperties(family=[name])) for name in families()]
    return frozenset(code for path in paths for code in font_manager.get_font(path).get_charmap())


def legible(text: str) -> str:
    """The text with letters that no font here has written as \\u4e00, which says more than a box."""
    return "".join(
        one if ord(one) in _letters() or one == "\n" else one.encode("ascii", "backslashreplace").decode()
        for one in text
    )


def save(figure: Figure, directory: Path, name: str, dpi: float) -> list[Path]:
    """Writes a figure as PNG and SVG, and returns the paths. The letters of the SVG are its reader's."""
    paths = [directory / f"{name}.{kind}" for kind in ("png", "svg")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(paths[1], metadata=SVG_METADATA)
    for text in figure.findobj(Text):
        text.set_text(legible(text.get_text()))
    figure.savefig(paths[0], dpi=dpi)
    return paths


def remove_stale(directory: Path, written: list[Path]) -> None:
    """Removes the figures of an earlier report that this one does not have; other files stay."""
    for path in directory.iterdir():
        if OURS.fullmatch(path.name) and path not in written:
            path.unlink()
