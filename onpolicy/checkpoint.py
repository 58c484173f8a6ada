"""Checkpoints that are whole or absent: written aside, checked by digest, renamed into place.

``checkpoints/step-N/`` holds ``state.pt`` (trained weights in float32, optimizer, schedule, random states, prompt
cursor, progress; loadable with ``weights_only=True``) and ``manifest.json`` (its SHA-256 and size).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

STATE, MANIFEST = "state.pt", "manifest.json"


class DiskFullError(OSError):
    """No space left while saving; earlier checkpoints are untouched."""


def sync_to_disk(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that appears at ``path`` complete, or not at all. Raises DiskFullError when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with disk_errors(path):
            with open(scratch, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
            sync_to_disk(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within, a full disk is a DiskFullError naming ``path``, whatever the writer makes of it; all else passes."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not _no_space(path, error):
            raise
        raise DiskFullError(
            errno.ENOSPC,
            f"no space left while writing '{path}'; earlier checkpoints are intact: free some space, or lower "
            "checkpoint.keep, and continue with --resume",
        ) from error


def _no_space(path: Path, error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if "No space left on device" in str(error):  # as safetensors says it
        return True
    # torch.save only says that it failed to write.
    existing = next(parent for parent in [path, *path.resolve().parents] if parent.exists())
    return isinstance(error, RuntimeError) and shutil.disk_usage(existing).free < 1 << 20


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


class CheckpointStore:
    """The checkpoints of one run, newest last."""

    def __init__(self, directory: Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {keep}")
        self.directory, self.keep = directory, keep

    def all(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"), key=_step)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write ``step-N`` atomically, then drop what is older than the newest ``keep``."""
        target = self.directory / f"step-{step}"
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".saving-*"):  # of a process killed while it saved
            shutil.rmtree(leftover)
        scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=self.directory))
        try:
            with disk_errors(target):
                self._write(scratch, state)
                if target.exists():
                    shutil.rmtree(target)
                scratch.rename(target)
                sync_to_disk(self.directory)
        except Exception:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)
        return target

    @staticmethod
    def _write(directory: Path, state: dict[str, Any]) -> None:
        path = directory / STATE
        torch.save(state, path)
        sync_to_disk(path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        (directory / MANIFEST).write_text(json.dumps({"sha256": digest, "bytes": path.stat().st_size}))
        sync_to_disk(directory / MANIFEST)
        sync_to_disk(directory)

    def load_latest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest checkpoint whose digest is right, and a warning for each damaged one passed over.

        Raises ValueError when there are checkpoints and none of them is whole.
        """
        warnings: list[str] = []
        found = self.all()
        for directory in reversed(found):
            problem = self._problem(directory)
            if problem is None:
                return torch.load(directory / STATE, map_location="cpu", weights_only=True), warnings
            warnings.append(f"checkpoint {directory} is damaged ({problem}); falling back to the one before it")
        if found:
            raise ValueError(
                f"no checkpoint in '{self.directory}' is whole: {'; '.join(warnings)}. "
                "Start again with another --name, or delete the run's directory"
            )
        return None, warnings

    @staticmethod
    def _problem(directory: Path) -> str | None:
        try:
            manifest = json.loads((directory / MANIFEST).read_text())
            with open(directory / STATE, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            return f"{Path(str(error.filename)).name} is missing"
        except json.JSONDecodeError:
            return f"{MANIFEST} is not JSON"
        return None if digest == manifest.get("sha256") else f"{STATE} does not match its digest"
