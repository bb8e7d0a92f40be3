"""Training a reward on preference pairs, as a task of the driver."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from draftplus.build import quiet_libraries
from draftplus.config import RewardTrainConfig
from draftplus.data.batches import batch, check_batch_sizes, steps_of_epochs
from draftplus.data.pair_split import Split, evenly, is_tie, split_by_file, split_by_share, weights
from draftplus.data.pairs import Broken, Pairs, read_pairs
from draftplus.distributed import World
from draftplus.errors import UserError, needs_memory, notice
from draftplus.evaluation.chunks import chunks
from draftplus.progress import Advance, progress
from draftplus.rewards.preference import ClipPreference, load_preference, preference_loss
from draftplus.runs.directory import REWARDS, saved_steps, step_name
from draftplus.runs.files import remove, whole_directory, write_text
from draftplus.runs.inputs import same_reward_inputs
from draftplus.runs.journal import Row
from draftplus.runs.origin import write_origin
from draftplus.training.optim import Parameters
from draftplus.training.pair_pictures import PairPictures
from draftplus.training.placement import Placement
from draftplus.training.state import State
from draftplus.training.step import Metrics, backward
from draftplus.training.task import Abandonable
from draftplus.training.update import update
from draftplus.training.validation import Judged, gathered, numbers, reliability, worst

MOST_COUNTED = 100_000  # captions whose length is looked at before training
SIDE = 256  # of the pictures of pairs that are kept, at most


@dataclass(frozen=True)
class Preference:
    """The task. weights: of each pair to train on. pictures, validated: of the two sides of the split."""

    config: RewardTrainConfig
    model: ClipPreference
    split: Split
    weights: Mapping[int, float]
    pictures: PairPictures
    validated: PairPictures
    micro: int
    run: Path
    total: int
    here: World
    placement: Placement
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> Parameters:
        return self.model.trainable()

    def share(self, step: int) -> list[int]:
        """The pairs of this process's share of a step."""
        size = self.config.train.global_batch_size
        return batch(self.split.train_rows, step, self.config.seed, size, 1, self.here.rank, self.here.size).prompts

    def step(self, state: State, abandonable: Abandonable) -> dict[str, float]:
        with abandonable(), needs_memory(f"step {state.step + 1}, whose micro-batches have {self.micro} pairs"):
            metrics = self.accumulate(state.step)
            means = metrics.named(self.placement.reduce(list(self.parameters.values()), metrics.vector))
        means["accuracy"] = means["accuracy"] / decided if (decided := means.pop("decided")) else math.nan
        return {**means, "grad_norm": update(state, self.config.optim, means, False, "lower optim.lr")}

    def accumulate(self, step: int) -> Metrics:
        """Adds the gradient of this process's share of a step to the parameters. Returns its part of the means."""
        rows, size = self.share(step), self.config.train.global_batch_size
        self.pictures.ahead(rows)
        if step + 1 < self.total:
            self.pictures.ahead(self.share(step + 1))
        sums = torch.zeros(4, dtype=torch.float64)
        for part in chunks(len(rows), self.micro):
            pictures, places = self.pictures(rows[part])
            sums[3] += len(rows[part]) - len(places)
            if not places:
                continue
            chosen = [rows[part][place] for place in places]
            labels = torch.tensor([self.split.train.label(row) for row in chosen], device=self.here.device)
            weighed = torch.tensor([self.weights[row] for row in chosen], device=self.here.device)
            scores = self.model.scores(pictures, [self.split.train.caption(row) for row in chosen])
            loss = (weighed * preference_loss(scores, labels)).sum() / size
            backward(loss, part)
            judged = Judged(labels.cpu().double(), scores.detach().cpu().double())
            sums[0] += loss.detach().cpu().double()
            sums[1] += judged.points[~judged.ties].sum() / size
            sums[2] += float((~judged.ties).sum()) / size
        return Metrics(("loss", "accuracy", "decided", "broken"), sums)

    def note(self, row: Row) -> str:
        return f"loss {row['loss']:.4f}, accuracy {row['accuracy']:.1%}"

    def evaluate(self, step: int, advance: Advance) -> Row:
        began = time.perf_counter()
        places, judged = self.judge(lambda done, total: advance(step, f"validating {done}/{total} pairs"))
        if self.here.is_main:
            self._keep(step, places, judged)
        return {"step": step, **numbers(judged), "seconds": round(time.perf_counter() - began, 4)}

    @torch.no_grad()
    def judge(self, advance: Callable[[int, int], None]) -> tuple[list[int], Judged]:
        """Scores the pairs of validation, each process its share. Returns their indices, and what came of them.

        Raises UserError where none can be read.
        """
        pairs, chosen = self.split.validation, evenly(self.split.validation_rows, self.config.eval.max_pairs)
        own = chosen[self.here.rank :: self.here.size]
        rows = []
        for part in chunks(len(own), self.micro):
            advance(part.start, len(own))
            self.validated.ahead(own[part.stop : part.stop + self.micro])
            pictures, places = self.validated(own[part])
            if not places:
                continue
            read = [own[part][place] for place in places]
            scores = self.model.scores(pictures, [pairs.caption(row) for row in read]).cpu().tolist()
            rows += [(row, pairs.label(row), score) for row, score in zip(read, scores, strict=True)]
        parts = self.here.gather(rows)
        if not any(parts):
            raise UserError("none of the pairs of validation can be read; give others in data.validation")
        return gathered(parts)

    def _keep(self, step: int, places: Sequence[int], judged: Judged) -> None:
        """Writes the pairs that it gets most wrong, with their pictures, and how well its probabilities hold."""
        pairs, told = self.split.validation, []
        with whole_directory(self.run / "samples" / step_name(step)) as directory:
            for rank, at in enumerate(worst(judged, self.config.eval.worst)):
                files = [f"{rank:02}-{side}.png" for side in ("first", "second")]
                for file, picture in zip(files, pairs.pictures(places[at]), strict=True):
                    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
                    image.thumbnail((SIDE, SIDE))
                    image.save(directory / file)
                told.append(
                    {
                        "caption": pairs.caption(places[at]), "label_0": pairs.label(places[at]),
                        "probability_0": float(judged.probabilities[at]), "scores": judged.scores[at].tolist(),
                        "loss": float(judged.losses[at]), "files": files, "where": pairs.where(places[at]),
                    }
                )  # fmt: skip
            words = {"worst": told, "reliability": reliability(judged)}
            text = json.dumps(words, indent=1, ensure_ascii=False)
            (directory / "pairs.json").write_text(text, encoding="utf-8")

    def comparable(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows)

    def stop_reason(self, rows: Sequence[Row]) -> str | None:
        patience, by = self.config.stop.patience, self.config.stop.by
        best = best_row(rows, by)
        if rows and by == "loss" and not _is_number(rows[-1].get("loss")):
            return "the validation loss is not finite"
        if patience is None or best is None or len(rows) - 1 - rows.index(best) < patience:
            return None
        return (
            f"{patience} validations in a row were not better than that of step {best['step']}, with {by} "
            f"{best[by]:.4g}; stop.patience is {patience}"
        )

    def write_best(self, rows: Sequence[Row]) -> None:
        best = best_row([row for row in rows if row["step"] > 0], self.config.stop.by)
        if best is None:
            (self.run / "best.json").unlink(missing_ok=True)
            return
        how = "lowest" if self.config.stop.by == "loss" else "highest"
        rule = f"{how} {self.config.stop.by} on the validation pairs, over the evaluated steps"
        told = {"step": best["step"], "value": best[self.config.stop.by], "rule": rule}
        write_text(self.run / "best.json", json.dumps(told, indent=1))
        self._forget_worse(rows)

    def _forget_worse(self, rows: Sequence[Row]) -> None:
        """Removes weights that can be the best no more, whatever checkpoint the run is continued from."""
        first = min(saved_steps(self.run / "checkpoints"), default=0)
        before = best_row([row for row in rows if 0 < row["step"] <= first], self.config.stop.by)
        for step in saved_steps(self.run / REWARDS.each):
            if before is not None and step <= first and step != before["step"]:
                remove(self.run / REWARDS.each / step_name(step))

    def save(self, directory: Path | None) -> None:
        if directory is not None:
            self.model.save(directory)

    def before(self, evaluated: Sequence[int], step: int) -> None:
        if self.here.is_main:
            write_origin(self.run, self.config, self.inputs, step)

    def finish(self, step: int, advance: Advance) -> None:
        pass


def best_row(rows: Sequence[Row], by: str) -> Row | None:
    """The earliest of the best rows of eval.jsonl, by loss or accuracy; None where none has a number."""
    known = [row for row in rows if _is_number(row.get(by))]
    sign = 1 if by == "loss" else -1
    return min(known, key=lambda row: sign * row[by], default=None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def preference(config: RewardTrainConfig, run: Path, placement: Placement, here: World) -> Preference:
    """Builds the task of a configuration.

    Raises UserError for everything that is wrong with the configuration, the model or the pairs.
    """
    sizes = config.train
    micro = min(sizes.micro_batch_size, max(1, sizes.global_batch_size // here.size))
    check_batch_sizes(sizes.global_batch_size, micro, 1, here.size)
    with progress("reading pairs", None, here.is_main):
        split = read_split(config)
    quiet_libraries()
    with progress("loading the model", None, here.is_main):
        chosen = config.model
        model = load_preference(
            chosen.path, chosen.processor, chosen.revision, chosen.towers, chosen.logit_scale,
            chosen.gradient_checkpointing, here.device, precision=getattr(torch, chosen.dtype),
        )  # fmt: skip
    if here.is_main:
        _tell_of_long_captions(model, split.train)
    room = int(config.data.cache_gb * 1e9)
    broken = Broken(config.data.max_broken, "data.max_broken")
    # the pairs of validation are read again and again, those of training once in an epoch
    validated = PairPictures(split.validation, model.resizing, room // 4, broken)
    pictures = PairPictures(split.train, model.resizing, room - room // 4, broken)
    weighed = weights(split.train, split.train_rows, config.data.balance)
    total = sizes.steps
    if sizes.epochs is not None:
        total = steps_of_epochs(sizes.epochs, len(split.train_rows), sizes.global_batch_size)
    assert total is not None
    inputs = same_reward_inputs(config, run, split.train, split.validation, here)
    return Preference(config, model, split, weighed, pictures, validated, micro, run, total, here, placement, inputs)


def read_split(config: RewardTrainConfig) -> Split:
    """The pairs of a configuration, split. Raises UserError where there are none, or they cannot be split."""
    data = config.data
    if data.pairs is None:
        raise UserError("data.pairs is not set; name the pairs to train on: draftplus reward train PAIRS")
    pairs = read_pairs(data.pairs)
    if data.validation is not None:
        split = split_by_file(pairs, read_pairs(data.validation), data.split_by)
    else:
        split = split_by_share(pairs, data.held_out, data.split_by)
    if all(is_tie(pairs.label(row)) for row in split.train_rows):
        raise UserError(f"'{data.pairs}': all {len(split.train_rows)} pairs to train on are ties, which teach nothing")
    if all(is_tie(split.validation.label(row)) for row in split.validation_rows):
        raise UserError("all pairs of validation are ties, so that no accuracy can be measured; hold out others")
    return split


def _tell_of_long_captions(model: ClipPreference, pairs: Pairs) -> None:
    captions = list(dict.fromkeys(row.caption for row in pairs))[:MOST_COUNTED]
    many = model.too_long(captions)
    if many:
        notice(
            f"{many} of {len(captions)} captions are longer than the {model.length} tokens that the text encoder "
            "reads; their ends have no effect"
        )
