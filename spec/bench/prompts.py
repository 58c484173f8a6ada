"""Prompts of a data set as the target's token ids: JSON lines, JSON, Parquet, or anything ``datasets`` can load."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
Message = Mapping[str, str]

FIELDS = ("messages", "turns", "prompt", "question")  # the first that a row has
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """One prompt, chat template applied."""

    token_ids: tuple[int, ...]
    category: str | None = None  # where the data has one


@dataclass(frozen=True)
class Prompts:
    """What is measured, and what was not."""

    prompts: list[Prompt]
    too_long: int  # left out

    @property
    def categories(self) -> list[str]:
        """Those there are, by name."""
        return sorted({p.category for p in self.prompts if p.category is not None})


def load_prompts(
    rows: Sequence[Row],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int,
    count: int | None = None,
    seed: int = 0,
) -> Prompts:
    """``count`` prompts (None: all) of at most ``limit`` tokens, drawn at random, categories in proportion.

    Raises ValueError, naming ``source``, where a row has no prompt or none is short enough.
    """
    kept: list[Prompt] = []
    too_long = 0
    for i in mixed([_category(row) for row in rows], seed):
        ids = encode(tokenizer, conversation(rows[i], f"{source} row {i + 1}"))
        if len(ids) > limit:
            too_long += 1
            continue
        kept.append(Prompt(tuple(ids), _category(rows[i])))
        if len(kept) == count:
            break
    if not kept:
        raise ValueError(
            f"all {too_long} prompts of {source} are longer than {limit} tokens, the target's context less the text: "
            "shorten them, or lower --max-tokens"
        )
    return Prompts(kept, too_long)


def mixed(categories: Sequence[str | None], seed: int) -> list[int]:
    """A random order any beginning of which has the categories in about the proportions of the whole."""
    members: dict[str | None, list[int]] = defaultdict(list)
    for i, category in enumerate(categories):
        members[category].append(i)
    draw = random.Random(seed)
    place: dict[int, float] = {}
    for indices in members.values():
        draw.shuffle(indices)
        offset = draw.random()
        place.update((i, (rank + offset) / len(indices)) for rank, i in enumerate(indices))
    return sorted(place, key=place.__getitem__)


def conversation(row: Row, where: str) -> list[Message]:
    """The messages up to where the assistant is to speak. Raises ValueError for a row without any, naming ``where``."""
    name = next((field for field in FIELDS if row.get(field) is not None), None)
    if name is None:
        raise ValueError(
            f"{where} has none of the fields {', '.join(FIELDS)} (found: {', '.join(row) or 'nothing'}): rename "
            "the one that holds the prompt"
        )
    value = row[name]
    if name == "turns":
        value = value[0] if isinstance(value, list) and value else ""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where}: {name} is empty; remove the row")
        return [{"role": "user", "content": value}]
    return _asked(value, f"{where}: {name}")


def _asked(value: Any, where: str) -> list[Message]:
    """A list of messages up to its last one that is not the assistant's."""
    ok = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not ok:
        raise ValueError(f'{where} must be a text or a list of {{"role": ..., "content": ...}} with texts')
    last = max((i for i, message in enumerate(value) if message["role"] != "assistant"), default=-1)
    if last < 0:
        raise ValueError(f"{where} has no message to answer; remove the row")
    return [{"role": m["role"], "content": m["content"]} for m in value[: last + 1]]


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids by the tokenizer's chat template, or without one of the texts joined by blank lines."""
    if not tokenizer.chat_template:
        return list(tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"])
    import jinja2

    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the target's chat template refuses a conversation of roles {roles}: {error}") from error
    return list(encoded["input_ids"])


def read_rows(source: str, split: str | None = None, subset: str | None = None) -> Sequence[Row]:
    """All rows of a local file or folder, which is never looked up anywhere, or of a hub id.

    Raises ValueError where it cannot be read or is empty.
    """
    rows = _read(source, split, subset)
    if not rows:
        raise ValueError(f"{source} has no rows: give a file with at least one prompt")
    return rows


def _read(source: str, split: str | None, subset: str | None) -> Sequence[Row]:
    path = Path(source).expanduser()
    if path.is_file():
        if split or subset:
            raise ValueError(f"{source} is one file, which has no split or subset: leave --split and --subset out")
        return _read_file(path)
    if path.is_dir():
        return _from_datasets(str(path), split, subset)
    if path.suffix in SUFFIXES or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"there is no file or folder {source}")
    return _from_datasets(source, split, subset)


def _read_file(path: Path) -> Sequence[Row]:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return list(_json_lines(text, path)) if path.suffix == ".jsonl" else _json_list(text, path)


def _json_lines(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _row(_parsed(line, f"{path} line {number}"), f"{path} line {number}")


def _json_list(text: str, path: Path) -> list[Row]:
    content = _parsed(text, str(path)) if text.strip() else []
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list of objects; for one object a line name it .jsonl")
    return [_row(row, f"{path} row {number}") for number, row in enumerate(content, 1)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object with named fields, found {type(value).__name__}")
    return value


def _from_datasets(source: str, split: str | None, subset: str | None) -> Sequence[Row]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if Path(source, "state.json").is_file() or Path(source, "dataset_dict.json").is_file():
            found: Any = datasets.load_from_disk(source)
        else:
            found = datasets.load_dataset(source, subset)
    except OSError as error:  # includes "not found" and every form of "no connection"
        raise ValueError(f"cannot load the data set {source!r}: {error}. Check the name, or give a file") from error
    if not isinstance(found, dict):
        return list(found)
    if split is None and len(found) > 1:
        raise ValueError(f"{source} has the splits {', '.join(found)}: choose one with --split")
    chosen = split or next(iter(found))
    if chosen not in found:
        raise ValueError(f"{source} has no split {chosen!r} (found {', '.join(found)}): choose one with --split")
    return list(found[chosen])


def _category(row: Row) -> str | None:
    value = row.get("category")
    return None if value is None else str(value)
