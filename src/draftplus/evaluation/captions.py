"""Which prompt belongs to which picture on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from draftplus.data.formats import TARS, kind_of
from draftplus.data.prompts import read_rows
from draftplus.errors import UserError
from draftplus.evaluation.stored import Stored

NAMES = ("file", "file_name", "image", "name", "key")  # fields that may hold a picture's name


@dataclass(frozen=True)
class Captioned:
    """Pictures with their prompts, as many of each. left_out: pictures that a file of prompts by name does not name."""

    pictures: list[Stored]
    prompts: list[str]
    left_out: list[Stored]


def captioned(
    pictures: Sequence[Stored], prompts: str | Path | None, column: str | None, prompt: str | None
) -> Captioned:
    """The prompt of each picture: `prompt`, or that of the file `prompts`, or of the text beside it.

    A file with a field of names gives each picture that it names its prompt; one without gives them in the order of the
    pictures. column: the field of its prompts.

    Raises UserError for pictures without a prompt, prompts without a picture, and where their numbers differ.
    """
    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts are both given; give one of them")
    if prompt is not None:
        return Captioned(list(pictures), [prompt] * len(pictures), [])
    if prompts is None:
        for picture in pictures:
            if picture.caption is None:
                raise UserError(
                    f"'{picture}' has no prompt: there is no .txt of its name beside it; give --prompts FILE or "
                    "--prompt 'a cat' (--prompt '' for rewards that look at the picture alone)"
                )
        return Captioned(list(pictures), [picture.caption or "" for picture in pictures], [])
    path = Path(prompts).expanduser()
    kind = kind_of(path)
    if not path.is_file() or kind is None or kind in TARS:
        raise UserError(f"--prompts '{prompts}': no such .txt, .jsonl, .json, .csv, .tsv or .parquet file")
    field = _field_of_names(path, kind)
    texts = [row.prompt for row in read_rows(path, column)]
    if field is None:
        if len(texts) != len(pictures):
            raise UserError(
                f"--prompts '{prompts}' has {len(texts)} prompts for {len(pictures)} pictures; give one for each, in "
                f"their order, or a .jsonl or .csv file whose field {NAMES[0]} names the picture"
            )
        return Captioned(list(pictures), texts, [])
    return _by_name(pictures, [row.prompt for row in read_rows(path, field)], texts, str(prompts))


def _by_name(pictures: Sequence[Stored], names: Sequence[str], texts: Sequence[str], source: str) -> Captioned:
    known: dict[str, str] = {}
    for name, text in zip(names, texts, strict=True):
        if known.setdefault(Path(name).as_posix(), text) != text:
            raise UserError(f"--prompts '{source}' has two prompts for '{name}'; remove one of them")
    there = {picture.name for picture in pictures}
    absent = [name for name in known if name not in there]
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UserError(
            f"--prompts '{source}' names '{absent[0]}'{more}, but there is no such picture; names are relative to the "
            "directory that is given, or of members of the tar"
        )
    chosen = [picture for picture in pictures if picture.name in known]
    return Captioned(
        chosen, [known[picture.name] for picture in chosen], [one for one in pictures if one.name not in known]
    )


def _field_of_names(path: Path, kind: str) -> str | None:
    """The field that holds the pictures' names, by the file's first row; None where it has none."""
    fields: list[str] = []
    with suppress(ValueError):  # a file that is no JSON, or no text, is refused where it is read
        if kind in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig") as file:
                fields = [name.strip().strip('"') for name in file.readline().split("\t" if kind == ".tsv" else ",")]
        elif kind == ".jsonl":
            with path.open(encoding="utf-8-sig") as file:
                first = next((line for line in file if line.strip()), "{}")
            fields = list(json.loads(first))
    return next((name for name in NAMES if name in fields), None)
