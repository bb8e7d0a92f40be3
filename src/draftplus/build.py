"""Names to objects: the one place where a configuration's names resolve.

A new metric is one file and one line here; the lines of rewards are in `rewards.names`, those of models in
`models.families`, which are known without torch. A user's own reward is named as `package.module:object`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from draftplus.config import Config, ModelConfig, RewardConfig, SamplerConfig, nearest
from draftplus.config.objective import DdpoConfig
from draftplus.diffusion.methods import METHODS, check_method, check_windows, gated_steps
from draftplus.diffusion.problem import Problem
from draftplus.diffusion.regularisers import check_space
from draftplus.diffusion.sampler import Sampler
from draftplus.diffusion.schedule import make_schedule
from draftplus.diffusion.solvers import make_solver, random_steps
from draftplus.distributed import move
from draftplus.errors import UserError
from draftplus.metrics.metric import Metric
from draftplus.metrics.styles import style_captions
from draftplus.models.families import family_of, model_path
from draftplus.rewards.arguments import bind, parameters_of
from draftplus.rewards.clip import EMOJI_CLIP, load_clip_reward
from draftplus.rewards.combined import Combined, Scale
from draftplus.rewards.custom import load_custom
from draftplus.rewards.names import REWARDS as REWARDS
from draftplus.rewards.names import refuse_unknown_reward, resolved
from draftplus.rewards.names import reward_loader as reward_loader
from draftplus.rewards.offloaded import networks_of
from draftplus.types import Model, Reward

METRICS = {
    "lpips": "draftplus.metrics.metric:LPIPS",
    "vendi": "draftplus.metrics.metric:VENDI",
    "precision": "draftplus.metrics.metric:PRECISION",
    "recall": "draftplus.metrics.metric:RECALL",
    "coverage": "draftplus.metrics.metric:COVERAGE",
    "drift": "draftplus.metrics.metric:DRIFT",
    "style_entropy": "draftplus.metrics.metric:STYLE_ENTROPY",
    "style_count": "draftplus.metrics.metric:STYLE_COUNT",
    "style_divergence": "draftplus.metrics.metric:STYLE_DIVERGENCE",
}


def quiet_libraries() -> None:
    """Silences progress bars and advice of the model libraries that mean nothing to our users."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it names every kernel that this machine has not


def build_model(
    config: ModelConfig, device: torch.device, seed: int = 0, trainable: bool = True,
    denoiser_on: torch.device | None = None,
) -> Model:  # fmt: skip
    """The model of a built-in name, directory, hub id or single file. denoiser_on: where its denoiser is; None: there.

    Raises UserError for a model that is missing or of a family without an adapter.
    """
    load = resolved(family_of(config).load)
    apart = {} if denoiser_on is None else {"denoiser_on": denoiser_on}
    model: Model = load(config, model_path(config), device, seed=seed, trainable=trainable, **apart)
    return model


def build_reward(name: str, config: RewardConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Reward:
    """The reward of a built-in name, or a user's `package.module:object`.

    Raises UserError for an unknown name (naming the nearest), arguments that do not fit, or weights that are missing.
    """
    refuse_unknown_reward(name)
    if name not in REWARDS:
        return load_custom(name, config.path, config.args, device, dtype)
    load = resolved(REWARDS[name])
    reward: Reward = load(**bind(name, parameters_of(name, load), config.path, config.args, device, dtype))
    return reward


def build_rewards(
    configs: Mapping[str, RewardConfig], device: torch.device, loads_on: torch.device | None = None,
    place: Callable[[Reward], None] = lambda reward: None,
) -> dict[str, Reward]:  # fmt: skip
    """The rewards of a mapping of names. loads_on: where the networks of built-in ones are until `place` was called,
    one reward after the other; None: on the device."""
    made: dict[str, Reward] = {}
    for name, config in configs.items():
        elsewhere = loads_on if name in REWARDS else None  # a user's own may hold networks that are not found
        made[name] = build_reward(name, config, elsewhere or device)
        place(made[name])
        for network in networks_of(made[name]) if elsewhere else ():
            move(network, device)
    return made


def build_metric(name: str) -> Metric:
    """The metric of a name.

    Raises UserError for an unknown one, naming the nearest metric or reward.
    """
    if name not in METRICS:
        near = nearest(name, [*METRICS, *REWARDS])
        raise UserError(
            f"unknown metric '{name}'; {near + ' Choose' if near else 'choose'} one of: {', '.join(METRICS)}, or any "
            "reward"
        )
    metric: Metric = resolved(METRICS[name])
    return metric


def build_features(path: str | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """(b, 3, H, W) images in [0, 1] -> (b, d) features of unit length, of a transformers `CLIPModel` (None: the
    embedded one), preprocessed as its checkpoint says.

    Raises UserError if it is missing or of another architecture.
    """
    clip = load_clip_reward(path or EMOJI_CLIP, device=device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return clip.image_features(images.to(device)).float().cpu()

    return features


def build_styles(device: torch.device) -> Callable[[Tensor, str], Tensor]:
    """(b, 3, H, W) images of a prompt -> (b, 7) probabilities of the embedded model's styles, by the embedded CLIP.

    Zero-shot (Radford et al. 2021): the softmax of exp(logit_scale)·cos with "<prompt> in <style> style".
    """
    clip = load_clip_reward(EMOJI_CLIP, device=device)

    @torch.no_grad()
    def styles(images: Tensor, prompt: str) -> Tensor:
        logits = clip.logits(images.to(device), style_captions(prompt))  # (b, 7)
        return logits.softmax(1).cpu()

    return styles


def build_sampler(model: Model, config: SamplerConfig, ddpo: DdpoConfig | None = None) -> Sampler:
    """How a configuration samples a model, with the gate of its weights. ddpo: for its rollouts, which have a noise
    setting of their own.

    Raises UserError if the settings do not fit the model.
    """
    if config.steps is None or config.guidance_scale is None:
        raise ValueError("the sampler's settings depend on the model: pass the configuration through runs.plan.settled")
    model.check(config)
    config_of = model.scheduler(model.latent_shape(config.height, config.width), config.steps)
    schedule, name = make_schedule(config_of, config.steps, config.solver, config.spacing, config.sigmas)
    solver, eta, gate = make_solver(name, config.eta), config.eta, gated_steps(model.tuned.gate, len(schedule))
    if ddpo is not None:
        if schedule.prediction == "flow":
            raise UserError(
                "objective.method=ddpo samples with DDIM, but this is a flow-matching model; use another method"
            )
        solver, eta = make_solver(name, ddpo.eta, "objective.ddpo.eta"), ddpo.eta
        if not any(index >= gate for index in random_steps(schedule, eta)):
            trained = "of these steps" if not gate else f"of the {config.steps - gate} that the gate leaves"
            raise UserError(
                f"sampler.steps is {config.steps}, and none {trained} adds noise, which ddpo needs; use more steps"
            )
    return Sampler(model, schedule, solver, config.guidance_scale, config.negative_prompt, eta, gate)


def build_problem(config: Config, model: Model, rewards: Mapping[str, Reward]) -> Problem:
    """What an optimizer step needs besides prompts and noise. rewards: at least those of `config.reward`, by name.

    Raises UserError if the sampler does not fit the model or the method, or a reward does not fit the method.
    """
    if config.sampler.steps is not None:
        check_method(config, config.sampler.steps)
    name, differentiates = config.objective.method, METHODS[config.objective.method].differentiates
    for reward, settings in config.reward.items():
        if differentiates and not rewards[reward].differentiable:
            raise UserError(
                f"reward '{reward}' has no gradient (differentiable is False), but objective.method={name} needs one; "
                "use objective.method=ddpo"
            )
        if not differentiates and reward in REWARDS and settings.args.get("dropout"):
            raise UserError(
                f"reward.{reward}.args.dropout is {settings.args['dropout']}, but method {name} takes no gradient "
                "of the reward, so dropout has no effect; remove it"
            )
    ddpo = None if differentiates else config.objective.ddpo
    model.tuned.gate = config.objective.gate  # which its weights remember
    sampler = build_sampler(model, config.sampler, ddpo)
    check_space(config.objective, sampler.schedule)
    check_windows(config, sampler.schedule)
    return Problem(sampler, weighted_sum(config, rewards), config.objective)


def weighted_sum(config: Config, rewards: Mapping[str, Reward], scales: Mapping[str, Scale] | None = None) -> Combined:
    """The sum that a configuration optimises. scales: of the rewards that are normalised in it.

    Raises UserError for one that cannot be.
    """
    for name, settings in config.reward.items():
        if settings.normalise is not None and getattr(rewards[name], "compares_images", False):
            raise UserError(
                f"reward.{name}.normalise is {settings.normalise}, but this reward compares the images of a "
                "micro-batch, whose composition in training is another; remove it, and choose its weight instead"
            )
    return Combined({name: (rewards[name], settings.weight) for name, settings in config.reward.items()}, scales)
