"""What is planned against what a real step on a tiny model holds, of every family."""

from __future__ import annotations

from pathlib import Path
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
from draftplus.planning.measure import Memory, measure
from draftplus.planning.meter import Meter, storages
from draftplus.planning.subject import subject
from draftplus.rewards.clip import load_emoji_clip
from draftplus.runs.plan import plan_run
from draftplus.training.placement import Replicated
from draftplus.training.state import initial_state
from draftplus.training.step import Setup, loss, precisely
from draftplus.training.update import update
from tests.support.pipelines import save_pipeline
from tests.tiny import CPU

FAMILIES = {"sd": 16, "sdxl": 64, "sd3": 64, "flux_dev": 64, "chroma": 64, "flux2_klein_base": 64, "qwen_image": 64,
            "zimage": 64}  # fmt: skip
PROMPT = "a cat on a mat"
IMAGES = 2


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = save_pipeline(name, tmp_path_factory.mktemp("planned") / name)
        return made[name]

    return directory


def configured(directory: Path, size: int, *more: str) -> Config:
    settings = [
        f"model.path={directory}", "device=cpu", "sampler.steps=3", f"sampler.height={size}", f"sampler.width={size}",
        "objective.kl_coeff=0.1", f"train.global_batch_size={IMAGES}", f"train.micro_batch_size={IMAGES}",
    ]  # fmt: skip
    return plan_run("emoji", [*settings, *more])[0]


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


def planned(config: Config) -> Memory:
    return measure(subject(config), IMAGES, IMAGES, PROMPT)


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_those_of_a_real_step(saved: Any, name: str) -> None:
    """What is held where the reward ends is what autograd saved, up to what is no activation: latents and images."""
    config = configured(saved(name), FAMILIES[name])
    found, setup = planned(config), real(config)[0]
    told = sum(found.kept[part] for part in ("window", "decode", "reward"))
    true = kept(setup)
    assert told == pytest.approx(true, rel=0.05), (told, true)
    assert found.phases["step"] > told


@pytest.mark.parametrize("tuning", ["model.lora.rank=4", "model.lora=null"])
def test_weights_and_what_training_adds_are_exact(saved: Any, tuning: str) -> None:
    """To the byte: against a true model after one true update."""
    config = configured(saved("sd"), FAMILIES["sd"], tuning, "optim.ema=0.99")
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
    update(state, config.optim, {"loss": 1.0}, setup.placement)
    moments = [one for of in state.optimizer.state.values() for name, one in of.items() if name != "step"]
    assert state.ema is not None
    average = sum(one.nbytes for one in state.ema.shadow.values())
    told = {"gradients": gradients, "optimizer": sum(one.nbytes for one in moments), "average": average}
    assert dict(found.trained) == told


def test_checkpointing_and_the_batch_change_what_is_kept(saved: Any) -> None:
    config = configured(saved("sdxl"), FAMILIES["sdxl"])
    run = subject(config)
    one, two = (measure(run, images, 2, PROMPT) for images in (1, 2))
    less = measure(subject(configured(saved("sdxl"), 64, "model.gradient_checkpointing=true")), 2, 2, PROMPT)
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


def test_many_steps_are_reckoned_from_a_few(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a window of 6 steps keeps, from 3 and 4 of them, is what it keeps when all are taken."""
    from draftplus.planning import measure as module

    config = configured(saved("sd"), 16, "sampler.steps=6", "objective.grad_steps=6")
    reckoned = planned(config)
    monkeypatch.setattr(module, "MOST_GRADED", 6)
    taken = planned(config)
    assert reckoned.kept["window"] == pytest.approx(taken.kept["window"], rel=1e-3)
    assert reckoned.peak == pytest.approx(taken.peak, rel=0.01)


@pytest.mark.parametrize("method", ["ddpo", "draft_lv", "refl", "alignprop", "drtune"])
def test_every_method_has_a_plan(saved: Any, method: str) -> None:
    config = configured(saved("sd"), 16, f"objective.method={method}", "sampler.eta=1.0")
    assert planned(config).phases["step"] > 0
