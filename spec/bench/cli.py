"""The command line of ``python -m spec.bench``.

Exit status: 0 success; 2 a user's mistake (one line on stderr); 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spec import loading
from spec.bench.plan import SERVED, Plan, grid
from spec.provenance import provenance, write_atomically

if TYPE_CHECKING:
    from spec.bench.prompts import Prompts
    from spec.bench.run import Drafters
    from spec.models.base import LanguageModel


def make_parser() -> argparse.ArgumentParser:
    """Every option with its default in the help."""
    parser = argparse.ArgumentParser(
        prog="python -m spec.bench",
        description="How often a target accepts what a draft proposes, what speed-up that buys on this machine, and "
        "which draft length is best.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--target", required=True, metavar="DIR", help="model directory or hub id")
    add("--draft", required=True, metavar="DIR", help=loading.DRAFT_HELP)
    add("--data", required=True, metavar="FILE_OR_ID", help="prompts: .jsonl, .json, .parquet, a folder, or a hub id")
    add("--split", help="of a data set with several")
    add("--subset", help="of a hub data set: its configuration")
    add("--prompts", type=int, default=32, help="how many, drawn at random, categories in proportion; 0 for all")
    add("--max-tokens", type=int, default=64, help="of each text")
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0], metavar="T", help="of the grid; 0 is greedy")
    add("--top-ps", type=float, nargs="+", default=[1.0, 0.9], metavar="P", help="of the grid; 1 switches it off")
    add("--draft-length", type=int, default=4, metavar="K", help="of the runs that are counted and timed")
    add("--longest", type=int, default=8, metavar="K", help="longest draft of which is said what to expect")
    add("--served", choices=SERVED, default="block", help="how the runs draft and verify: the draft's argmax, "
        "drawn tokens verified one by one, or drawn tokens verified as a block")  # fmt: skip
    add("--rollouts", type=int, default=512, help="drafts at each setting from which accepted lengths are expected")
    add("--speed-prompts", type=int, default=4, help="prompts on which plain and speculative are timed; 0 for none")
    add("--batch", type=int, default=16, help="texts at a time, but for timings")
    add("--seed", type=int, default=0, help="of prompts and texts")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights")
    add("--quantization", choices=("none", "int8", "int4"), default="none", help="of the target's weights")
    add("--draft-quantization", choices=("auto", "none", "int8", "int4"), default="auto", help="of the draft's")
    add("--device", help="cpu or cuda; default: a GPU where there is one")
    add("--json", metavar="OUT", help="write every figure, with what produced it")
    add("--html", metavar="OUT", help="write a page of plots")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        found = run(options)
        if options.json:
            write_atomically(Path(options.json), json.dumps(found, indent=1, allow_nan=False) + "\n")
        if options.html:
            from spec.bench.web import render

            write_atomically(Path(options.html), render(found))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    from spec.bench.tables import show

    show(found)
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What ``--json`` writes. Raises ValueError or OSError for what cannot be done, cheapest checks first."""
    plan = plan_of(options)
    loading.check_names(options.target, options.draft)
    if options.prompts < 0:
        raise ValueError(f"prompts {options.prompts}: must be positive, or 0 for all")
    for path in filter(None, (options.json, options.html)):
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder: name a file in it")
    begin = time.perf_counter()
    target, drafters, prompts, end_tokens = prepare(options, plan)

    from spec.bench.results import results
    from spec.bench.run import measure

    measured = measure(target, drafters, prompts.prompts, plan, end_tokens, bars)
    return {
        "target": options.target, "draft": options.draft, "data": options.data,
        "prompts": len(prompts.prompts), "skipped_too_long": prompts.too_long,
        **results(measured, plan, prompts.categories),
        "seconds": time.perf_counter() - begin, "provenance": provenance(),
    }  # fmt: skip


def plan_of(options: argparse.Namespace) -> Plan:
    """Raises ValueError for a value outside its range."""
    return Plan(
        tuple(grid(options.temperatures, options.top_ps)), draft_length=options.draft_length, longest=options.longest,
        served=options.served, max_tokens=options.max_tokens, rollouts=options.rollouts, batch=options.batch,
        speed_prompts=options.speed_prompts, seed=options.seed,
    )  # fmt: skip


def prepare(options: argparse.Namespace, plan: Plan) -> tuple[LanguageModel, Drafters, Prompts, frozenset[int]]:
    """Target, drafters, prompts and the tokens that end a text, in the order in which mistakes are cheapest."""
    import transformers

    from spec.allocator import keep_freed_memory
    from spec.bench.prompts import load_prompts, read_rows
    from spec.bench.run import Drafters
    from spec.engine import ending_tokens

    keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()
    rows = read_rows(options.data, options.split, options.subset)
    tokenizer = loading.open_tokenizer(options.target)
    models = loading.ModelOptions(options.dtype, options.device)
    target = loading.open_target(options.target, models, options.quantization)
    limit = target.max_positions - plan.room
    if limit < 1:
        raise ValueError(
            f"max tokens {plan.max_tokens}: they leave no room for a prompt in the {target.max_positions} positions of "
            f"{target.name}; lower --max-tokens"
        )
    prompts = load_prompts(
        rows, options.data, tokenizer, limit=limit, count=options.prompts or None,
        seed=options.seed,
    )  # fmt: skip
    drawn, argmax = loading.open_drafters(
        options.draft, target, tokenizer, models, options.draft_quantization, ("probabilistic", "greedy")
    )
    drafters = Drafters(drawn, None if options.draft in loading.LOOKUPS else argmax)
    return target, drafters, prompts, ending_tokens(target, tokenizer)


@contextlib.contextmanager
def bars(what: str, count: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; gives what to call after each of ``count`` pieces of work."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as lines:
        line = lines.add_task(what, total=count)
        yield lambda: lines.advance(line)
