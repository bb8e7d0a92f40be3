"""A user's own reward by `package.module:object`."""

import itertools
import sys

import pytest
import torch

from draftplus.errors import UserError
from draftplus.rewards.custom import load_custom

SOURCE = """
import torch

def brightness(images, prompts, scale=1.0):
    return scale * images.mean(dim=(1, 2, 3))

def file_size(images, prompts):
    return torch.zeros(len(images))
file_size.differentiable = False

def on_device(images, prompts, device):
    return images.mean(dim=(1, 2, 3)) + (0 if device == "cpu" else 1)

class Redness:
    def __init__(self, channel=0, path=None, dtype=None):
        self.channel, self.path, self.dtype = channel, path, dtype
    def __call__(self, images, prompts):
        return images[:, self.channel].mean(dim=(1, 2))

class Measured:
    differentiable = False
    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3))

blueness = Redness(2)

def make(channel):
    return Redness(channel)

def make_measured():
    return lambda images, prompts: images.mean(dim=(1, 2, 3))
make_measured.differentiable = False

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
    def forward(self, images, prompts):
        return self.scale * images.mean(dim=(1, 2, 3))

def weighted(images: torch.Tensor, prompts: list[str], red: float = 1.0):
    return red * images[:, 0].mean(dim=(1, 2))

def loaded(images, prompts, path="own weights"):
    return images.new_tensor([float(path == "own weights")] * len(images))

def wrong_names(pictures, captions):
    return pictures

def makes_a_number():
    return 3

def fails():
    raise TypeError("inside the user's code")

number = 3
"""
modules = (f"my_rewards_{n}" for n in itertools.count())


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working directory, under a name of its own since imports are remembered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    name = next(modules)
    (tmp_path / f"{name}.py").write_text(SOURCE)
    return name


@pytest.fixture
def images():
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def load(spec, path=None, **args):
    return load_custom(spec, path, args, "cpu", torch.float32)


def test_a_function_is_the_reward_with_args_bound(module, images):
    mean = images.mean(dim=(1, 2, 3))
    assert torch.equal(load(f"{module}:brightness")(images, ["", ""]), mean)
    assert torch.equal(load(f"{module}:brightness", scale=3.0)(images, ["", ""]), 3.0 * mean)
    assert torch.equal(load(f"{module}:on_device")(images, ["", ""]), mean)


@pytest.mark.parametrize(
    ("name", "args", "channel"),
    [("Redness", {"channel": 1}, 1), ("Redness", {}, 0), ("make", {"channel": 2}, 2), ("blueness", {}, 2)],
)
def test_classes_factories_and_instances(module, images, name, args, channel):
    reward = load(f"{module}:{name}", **args)
    assert torch.equal(reward(images, ["", ""]), images[:, channel].mean(dim=(1, 2)))


def test_path_and_dtype_reach_a_class_that_names_them(module):
    made = load(f"{module}:Redness", path="weights").function
    assert (made.path, made.dtype) == ("weights", torch.float32)


@pytest.mark.parametrize(
    ("name", "differentiable"),
    [("brightness", True), ("file_size", False), ("Redness", True), ("Measured", False), ("make_measured", False)],
)
def test_differentiable_unless_said_otherwise(module, name, differentiable):
    assert load(f"{module}:{name}").differentiable is differentiable


def test_a_network_is_frozen(module):
    network = load(f"{module}:Network").function
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_a_package_in_the_working_directory(module, tmp_path, images):
    (tmp_path / f"pkg_{module}").mkdir()
    (tmp_path / f"pkg_{module}" / "scores.py").write_text(SOURCE)
    assert load(f"pkg_{module}.scores:brightness")(images, ["", ""]).shape == (2,)


@pytest.mark.parametrize(
    ("spec", "args", "words"),
    [
        ("{}", {}, "form package.module:object"),
        ("{}:", {}, "form package.module:object"),
        ("absent_{}:score", {}, "no module 'absent_"),
        ("{}:absent", {}, "has no 'absent'"),
        ("{}:number", {}, "is of type int: it must be"),
        (
            "{}:brightness",
            {"scal": 1.0},
            r":brightness' has no argument 'scal' \(args\.scal is 1\.0\): did you mean 'scale'",
        ),
        (
            "{}:file_size",
            {"unit": "kB"},
            r":file_size' has no argument 'unit' \(args\.unit is 'kB'\): it takes no arguments",
        ),
        ("{}:brightness", {"prompts": 1}, "has no argument 'prompts' .*: it takes scale"),
        ("{}:make", {}, ":make' needs an argument 'channel': add it to args"),
        ("{}:Redness", {"chanel": 1}, r"has no argument 'chanel' \(args\.chanel is 1\): did you mean 'channel'"),
        ("{}:wrong_names", {}, r"needs an argument 'pictures'(.|\n)*are named images and prompts is the reward"),
        ("{}:weighted", {"red": "much"}, ":weighted': args.red is 'much'; it must be a number"),
        ("{}:makes_a_number", {}, "returned an object of type int"),
    ],
)
def test_mistakes_are_named(module, spec, args, words):
    with pytest.raises(UserError, match=words):
        load(spec.format(module), **args)


def test_a_path_nobody_takes_is_refused(module):
    with pytest.raises(
        UserError, match=r"takes no path, but path is 'weights': remove it(.|\n)*a parameter named path"
    ):
        load(f"{module}:brightness", path="weights")


def test_without_a_path_its_own_default_stays(module, images):
    assert load(f"{module}:loaded")(images, ["", ""]).tolist() == [1, 1]
    assert load(f"{module}:loaded", path="others")(images, ["", ""]).tolist() == [0, 0]


def test_a_module_that_the_user_s_module_lacks_is_named(module, tmp_path):
    (tmp_path / f"needs_{module}.py").write_text("import surely_not_installed\n")
    with pytest.raises(UserError, match=r"line 1: ModuleNotFoundError: No module named 'surely_not_installed'"):
        load(f"needs_{module}:score")


def test_exceptions_of_the_user_s_code_pass_through(module):
    with pytest.raises(TypeError, match="inside the user's code"):
        load(f"{module}:fails")
