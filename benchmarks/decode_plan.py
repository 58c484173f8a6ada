"""What benchmarks/decode.py measures: the sides, and the prompts that all of them decode, as token ids."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COPY_INSTRUCTION = "Repeat the following text exactly:"
_COPY_SEED = 1  # of the word problems whose sentences are copied
_COPIES = 2  # of a passage in the prompt, after the first


@dataclass(frozen=True)
class Side:
    """An engine with one way of drafting."""

    engine: str  # ours, ours-int8, ours-int4 (the target quantised), transformers, vllm, llama.cpp
    drafter: str = (
        "none"  # none, draft (the draft model), ngram, suffix, ngram+draft (the model where there is no match)
    )
    adaptive: bool = False  # the length from measured costs and acceptance; else the fixed one

    @property
    def name(self) -> str:
        """For example ours.plain, ours.draft, ours.draft.auto."""
        drafter = "plain" if self.drafter == "none" else self.drafter
        return f"{self.engine}.{drafter}" + (".auto" if self.adaptive else "")

    @property
    def plain(self) -> Side:
        """The same engine without drafts."""
        return Side(self.engine)

    @property
    def needs_model(self) -> bool:
        """Whether it drafts with the draft model."""
        return "draft" in self.drafter

    def decodes(self, workload: str, batch: int) -> bool:
        """Text is copied to see what looking it up gains: the draft model alone is left out there.

        transformers assists one sequence at a time, and llama_cpp's ``generate`` decodes one.
        """
        alone = self.engine == "llama.cpp" or (self.engine == "transformers" and self.drafter != "none")
        return not (workload == "copy" and self.drafter == "draft") and not (alone and batch > 1)


_OURS = [Side("ours", d, a) for d in ("draft", "ngram", "suffix", "ngram+draft") for a in (False, True)]
_QUANTISED = [
    side
    for engine in ("ours-int8", "ours-int4")
    for side in (Side(engine), Side(engine, "draft"), Side(engine, "draft", adaptive=True))
]
_PEERS = [Side(engine, drafter) for engine in ("transformers", "vllm") for drafter in ("none", "draft", "ngram")]
SIDES = [Side("ours"), *_OURS, *_QUANTISED, *_PEERS, Side("llama.cpp")]


def select(patterns: Sequence[str] | None) -> list[Side]:
    """The sides that any of the shell-style patterns names, all without patterns.

    Raises ValueError for a pattern that names none.
    """
    if patterns is None:
        return SIDES
    for pattern in patterns:
        if not any(fnmatchcase(side.name, pattern) for side in SIDES):
            names = ", ".join(side.name for side in SIDES)
            raise ValueError(f"--only {pattern}: names no side; choose among {names}, or patterns such as 'ours.*'")
    return [side for side in SIDES if any(fnmatchcase(side.name, pattern) for pattern in patterns)]


def missing(side: Side, gguf: str | None) -> str | None:
    """Why a side cannot be measured here; None when it can."""
    module = {"vllm": "vllm", "llama.cpp": "llama_cpp"}.get(side.engine)
    if module is not None and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if side.engine == "llama.cpp" and gguf is None:
        return "no GGUF file of this target: pass --gguf"
    return None


@dataclass(frozen=True)
class Cell:
    """Prompts to decode ``batch`` at a time, at one temperature."""

    workload: str  # problems, data, copy
    temperature: float
    batch: int
    prompts: list[list[int]]  # token ids, chat template applied; a multiple of ``batch``


@dataclass(frozen=True)
class Plan:
    """What a measured process is given: one round."""

    target: str  # directory
    draft: str | None  # directory; None where no side drafts with a model
    gguf: str | None  # of the target, for llama.cpp
    tokens: int  # new tokens of every prompt, end tokens or not
    draft_length: int  # of the draft model and of ngram+draft
    lookup_length: int  # of ngram and suffix
    seed: int
    cells: list[Cell]

    def length(self, side: Side) -> int:
        """Fixed draft length of a side."""
        return self.draft_length if side.needs_model else self.lookup_length

    @property
    def longest(self) -> int:
        """Tokens of the longest text, with the drafts behind it."""
        prompts = (len(ids) for cell in self.cells for ids in cell.prompts)
        return max(prompts) + self.tokens + max(self.draft_length, self.lookup_length) + 1

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        fields = json.loads(path.read_text())
        return cls(**fields | {"cells": [Cell(**cell) for cell in fields["cells"]]})


def cells(
    workloads: dict[str, list[list[int]]],
    temperatures: Sequence[float],
    batches: Sequence[int],
    prompts: int,
    turn: int,
) -> list[Cell]:
    """Every combination, with the prompts of round ``turn``: at least ``prompts``, in whole batches.

    Rounds go through a workload's prompts in order, and begin again where they end.
    """
    found = []
    for workload, ids in workloads.items():
        for batch in batches:
            count = -(-prompts // batch) * batch
            chosen = [ids[(turn * count + i) % len(ids)] for i in range(count)]
            found += [Cell(workload, temperature, batch, chosen) for temperature in temperatures]
    return found


def problem_prompts(tokenizer: PreTrainedTokenizerBase, data: str | None, count: int, room: int) -> list[list[int]]:
    """Templated prompts of at most ``room`` tokens: the held-out word problems, or those of the file ``data``.

    Held out: none of them is a prompt that the quickstart's student was trained on. A file may have fewer than
    ``count``. Raises ValueError or FileNotFoundError as :func:`onpolicy.prompts.load_prompts` does.
    """
    from onpolicy.prompts import PromptsConfig, load_prompts

    if data is None:
        config = PromptsConfig(size=1, heldout_size=count, max_prompt_tokens=room)
        prompts = load_prompts(config, tokenizer)[1]
    else:
        config = PromptsConfig(source=data, heldout_size=0, shuffle=False, max_prompt_tokens=room)
        prompts = load_prompts(config, tokenizer)[0][:count]
    return [list(prompt.token_ids) for prompt in prompts]


def copy_prompts(tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, room: int) -> list[list[int]]:
    """Templated conversations in which a passage has been repeated twice and a third time is begun.

    What is left of it has at least ``tokens`` tokens, so that copying takes the whole completion. A small model that is
    asked once soon goes astray when it samples, and then the task would not be one of copying. Passages share no
    sentence. Raises ValueError where such a prompt has more than ``room`` tokens.
    """
    from onpolicy.prompts import render

    prompts = []
    for passage in islice(passages(statements(), tokenizer, tokens), count):
        text = " ".join(passage)
        messages = [{"role": "user", "content": f"{COPY_INSTRUCTION}\n\n{text}"}]
        for _ in range(_COPIES):
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Repeat it once more."}]
        begun = tokenizer(passage[0], add_special_tokens=False)["input_ids"]
        prompts.append([*render(tokenizer, messages), *begun])
        if len(prompts[-1]) > room:
            raise ValueError(
                f"a prompt that asks for {tokens} tokens to be copied has {len(prompts[-1])}, and the model leaves "
                f"room for {room}: lower --tokens"
            )
    return prompts


def statements() -> Iterator[str]:
    """Sentences of the built-in word problems, each once, without the questions: a model would answer those."""
    from onpolicy.prompts import word_problems

    seen: set[str] = set()
    for problem in word_problems(_COPY_SEED):
        for sentence in re.findall(r"[^.?]+[.?](?= |$)", problem.question):
            if sentence.endswith(".") and sentence not in seen:
                seen.add(sentence)
                yield sentence.strip()


def passages(sentences: Iterator[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[list[str]]:
    """Consecutive sentences that have at least ``tokens`` tokens without the first of them."""
    passage: list[str] = []
    for sentence in sentences:
        passage.append(sentence)
        if len(tokenizer(" ".join(passage[1:]), add_special_tokens=False)["input_ids"]) >= tokens:
            yield passage
            passage = []
