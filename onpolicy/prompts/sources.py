"""Rows of a data set, from a local file or folder or from a hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onpolicy.prompts.config import WORD_PROBLEMS, SourceConfig

Row = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".json", ".parquet")
_SPLIT_NAMES = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_rows(source: SourceConfig) -> Sequence[Row]:
    """All rows of a source that is not built in.

    What exists as a local path is read locally, without any look-up on a hub; only what cannot be a path is asked
    of the hub. Raises FileNotFoundError for a missing file, folder or hub dataset, and ValueError for an unreadable
    or empty one.
    """
    path = Path(source.source).expanduser()
    if path.is_dir():
        rows = _read_folder(path, source)
    elif path.is_file():
        if source.split or source.subset:
            raise ValueError(f"{path} is one file, which has no split or subset: leave prompts.split and .subset unset")
        rows = read_file(path)
    elif _looks_local(source.source):
        raise FileNotFoundError(f"there is no file or folder {source.source} (looked in {Path.cwd()})")
    else:
        rows = _read_hub(source)
    if len(rows) == 0:
        raise ValueError(f"{source.source} has no rows: a data set needs at least one")
    return rows


def read_file(path: Path) -> Sequence[Row]:
    """Rows of one .jsonl, .json (a list of objects) or .parquet file. Raises ValueError if it is none of these."""
    if path.suffix == ".jsonl":
        return list(_read_jsonl(path))
    if path.suffix == ".json":
        return _read_json(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    raise ValueError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use one of {', '.join(_SUFFIXES)}")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _as_row(_parse_json(line, f"{path} line {number}"), f"{path} line {number}")


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    content = _parse_json(text, str(path)) if text.strip() else []
    if not isinstance(content, list):
        raise ValueError(
            f"{path} must hold a list of objects, found {type(content).__name__}; for one object a line name it .jsonl"
        )
    return [_as_row(row, f"{path} row {number}") for number, row in enumerate(content, start=1)]


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object with named columns, found {type(value).__name__}")
    return value


def _read_folder(folder: Path, source: SourceConfig) -> Sequence[Row]:
    """A data set saved by ``datasets.save_to_disk``, or all files of a split."""
    folder = folder / source.subset if source.subset else folder
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} (prompts.subset names a sub-folder)")
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _read_saved(folder, source.split)
    files = sorted(file for file in folder.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    return [row for file in _files_of_split(folder, files, source.split) for row in read_file(file)]


def _files_of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files with the split's name in theirs or their folder's; all of them if none is named after a split."""
    if not files:
        raise FileNotFoundError(f"{folder} holds no {', '.join(_SUFFIXES)} file")
    named = {file: set(re.split(r"[-_./]", file.relative_to(folder).as_posix())) for file in files}
    chosen = [file for file in files if (split or "train") in named[file]]
    if chosen:
        return chosen
    if split is None and not any(words & set(_SPLIT_NAMES) for words in named.values()):
        return files
    listing = ", ".join(str(file.relative_to(folder)) for file in files[:8])
    raise ValueError(f"{folder} has no files of split {split or 'train'!r} (found {listing}): set prompts.split")


def _read_saved(folder: Path, split: str | None) -> Sequence[Row]:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        split = split or "train"
        if split not in saved:
            raise ValueError(f"{folder} has no split {split!r} (found {', '.join(saved)}): set prompts.split")
        return saved[split]
    if split:
        raise ValueError(f"{folder} is one saved split: leave prompts.split unset")
    return saved


def _looks_local(source: str) -> bool:
    return Path(source).suffix in _SUFFIXES or _HUB_ID.fullmatch(source) is None


def _read_hub(source: SourceConfig) -> Sequence[Row]:
    import datasets

    split = source.split or "train"
    name = f"{source.source!r}" + (f" ({source.subset})" if source.subset else "")
    try:
        return datasets.load_dataset(source.source, source.subset, split=split)
    except OSError as error:  # includes "not found" and every form of "no connection"
        raise FileNotFoundError(
            f"cannot get the data set {name}, which is no local path, from the Hugging Face hub: {error}. Check the "
            f"spelling and the connection, give a local .jsonl or .parquet file, or use {WORD_PROBLEMS!r} (built in)"
        ) from error
    except ValueError as error:  # an unknown subset or split; the message lists those there are
        raise ValueError(f"cannot read split {split!r} of {name}: {error}. Set prompts.subset and .split") from error
