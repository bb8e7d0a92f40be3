"""What a row of eval.jsonl and a target of eval.json say: every field is named, written and checked here.

A number that was not finite is null in the files, and None here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

REWARD = "reward/"  # before a reward's name, in the key of its mean

Number = float | None


def reward_key(name: str) -> str:
    """The key of a reward's mean."""
    return f"{REWARD}{name}"


def reward_names(keys: Iterable[str]) -> list[str]:
    """The names of the rewards among the keys, in order of appearance."""
    return list(dict.fromkeys(key.removeprefix(REWARD) for key in keys if key.startswith(REWARD)))


@dataclass(frozen=True)
class HeldOut:
    """What was measured on the held-out prompts. In a file of another hand, any of it may be absent.

    reward: the weighted sum of the trained rewards' means. rewards: by name, each one's mean. lpips: the mean over
    prompts of the mean distance of two images of a prompt. images: of all prompts together. seconds: that it took.
    per_image: by reward, the score of each image, a prompt's images next to one another, as many of each.
    lpips_per_prompt: by prompt, in the order of the images.
    """

    reward: Number = None
    rewards: Mapping[str, Number] = field(default_factory=dict)
    lpips: Number = None
    images: int | None = None
    seconds: Number = None
    per_image: Mapping[str, Sequence[Number]] = field(default_factory=dict)
    lpips_per_prompt: Mapping[str, Number] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        """The prompts, in the order of the images."""
        return list(self.lpips_per_prompt)

    def scores(self, name: str) -> list[list[Number]] | None:
        """A reward's scores of the images of each prompt; None where they were not recorded."""
        scores, prompts = list(self.per_image.get(name) or ()), len(self.lpips_per_prompt)
        if not scores or not prompts or len(scores) % prompts:
            return None
        n = len(scores) // prompts
        return [scores[start : start + n] for start in range(0, len(scores), n)]

    def row(self) -> dict[str, Any]:
        """Its part of a row of eval.jsonl."""
        told = {key: value for key, value in vars(self).items() if key != "rewards"}
        means = {reward_key(name): mean for name, mean in self.rewards.items()}
        return {"reward": told.pop("reward"), **means, **told}


HELD_OUT = frozenset(HeldOut.__dataclass_fields__) - {"rewards"}


@dataclass(frozen=True)
class VariantRow:
    """Another way to sample the trained model, one of `eval.variants`, and what came of it."""

    label: str | None
    lora_scale: float | None
    anneal: str | None
    checkpoint: int | None
    held_out: HeldOut


@dataclass(frozen=True)
class EvaluationRow:
    """A row of eval.jsonl: the evaluation of a step, 0 the base model. variants: of the last step only."""

    step: int
    held_out: HeldOut
    variants: tuple[VariantRow, ...] = ()


def evaluation_row(step: int, held_out: HeldOut) -> dict[str, Any]:
    """The row of eval.jsonl of a step."""
    return {"step": step, **held_out.row()}


def variant_row(label: str, variant: Mapping[str, Any], held_out: HeldOut) -> dict[str, Any]:
    """A variant's row, for the list `variants` of the last step's. variant: as `eval.variants` has it."""
    return {"label": label, **variant, **held_out.row()}


def read_held_out(row: Mapping[str, Any]) -> HeldOut:
    """What a row of eval.jsonl, or of a variant, says of its images. It must be well formed, as `ill_formed` tells."""
    told = {key: row[key] for key in HELD_OUT if row.get(key) is not None}
    return HeldOut(rewards={name: row[reward_key(name)] for name in reward_names(row)}, **told)


def read_evaluation(row: Mapping[str, Any]) -> EvaluationRow:
    """A row of eval.jsonl, which must be well formed."""
    variants = [
        VariantRow(
            one.get("label"), one.get("lora_scale"), one.get("anneal"), one.get("checkpoint"), read_held_out(one)
        )
        for one in row.get("variants") or ()
    ]
    return EvaluationRow(row["step"], read_held_out(row), tuple(variants))


def ill_formed(row: Mapping[str, Any]) -> list[str]:
    """The keys of a row of eval.jsonl whose values do not have the shape that a run gives them."""
    return [key for key, value in row.items() if not _is_well_formed(key, value)]


def _is_well_formed(key: str, value: Any) -> bool:
    if key == "per_image":
        return isinstance(value, dict) and all(isinstance(one, list) and are_numbers(one) for one in value.values())
    if key == "lpips_per_prompt":
        return isinstance(value, dict) and are_numbers(value.values())
    if key == "variants":
        return isinstance(value, list) and all(isinstance(one, dict) and _is_variant(one) for one in value)
    return are_numbers([value])


def _is_variant(row: Mapping[str, Any]) -> bool:
    texts = all(isinstance(row.get(key), (str, type(None))) for key in ("label", "anneal"))
    return texts and not ill_formed({key: value for key, value in row.items() if key not in ("label", "anneal")})


def are_numbers(values: Iterable[Any]) -> bool:
    """Whether all are numbers, or null in the place of one that was not finite."""
    return all(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values)


@dataclass(frozen=True)
class MetricRow:
    """A metric of a target: its mean over `images` images, with its standard error and 95% interval.

    change: the same of the paired difference from the base model, where there is one.
    """

    mean: Number
    standard_error: Number = None
    interval: Sequence[float] | None = None
    images: int | None = None
    change: MetricRow | None = None

    def row(self) -> dict[str, Any]:
        """Its part of eval.json."""
        told = {**vars(self), "interval": list(self.interval) if self.interval else None}
        change = told.pop("change")
        return told if change is None else {**told, "change": change.row()}


@dataclass(frozen=True)
class TargetRow:
    """A target of eval.json: what was evaluated, where it is from, and its numbers.

    run, step: None for a model, and for a step that is not known. gate: the fraction of the sampling steps that the
    base model drew (`objective.gate`); 0 where `anneal` says which draws. hash: of everything that decides its images.
    per_prompt: by metric, the value of each prompt. per_image: a list for each of prompt, seed, file and the rewards'
    keys, in the order of the images. pictures: their directory, beside eval.json.
    """

    target: str
    label: str
    run: str | None = None
    step: int | None = None
    lora_scale: float = 1.0
    anneal: str | None = None
    gate: float = 0.0
    hash: str = ""
    model_hash: str = ""
    adapter_hash: str | None = None
    metrics: Mapping[str, MetricRow] = field(default_factory=dict)
    per_prompt: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    per_image: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    pictures: str = ""

    def row(self) -> dict[str, Any]:
        """Its part of eval.json."""
        return {**vars(self), "metrics": {name: metric.row() for name, metric in self.metrics.items()}}


def read_target(told: Any) -> TargetRow:
    """A target of eval.json. Raises ValueError where it is not what `draftplus evaluate` writes."""
    if not isinstance(told, dict):
        raise ValueError("a target is an object")
    known = {key: told[key] for key in TargetRow.__dataclass_fields__ if key in told}
    texts = [told.get("target"), told.get("label", told.get("target"))]
    if not all(isinstance(text, str) for text in texts) or not isinstance(told.get("metrics"), dict):
        raise ValueError("a target has a name, a label and metrics")
    metrics = {name: _read_metric(metric) for name, metric in told["metrics"].items()}
    return TargetRow(**{**known, "label": texts[1], "metrics": metrics})


def _read_metric(told: Any) -> MetricRow:
    if not isinstance(told, dict) or "mean" not in told:
        raise ValueError("a metric has a mean")
    interval, change = told.get("interval"), told.get("change")
    if interval is not None and not (isinstance(interval, list) and len(interval) == 2):
        raise ValueError("an interval has two ends")
    if not are_numbers([told["mean"], told.get("standard_error"), told.get("images"), *(interval or ())]):
        raise ValueError("a metric is of numbers")
    if interval is not None and None in interval:
        interval = None
    return MetricRow(
        told["mean"], told.get("standard_error"), interval, told.get("images"),
        None if change is None else _read_metric(change),
    )  # fmt: skip
