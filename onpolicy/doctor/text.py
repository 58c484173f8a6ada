"""Tokenizers, special tokens, chat templates and lengths: what goes wrong before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from onpolicy import checks
from onpolicy.doctor.findings import Finding
from onpolicy.evaluate.provenance import model_file
from onpolicy.prompts import load_prompts
from onpolicy.prompts.config import PromptsConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from onpolicy.types import Prompt

_PROBED_PROMPTS = 64
_NEAR = 0.9  # of the limit
_DROPPED = 0.1  # share of dropped prompts worth a warning


def vocabularies(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase | None, teacher_rows: int, student_rows: int
) -> Finding:
    """Same tokens under the same ids, and a row for each. ``student`` None: pruned from the teacher, same tokenizer."""
    name = "vocabularies"
    try:
        checks.check_vocabularies(teacher, student or teacher, teacher_rows, student_rows)
    except ValueError as error:
        found, _, remedy = str(error).partition(": ")
        cost = "every score of a token that means something else to the teacher is noise; training refuses to start"
        return Finding("error", name, found, cost, remedy)
    used = checks.used_ids(teacher)
    found = f"{used:,} tokens; the teacher has {teacher_rows:,} rows, the student {student_rows:,}"
    if teacher_rows == student_rows:
        return Finding("ok", name, found)
    return Finding(
        "note", name, found + ": padded differently, training leaves the padding out",
        "elsewhere a crash, or a few rows' mass compared with nothing (trl#2215, #3028, #6252)",
    )  # fmt: skip


def special_tokens(tokenizer: PreTrainedTokenizerBase, model: str, stops: Sequence[int], end_of_turn: int) -> Finding:
    """Where completions end: for this run, for the tokenizer, and for whoever serves the saved student.

    Args:
        model: checkpoint whose generation settings the saved student inherits.
        stops: the run's stop tokens. end_of_turn: what the chat template writes after an assistant's message.
    """
    name = "special tokens"
    named = lambda ids: " ".join(f"{tokenizer.convert_ids_to_tokens(i)}={i}" for i in ids) or "none"  # noqa: E731
    ends = generation_ends(model)
    found = f"turns end with {named([end_of_turn])}, this run at {named(stops)}, by generation_config at {named(ends)}"
    if ends and end_of_turn not in ends:
        return Finding(
            "warning", name, found,
            "a server that reads generation_config never stops the student at its end of turn: it runs on into an "
            "invented next turn, in every evaluation made that way",
            f"add {end_of_turn} to eos_token_id in generation_config.json of '{model}'",
        )  # fmt: skip
    if missed := sorted(set(ends) - set(stops)):
        return Finding(
            "warning", name, found,
            f"rollouts go on after {named(missed)}, where the model believes to have ended: the rest is noise that "
            "the teacher scores all the same",
            "make it the tokenizer's eos_token, or remove it from generation_config.json",
        )  # fmt: skip
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        state = "there is no padding token" if tokenizer.pad_token_id is None else "padding is the end token"
        return Finding(
            "note", name, f"{found}; {state}: harmless here, masks come from lengths",
            "trainers that mask by token id would never teach the student to stop",
        )  # fmt: skip
    return Finding("ok", name, found)


def generation_ends(model: str) -> list[int]:
    """End tokens of a checkpoint's generation settings, or of its configuration; [] where neither says."""
    for file in ("generation_config.json", "config.json"):
        path = model_file(model, file)
        stated: Any = json.loads(path.read_text()).get("eos_token_id") if path else None
        if stated is not None:
            return sorted(set(stated)) if isinstance(stated, list) else [stated]
    return []


def chat_templates(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase | None, config: PromptsConfig, available: int
) -> Finding:
    """Both templates must give the same ids on real prompts. ``available`` is how many training prompts there are."""
    name = "chat templates"
    if config.template == "plain":
        return Finding("ok", name, "not used (prompts.template: plain)")
    if "strftime_now" in str(teacher.chat_template):
        return Finding(
            "warning", name, "the template writes today's date into the prompt (strftime_now)",
            "prompts change overnight: a run resumed tomorrow, and the student's users, have other ones",
            "set prompts.chat_template to a copy with a fixed date",
        )  # fmt: skip
    if student is None:
        return Finding("ok", name, "the student is pruned from the teacher and keeps its template")
    settings = replace(config, size=min(available, _PROBED_PROMPTS), max_prompt_tokens=10**9, too_long="error")
    ours, theirs = load_prompts(settings, teacher)[0], load_prompts(settings, student)[0]
    different = sum(a.token_ids != b.token_ids for a, b in zip(ours, theirs, strict=True))
    if not different:
        return Finding("ok", name, f"teacher and student render {len(ours)} prompts to the same ids")
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a.token_ids != b.token_ids)
    return Finding(
        "error", name,
        f"teacher and student render {different} of {len(ours)} prompts differently, e.g. "
        f"{_difference(teacher, ours[first].token_ids, theirs[first].token_ids)}",
        "one of the two reads a format it never saw, which biases every score: +0.287 nats/token in tinker#796",
        "set prompts.chat_template to the teacher's template file",
    )  # fmt: skip


def _difference(tokenizer: PreTrainedTokenizerBase, ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Where two renderings part."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    show = lambda ids: repr(tokenizer.decode(list(ids[same : same + 8]))) if len(ids) > same else "nothing"  # noqa: E731
    return f"{show(ours)} against {show(theirs)} at token {same}"


def prompt_lengths(prompts: Sequence[Prompt], rows: int, limit: int) -> Finding:
    """How prompts relate to the longest allowed. ``rows``: how many there were before too long ones were dropped."""
    name, lengths = "prompt lengths", [len(prompt.token_ids) for prompt in prompts]
    near, dropped = sum(length > _NEAR * limit for length in lengths), rows - len(prompts)
    found = (
        f"{len(prompts):,} prompts, median {median(lengths):.0f} and at most {max(lengths)} tokens of {limit} allowed; "
        f"{near / len(prompts):.0%} near the limit, {dropped / rows:.0%} dropped"
    )
    if dropped > _DROPPED * rows:
        return Finding(
            "warning", name, found, "the student never learns on long prompts: they are missing from its training",
            "raise prompts.max_prompt_tokens, or lower sampling.max_tokens where the models' context is the limit",
        )  # fmt: skip
    return Finding("note" if dropped else "ok", name, found)
