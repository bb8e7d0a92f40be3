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
from draftplus.planning.measure import Memory, measure, subject
from draftplus.rewards.clip import load_emoji_clip
from draftplus.runs.plan import plan_run
from draftplus.training.placement import Replicated
from draftplus.training.state import initial_state
from draftplus.training.step import Setup, loss, precisely
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
