"""A run's memory as configured, the largest micro-batch that fits, and what to switch on where it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from draftplus.build import quiet_libraries
from draftplus.config import Config, load_config
from draftplus.config.sizes import bytes_in
from draftplus.data.prompts import load_prompts
from draftplus.diffusion.methods import METHODS
from draftplus.errors import UserError
from draftplus.evaluation.chunks import SAMPLING_BATCH
from draftplus.models.paths import is_single_file
from draftplus.planning.measure import Memory, measure
from draftplus.planning.sharding import sharers, spread, spreads
from draftplus.planning.subject import Subject, parameters, subject
from draftplus.progress import progress
from draftplus.runs.directory import is_run
from draftplus.runs.origin import run_config
from draftplus.runs.plan import settled
from draftplus.training.dry_run import passes
from draftplus.training.sizes import micro_batch_size

SHARD = "shard"  # of parallel.mode
LOOKED_AT = 1000  # prompts, of which the longest is that of every image
HELPS = 0.99  # of the memory before; what leaves more is not advised


@dataclass(frozen=True)
class Advice:
    """A setting that lowers the memory, what it costs, and the memory with it and all that come before it."""

    setting: str
    cost: str
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """What a run takes. other: with gradient checkpointing the other way. elsewhere: of one of several processes, with
    the other `parallel.mode`; None for one process, or where that cannot be reckoned. parameters: by network. limit:
    bytes, None where none is given. largest: images of the largest micro-batch that fits; 0: none. advice: in order of
    what it costs, until the run fits."""

    config: Config
    memory: Memory
    other: Memory
    parameters: Mapping[str, int]
    passes: tuple[int, int, int]
    doubled: bool
    uncounted: Sequence[str]
    ranks: int = 1
    limit: int | None = None
    largest: int | None = None
    advice: Sequence[Advice] = field(default_factory=list)
    elsewhere: Memory | None = None

    @property
    def fits(self) -> bool:
        """True where no limit is given."""
        return self.limit is None or self.memory.peak <= self.limit

    @property
    def fits_with_advice(self) -> bool:
        return self.limit is not None and bool(self.advice) and self.advice[-1].memory.peak <= self.limit


def bytes_of(text: str) -> int:
    """The bytes of a size such as 24GB (`config.sizes`).

    Raises UserError for anything else.
    """
    size = bytes_in(text)
    if not size:
        raise UserError(f"--memory '{text}': give the memory of a device, such as 24GB or 512MB")
    return size


def configured(target: Config | str | Path, overrides: Sequence[str]) -> Config:
    """The configuration that is planned. target: a configuration, a recipe, or a run, any key of which may be changed.

    Raises UserError where it is wrong, or of another kind of training.
    """
    if isinstance(target, Config):
        return load_config(None, overrides, base=target)
    return run_config(Path(target), overrides) if is_run(target) else load_config(target, overrides)


def plan_memory(config: Config, memory: int | None = None, gpus: int = 1) -> Plan:
    """The plan of a configuration. memory: bytes of one device. gpus: how many processes share a step's images.

    Raises UserError for a number of GPUs that does not fit, and for what does not fit together, as training does.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: give at least 1")
    config = settled(config)
    quiet_libraries()
    micro, share = micro_batch_size(config, gpus), config.train.global_batch_size // gpus
    prompt = max(load_prompts(config.data.prompts, config.data.column).train[:LOOKED_AT], key=len)
    with progress("planning", None):
        planner = _Planner(prompt, share, gpus)
        run = subject(config)
        found = planner(run, micro)
        turned = not config.model.gradient_checkpointing
        other = planner(subject(changed(config, f"model.gradient_checkpointing={str(turned).lower()}")), micro)
        sampler = run.problem.sampler
        made = Plan(
            config, found, other, parameters(run), passes(run.problem, config.seed),
            run.model.doubles(sampler.negative_prompt, sampler.guidance_scale), run.uncounted, gpus, memory,
            elsewhere=planner.elsewhere(run, micro),
        )  # fmt: skip
        if memory is None:
            return made
        largest = planner.largest(run, memory, _divisors(config, share))
        return replace(made, largest=largest, advice=[] if made.fits else planner.advice(config, micro, memory))


def changed(config: Config, *settings: str) -> Config:
    """A configuration with these settings besides."""
    return settled(load_config(None, settings, base=config))


def _divisors(config: Config, share: int) -> list[int]:
    """The micro-batches that a share can be cut into, ascending."""
    updates = 1 if METHODS[config.objective.method].differentiates else config.objective.ddpo.updates
    update = max(1, share // updates)
    return [size for size in range(1, update + 1) if update % size == 0]


@dataclass(frozen=True)
class _Planner:
    """What measures a run of this prompt, share and number of processes; each setting once."""

    prompt: str
    share: int
    ranks: int
    known: dict[tuple[int, int], tuple[Subject, Memory]] = field(default_factory=dict)

    def __call__(self, run: Subject, micro: int) -> Memory:
        whole = self._whole(run, micro)
        return spread(whole, run, sharers(run.config, self.ranks)) if run.config.parallel.mode == SHARD else whole

    def _whole(self, run: Subject, micro: int) -> Memory:
        """With all weights on each process."""
        key = id(run), micro
        if key not in self.known:
            self.known[key] = run, measure(run, micro, self.share, self.prompt, self.ranks)
        return self.known[key][1]

    def elsewhere(self, run: Subject, micro: int) -> Memory | None:
        if self.ranks == 1 or not spreads(run.config):
            return None
        whole = self._whole(run, micro)
        return whole if run.config.parallel.mode == SHARD else spread(whole, run, self.ranks)

    def largest(self, run: Subject, limit: int, sizes: Sequence[int]) -> int:
        """The largest of these micro-batches that fits; 0 for none. Memory grows with the micro-batch."""
        low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
        while low < high:
            middle = (low + high) // 2
            if self(run, sizes[middle]).peak <= limit:
                low = middle + 1
            else:
                high = middle
        return sizes[low - 1] if low else 0

    def advice(self, config: Config, micro: int, limit: int) -> list[Advice]:
        """What lowers the memory, in order of what it costs, until the run fits."""
        given: list[Advice] = []
        run = subject(config)
        memory = self(run, micro)
        for remedy in (*REMEDIES[:SHARDED], *SHARDING[: self.ranks - 1], *REMEDIES[SHARDED:]):
            settings = remedy.settings(config, memory)
            if settings is None:
                continue
            size = micro
            if settings == MICRO:
                sizes = [one for one in _divisors(config, self.share) if one < micro]
                if not sizes:
                    continue
                size = self.largest(run, limit, sizes) or 1
                settings = f"{MICRO}={size}"
            candidate = changed(config, *settings.split())
            tried = subject(candidate)
            after = self(tried, size)
            if after.peak > HELPS * memory.peak:
                continue
            given.append(Advice(settings, remedy.cost, after))
            config, run, memory, micro = candidate, tried, after, size
            if memory.peak <= limit:
                break
        return given


MICRO = "train.micro_batch_size"


@dataclass(frozen=True)
class Remedy:
    """settings: (configuration, its memory) -> what to set, None where it is set or cannot help. cost: in words."""

    settings: Callable[[Config, Memory], str | None]
    cost: str


def _unless(key: str, on: Callable[[Config], bool]) -> Callable[[Config, Memory], str | None]:
    return lambda config, memory: None if on(config) else key


def _smaller_sampling(config: Config, memory: Memory) -> str | None:
    now = config.train.sampling_batch_size or SAMPLING_BATCH
    if memory.fullest != "sampling" or now <= 1:
        return None
    return f"train.sampling_batch_size={min(now - 1, max(1, config.train.micro_batch_size))}"


def _fewer_steps(config: Config, memory: Memory) -> str | None:
    steps = config.objective.grad_steps
    return None if steps == 1 or config.objective.method != "draft" else "objective.grad_steps=1"


def _fewer_layers(config: Config, memory: Memory) -> str | None:
    lora = config.model.lora
    if lora is None:
        return "model.lora.rank=8 model.lora.alpha=8"
    return None if lora.targets == "attention" else "model.lora.targets=attention"


def _quantised(kind: str) -> Callable[[Config, Memory], str | None]:
    """Frozen weights in fewer bits, where training allows it."""

    def settings(config: Config, memory: Memory) -> str | None:
        model = config.model
        possible = model.lora is not None and not is_single_file(model.path) and config.parallel.mode != SHARD
        if not possible or model.quantize == kind or (kind == "nf4" and config.device == "cpu"):
            return None
        return f"model.quantize={kind}" if model.quantize is None or kind == "nf4" else None

    return settings


SHARDED = 3  # remedies that cost less than sharding does, which is one with several processes alone
SHARDING = (
    Remedy(
        lambda config, memory: "parallel.mode=shard" if config.parallel.mode != SHARD and spreads(config) else None,
        "the denoiser is held in parts, which cross between the GPUs in every pass",
    ),
)
REMEDIES = (
    Remedy(
        _unless("model.offload=true", lambda c: c.model.offload or c.device == "cpu"),
        "networks move to and from the device in every step",
    ),
    Remedy(_unless("model.vae_slicing=true", lambda c: c.model.vae_slicing), "images are decoded one at a time"),
    Remedy(
        _unless("model.gradient_checkpointing=true", lambda c: c.model.gradient_checkpointing),
        "the passes with gradient are computed twice",
    ),
    Remedy(_smaller_sampling, "more passes without gradient, each of fewer images"),
    Remedy(lambda config, memory: MICRO, "more passes with gradient, each of fewer images"),
    Remedy(
        _unless(
            "optim.name=adamw_8bit",
            lambda c: c.optim.name != "adamw" or (c.parallel.mode == SHARD and c.model.lora is None),
        ),
        "the optimizer's moments are rounded to 8 bits; it needs bitsandbytes",
    ),
    Remedy(
        _unless("model.dtype=bfloat16", lambda c: c.model.dtype != "float32"),
        "frozen weights are rounded to 8 bits of precision",
    ),
    Remedy(_quantised("int8"), "frozen linear layers are rounded to 8 bits; it needs torchao"),
    Remedy(
        _unless("model.vae_tiling=true", lambda c: c.model.vae_tiling), "large images are decoded in tiles, blended"
    ),
    Remedy(_quantised("nf4"), "frozen linear layers are rounded to 4 bits; it needs bitsandbytes and a CUDA device"),
    Remedy(_fewer_steps, "only the last sampling step carries gradient"),
    Remedy(_fewer_layers, "fewer weights are trained"),
)
