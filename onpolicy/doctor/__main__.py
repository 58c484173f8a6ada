"""``python -m onpolicy.doctor --config ...``: examine a run before it is started.

Exit status: 0 no error was found; 1 errors were found; 2 a user's mistake in the options (one message on stderr).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from onpolicy.config import TrainConfig
from onpolicy.doctor.findings import show
from onpolicy.train import configuration, make_parser

DESCRIPTION = """Preflight checks of a run: tokenizers and templates, the teacher's weights and scores, whether the
sampler has the trainer's weights and temperature, memory, time, disk and licence. Half a minute for a tiny model, a
minute and a half for the default one on two busy cores: it loads the models, starts the engine and makes one small
training step, so larger models and longer completions take longer. Takes the options of onpolicy.train. Nothing is
written into the run's directory."""


def parse(arguments: Sequence[str] | None = None) -> tuple[TrainConfig, bool, bool]:
    """(configuration, resume, as JSON). Exits with status 2 and a message on a wrong option."""
    parser = make_parser()
    parser.prog, parser.description = "python -m onpolicy.doctor", DESCRIPTION
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
    config, others = configuration(parser, arguments)
    return config, others["resume"], others["json"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine; returns the exit status."""
    config, resume, as_json = parse(arguments)
    from spec.runtime import ensure_tuned

    ensure_tuned()
    print("examining: loading the libraries, the models and the engine takes most of the time ...", file=sys.stderr)
    try:
        # What engines and loaders print must not stand between the findings.
        with contextlib.redirect_stdout(sys.stderr):
            from onpolicy.doctor.examination import examine

            report = examine(config, resume)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(report.to_json())
    else:
        show(report)
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())
