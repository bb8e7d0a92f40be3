"""Preference pairs: two pictures of a caption, and how often each is preferred.

Captions and labels are in memory; pictures stay where they are and are read one by one, in any order. Those of
compressed archives cannot be read at a place, so they are copied once to a temporary file (in `TMPDIR`) that is gone
with the process.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from draftplus.data.formats import short
from draftplus.data.pair_formats import READERS, WORDS, kind_of
from draftplus.data.pictures import decode
from draftplus.data.places import Copies, Place
from draftplus.data.prompts import expanded, matching
from draftplus.errors import UserError, notice

ROUNDING = 1e-3  # by which two labels may miss the sum of one
_KNOWN = "a .parquet, .jsonl or .tar file of pairs, a directory of these, or a pattern such as 'pairs/*.parquet'"


class _Pair(NamedTuple):
    caption: str
    label: float
    pictures: tuple[Place, Place]
    where: str

    @property
    def told(self) -> tuple[object, ...]:
        """What it is without its pictures."""
        return self.caption, self.label


@dataclass
class Pairs(Sequence[_Pair]):
    """Pairs by index. unlabelled: how many rows said by `has_label` that they have no label, and were left out."""

    rows: list[_Pair]
    unlabelled: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def caption(self, index: int) -> str:
        """The caption of a pair."""
        return self.rows[index].caption

    def label(self, index: int) -> float:
        """How much the first picture is preferred, in [0, 1]; 0.5 is a tie, NaN where it is not known. The second's is
        the rest of 1."""
        return self.rows[index].label

    def where(self, index: int) -> str:
        """The file and the row, line or member of a pair."""
        return self.rows[index].where

    def bytes_of(self, index: int) -> tuple[bytes, bytes]:
        """The two pictures' files. Raises Undecodable where one is missing."""
        first, second = (place.read() for place in self.rows[index].pictures)
        return first, second

    def places(self) -> list[Place]:
        """Where all pictures are, those of one pair after those of another."""
        return [place for row in self.rows for place in row.pictures]

    def pictures(self, index: int) -> tuple[Tensor, Tensor]:
        """Both pictures, each (3, H, W) uint8 RGB. Raises Undecodable where one does not decode."""
        first, second = (decode(data) for data in self.bytes_of(index))
        return first, second


@dataclass
class Broken:
    """Pairs that are left out because a picture does not decode: each told once; too many are a mistake.

    key: the setting of `limit`, for the message.
    """

    limit: int
    key: str
    found: dict[str, str] = field(default_factory=dict)

    def add(self, where: str, reason: str) -> None:
        """Takes note of one. Raises UserError where there are more than the limit."""
        if where in self.found:
            return
        self.found[where] = reason
        if len(self.found) > self.limit:
            first = "; ".join(f"{place}: {why}" for place, why in list(self.found.items())[:2])
            raise UserError(
                f"{len(self.found)} pairs have a picture that cannot be read, more than {self.key}={self.limit} "
                f"allows: {first}.\nRepair or remove them, or raise {self.key}"
            )
        notice(f"{where}: a picture cannot be read ({reason}), so the pair is left out")


def read_pairs(source: str | Path, labelled: bool = True) -> Pairs:
    """The pairs of files: a file, all of a directory, or those that a pattern or range names.

    labelled: whether each must have a label; else those that have none are kept, with NaN.

    - .parquet, with the columns jpg_0 and jpg_1 (encoded pictures), label_0, label_1 and caption, as in Pick-a-Pic;
      rows whose has_label is false are left out.
    - .jsonl: one such object per line, where jpg_0 and jpg_1 name files below the .jsonl's own directory.
    - .tar, also compressed up to some gigabytes: WebDataset, of each sample KEY.0.jpg and KEY.1.jpg (or .png, .webp),
      and KEY.json with label_0, label_1 and caption.

    Raises UserError for a source that is missing, empty or damaged, labels that do not sum to one, a column or member
    that is absent, and a file outside of the directory. Whether a picture decodes is seen when it is read.
    """
    pairs, copies, captions = Pairs([]), Copies(), dict[str, str]()
    for path in pair_files(source):
        kind = kind_of(path)
        if kind is None or not path.is_file():
            raise UserError(f"cannot read pairs from '{path}': give {_KNOWN}.")
        before = len(pairs)
        for fields, pictures, where in READERS[kind](path, copies, labelled):
            if fields.get("has_label") is False and labelled:
                pairs.unlabelled += 1
                continue
            caption = _caption(fields, where)
            caption = captions.setdefault(caption, caption)  # one string, where many pairs have it
            pairs.rows.append(_Pair(caption, _label(fields, where, labelled), pictures, where))
        if len(pairs) == before:
            left_out = f", and {pairs.unlabelled} rows without a label" if pairs.unlabelled else ""
            raise UserError(f"'{path}' has no pairs{left_out}: it needs at least one.")
    return pairs


def pair_files(source: str | Path) -> list[Path]:
    """The files that a source names, in order. Raises UserError where there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if kind_of(one) and not one.name.startswith("."))
        if not files:
            raise UserError(f"pairs '{source}' is a directory without pairs: give {_KNOWN}.")
        return files
    if path.exists():
        return [path]
    files = [one for name in expanded(str(path)) for one in matching(name)]
    absent = [one for one in files if not one.exists()]
    if not files or absent:
        raise UserError(f"no file of pairs '{absent[0] if absent else source}': give {_KNOWN}.")
    return files


def caption_key(caption: str) -> str:
    """The caption without differences in case, punctuation, white space and spelling of characters (Unicode NFKC)."""
    plain = unicodedata.normalize("NFKC", caption).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split()) or plain.strip()


def _caption(fields: Mapping[str, Any], where: str) -> str:
    caption = fields["caption"]
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"{where}: caption is {short(caption)}; it must be a string that is not empty.")
    return caption.strip()


def _label(fields: Mapping[str, Any], where: str, labelled: bool) -> float:
    labels: list[Any] = [fields.get(name) for name in WORDS[:2]]
    if not labelled and (labels == [None, None] or fields.get("has_label") is False):
        return math.nan
    for name, label in zip(WORDS, labels, strict=False):
        if isinstance(label, bool) or not isinstance(label, (int, float)) or not 0 <= label <= 1:
            raise UserError(f"{where}: {name} is {short(label)}; it must be a number from 0 to 1.")
    total = math.fsum(labels)
    if abs(total - 1) > ROUNDING:
        raise UserError(
            f"{where}: label_0 {labels[0]:g} and label_1 {labels[1]:g} sum to {total:g}; they must sum to 1, a tie is "
            "0.5 and 0.5."
        )
    return labels[0] / total
