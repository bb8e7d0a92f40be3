"""What `draftplus evaluate` measures with: rewards, metrics, and the networks that metrics need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from draftplus.build import METRICS, build_features, build_metric, build_reward, build_styles
from draftplus.config import RewardConfig
from draftplus.distributed import pick_device
from draftplus.errors import UserError
from draftplus.evaluation.chunks import SAMPLING_BATCH
from draftplus.evaluation.images import Images, first_run
from draftplus.evaluation.scores import Rewards
from draftplus.evaluation.targets import Target
from draftplus.metrics.metric import Metric
from draftplus.models.families import MODELS
from draftplus.rewards.names import compares_images, is_reward


@dataclass(frozen=True)
class Instruments:
    """What measures images. features, styles: None if no metric needs them. described: the settings of each reward, and
    whether it was trained on."""

    rewards: Rewards
    metrics: Mapping[str, Metric]
    features: Callable[[Tensor], Tensor] | None
    styles: Callable[[Tensor, str], Tensor] | None
    described: Mapping[str, dict[str, Any]]
    device: torch.device
    batch_size: int

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(metric.needs for metric in self.metrics.values()))


def instruments_of(
    targets: Sequence[Target], which: Images, rewards: Sequence[str], metrics: Sequence[str], features: str | None
) -> Instruments:
    """The runs' rewards and those named in `rewards`; the metrics, by default LPIPS, and for the embedded model styles.

    Raises UserError for unknown names, and for metrics that cannot measure these images.
    """
    first = first_run(targets)
    device = pick_device(first.config.device)
    embedded = first.config.model.path in MODELS
    known = _reward_configs([t for t in targets if t.run is not None or (embedded and t is first)])
    known = {name: config for name, config in known.items() if not compares_images([name])}
    for name in [*rewards, *metrics]:
        if compares_images([name]):
            raise UserError(
                f"'{name}' scores a training batch, not an image; to measure diversity, use the metric vendi"
            )
    for name in rewards:
        if name in METRICS:
            raise UserError(f"reward '{name}': this is a metric; name it among the metrics instead")
    named = list(metrics) or ["lpips", *(["style_entropy", "style_divergence"] if embedded else [])]
    scorers = dict.fromkeys([*known, *rewards, *(name for name in named if name not in METRICS and is_reward(name))])
    chosen = {name: build_metric(name) for name in dict.fromkeys(named) if name not in scorers}
    for name, metric in chosen.items():
        if which.per_prompt < metric.least:
            raise UserError(
                f"metric '{name}' needs at least {metric.least} images of each prompt, got {which.per_prompt}; use "
                "more images per prompt, or other metrics"
            )
    needs = frozenset().union(*(metric.needs for metric in chosen.values()))
    if features is not None and "features" not in needs:
        raise UserError(f"features '{features}': no chosen metric uses features; add one, such as vendi")
    return Instruments(
        {name: build_reward(name, known.get(name, RewardConfig()), device) for name in scorers},
        chosen,
        build_features(features, device) if "features" in needs else None,
        build_styles(device) if "styles" in needs else None,
        {
            name: {**asdict(known.get(name, RewardConfig())), "trained": any(name in t.config.reward for t in targets)}
            for name in scorers
        },
        device,
        first.config.train.sampling_batch_size or SAMPLING_BATCH,
    )


def _reward_configs(targets: Sequence[Target]) -> dict[str, RewardConfig]:
    """The rewards that the targets train on and hold out, by name; their weights in the sum do not matter here."""
    known: dict[str, tuple[Target, RewardConfig]] = {}
    for target in targets:
        for name, config in {**target.config.reward, **target.config.eval.rewards}.items():
            scoring = {key: value for key, value in config.args.items() if key != "dropout"}  # it acts on gradients
            config = replace(config, args=scoring)
            first, other = known.setdefault(name, (target, config))
            if (config.path, config.args) != (other.path, other.args):
                raise UserError(
                    f"'{first.name}' and '{target.name}' have different settings for reward '{name}', so its scores "
                    "are not comparable; evaluate each one separately"
                )
    return {name: config for name, (_, config) in known.items()}
