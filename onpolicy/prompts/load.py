"""The two lists of prompts of a run: to train on, and held out."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onpolicy.prompts.config import DEFAULT_WORD_PROBLEMS, WORD_PROBLEMS, PromptsConfig, SourceConfig
from onpolicy.prompts.examples import Example, content_hash, find_columns, to_example
from onpolicy.prompts.sources import read_rows
from onpolicy.prompts.templates import encode_completion, end_of_turn_id, prepare_tokenizer, read_chat_template, render
from onpolicy.prompts.word_problems import word_problems
from onpolicy.seeds import derive
from onpolicy.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_HELDOUT_SHARE = 16  # one word problem in so many belongs to the held-out side
_MOST_REPEATS = 20  # word problems drawn for each new one before the generator counts as exhausted


def load_prompts(
    config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, *, model_limit: int | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, templated and tokenised.

    No prompt is on both sides, nor twice on one, up to case and white space; of several rows with the same prompt
    the first counts. ``model_limit`` is the longest prompt the models leave room for (context less completion).
    The tokenizer takes over ``config.chat_template`` if that is set.

    Raises FileNotFoundError and ValueError as :func:`load_examples` does, and ValueError for a missing chat template
    or a prompt too long.
    """
    prepare_tokenizer(tokenizer, config.template, config.chat_template)
    train, heldout = load_examples(config)
    limit = config.max_prompt_tokens if model_limit is None else min(config.max_prompt_tokens, model_limit)
    return _encode_all(train, config, tokenizer, limit), _encode_all(heldout, config, tokenizer, limit)


def check_source(config: PromptsConfig) -> None:
    """Everything about the prompts that can be checked before a tokenizer is there; raises as load_prompts would."""
    if config.chat_template is not None:
        read_chat_template(config.chat_template)
    load_examples(config)


def load_examples(config: PromptsConfig) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, disjoint and without duplicates.

    Held out are, of a data set, the rows with the smallest content hashes, and of the word problems those whose
    instance (story and numbers, whoever is in it) hashes to a sixteenth of the range: the same stories, never the
    same instance. Neither depends on the seed, on ``size`` or on the order of rows, and a smaller held-out set is
    contained in a larger one of the same source.

    Raises FileNotFoundError for a missing source and ValueError for an empty one, columns that cannot be told, a
    row that cannot be read, or fewer prompts than asked for.
    """
    sources = config.sources()
    weights = [source.weight for source in sources]
    train_sizes = _shares(config.size, weights) if config.size is not None else [None] * len(sources)
    pools = [None if source.source == WORD_PROBLEMS else _read_examples(source) for source in sources]
    heldout = _load_heldout(config, sources, pools, _shares(config.heldout_size, weights))
    taken = {key for example in heldout for key in _keys(example)}
    train: list[Example] = []
    for source, pool, size in zip(sources, pools, train_sizes, strict=True):
        if pool is None:
            fresh = _generate(config.seed, "train", DEFAULT_WORD_PROBLEMS if size is None else size, taken)
        else:
            fresh = _sample([e for e in pool if taken.isdisjoint(_keys(e))], size, source, config)
        train += fresh
        taken.update(example.key for example in fresh)
    return train, heldout


def _load_heldout(
    config: PromptsConfig, sources: Iterable[SourceConfig], pools: list[list[Example] | None], sizes: list[int]
) -> list[Example]:
    if config.heldout_size == 0:
        return []
    own = config.heldout()
    if own is not None and own.source != WORD_PROBLEMS:
        return _smallest_hashes(_read_examples(own), config.heldout_size)
    if own is not None:
        return _generate(0, "heldout", config.heldout_size, set())
    heldout: list[Example] = []
    for source, pool, size in zip(sources, pools, sizes, strict=True):
        taken = {key for example in heldout for key in _keys(example)}
        if pool is None:
            heldout += _generate(0, "heldout", size, taken)
            continue
        if size >= len(pool):
            raise ValueError(
                f"{source.source} has {len(pool)} distinct prompts: holding out {size} leaves none to train on; "
                "lower prompts.heldout_size or set prompts.heldout_split"
            )
        heldout += _smallest_hashes([e for e in pool if taken.isdisjoint(_keys(e))], size)
    return heldout


def _read_examples(source: SourceConfig) -> list[Example]:
    """Every distinct example of a data set, in its order."""
    rows = read_rows(source)
    names: Any = getattr(rows, "column_names", None) or list(dict.fromkeys(name for row in rows for name in row))
    columns = find_columns(source, names)
    label = Path(source.source).name
    distinct: dict[str, Example] = {}
    for number, row in enumerate(rows, start=1):
        example = to_example(row, columns, f"{label} row {number}")
        distinct.setdefault(example.key, example)
    return list(distinct.values())


def _generate(seed: int, side: str, size: int, taken: set[str]) -> list[Example]:
    """``size`` distinct word problems of one side, "train" or "heldout", none of whose keys is in ``taken``."""
    seen = set(taken)
    examples = list(islice(_new_word_problems(seed, side, seen, size * _HELDOUT_SHARE * _MOST_REPEATS), size))
    if len(examples) < size:
        setting = "prompts.size" if side == "train" else "prompts.heldout_size"
        raise ValueError(f"the built-in source has only {len(examples)} {side} prompts: lower {setting} ({size})")
    return examples


def _new_word_problems(seed: int, side: str, seen: set[str], attempts: int) -> Iterator[Example]:
    for number, problem in enumerate(islice(word_problems(seed), attempts), start=1):
        if (int(content_hash(problem.instance), 16) % _HELDOUT_SHARE == 0) != (side == "heldout"):
            continue
        message = {"role": "user", "content": problem.question}
        origin = f"{WORD_PROBLEMS} {number}"
        example = Example((message,), origin, str(problem.answer), problem.solution, problem.instance)
        if example.key not in seen:
            seen.add(example.key)
            yield example


def _keys(example: Example) -> set[str]:
    return {example.key} | ({example.instance} if example.instance else set())


def _smallest_hashes(examples: list[Example], size: int) -> list[Example]:
    if size > len(examples):
        raise ValueError(
            f"only {len(examples)} distinct prompts to hold out, prompts.heldout_size asks for {size}: lower it"
        )
    return sorted(examples, key=lambda example: content_hash("heldout\n" + example.key))[:size]


def _sample(examples: list[Example], size: int | None, source: SourceConfig, config: PromptsConfig) -> list[Example]:
    """``size`` of the examples in their own order: drawn at random if the run shuffles, else the first ones."""
    if not examples:
        raise ValueError(f"{source.source}: every prompt is held out, none is left to train on")
    if size is None:
        return examples
    if size > len(examples):
        raise ValueError(
            f"{source.source} has {len(examples)} distinct training prompts, {size} are asked for: lower prompts.size "
            "or leave it unset"
        )
    if not config.shuffle:
        return examples[:size]
    chosen = random.Random(derive(config.seed, "prompts", source.source)).sample(range(len(examples)), size)
    return [examples[index] for index in sorted(chosen)]


def _shares(total: int, weights: list[float]) -> list[int]:
    """``total`` divided by the weights into whole numbers that add up to it."""
    edges = [round(total * sum(weights[:index]) / sum(weights)) for index in range(len(weights) + 1)]
    return [after - before for before, after in pairwise(edges)]


def _encode_all(
    examples: list[Example], config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[Prompt]:
    has_completions = any(example.completion is not None for example in examples)
    end_id = end_of_turn_id(tokenizer, config.template) if has_completions else -1
    prompts = [_encode(example, config, tokenizer, end_id) for example in examples]
    kept = []
    for example, prompt in zip(examples, prompts, strict=True):
        if len(prompt.token_ids) <= limit:
            kept.append(prompt)
        elif config.too_long == "error":
            raise ValueError(
                f"the prompt of {example.origin} is {len(prompt.token_ids)} tokens long, {limit} are allowed (the "
                "lower of prompts.max_prompt_tokens and the room the models leave beside a completion): raise "
                "prompts.max_prompt_tokens, shorten the completions, or set prompts.too_long to drop"
            )
    if len(kept) < len(prompts):
        logger.warning("dropped %d of %d prompts longer than %d tokens", len(prompts) - len(kept), len(prompts), limit)
    if examples and not kept:
        raise ValueError(f"all {len(examples)} prompts are longer than {limit} tokens: raise prompts.max_prompt_tokens")
    return kept


def _encode(example: Example, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, end_id: int) -> Prompt:
    messages = example.messages
    if config.system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": config.system}, *messages)
    completion = None
    if example.completion is not None:
        completion = tuple(encode_completion(tokenizer, example.completion, end_id, config.template))
    return Prompt(example.id, tuple(render(tokenizer, messages, config.template)), example.answer, completion)
