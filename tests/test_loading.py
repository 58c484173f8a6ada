"""Damaged model directories: one line that names the file's fault, never random weights, a traceback or a 500."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spec import loading
from tests.conftest import make_model

FLOAT = loading.ModelOptions("float32")
WEIGHTS, INNER = "model.safetensors", "model.layers.1.mlp.up_proj.weight"


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def _config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _halved(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return damage


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (_weights(lambda tensors: tensors.pop(INNER)), f"lacks the weight {INNER}: "),
    "more missing": (
        _weights(lambda tensors: [tensors.pop(k) for k in list(tensors)[:3]]),
        "and 3 more: ",
    ),  # the tied pair is two names
    "truncated": (_halved(WEIGHTS), "damaged"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "damaged"),
    "shape": (_weights(lambda tensors: tensors.update({INNER: torch.zeros(3, 3)})), "damaged"),
    "config of another": (_config(vocab_size=100), "do not belong together"),
    "config of nothing": (_config(hidden_act="none such"), "damaged"),
    "config type": (_config(num_hidden_layers="x"), "damaged"),
}
TOKENIZERS = {
    "empty object": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "truncated": _halved("tokenizer.json"),
    "missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "no object": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer) -> Path:
    return make_model(tmp_path_factory.mktemp("whole") / "model", tokenizer, layers=2)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.mark.parametrize(("damage", "message"), MODELS.values(), ids=MODELS)
def test_a_damaged_model_is_refused_with_a_remedy(damage, message: str, copy) -> None:
    damage(copy)
    with pytest.raises(ValueError) as refused:
        loading.open_target(str(copy), FLOAT)
    assert message in str(refused.value) and "copy or save it again" in str(refused.value)


@pytest.mark.parametrize("damage", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_damaged_tokenizer_is_refused_with_a_remedy(damage, copy) -> None:
    damage(copy)
    with pytest.raises(ValueError, match="(?s)cannot load the tokenizer of .*copy or save them again"):
        loading.open_tokenizer(str(copy))


@pytest.mark.parametrize("tied", (True, False))
def test_whole_models_load_tied_or_not(tied: bool, tmp_path, tokenizer) -> None:
    """Tied weights are stored once: the second name is not missing."""
    folder = make_model(tmp_path / "model", tokenizer, layers=1, tied=tied)
    assert ("lm_head.weight" in load_file(folder / WEIGHTS)) is not tied
    assert loading.open_target(str(folder), FLOAT).vocab_size == len(tokenizer)
