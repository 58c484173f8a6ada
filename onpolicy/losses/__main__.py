"""Print what every estimator really descends: ``python -m onpolicy.losses``.

``--write`` renews what is generated of it in a checkout: the whole of docs/estimators.md, with explanations, and the
table in README.md, of the rows that a reader meets first.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import torch

from onpolicy.losses.proofs.cases import all_cases
from onpolicy.losses.proofs.truncation import SIZES, TruncationRow, truncation_rows
from onpolicy.losses.proofs.values import ControlRow, ValueRow, control_rows, value_rows
from onpolicy.losses.proofs.worlds import CONTROLS, Row, World, measure

HEADER = """\
# What each estimator really descends

Written by `python -m onpolicy.losses --write`; a test keeps this file true. A toy language model (3 tokens, one of
them the stop token; completions of up to 3 tokens; another distribution after every prefix) is small enough to sum
over everything it can say, so nothing here is sampled: expectation and variance are exact, in float64. Each row's
expectation equals the gradient of what stands under *really descends*, or a brute-force sum where no objective has
that gradient. Largest deviation in this run: below {bound}.

S student, T teacher, R reference, Q sampler; ρ = S/Q. *Prefixes held fixed*: a sum over prefixes as the student
draws them, whose law is not differentiated. **Bias**: distance from the gradient the estimator is said to follow, in
units of that gradient's norm. **Variance** of the gradient by the logits, of one sequence, in units of that norm
squared. The columns repeat with a control variate: **-KL** subtracts -KL(S‖T)(h_t), **best** subtracts
`least_variance_baseline`. The size of the numbers belongs to this toy model; zeros and their absence are general.
"""

NOTES = {
    "k1, k2, k3: in the reward or in the loss": """\
All three measure reverse KL; what matters is where they are put. In the loss, k1 teaches nothing and k3 descends
forward KL. A weight that depends on the prefix alone (a top-k KL used as advantage) teaches nothing either: it is a
control variate. k3 times S/stop(S) is k1 in reward, sample by sample; so is k2 in loss.
""",
    "credit for later tokens": """\
Discount 0 forgets that a token decides which prefixes follow. Subtracting -KL from rewards instead of returns makes
discount 1 forget it too. Later rewards in closed form cost no bias.
""",
    "what is rewarded": """\
A task reward at the last token needs discount 1, or `task_placement: sequence`.
""",
    "sampler Q differs from the student": """\
A token's ρ corrects the token, not the prefixes before it; bounding ρ trades variance for bias. Here Q is far off, so
that the biases can be seen.
""",
    "lengths": """\
A completion's length depends on the tokens that are credited. Dividing by it, or dropping unfinished rollouts, biases
the gradient, and control variates are no longer free.
""",
    "batches of two sequences": """\
What a batch shares (mean, deviation, number of tokens) depends on the tokens it is applied to.
""",
    "full vocabulary at the student's prefixes (GKD)": """\
No sampling noise but that of prefixes. What is left out is the gradient of the prefixes' law: the bias against the
objective with it.
""",
}
VALUE_NOTE = """\
k1 and k3 are unbiased and k2 is not, although in the loss it is k2 that has the right gradient.
"""
CONTROL_NOTE = """\
Variance of "k1 in reward, discount 0", in units of that without a control variate: median over random models (8
tokens, completions of up to 2), and the share of models in which it is lowered. -KL helps a student that is unsure
of its next token and may hurt one that is sure; the best baseline costs one more sum over the vocabulary.
"""
TRUNCATION_NOTE = """\
`top_k: k` compares the teacher's k likeliest tokens and, as one bucket, all others (here of 8 tokens; completions of up
to 2). Both sides stay distributions, so no value is negative and no gradient drains the support. Values of all but the
two mixtures with weights of their own (`adaptive_kl`, `lk_hybrid`) can only shrink, and what is lost is how the student
divides the bucket's mass: its gradient there. **Value**: (truncated - whole) / whole. **Gradient**: distance of the two
gradients, prefixes held fixed, in units of the whole one's norm. At k = V both are 0. `kd` is as forward KL.
"""
IN_README = (
    "k1 in reward", "k3 in reward", "k1 in loss", "k2 in loss", "k3 in loss", "k3 in loss, times S/stop(S)",
    "discount 0", "discount 1", "discount 1, -KL subtracted from rewards", "extrapolation 1.5 from reference R",
    "two teachers, weights 0.7 and 0.3", "task reward to every token, discount 0", "TIS: min(ρ, 2), token",
    "ρ of the sequence", "unfinished rollouts masked",
)  # fmt: skip
BEGIN, END = "<!-- begin: python -m onpolicy.losses --write -->", "<!-- end -->"
ROOT = Path(__file__).parents[2]
BOUND = 1e-10


@dataclass(frozen=True)
class Measured:
    """Everything that is printed."""

    estimators: list[Row]
    values: list[ValueRow]
    controls: list[ControlRow]
    truncations: list[TruncationRow]

    @classmethod
    def of(cls, world: World) -> Measured:
        """All rows, each with its proof checked."""
        rows, values = [measure(case) for case in all_cases(world)], list(value_rows(world))
        truncations = list(truncation_rows())
        worst = max(chain((r.error for r in rows), (v.error for v in values), (t.error for t in truncations)))
        assert worst < BOUND, f"something is not what it is proved to be: off by {worst:.1e}"
        return cls(rows, values, list(control_rows()), truncations)


def number(value: float) -> str:
    """Three significant digits; what is rounding error only is 0."""
    return "0" if abs(value) < 1e-9 else f"{value:.3g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table with its columns padded, so that it reads as plain text too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (padded[0], rule, *padded[1:]))


def gradient_table(rows: Iterable[Row]) -> str:
    """The estimators of one idea."""
    header = ["estimator", "said to descend", "really descends"]
    header += [name if c == "none" else f"{name}, {c}" for c in CONTROLS for name in ("bias", "variance")]

    def cells(row: Row) -> list[str]:
        really = "the same" if row.really == row.claims else row.really
        measured = [[number(row.bias[c]), number(row.variance[c])] if c in row.bias else ["", ""] for c in CONTROLS]
        return [row.name, row.claims, really, *chain.from_iterable(measured)]

    return table(header, map(cells, rows))


def value_table(rows: Iterable[ValueRow]) -> str:
    cells = ([row.name, row.really, number(row.bias), number(row.variance)] for row in rows)
    return table(["estimate of the sequences' reverse KL", "really measures", "bias", "variance"], cells)


def control_table(rows: Iterable[ControlRow]) -> str:
    header = ["spread of S's logits", "distance of T's logits", "variance, -KL", "variance, best"]
    header += ["-KL lowers it", "best lowers it"]

    def cells(row: ControlRow) -> list[str]:
        shares = [f"{100 * row.lowered[c]:.0f} %" for c in ("-KL", "best")]
        return [number(row.spread), number(row.distance), *(number(row.variance[c]) for c in ("-KL", "best")), *shares]

    return table(header, map(cells, rows))


def truncation_table(rows: Iterable[TruncationRow]) -> str:
    header = ["divergence", *(f"{what}, k = {k}" for k in SIZES for what in ("value", "gradient"))]
    cells = ([row.name, *(number(x[k]) for k in SIZES for x in (row.value, row.gradient))] for row in rows)
    return table(header, cells)


def report(measured: Measured, *, markdown: bool) -> str:
    """Everything, as text; ``markdown`` adds what the columns mean and a note on every idea."""
    ideas = groupby(measured.estimators, key=lambda row: row.idea)
    sections = [(idea, NOTES[idea], gradient_table(group)) for idea, group in ideas]
    sections.append(("values", VALUE_NOTE, value_table(measured.values)))
    sections.append(("how much a control variate saves", CONTROL_NOTE, control_table(measured.controls)))
    sections.append(("truncated divergences", TRUNCATION_NOTE, truncation_table(measured.truncations)))
    parts = [HEADER.format(bound=f"{BOUND:.0e}")] if markdown else []
    for idea, note, lines in sections:
        parts += [f"## {idea}\n", f"{note}\n{lines}\n" if markdown else f"{lines}\n"]
    return "\n".join(parts)


def documents(measured: Measured, root: Path = ROOT) -> dict[Path, str]:
    """What the generated documents of a checkout must say. ValueError where the README's markers are gone."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md needs one line '{BEGIN}' and one line '{END}', between which the table goes")
    before, rest = readme.split(BEGIN)
    shown = gradient_table(row for row in measured.estimators if row.name in IN_README)
    return {
        root / "docs" / "estimators.md": report(measured, markdown=True),
        root / "README.md": f"{before}{BEGIN}\n{shown}\n{END}{rest.split(END)[1]}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m onpolicy.losses", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew docs/estimators.md and the table in README.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # tensors of a few hundred numbers: more threads only wait for each other
    measured = Measured.of(World.make())
    if not options.write:
        print(report(measured, markdown=False), end="")
        return
    for path, text in documents(measured).items():
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
