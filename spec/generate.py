"""``python -m spec.generate``: text from the command line, plain or speculative, for a first look.

Exit status: 0 success; 2 a user's mistake (one line on stderr); 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spec import loading
from spec.runtime import ensure_tuned

if TYPE_CHECKING:
    from spec.engine import Engine
    from spec.request import Request, Result

QUANTIZATIONS = ("none", "int8", "int4")  # spec.models.linear.Quantization, without importing it
DRAFTED, OWN = "green", "cyan"  # colours: accepted from the draft, and the target's own


def make_parser() -> argparse.ArgumentParser:
    """Every option with its default in the help."""
    parser = argparse.ArgumentParser(
        prog="python -m spec.generate",
        description="Text from a target model, plain or with speculative decoding: the same text in law, sooner. "
        f"Accepted draft tokens are printed in {DRAFTED}, the target's own in {OWN}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--target", required=True, metavar="DIR", help="model directory or hub id")
    add("--draft", metavar="DIR", help=f"{loading.DRAFT_HELP}; without it, no drafts")
    add("--prompt", required=True, metavar="TEXT", help="what to answer, or with --raw to continue")
    add("--raw", action="store_true", help="continue the text as it is, without a chat template")
    add("--max-tokens", type=int, default=128, help="most tokens to generate")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 keeps the whole vocabulary")
    add("--top-p", type=float, default=1.0, help="1 switches it off")
    add("--min-p", type=float, default=0.0, help="0 switches it off")
    add("--repetition-penalty", type=float, default=1.0, help="1 switches it off")
    add("--seed", type=int, default=0, help="same seed, same text")
    add("--draft-length", default="4", metavar="K|auto", help="tokens to draft a step; auto adapts to what pays")
    add("--drafting", choices=("probabilistic", "greedy"), default="probabilistic", help="how a draft model drafts")
    add("--draft-quantization", choices=("auto", *QUANTIZATIONS), default="auto", help="of a draft model's weights")
    add("--mode", choices=("block", "token"), default="block", help="verification")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights")
    add("--quantization", choices=QUANTIZATIONS, default="none", help="of the target's weights: another target, faster")
    add("--device", help="cpu or cuda; default: a GPU where there is one")
    add("--json", action="store_true", help="print one JSON object instead")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Generates; returns the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        engine, request = prepare(options)
        result = run(engine, request, show=not options.json)
        if result.completions[0].error is not None:
            raise ValueError(result.completions[0].error)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(as_json(result)))
    else:
        show_figures(result)
    return 0


def prepare(options: argparse.Namespace) -> tuple[Engine, Request]:
    """Loads what the options name. Raises ValueError or OSError for what cannot be, cheapest checks first."""
    from spec.params import Params

    params = Params(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
        repetition_penalty=options.repetition_penalty, seed=options.seed,
    )  # fmt: skip
    policy = loading.draft_length(options.draft_length)
    loading.check_names(options.target, options.draft)

    import transformers

    from spec.allocator import keep_freed_memory
    from spec.engine import Engine
    from spec.request import Request

    keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = loading.open_tokenizer(options.target)
    raw = options.raw
    prompt = list(tokenizer(options.prompt)["input_ids"]) if raw else loading.encode_prompt(tokenizer, options.prompt)
    request = Request(prompt, params, options.max_tokens, tuple(options.stop))
    models = loading.ModelOptions(options.dtype, options.device)
    target = loading.open_target(options.target, models, options.quantization)
    how = loading.DrafterOptions(options.drafting, options.draft_quantization)
    drafter = loading.open_drafter(options.draft, target, tokenizer, models, how)
    return Engine(target, drafter, tokenizer=tokenizer, draft_length=policy, mode=options.mode), request


def run(engine: Engine, request: Request, show: bool) -> Result:
    """Decodes, printing the text as it comes if it is to be shown."""
    from rich.console import Console
    from rich.text import Text

    from spec.request import Event

    console = Console(highlight=False, soft_wrap=True)
    results: list[Result] = []

    def print_token(event: Event) -> None:
        console.print(Text(event.text, style=DRAFTED if event.from_draft else OWN), end="")

    engine.add(request, print_token if show else None, results.append)
    while engine.step():
        pass
    return results[0]


def figures(result: Result) -> dict[str, Any]:
    """What the decoding came to. The rate is that of the tokens after the first: the first waits for the prompt."""
    completion = result.completions[0]
    tokens = len(completion.token_ids)
    first = result.seconds_to_first_token or 0.0
    positions = zip(completion.accepted, completion.drafted, strict=True)
    return {
        "prompt_tokens": len(result.request.prompt_ids),
        "tokens": tokens,
        "from_draft": sum(completion.from_draft),
        "target_steps": completion.target_steps,
        "tokens_per_target_step": tokens / completion.target_steps if completion.target_steps else None,
        "accepted_by_position": [accepted / drafted if drafted else None for accepted, drafted in positions],
        "seconds": result.seconds,
        "seconds_to_first_token": result.seconds_to_first_token,
        "tok_s": (tokens - 1) / (result.seconds - first) if tokens > 1 and result.seconds > first else None,
    }


def as_json(result: Result) -> dict[str, Any]:
    """The completion and its figures."""
    completion = dataclasses.asdict(result.completions[0])
    kept = {
        name: completion[name] for name in ("text", "token_ids", "from_draft", "finish_reason", "drafted", "accepted")
    }
    return {**kept, "figures": figures(result)}


def show_figures(result: Result) -> None:
    """One line, the two counts in the colours of their tokens."""
    from rich.console import Console

    f = figures(result)
    parts = [f"[{OWN}]{f['tokens'] - f['from_draft']} tokens by the target[/]"]
    if result.completions[0].drafted:
        shares = " ".join(f"{share:.0%}" for share in f["accepted_by_position"] if share is not None)
        parts.insert(0, f"[{DRAFTED}]{f['from_draft']} tokens from the draft[/]")
        parts += [f"{f['tokens_per_target_step']:.2f} a target step", f"accepted by position {shares}"]
    if f["tok_s"] is not None:
        parts.append(f"{f['tok_s']:.1f} tokens/s after the first, which took {f['seconds_to_first_token']:.2f} s")
    parts.append(f"ended by {result.completions[0].finish_reason}")
    Console(highlight=False, soft_wrap=True).print("\n" + " · ".join(parts))


if __name__ == "__main__":
    ensure_tuned()
    sys.exit(main())
