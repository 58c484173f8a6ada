"""From the command line's options to an audit."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from spec import loading
from spec.audit.conditionals import Conditionals, LookupConditionals, ModelConditionals
from spec.audit.sample import EngineUnderAudit
from spec.audit.verdict import Fault, Verdict
from spec.params import Params

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from spec.audit.floor import Floor
    from spec.models.base import LanguageModel
    from spec.models.transformers_model import TransformersModel

TOLERANCE = 2e-3  # mass a token outside the support, at least, that is left to rounding unless the user says otherwise
PROMPTS = (
    "Explain why the sky is blue.", "Write a short story about a lighthouse keeper.", "What is 17 times 23?",
    "List three uses of a paper clip.", "Translate 'good morning' into French.", "Describe your favourite meal.",
    "How does a bicycle stay upright?", "Write a poem about winter.", "Give advice to a new teacher.",
    "What happened in 1969?", "Count from one to twenty.", "Repeat after me: red, green, blue, red, green, blue.",
)  # fmt: skip


def run(options: argparse.Namespace) -> Verdict:
    """Raises ValueError or OSError for what the options cannot mean."""
    if options.mode == "exact":
        return exact(options)
    import transformers

    from spec.allocator import keep_freed_memory

    keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = loading.open_tokenizer(options.target)
    prompts = _prompts(options, tokenizer)
    models = loading.ModelOptions(options.dtype, options.device)
    target = loading.open_target(options.target, models)
    conditionals = ModelConditionals(target)
    with open_engine(options, options.engine, options.draft, target, tokenizer) as engine:
        if options.mode == "samples":
            return _samples(options, engine, target, tokenizer, prompts)
        if options.mode == "greedy":
            return _greedy(options, engine, conditionals, prompts)
        return _statistical(options, engine, conditionals, prompts)


def _statistical(
    options: argparse.Namespace, engine: EngineUnderAudit, target: Conditionals, prompts: list[list[int]]
) -> Verdict:
    from dataclasses import replace

    from spec.audit.scoring import Scorer
    from spec.audit.statistical import Settings, Watch, audit, panel_for
    from spec.progress import status

    chosen = Params(temperature=options.temperature or 1.0, top_k=options.top_k, top_p=options.top_p)
    alone = options.temperature is not None or chosen != Params()
    if alone and options.temperature == 0:
        raise ValueError("--temperature 0 has no noise to test: use --mode greedy")
    panel = panel_for(engine, (chosen,)) if alone else panel_for(engine, vocabulary=target.vocab_size)
    settings = Settings(
        delta=options.delta, epsilon=options.epsilon, tokens=options.max_tokens_audited,
        max_tokens=options.max_tokens, tolerance=options.tolerance or 0.0, seed=options.seed,
    )  # fmt: skip
    measured = _floor(options, engine, target, prompts, panel)
    if options.tolerance is None:  # our own engine computes as its target does here; another has its own kernels
        tolerance = TOLERANCE if options.engine == "torch" else measured.tolerance(TOLERANCE)
        settings = replace(settings, tolerance=tolerance)
    settings = replace(settings, logprob_gap=measured.tie(_dtype(options)))
    scorer = Scorer(target, _draft(options, target), options.seed)
    with status("the first answers ...") as say:

        def report(watch: Watch) -> None:
            say(
                f"{watch.tokens:,} of at most {settings.tokens:,} tokens: evidence of a difference "
                f"10^{watch.log10_e:.1f}, bound on it {watch.epsilon:.2%}"
            )

        verdict = audit(engine, scorer, prompts, settings, panel, report)
    return replace(verdict, floor=measured.figures)


def _greedy(
    options: argparse.Namespace, engine: EngineUnderAudit, target: Conditionals, prompts: list[list[int]]
) -> Verdict:
    from dataclasses import replace

    from spec.audit.greedy import audit_greedy, panel_for

    measured = _floor(options, engine, target, prompts, panel_for(engine))
    tie = measured.tie(_dtype(options))
    verdict = audit_greedy(engine, target, prompts, tie=tie, tokens=options.max_tokens_audited)
    return replace(verdict, floor=measured.figures)


def _floor(
    options: argparse.Namespace,
    engine: EngineUnderAudit,
    target: Conditionals,
    prompts: list[list[int]],
    panel: Sequence[Params],
) -> Floor:
    """On texts of the engine, beside transformers' forward pass in the same dtype and in a wider one."""
    from dataclasses import replace

    from spec.audit.floor import floor
    from spec.request import Request

    few = [
        Request(tuple(prompt), replace(panel[i % len(panel)], seed=i), 16) for i, prompt in enumerate(prompts[:6])
    ]  # fmt: skip
    wider = "float32" if options.dtype == "bfloat16" else "float64"
    others = {"kernels": lambda: _by_transformers(options, options.dtype), "dtype": lambda: _by_transformers(
        options, wider)}  # fmt: skip
    return floor(target, engine.generate(few), others, panel)


def _by_transformers(options: argparse.Namespace, dtype: str) -> Conditionals:
    return ModelConditionals(_load(options, options.target, dtype))


def _load(options: argparse.Namespace, name: str, dtype: str) -> TransformersModel:
    import torch

    from spec.models.transformers_model import TransformersModel

    return TransformersModel.load(name, dtype=getattr(torch, dtype), device=options.device or "cpu")


def _dtype(options: argparse.Namespace) -> torch.dtype:
    import torch

    return torch.bfloat16 if options.dtype == "bfloat16" else torch.float32


def _samples(
    options: argparse.Namespace,
    engine: EngineUnderAudit,
    target: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
) -> Verdict:
    from spec.audit.samples_only import audit_samples

    chosen = Params(temperature=options.temperature or 1.0, top_k=options.top_k, top_p=options.top_p)
    with open_engine(options, options.against, None, target, tokenizer) as other:
        return audit_samples(engine, other, prompts, params=chosen, delta=options.delta)


def exact(options: argparse.Namespace) -> Verdict:
    """Our verifiers and transformers' function, or with ``--engine vllm`` vLLM's kernels, in a process of their own."""
    from spec.audit.exact import report

    rounding = 1e-12
    if options.engine == "vllm":
        command = [sys.executable, "-m", "spec.audit.exact_vllm", *([] if options.without_repair else ["--repair"])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise ValueError(f"vLLM's rejection sampler cannot be probed: {why}")
        found = json.loads(done.stdout.splitlines()[-1])
        gaps, rounding = {f"vllm {found['version']} rejection sampler": found["gap"]}, found["rounding"]
    elif options.engine in ("torch", "hf"):
        gaps = {k: v for k, v in report().items() if k.startswith("ours" if options.engine == "torch" else "trans")}
    else:
        raise ValueError("--mode exact looks inside the verifier: it cannot for a URL")
    worst = max(gaps, key=lambda name: gaps[name])
    wrong = gaps[worst] > rounding
    fault = Fault("the joint law is not the target's", {"gap": gaps[worst]}, {"verifier": worst}) if wrong else None
    return Verdict("different" if wrong else "equivalent", options.engine, "exact", 0.0, 0, fault=fault,
                   tests={"gaps": gaps, "rounding": rounding, "decided_at": 0})  # fmt: skip


@contextlib.contextmanager
def open_engine(
    options: argparse.Namespace, kind: str, draft: str | None, target: LanguageModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[EngineUnderAudit]:
    """The engine of this kind, for as long as it is used. Raises ValueError for a kind there is not."""
    if kind == "torch":
        yield _ours(options, draft, target, tokenizer)
    elif kind == "hf":
        yield _transformers(options, draft)
    elif kind == "vllm":
        from spec.audit.engines.vllm import VllmEngine

        with VllmEngine(
            options.target, draft, length=_fixed_length(options), drafting=options.drafting,
            repaired=not options.without_repair, dtype=options.dtype, max_model_len=1024,
        ) as engine:  # fmt: skip
            yield engine
    elif kind.startswith(("http://", "https://")):
        from spec.audit.engines.server import ServerEngine

        yield ServerEngine(kind, tokenizer, retokenise=options.retokenise)
    else:
        raise ValueError(f"unknown engine {kind!r}: choose torch, hf, vllm, or a URL that begins with http")


def _ours(
    options: argparse.Namespace, draft: str | None, target: LanguageModel, tokenizer: PreTrainedTokenizerBase
) -> EngineUnderAudit:
    from spec.audit.engines.ours import OurEngine
    from spec.engine import Engine

    models = loading.ModelOptions(options.dtype, options.device)
    how = loading.DrafterOptions(options.drafting, "none")  # many texts at a time
    drafter = loading.open_drafter(draft, target, tokenizer, models, how)
    policy = loading.draft_length(options.draft_length)
    return OurEngine(Engine(target, drafter, draft_length=policy, mode=options.verification))


def _transformers(options: argparse.Namespace, draft: str | None) -> EngineUnderAudit:
    from spec.audit.engines.hf import TransformersEngine

    model = _load(options, options.target, options.dtype).model
    if draft == "ngram":
        return TransformersEngine(model, lookup=_fixed_length(options))
    return TransformersEngine(model, None if draft is None else _load(options, draft, options.dtype).model)


def _draft(options: argparse.Namespace, target: Conditionals) -> Conditionals | None:
    """The draft's law, for sharper bets; a lookup's is guessed."""
    if options.draft is None:
        return None
    last = options.draft.rpartition("+")[2] if options.draft.startswith(loading.LOOKUPS) else options.draft
    if last in loading.LOOKUPS:
        return LookupConditionals(target.vocab_size)
    return ModelConditionals(loading.open_target(last, loading.ModelOptions(options.dtype, options.device)))


def _prompts(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if options.prompts is None:
        return [loading.encode_prompt(tokenizer, text) for text in PROMPTS]
    from spec.bench.prompts import load_prompts, read_rows

    source = options.prompts
    found = load_prompts(read_rows(source), source, tokenizer, limit=512, seed=options.seed)
    return [list(prompt.token_ids) for prompt in found.prompts]


def _fixed_length(options: argparse.Namespace) -> int:
    if not options.draft_length.isdigit():
        raise ValueError(f"--draft-length {options.draft_length}: give a number for this engine")
    return int(options.draft_length)
