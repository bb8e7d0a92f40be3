"""What rewards list as divisible: in parts nothing changes, and it is called as often for any prompts.

One process has all parts here; `tests/distributed/test_frozen.py` has several.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from draftplus import rng
from draftplus.build import build_reward
from draftplus.config import RewardConfig
from draftplus.distributed import World
from draftplus.distributed.sharding import is_part, layers
from draftplus.errors import UserError
from draftplus.rewards.aesthetic import FILE, load_aesthetic
from draftplus.rewards.clip import load_emoji_clip
from draftplus.rewards.combined import Combined
from draftplus.rewards.dissimilarity import load_dissimilarity
from draftplus.rewards.hpsv3 import load_hpsv3
from draftplus.rewards.image_reward import load_image_reward
from draftplus.rewards.mps import load_mps
from draftplus.rewards.offloaded import networks_of
from draftplus.training.placement import Sharded
from draftplus.types import Scores
from tests.support import published
from tests.support.originals import CLIP_SAYS, drawn, save_clip
from tests.support.runs import REWARDS, relative
from tests.tiny import CPU

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
ALONE = World(0, 1, CPU)


@pytest.fixture
def group() -> Iterator[None]:
    """What FSDP2 asks for, also of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def aesthetic(directory: Path) -> Any:
    torch.save({name: one.float() for name, one in drawn(CLIP_SAYS["names"]["aesthetic"]).items()}, directory / FILE)
    return load_aesthetic(directory, clip=str(save_clip(directory / "clip", "quick_gelu", 768)))


def image_reward(directory: Path) -> Any:
    return load_image_reward(published.save_image_reward(directory, published.image_reward()))


# and what of it stays whole
MADE: dict[str, tuple[Any, set[str]]] = {
    "emoji_clip": (lambda _: load_emoji_clip(negative="a blurry picture"), {"text_model", "visual_projection"}),
    "dropout": (lambda _: load_emoji_clip(dropout=0.2), {"text_model"}),
    "dissimilarity": (lambda _: load_dissimilarity(), {"text_model"}),
    "aesthetic": (aesthetic, {"visual_projection"}),
    "image_reward": (image_reward, set()),
    "mps": (lambda path: load_mps(published.save_mps(path)), {"text_model", "visual_projection"}),
    "hpsv3": (lambda path: load_hpsv3(published.save_hpsv3(path)), set()),
}  # fmt: skip


def judged(reward: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Scores and their gradient in the images."""
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with rng.samples(0, 0, [0, 1]):
        scores = reward(images, prompts)
    scores = scores.total if isinstance(scores, Scores) else scores
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), gradient


def divide(reward: Any) -> list[nn.Module]:
    """In parts, whatever it takes. Returns the units in which it is gathered."""
    Sharded(ALONE, None, 0).place_reward(reward)
    return [unit for network in reward.divisible for unit in (network, *layers(network))]


def resting(unit: Any) -> bool:
    """Whether nothing that was gathered is held."""
    groups = unit._get_fsdp_state()._fsdp_param_groups
    gathered = [one for group in groups for param in group.fsdp_params for one in param.all_gather_outputs]
    return all(group.is_sharded for group in groups) and not any(one.untyped_storage().size() for one in gathered)


@pytest.mark.parametrize("name", MADE)
def test_in_parts(name: str, tmp_path: Path, group: None) -> None:
    made, whole = MADE[name]
    reward = made(tmp_path)
    scores, gradient = judged(reward, ["a cat", "a dog"])
    assert gradient.abs().max() > 0
    units = divide(reward)
    assert len(units) > len(reward.divisible), "there are layers"
    again, same = judged(reward, ["a cat", "a dog"])
    torch.testing.assert_close(again, scores, rtol=0, atol=0)
    assert relative(same, gradient) < 1e-6  # contributions may be added in another order
    assert all(map(resting, units))
    with torch.no_grad():
        reward(torch.rand(2, 3, 56, 56), ["a cat", "a dog"])
    assert all(map(resting, units))
    found = [(key.split("."), is_part(p)) for one in networks_of(reward) for key, p in one.named_parameters()]
    assert {name for names, part in found if not part for name in names} >= whole
    assert not whole & {name for names, part in found if part for name in names}


@pytest.mark.parametrize("name", MADE)
def test_prompts_do_not_decide_how_often_it_is_called(name: str, tmp_path: Path, group: None) -> None:
    """Nor whether they were there before: another process may have seen others."""
    reward = MADE[name][0](tmp_path)
    calls: list[int] = []
    for number, unit in enumerate(divide(reward)):
        unit.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    seen = []
    for prompts in (["a cat", "a dog"], ["a cat", "a dog"], ["a cat", "a long story of an owl"], ["a bee"] * 2):
        judged(reward, prompts)
        seen.append(calls.copy())
        calls.clear()
    assert seen[0] and all(one == seen[0] for one in seen)


class Own(nn.Module):
    """A user's own reward: a network without lists of layers, which it says is divisible."""

    def __init__(self, divisible: Any = None) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.divisible = [self.network] if divisible is None else divisible

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.network(images.mean((2, 3)))[:, 0]


class Silent(Own):
    """The same, which says nothing."""

    def __init__(self) -> None:
        super().__init__()
        del self.divisible


def built(name: str, **args: Any) -> Any:
    return build_reward(f"{__name__}:{name}", RewardConfig(args=args), CPU)


def test_a_users_own_reward_is_divided_where_it_says_so(group: None) -> None:
    own, silent = built("Own"), built("Silent")
    scores, gradient = judged(own, ["a cat", "a dog"])
    units = divide(own)
    again, same = judged(own, ["a cat", "a dog"])
    torch.testing.assert_close((again, same), (scores, gradient), rtol=0, atol=0)
    assert all(map(is_part, own.function.parameters())) and all(map(resting, units))
    Sharded(ALONE, None, 0).place_reward(silent)
    assert not any(map(is_part, silent.function.parameters()))
    Sharded(ALONE, None, 0).place_reward(build_reward(f"{REWARDS}:redness", RewardConfig(), CPU))


@pytest.mark.parametrize(("listed", "told"), [(3, "int"), (["network"], "str"), ([nn.ModuleList([])], "ModuleList")])
def test_what_cannot_be_divided_is_refused(listed: Any, told: str) -> None:
    with pytest.raises(UserError, match=rf"Own': its divisible is {told}, or has one; it must be a list of networks"):
        built("Own", divisible=listed)


def test_a_network_of_two_rewards(group: None) -> None:
    """It is divided once, and each calls it."""
    own = built("Own")
    other = copy.copy(own)
    expected = judged(Combined({"a": (own, 1.0), "b": (other, 2.0)}), ["a cat", "a dog"])
    divide(own)
    units = divide(other)
    found = judged(Combined({"a": (own, 1.0), "b": (other, 2.0)}), ["a cat", "a dog"])
    torch.testing.assert_close(found, expected)
    assert all(map(resting, units))


@pytest.mark.parametrize(("above", "parts"), [(None, False), (10**9, False), (4 * 41, False), (4 * 41 - 1, True)])
def test_the_bound(above: int | None, parts: bool, group: None) -> None:
    own = built("Own")
    Sharded(ALONE, None, above).place_reward(own)
    assert all(is_part(p) == parts for p in own.function.parameters())


def test_half_precision_stays(group: None) -> None:
    own = built("Own")
    own.function.network.bfloat16()
    images = torch.rand(2, 3, 4, 4).bfloat16()
    before = own(images, ["a", "b"])
    divide(own)
    assert {p.dtype for p in own.function.parameters()} == {torch.bfloat16}
    assert torch.equal(own(images, ["a", "b"]), before)


def test_it_may_be_moved(group: None) -> None:
    """As `model.offload` does: to other memory and back, while nothing is gathered."""
    own = built("Own")
    scores, gradient = judged(own, ["a cat", "a dog"])
    divide(own)
    judged(own, ["a cat", "a dog"])
    before = [one.to_local() for one in own.function.parameters()]
    own.function._apply(lambda tensor: tensor.clone())
    for one in before:
        one.data.fill_(torch.nan)
    torch.testing.assert_close(judged(own, ["a cat", "a dog"]), (scores, gradient), rtol=0, atol=0)
