"""What a DRaFT+ step costs on the embedded model, against the bare passes that it needs. Exit status 1 above a target.

    python benchmarks/step.py               a few minutes on two quiet cores
    python benchmarks/step.py --cpu-time    on a busy machine, with OMP_NUM_THREADS=1
    python benchmarks/step.py --device cuda --model sdxl    images a second of sd15, sdxl, sd35 or flux on a GPU

- step: what training does in a step (10 sampling steps, the last with gradient, batch 8, KL), over its floor: the 9
  guided forwards with adapters folded, the one with adapters and gradient, the one of the frozen model, decoding,
  reward, one backward through them, the optimizer's update; called on the modules, with text features, noise and
  folded weights at hand.
- KL over the trajectory: the same step with one draw, over the same passes and those at the drawn step, one with
  gradient and one of the frozen model, with a backward pass of their own; then without the window's term and its pass.
- gate: a step under `objective.gate=0.5`, without KL, whose start noise was used before; over the passes behind the
  gate.
- KL: what the term adds to a step's tail (denoise, decode, reward, backward), over one guided forward of the frozen
  model. The prefix before the tail is the same with and without it.
- memory: the highest resident memory while two steps are taken, less what the loaded model held before (VmHWM, set back
  by /proc/self/clear_refs; Linux only), each in a fresh process. glibc is told to hand every freed tensor back, else
  the number would be of its caches.
- help: `draftplus --help` from start to end.

Times are medians of interleaved repeats; that of KL is the median of differences within a repeat.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TARGETS = {"step": 1.10, "kl": 1.15, "memory": 1.05, "help": 0.5}
SETTINGS = ["objective.kl_coeff=0.1", "device=cpu"]
TRAJECTORY = ["objective.kl_steps=trajectory", "objective.kl_prefix_coeff=0.1"]
REUSED = ["objective.gate=0.5", "train.prefix_cache.uses=1000", "train.prefix_cache.batches=1"]
STEPS = {  # each is measured over its floor
    "DRaFT+ step": [],
    "with KL over the trajectory": TRAJECTORY,
    "with KL before the window alone": [*TRAJECTORY, "objective.kl_coeff=0"],
    "under a gate, its start known": [*REUSED, "objective.kl_coeff=0"],
}
LONG, WHOLE_SHARE = ["sampler.steps=50"], ["train.micro_batch_size=8", "train.sampling_batch_size=8"]
MEMORY = {  # settings, and what is added to them; with KL over the window
    "50 sampling steps over 10": ([], LONG),
    "global batch 64 over 16": ([*WHOLE_SHARE, "train.global_batch_size=16"], ["train.global_batch_size=64"]),
    "KL over the trajectory, 50 steps over 10": (TRAJECTORY, LONG),
    "KL over the trajectory, 8 draws over 1": ([*TRAJECTORY, *LONG], ["objective.kl_draws=8"]),
    "the same under a gate, 50 steps over 10": ([*TRAJECTORY, *REUSED], LONG),
}
# read by glibc when a process starts: tensors come from mmap, whose pages go back when they are freed
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class Setup:
    """The embedded model, its reward and what a step takes, as training builds them."""

    def __init__(self, overrides: Sequence[str] = ()) -> None:
        from draftplus.build import build_model, build_problem, build_rewards, quiet_libraries
        from draftplus.config import load_config
        from draftplus.data.prompts import load_prompts
        from draftplus.distributed import World, pick_device
        from draftplus.runs.plan import settled
        from draftplus.training.placement import Replicated
        from draftplus.training.reuse import PrefixCache
        from draftplus.training.state import initial_state
        from draftplus.training.step import Setup

        self.config = settled(load_config("emoji", [*SETTINGS, *overrides]))
        self.here = World(0, 1, pick_device("cpu"))
        quiet_libraries()
        self.model: Any = build_model(self.config.model, self.here.device, self.config.seed)
        self.rewards: Any = build_rewards(self.config.reward, self.here.device)
        self.problem = build_problem(self.config, self.model, self.rewards)
        self.shape = self.model.latent_shape()
        self.prompts = load_prompts(self.config.data.prompts).train
        micro = self.config.train.micro_batch_size
        placement, reuse = Replicated(self.here), self.config.train.prefix_cache
        cache = PrefixCache(reuse.batches) if reuse.uses > 1 else None
        self.setup = Setup(self.config, self.problem, self.prompts, self.shape, micro, self.here, placement, cache)
        self.state = initial_state(self.model.tuned.trainable(), self.config.optim)

    def step(self) -> None:
        """As the loop of training does it, but for writing the row."""
        from contextlib import nullcontext

        from draftplus.training.step import gradient_step

        gradient_step(self.setup, self.state, nullcontext)
        self.state.step += 1

    def tail(self, kl_coeff: float) -> Callable[[], None]:
        """The loss and its gradient from a point before the last step."""
        from dataclasses import replace

        from draftplus.diffusion.objectives import loss, plan
        from draftplus.diffusion.sampler import Rollout

        problem = replace(self.problem, objective=replace(self.config.objective, kl_coeff=kl_coeff))
        n = self.config.train.micro_batch_size
        planned = plan(problem.objective, problem.sampler.schedule, 0, 0)
        noise = self.setup.noise(0, range(n))
        start, prompts = Rollout(noise("x_T", 0)), self.prompts[:n]
        conditioning = self.model.encode(prompts)

        def run() -> None:
            loss(problem, start, planned, conditioning, prompts, noise).value.backward()
            self.state.optimizer.zero_grad()

        return run

    def passes(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """The floor of a step, and one guided forward of the frozen model; on the modules themselves.

        Under a gate the floor begins behind it.
        """
        import torch

        from draftplus.diffusion.regularisers import prefix_coeff
        from draftplus.models import lora

        config, model = self.config, self.model
        unet, vae, reward = model.unet, model.vae, self.rewards["emoji_clip"]
        n = config.train.global_batch_size
        prompts = self.prompts[:n]
        text = torch.cat([model.encode([""] * n).hidden, model.encode(prompts).hidden])
        wanted = torch.stack([reward._text_features(prompt) for prompt in prompts])
        latents = torch.randn(n, *self.shape, generator=torch.Generator().manual_seed(0))
        twice = torch.cat([latents, latents])
        steps = self.problem.sampler.schedule.steps
        times = [torch.tensor(step.timestep, dtype=torch.int64) for step in steps]
        last, begin = steps[-1], self.problem.sampler.gate
        window, before = config.objective.kl_coeff, prefix_coeff(config.objective)
        mean, std = (torch.tensor(getattr(reward.preprocessing, key))[:, None, None] for key in ("mean", "std"))
        crop = reward.preprocessing.crop[0]
        parameters = self.model.tuned.trainable()
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.0)
        layers = [layer.get_base_layer() for layer in lora.layers(unet)]
        with model.tuned.folded():
            merged = [layer.weight.data for layer in layers]
        originals = [layer.weight.data for layer in layers]

        def guided(at: int) -> Any:
            without, given = unet(twice, times[at], encoder_hidden_states=text, return_dict=False)[0].chunk(2)
            return without + config.sampler.guidance_scale * (given - without)

        def reference(at: int = -1) -> Any:
            with torch.no_grad(), model.tuned.reference():
                return guided(at)

        def frozen() -> None:
            reference()

        def floor() -> None:
            for layer, weight in zip(layers, merged, strict=True):
                layer.weight.data = weight
            with torch.no_grad(), model.tuned.reference():
                for at in range(begin, len(steps) - 1):
                    guided(at)
            for layer, weight in zip(layers, originals, strict=True):
                layer.weight.data = weight
            eps = guided(-1)
            clean = (latents - last.sigma * eps) / last.alpha
            image = vae.decode(clean / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
            if image.shape[-1] != crop:
                image = torch.nn.functional.interpolate(image, (crop, crop), mode="bicubic", antialias=True)
            features = reward.model.get_image_features(pixel_values=(image.clamp(0, 1) - mean) / std).pooler_output
            scores = (torch.nn.functional.normalize(features, dim=-1) * wanted).sum(-1)
            value = -scores.mean()
            if window > 0:
                value = value + window * (eps - reference()).square().mean()
            value.backward()
            for at in range(config.objective.kl_draws if before > 0 else 0):
                (before * (guided(at) - reference(at)).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return floor, frozen


def measure(
    works: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float], until: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each piece of work, all of them once in every repeat; a first round is not counted.

    until: no repeat but the first begins once `clock` says this.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        if repeat > 1 and clock() > until:
            break
        for name, work in works.items():
            began = clock()
            work()
            if repeat:
                taken[name].append(clock() - began)
        if sys.stderr.isatty():
            print(f"repeat {repeat} of {repeats}", end="\r", file=sys.stderr, flush=True)
    return taken


def peak_memory(overrides: Sequence[str]) -> float:
    """MiB of a step above the loaded model, in this process."""
    setup = Setup(overrides)
    setup.prompts = setup.prompts[:4]  # a longer batch has no more texts to remember
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    for _ in range(2):
        setup.step()
    return (status("VmHWM") - before) / 1024


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def memory_of(*overrides: str) -> float:
    """`peak_memory` in a fresh process."""
    command = [sys.executable, __file__, "--memory", *overrides]
    done = subprocess.run(command, env={**os.environ, **RETURN_MEMORY}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stderr}")
    return float(done.stdout)


def help_seconds() -> float:
    """The best of 5."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "draftplus", "--help"], check=True, capture_output=True)
        taken.append(time.perf_counter() - began)
    return min(taken)


def main(repeats: int, cpu_time: bool, only: Sequence[str]) -> int:
    """Measures and prints. Returns how many targets were missed."""
    import torch

    missed = 0

    def tell(name: str, what: str, value: float, detail: str, unit: str = "") -> None:
        nonlocal missed
        missed += value > TARGETS[name]
        word = "met" if value <= TARGETS[name] else "MISSED"
        print(f"{what:<54} {value:6.3f}{unit:<2} at most {TARGETS[name]:.2f}{unit:<2} {word:<7} {detail}", flush=True)

    clock = time.process_time if cpu_time else time.perf_counter
    print(
        f"the embedded model on {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{'processor' if cpu_time else 'wall'} time, medians of {repeats}"
    )
    if "time" in only:
        setups = {name: Setup(overrides) for name, overrides in STEPS.items()}
        plain = setups["DRaFT+ step"]
        tails = {"tail": plain.tail(0.0), "tail with KL": plain.tail(plain.config.objective.kl_coeff)}
        floors = {f"floor {name}": one.passes()[0] for name, one in setups.items()}
        works = {name: one.step for name, one in setups.items()} | floors | tails | {"reference": plain.passes()[1]}
        taken = measure(works, repeats, clock)
        middle = {name: statistics.median(seconds) for name, seconds in taken.items()}
        for name in STEPS:
            floor = middle[f"floor {name}"]
            tell("step", f"{name}, over its passes", middle[name] / floor, f"{middle[name]:.3f} s over {floor:.3f} s")
        added = statistics.median(a - b for a, b in zip(taken["tail with KL"], taken["tail"], strict=True))
        detail = f"{added:.3f} s over {middle['reference']:.3f} s"
        tell("kl", "KL term over one guided reference forward", added / middle["reference"], detail)
    if "memory" in only:
        for what, (settings, added) in MEMORY.items():
            few, many = memory_of(*settings), memory_of(*settings, *added)
            tell("memory", f"peak memory, {what}", many / few, f"{many:.0f} MiB over {few:.0f}")
    if "help" in only:
        tell("help", "draftplus --help, best of 5", help_seconds(), "", " s")
    return missed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="of the timings (default 15)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time")
    parser.add_argument("--only", nargs="+", choices=["time", "memory", "help"], default=["time", "memory", "help"])
    parser.add_argument("--memory", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=["sd15", "sdxl", "sd35", "flux"], help="images a second of this one instead")
    parser.add_argument("--device", default="cuda", help="of --model (default cuda)")
    parser.add_argument("--size", type=int, default=512, help="of --model's images, in pixels (default 512)")
    parser.add_argument("--images", type=int, help="of --model's micro-batch (default as in benchmarks.gpu)")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps of --model (default 10)")
    parser.add_argument("--minutes", type=float, default=8.0, help="no repeat of --model begins later (default 8)")
    parser.add_argument("--tiny", action="store_true", help="a tiny --model, which shows that the code runs")
    chosen = parser.parse_args()
    if chosen.model is not None:
        sys.path.insert(0, str(Path(__file__).parents[1]))  # a script finds only what is in its own directory
        from benchmarks import throughput

        throughput.main(chosen)
        sys.exit(0)
    if chosen.memory is not None:
        print(peak_memory(chosen.memory))
        sys.exit(0)
    sys.exit(1 if main(chosen.repeats, chosen.cpu_time, chosen.only) else 0)
