"""``python -m onpolicy.train``: parse the configuration, check it, run it.

Exit status: 0 success; 2 a user's mistake (one message on stderr); 1 anything else, interruption included.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onpolicy.config import TrainConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

DESCRIPTION = """On-policy distillation: the student samples, the teacher scores every sampled token, the student
is updated by reverse KL, the new weights go back to the sampler. Settings come from --config and from options, later
ones win; --print_config shows the result. Leaves output_dir/name/ with student/, summary.json and report.html."""


def make_parser() -> ArgumentParser:
    """The parser of :class:`~onpolicy.config.TrainConfig`: unknown keys and wrong types are errors."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "%(prog)s [--config FILE] [--resume] [--SECTION.OPTION VALUE ...]"  # listing them all hides the message
    parser = ArgumentParser(prog="python -m onpolicy.train", usage=usage, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; see configs/.")
    parser.add_argument("--resume", action="store_true", help="Continue the run in output_dir/name, if there is one.")
    parser.add_class_arguments(TrainConfig, None)
    return parser


def parse(arguments: Sequence[str] | None = None) -> tuple[TrainConfig, bool]:
    """(configuration, resume). Exits with status 2 and a message on a wrong option."""
    config, others = configuration(make_parser(), arguments)
    return config, others["resume"]


def configuration(parser: ArgumentParser, arguments: Sequence[str] | None) -> tuple[TrainConfig, dict[str, Any]]:
    """(configuration, the options beside it). Exits with status 2 and a message on a wrong option or value."""
    settings = TrainConfig.__dataclass_fields__
    try:
        namespace = parser.parse_args(arguments)
        fields = vars(parser.instantiate(namespace))
    except ValueError as error:  # of a section's own checks (__post_init__)
        parser.error(str(error))
    others = {name: value for name, value in fields.items() if name not in settings}
    return TrainConfig(**{name: fields[name] for name in settings}), others


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    config, resume = parse(arguments)
    try:
        return _train(config, resume)
    except KeyboardInterrupt:  # a second Ctrl-C, or one before the run began
        print(f"interrupted; --resume --name {config.name} continues after the last checkpoint", file=sys.stderr)
        return 1


def _train(config: TrainConfig, resume: bool) -> int:
    from spec.runtime import ensure_tuned

    ensure_tuned()
    from onpolicy.prepare import prepare
    from onpolicy.processes import is_first
    from onpolicy.run import Interrupted, Refused, StoppedRun, execute

    try:
        prepared = prepare(config, resume)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        summary = execute(prepared)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 1
    except StoppedRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if is_first():
        say_what_was_reached(summary)
    return 0


def say_what_was_reached(path: Path) -> None:
    """The held-out table, time and memory, and as the last line the summary's path."""
    from onpolicy.evaluate.figures import duration, table

    summary = json.loads(path.read_text())
    if summary["heldout"]:
        print(table(summary["heldout"]))
    took, memory = duration(summary["seconds"]), summary["peak_rss_gib"]
    print(f"{took}, peak memory {memory} GiB; report: {path.parent / 'report.html'}")
    print(path)


if __name__ == "__main__":
    sys.exit(main())
