"""What is planned against what a real step on a tiny model holds, of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from draftplus.build import build_model, build_problem
from draftplus.config import Config
from draftplus.data.batches import Batch
from draftplus.diffusion.objectives import plan
from draftplus.diffusion.sampler import Rollout
from draftplus.distributed import World
from draftplus.planning.measure import measure
from draftplus.planning.meter import Meter, storages
from draftplus.planning.subject import subject
from draftplus.rewards.clip import load_emoji_clip
from draftplus.training.placement import Replicated
from draftplus.training.state import initial_state
from draftplus.training.step import Setup, loss, precisely
from draftplus.training.update import update
from tests.planning.conftest import FAMILIES, IMAGES, PROMPT, Configured, planned
from tests.tiny import CPU


def real(config: Config) -> tuple[Setup, Any]:
    """A step's setup with true weights, and the state."""
    model = build_model(config.model, CPU, config.seed)
    rewards = {"emoji_clip": load_emoji_clip()}
    problem = build_problem(config, model, rewards)
    shape = model.latent_shape(config.sampler.height, config.sampler.width)
    here = World(0, 1, CPU)
    setup = Setup(config, problem, [PROMPT], shape, IMAGES, here, Replicated(here))
    return setup, initial_state(model.tuned.trainable(), config.optim)


def kept(setup: Setup) -> int:
    """Bytes of the storages that the backward pass of a true micro-batch keeps, weights aside."""
    problem, model = setup.problem, setup.problem.model
    tuned: Any = model.tuned
    planned = plan(problem.objective, problem.sampler.schedule, setup.config.seed, 0)
    share = Batch([PROMPT] * IMAGES, list(range(IMAGES)))
    conditioning = model.encode(share.prompts)
    start = Rollout(torch.randn(IMAGES, *setup.shape), torch.randn(IMAGES, *setup.shape))
    networks = [*tuned.networks(), model.vae, *[one.model for one, _ in problem.scorer.rewards.values()]]
    held: dict[int, int] = {}

    with precisely(setup, planned):
        own = {t.untyped_storage()._cdata for net in networks for t in (*net.parameters(), *net.buffers())}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                held[storage._cdata] = storage.nbytes()
                alive.append(storage)
            return tensor

        alive: list[Any] = []
        with saved_tensors_hooks(note, lambda tensor: tensor):
            part = loss(problem, start, planned, conditioning, share.prompts, setup.noise(0, share.indices))
        part.value.backward()
    return sum(held.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_those_of_a_real_step(configured: Configured, name: str) -> None:
    """What is held where the reward ends is what autograd saved, up to what is no activation: latents and images."""
    config = configured(name)
    found, setup = planned(config), real(config)[0]
    told = sum(found.kept[part] for part in ("window", "decode", "reward"))
    true = kept(setup)
    assert told == pytest.approx(true, rel=0.05), (told, true)
    assert found.phases["step"] > told


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("tuning", ["model.lora.rank=4", "model.lora=null"])
def test_weights_and_what_training_adds_are_exact(configured: Configured, tuning: str, optimizer: str) -> None:
    """To the byte: against a true model after one true update."""
    config = configured("sd", tuning, "optim.ema=0.99", f"optim.name={optimizer}")
    found = planned(config)
    setup, state = real(config)
    model: Any = setup.problem.model
    parameters = state.parameters
    adapters = sum(one.nbytes for one in parameters.values()) if model.tuned.frozen is None else 0
    assert found.weights["denoiser"] + found.weights.get("adapters", 0) == storages([model.tuned.denoiser])
    assert found.weights.get("adapters", 0) == adapters
    assert found.weights["frozen copy"] == (0 if adapters else storages([model.tuned.frozen]))
    assert found.weights["autoencoder"] == storages([model.vae])
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    gradients = sum(one.grad.nbytes for one in parameters.values() if one.grad is not None)
    update(state, config.optim, {"loss": 1.0})
    moments = [one for of in state.optimizer.state.values() for name, one in of.items() if name != "step"]
    assert state.ema is not None
    average = sum(one.nbytes for one in state.ema.shadow.values())
    told = {"gradients": gradients, "optimizer": sum(one.nbytes for one in moments), "average": average}
    assert dict(found.trained) == told


def test_checkpointing_and_the_batch_change_what_is_kept(configured: Configured) -> None:
    config = configured("sdxl")
    run = subject(config)
    one, two = (measure(run, images, 2, PROMPT) for images in (1, 2))
    less = measure(subject(configured("sdxl", "model.gradient_checkpointing=true")), 2, 2, PROMPT)
    assert one.kept["window"] < two.kept["window"] and one.peak < two.peak
    assert less.kept["window"] < two.kept["window"] / 2
    assert less.peak < two.peak and less.weights == two.weights


def test_what_is_counted_goes_when_nothing_holds_it() -> None:
    with Meter() as meter:
        x = torch.empty(256, device="meta")
        y = x * 2 + 1
        assert meter.now == 2 * 1024 and meter.peak == 3 * 1024
        view = y[:3]
        del y
        assert meter.now == 2 * 1024, "a view holds its storage"
        del x, view
        assert meter.now == 0 and meter.restart() == meter.peak == 0


def test_many_steps_are_reckoned_from_a_few(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a window of 6 steps keeps, from 3 and 4 of them, is what it keeps when all are taken."""
    from draftplus.planning import measure as module

    config = configured("sd", "sampler.steps=6", "objective.grad_steps=6")
    reckoned = planned(config)
    monkeypatch.setattr(module, "MOST_GRADED", 6)
    taken = planned(config)
    assert reckoned.kept["window"] == pytest.approx(taken.kept["window"], rel=1e-3)
    assert reckoned.peak == pytest.approx(taken.peak, rel=0.01)


@pytest.mark.parametrize("method", ["ddpo", "draft_lv", "refl", "alignprop", "drtune"])
def test_every_method_has_a_plan(configured: Configured, method: str) -> None:
    config = configured("sd", f"objective.method={method}", "sampler.eta=1.0")
    assert planned(config).phases["step"] > 0


def test_a_penalty_over_the_trajectory_is_planned(configured: Configured) -> None:
    """A step without gradient that is looked at has passes of its own, after those of the window are gone."""
    window, trajectory = (planned(configured("sd", f"objective.kl_steps={over}")) for over in ("window", "trajectory"))
    assert trajectory.kept["window"] == window.kept["window"]
    assert window.phases["step"] <= trajectory.phases["step"] < 1.1 * window.phases["step"]


def test_reused_noises_are_counted(configured: Configured) -> None:
    """As many latents, of two stages and of what a penalty looks at, as batches take turns."""
    settings = ["objective.gate=0.4", "train.prefix_cache.uses=2"]
    found = [planned(configured("sd", *settings, f"train.prefix_cache.batches={batches}")) for batches in (1, 9)]
    latents = 4 * 8 * 8 * 4
    assert found[1].phases["step"] - found[0].phases["step"] == 8 * IMAGES * 2 * latents
    assert found[1].weights == found[0].weights


def test_a_gate_before_the_window_folds_nothing(configured: Configured) -> None:
    """Where the frozen model draws all steps without gradient, as in training."""
    open_, gated = (planned(configured("sd", f"objective.gate={gate}")) for gate in (0.0, 0.6))
    assert open_.folded > 0 == gated.folded
    assert gated.phases["sampling"] < open_.phases["sampling"]
