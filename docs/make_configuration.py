"""Writes docs/configuration.md from the configuration's dataclasses: `make docs`. A test holds the page current."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from draftplus.config import CHANGEABLE, RewardTrainConfig, all_keys, facts_of
from draftplus.config.schema import RewardConfig

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

<!-- Written by docs/make_configuration.py from src/draftplus/config/schema.py: `make docs` -->

A run's configuration comes from three places; later ones override earlier ones:

1. the defaults below;
2. a recipe: a built-in name (`draftplus train demo`) or a YAML file (`draftplus train my.yaml`);
3. `key=value` on the command line (`draftplus train demo optim.lr=3e-4 train.steps=200`).

A recipe contains only what differs from the defaults, in nested form. It can build on another recipe with `extends`:

```yaml
extends: emoji
objective: {method: draft, grad_steps: 3, kl_coeff: 0.2}
train: {steps: 200}
```

Where a key's value is text, `key=value` takes it literally, whatever YAML would make of it: `name=007`,
`sampler.negative_prompt=no`, `'sampler.negative_prompt=[deformed | disfigured], poorly drawn # really'`. Two things are
special: `null` means none, and text that is as a whole in quotes is what stands between them, so that
`'sampler.negative_prompt="null"'` is the word. All other values are read as YAML: numbers, lists, mappings, a reward's
`args`. In a YAML file a word that YAML takes for something else (`no`, `on`, `1e5`, `007`) is refused for a key that
is text, with the advice to put it in quotes. `config.yaml` of a run keeps every text as it was.

References such as `${oc.env:NAME}` are not resolved, because the files of a run would keep what they stand for: they
are refused, and `\\${` writes the text `${` in a YAML file. Give such a value on the command line, where the shell
resolves `$NAME`; what a configuration says is in `config.yaml` and in the report, so a secret does not belong there.
The name of a recipe ends in `.yaml` or `.yml`.

For an unknown key, the command stops with one line that names the nearest valid key; for a value of the wrong type,
with one line that names the key. `draftplus train ... --dry-run` prints the resolved configuration and stops. Every run
directory contains its complete configuration in `config.yaml`. This file is itself a recipe, so
`draftplus train runs/demo/config.yaml name=again` repeats the run.

`reward` and `eval.rewards` are mappings from a reward's name to its settings. `reward.pickscore.weight=2` changes one
setting; `reward=pickscore` replaces the whole mapping. `model.lora=null` means full fine-tuning of the denoiser.
"""

CONTINUING = """\
## Continuing a run

To continue an unfinished run, repeat the same command or use `draftplus train RUN`. Most keys affect the course of
training: if one of these has changed, the command stops and names it. Only the following keys, and all keys below them,
may change when a run continues:

{keys}

The same holds for the content of what they name: prompts, model files, a reward's code and weights. They may be moved,
but not changed; `origin.json` in the run directory holds what they were. In `config.yaml` paths are whole, so that a
run can be continued from any directory. Settings are changed by `key=value` on the command line: if the file itself was
edited, that is told, and only the keys above are taken from it. `draftplus train RUN name=other` starts a new run with
the settings of RUN, and then any key may change.
"""

REWARD = """\
## Training a reward

`draftplus reward train` has keys of its own; see [training a reward](reward_training.md). Its recipes and runs are told
from those of fine-tuning by the key `task`.

| key | default | meaning |
|---|---|---|"""

NOTES = {
    "model": "See [models](models.md).",
    "sampler": "How images are sampled: in training, in evaluation and in `draftplus generate`.",
    "objective": "What is optimised; see [concepts](concepts.md).",
    "reward": "Settings of each reward, under its name; see [rewards](rewards.md).",
    "data": "Which files can be read: see [prompts](prompts.md).",
    "train": "The length of the run is set by `steps` or `epochs`; if both are given, `epochs` counts.",
    "eval": "Evaluation uses prompts and seeds that are never used in training.",
    "log": "TensorBoard writes to `tensorboard/` in the run directory; the other two need the extra of the same name.",
}


def page() -> str:
    """The whole page as Markdown."""
    rows: dict[str, list[str]] = {}
    for key, field in all_keys():
        if key == "reward":
            rows["reward"] = [_row(f"reward.<name>.{f.name}", f) for f in dataclasses.fields(RewardConfig)]
        else:
            rows.setdefault(key.partition(".")[0] if "." in key else "The run", []).append(_row(key, field))
    parts = [INTRODUCTION]
    for section, told in rows.items():
        note = [NOTES[section], ""] if section in NOTES else []
        parts.append("\n".join([f"## {section}", "", *note, "| key | default | meaning |", "|---|---|---|", *told, ""]))
    told = [_row(key, field) for key, field in all_keys(RewardTrainConfig)]
    parts.append("\n".join([REWARD, *told, ""]))
    parts.append(CONTINUING.format(keys="\n".join(f"- `{key}`" for key in CHANGEABLE)))
    return "\n".join(parts)


def _row(key: str, field: dataclasses.Field) -> str:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    meaning = facts_of(field).meaning.replace("|", "\\|").replace("<", "&lt;")
    return f"| `{key}` | `{json.dumps(default, ensure_ascii=False)}` | {meaning} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
