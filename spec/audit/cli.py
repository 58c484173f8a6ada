"""The command line. Exit status: 0 equivalent, 3 different, 4 undecided, 2 a user's mistake, 1 an engine that
fails, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spec import loading

if TYPE_CHECKING:
    from spec.audit.verdict import Verdict

MODES = ("statistical", "exact", "greedy", "samples")


def make_parser() -> argparse.ArgumentParser:
    """Every option with its default in the help."""
    parser = argparse.ArgumentParser(
        prog="python -m spec.audit",
        description="Is an engine's output distributed as its target's? Exit status 0: equivalent within epsilon, "
        "3: different, 4: undecided, 2: wrong usage.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--engine", default="torch", metavar="torch|hf|vllm|URL", help="what to audit; a URL is OpenAI-compatible")
    add("--target", metavar="DIR", help="the model the engine claims to sample from; required but in mode exact")
    add("--draft", metavar="DIR", help="torch: " + loading.DRAFT_HELP + "; hf and vllm: a model or ngram")
    add("--mode", choices=MODES, default="statistical", help="what to compare; see docs/audit.md")
    add("--against", default="torch", metavar="torch|hf|URL", help="mode samples: the engine to compare with, plain")
    add("--prompts", metavar="FILE", help="JSON lines with messages, prompt or question; default: a dozen built in")
    add("--max-tokens-audited", type=int, default=50_000, metavar="N", help="give up after so many tokens")
    add("--max-tokens", type=int, default=32, help="of one request")
    add("--delta", type=float, default=1e-3, help="probability of a wrong answer, each way")
    add("--epsilon", type=float, default=0.02, help="shift of mass per token that counts as equivalent")
    add(
        "--tolerance",
        type=float,
        help="mass per token outside top-p and the like left to rounding; default: 0.002, "
        "or 4 times the target's own in other kernels where the engine is not ours and that is more",
    )
    add("--temperature", type=float, help="audit this setting alone, in place of the panel; with the next two")
    add("--top-k", type=int, default=0, help="0 keeps the whole vocabulary")
    add("--top-p", type=float, default=1.0, help="1 switches it off")
    add("--verification", choices=("block", "token"), default="block", help="torch: how drafts are verified")
    add("--drafting", choices=("probabilistic", "greedy"), default="probabilistic", help="how a draft model drafts")
    add("--draft-length", default="2", metavar="K|auto", help="tokens to draft a step; auto for torch only")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of engine and target")
    add("--device", help="cpu or cuda; default: a GPU where there is one")
    add("--seed", type=int, default=0, help="of requests and of the audit's own noise")
    add("--retokenise", action="store_true", help="URL: tokenise text again if the server gives no token ids")
    add("--without-repair", action="store_true", help="vllm: as it is installed, without this project's plugin")
    add("--mutants", action="store_true", help="audit the broken toy engines instead, as benchmarks.audit does")
    add("--json", metavar="OUT", help="write the verdict, one JSON object")
    add("--html", metavar="OUT", help="write a report with histograms and the path of the evidence")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Audits; returns the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        if options.mutants:
            return _mutants(options)
        if options.mode != "exact":
            if options.target is None:
                raise ValueError("--target: name the model that the engine claims to sample from")
            loading.check_names(options.target, options.draft)
        from spec.audit.runs import run

        verdict = run(options)
        return _show(verdict, options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # an engine that fails is not judged
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _show(verdict: Verdict, options: argparse.Namespace) -> int:
    from rich.console import Console

    from spec.audit.report import page, table

    Console().print(table(verdict))
    if options.json:
        Path(options.json).write_text(verdict.to_json() + "\n")
    if options.html:
        Path(options.html).write_text(page([verdict]))
    return verdict.exit_status


def _mutants(options: argparse.Namespace) -> int:
    """The table of :mod:`spec.audit.mutants`, one audit each; status 3 if one is missed that moves 1 % or more, or if a
    right engine is called different.
    """
    from spec.audit.trial import ENGINES, HEADER, line, missed, try_all

    print(HEADER)
    found: dict[str, dict[str, Any]] = {}
    for name in ENGINES:
        found |= try_all([name], seeds=1, tokens=min(options.max_tokens_audited, 20_000), delta=options.delta)
        print(line(name, found[name]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    return 3 if missed(found) else 0
