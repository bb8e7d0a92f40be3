"""Families whose prompts are not padded to one length: Qwen-Image and Z-Image."""

from __future__ import annotations

import pytest
import torch

from draftplus import api
from tests.families.cases import CASES, PROMPTS, load_model, stock_picture, stock_pipe
from tests.families.conftest import Saved

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SEED, STEPS = 5, 3
RAGGED = ["qwen_image", "zimage"]
LONG = "a street in the rain at night, " * 30  # more than the 512 tokens that are kept of it


@pytest.fixture(params=RAGGED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("negative", ["a", "a red dog, a blue dog and a green dog, which all sleep under the table"])
def test_each_prompt_of_a_batch_is_as_alone(name: str, saved: Saved, negative: str) -> None:
    """To stock alone too, whatever stock draws of the batch; with a negative prompt shorter or longer than any."""
    case, size = CASES[name], CASES[name].sizes[1]
    prompts = [*PROMPTS, PROMPTS[0]]
    overrides = case.overrides(size, STEPS, case.guided, negative)
    together = api.generate(str(saved(name)), prompts, [SEED], overrides)
    alone = torch.cat([api.generate(str(saved(name)), [prompt], [SEED], overrides) for prompt in PROMPTS])
    assert (together[:3] - alone).abs().max() < 1e-5
    assert (together[3] - alone[0]).abs().max() < 1e-5
    pipe, arguments = stock_pipe(saved(name)), case.call(size, STEPS, case.guided, negative)
    theirs = torch.cat([stock_picture(pipe, prompt, SEED, **arguments) for prompt in PROMPTS])
    assert (together[:3] - theirs).abs().max() < 1e-4
    assert (theirs[0] - theirs[1]).abs().max() > 0.01


def test_padding_is_left_out(name: str, saved: Saved) -> None:
    """Whatever lies in it, no prediction depends on it, and no gradient."""
    model = load_model(saved(name), trainable=False)
    given = model.encode(PROMPTS)
    assert given.mask is not None and [int(row.sum()) for row in given.mask] == [
        model.encode([prompt]).hidden.shape[1] for prompt in PROMPTS
    ]
    assert model.encode([PROMPTS[0]] * 2).mask is None
    x, t = torch.randn(3, 16, 8, 12, dtype=torch.float64), torch.tensor(500.0)
    with torch.no_grad():
        expected = model.predict(x, t, given)
        given.hidden[~given.mask] = 9.0
        assert torch.equal(model.predict(x, t, given), expected)
        for row in range(3):
            one = model.predict(x[row : row + 1], t, model.encode([PROMPTS[row]]))
            torch.testing.assert_close(one, expected[row : row + 1], rtol=1e-5, atol=1e-5)


def test_a_long_prompt_is_cut_where_stock_cuts_it(name: str, saved: Saved) -> None:
    case, size = CASES[name], CASES[name].sizes[0]
    assert load_model(saved(name), trainable=False).encode([LONG]).hidden.shape[1] == 512
    theirs = stock_picture(stock_pipe(saved(name)), LONG, SEED, **case.call(size, 2, case.plain))
    ours = api.generate(str(saved(name)), [LONG], [SEED], case.overrides(size, 2, case.plain))
    assert (ours - theirs).abs().max() < 1e-4
