"""What model.quantize refuses, by name, before any weights are loaded; without the packages that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftplus.config import ModelConfig, load_config
from draftplus.config.check import check
from draftplus.errors import UserError
from draftplus.evaluation.generate import TUNED
from draftplus.evaluation.targets import find_targets
from draftplus.models import quantize
from tests.tiny import CPU

CUDA = torch.device("cuda")


@pytest.mark.parametrize("kind", quantize.BACK_ENDS)
def test_full_fine_tuning_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=rf"model.quantize is {kind}, but model.lora is null.* model.quantize=null"):
        check(load_config(None, [f"model.quantize={kind}", "model.lora=null"]))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.quantize is 'int4'.*int8"):
        check(load_config(None, ["model.quantize=int4"]))


@pytest.mark.parametrize(("kind", "package"), quantize.BACK_ENDS.items())
def test_a_missing_package_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    wanted = rf"model.quantize is {kind}, which needs {package}; run: pip install 'draftplus\[quantize\]'"
    with pytest.raises(UserError, match=wanted):
        quantize.refuse_impossible(ModelConfig(quantize=kind), CUDA, False)
    quantize.refuse_impossible(ModelConfig(), CPU, True)  # nothing is asked for


def test_nf4_wants_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"nf4, .* CUDA device alone, but the device is cpu; use model.quantize=int8"):
        quantize.refuse_impossible(ModelConfig(quantize="nf4"), CPU, False)
    quantize.refuse_impossible(ModelConfig(quantize="nf4"), CUDA, False)


def test_a_single_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"'a.safetensors' is a single file, .* model.quantize=null"):
        quantize.refuse_impossible(ModelConfig("a.safetensors", quantize="int8"), CPU, True)


def test_evaluation_tells_quantised_models_apart(small: Path) -> None:
    plain, quantised = (find_targets([str(small)], more, TUNED)[0] for more in ([], ["model.quantize=int8"]))
    assert plain.hash != quantised.hash
