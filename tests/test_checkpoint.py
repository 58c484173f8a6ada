"""A checkpoint is whole or absent, and a damaged one is noticed."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from onpolicy.checkpoint import CheckpointStore, DiskFullError, atomic_file, disk_errors
from onpolicy.metrics import JsonLines
from onpolicy.rollouts.files import load_rollouts, save_rollouts
from onpolicy.types import Prompt, Rollout


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 10):
        store.save(step, {"step": step, "weights": torch.full((3,), float(step))})
    return store


def test_newest_is_loaded_and_old_ones_go(store) -> None:
    state, warnings = store.load_latest()
    assert state is not None and state["step"] == 10 and torch.equal(state["weights"], torch.full((3,), 10.0))
    assert warnings == [] and [p.name for p in store.all()] == ["step-2", "step-10"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "no state", "no manifest", "bad manifest"])
def test_damage_falls_back_to_the_one_before_and_says_so(store, damage) -> None:
    directory = store.directory / "step-10"
    state = directory / "state.pt"
    if damage == "flip":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "truncate":
        state.write_bytes(state.read_bytes()[:-9])
    elif damage == "no state":
        state.unlink()
    elif damage == "no manifest":
        (directory / "manifest.json").unlink()
    else:
        (directory / "manifest.json").write_text("{")
    loaded, warnings = store.load_latest()
    assert loaded is not None and loaded["step"] == 2
    assert len(warnings) == 1 and "step-10 is damaged" in warnings[0]


def test_nothing_whole_is_an_error_with_a_remedy(store) -> None:
    for directory in store.all():
        (directory / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint .* is whole.*another --name"):
        store.load_latest()


def test_no_checkpoint_is_no_error(tmp_path) -> None:
    assert CheckpointStore(tmp_path / "none").load_latest() == (None, [])


def test_what_a_killed_save_left_is_removed(store) -> None:
    leftover = store.directory / ".saving-abc"
    leftover.mkdir()
    (leftover / "state.pt").write_bytes(b"half")
    store.save(11, {"step": 11})
    assert not leftover.exists() and store.load_latest()[0] == {"step": 11}


def test_a_full_disk_keeps_the_last_good_checkpoint(store, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="free some space"):
        store.save(20, {"step": 20})
    monkeypatch.undo()
    assert store.load_latest()[0]["step"] == 10  # type: ignore[index]
    assert not list(store.directory.glob(".saving-*"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["file", "quota", "safetensors"],
)
def test_a_full_disk_is_recognised_whoever_writes(error, tmp_path) -> None:
    with pytest.raises(DiskFullError, match="while writing '.*st'.*free some space"), disk_errors(tmp_path / "st"):
        raise error
    for other in (PermissionError("no"), RuntimeError("shapes"), DiskFullError(errno.ENOSPC, "as it was")):
        with pytest.raises(type(other), match=str(other.args[-1])), disk_errors(tmp_path):
            raise other


def test_a_failed_write_on_a_full_disk_is_one(tmp_path, monkeypatch) -> None:
    """torch.save does not say why."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(DiskFullError), disk_errors(tmp_path / "not" / "there"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


def test_a_kill_while_the_metrics_are_opened_loses_no_line(tmp_path, monkeypatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("1\n2\n3\n")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", killed)
        JsonLines(path, keep=2)
    assert path.read_text() == "1\n2\n3\n"
    JsonLines(path, keep=2).write({})
    assert path.read_text() == "1\n2\n{}\n"


def test_atomic_file_leaves_the_old_content_when_writing_fails(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with atomic_file(path) as file:
        file.write("new")
    assert path.read_text() == "new"


def test_rollouts_survive_the_disk_bit_for_bit(tmp_path) -> None:
    logprobs = np.array([-1 / 3, -1e-30, np.nan], np.float32)
    rollouts = [
        Rollout(Prompt("a", (1, 2), "42", (3, 2)), np.array([7, 8, 2]), logprobs, "stop", 5, 1, "teacher"),
        Rollout(Prompt("b", (9,)), np.array([1]), np.array([-2.5], np.float32), "length", 0),
    ]
    save_rollouts(tmp_path / "r.jsonl", rollouts)
    loaded = load_rollouts(tmp_path / "r.jsonl")
    for before, after in zip(rollouts, loaded, strict=True):
        assert before.prompt == after.prompt
        np.testing.assert_array_equal(before.completion_ids, after.completion_ids)
        np.testing.assert_array_equal(before.logprobs.view(np.int32)[:2], after.logprobs.view(np.int32)[:2])
        assert (before.finish_reason, before.policy_version, before.sample_index, before.source) == (
            after.finish_reason, after.policy_version, after.sample_index, after.source
        )  # fmt: skip
