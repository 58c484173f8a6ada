"""From what the sides measured, round by round, to the table and the JSON object of benchmarks/decode.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.decode_plan import SIDES, Plan, Side

Figures = Mapping[str, Any]  # of a cell, see benchmarks.decode_runner.Counts.figures
Runs = Mapping[str, Sequence[Figures]]  # side name -> one result of benchmarks.decode_engines.measure a round
Key = tuple[str, int, float]  # workload, batch, temperature

_BY_NAME = {side.name: side for side in SIDES}
# name in the JSON -> the side that a rate is divided by, and its heading
_BASES = {"ratio_own_plain": "×own plain", "ratio_ours_plain": "×ours", "ratio_vllm_plain": "×vllm"}


def results(runs: Runs, plan: Plan) -> list[dict[str, Any]]:
    """One object a side and cell, grouped by workload, batch and temperature; medians over the rounds.

    A ratio is taken round by round, since the machine's speed drifts; None where there is no plain side to divide by.
    """
    rates = {name: _by_cell(rounds) for name, rounds in runs.items()}
    keys = dict.fromkeys(key for cells in rates.values() for key in cells)
    return [
        _result(_BY_NAME[name], key, rates, runs, plan)
        for key in sorted(keys, key=lambda key: (_place(key[0], keys), key[1], key[2]))
        for name in runs
        if key in rates[name]
    ]


def _place(workload: str, keys: Mapping[Key, Any]) -> int:
    return list(dict.fromkeys(key[0] for key in keys)).index(workload)


def _by_cell(rounds: Sequence[Figures]) -> dict[Key, list[Figures]]:
    found: dict[Key, list[Figures]] = {}
    for measured in rounds:
        for cell in measured["cells"]:
            found.setdefault((cell["workload"], cell["batch"], cell["temperature"]), []).append(cell)
    return found


def _result(
    side: Side, key: Key, cells: Mapping[str, Mapping[Key, list[Figures]]], runs: Runs, plan: Plan
) -> dict[str, Any]:
    workload, batch, temperature = key
    mine = cells[side.name][key]
    bases = dict(zip(_BASES, (side.plain.name, "ours.plain", "vllm.plain"), strict=True))
    length: int | str | None = None
    if side.drafter != "none":
        own = side.engine == "transformers" and side.drafter == "draft"  # transformers' own choice
        length = "auto" if side.adaptive or own else plan.length(side)
    return {
        "workload": workload,
        "engine": side.engine,
        "drafter": side.drafter,
        "draft_length": length,
        "temperature": temperature,
        "batch": batch,
        "tok_s": statistics.median(cell["tok_s"] for cell in mine),
        "rounds_tok_s": [cell["tok_s"] for cell in mine],
        **{name: _ratio(mine, cells.get(base, {}).get(key)) for name, base in bases.items()},
        "decode_tok_s": _median([cell["decode_tok_s"] for cell in mine]),
        "decode_ratio_own_plain": _ratio(mine, cells.get(side.plain.name, {}).get(key), "decode_tok_s"),
        "tokens_per_target_step": statistics.median(cell["tokens_per_target_step"] for cell in mine),
        "acceptance": _median([cell["acceptance"] for cell in mine]),
        "first_token_s": statistics.median(cell["first_token_s"] for cell in mine),
        "peak_rss_mib": statistics.median(run["peak_rss_mib"] for run in runs[side.name]),
    }


def _ratio(mine: Sequence[Figures], base: Sequence[Figures] | None, rate: str = "tok_s") -> float | None:
    """Median over the rounds of the quotient of two sides' rates."""
    pairs = zip(mine, base, strict=True) if base is not None else ()
    return _median([cell[rate] / other[rate] for cell, other in pairs if cell[rate] and other[rate]])


def _median(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def table(found: Sequence[Mapping[str, Any]], roofline_tok_s: float) -> str:
    """The results for people, one block a workload, batch and temperature."""
    lines = []
    heading = f"{'':24}{'K':>5}{'tok/s':>8}" + "".join(f"{name:>12}" for name in _BASES.values())
    heading += f"{'decode/s':>10}{'×own plain':>12}{'tok/step':>10}{'accepted':>10}{'first ms':>10}{'peak MiB':>10}"
    block = None
    for row in found:
        if block != (block := (row["workload"], row["batch"], row["temperature"])):
            bound = f"plain decoding reads its weights at most {roofline_tok_s:.0f} times a second"
            if row["batch"] > 1:
                bound += f", for {row['batch']} tokens each"
            lines += ["", f"{row['workload']}, batch {row['batch']}, T={row['temperature']:g} ({bound})", heading]
        side = Side(row["engine"], row["drafter"], row["draft_length"] == "auto" and row["engine"] != "transformers")
        line = f"{side.name:24}{_shown(row['draft_length'], '>5')}{row['tok_s']:8.1f}"
        line += "".join(_shown(row[name], ">12.2f") for name in _BASES)
        line += f"{_shown(row['decode_tok_s'], '>10.1f')}{_shown(row['decode_ratio_own_plain'], '>12.2f')}"
        line += f"{row['tokens_per_target_step']:10.2f}{_shown(row['acceptance'], '>10.3f')}"
        lines.append(line + f"{1e3 * row['first_token_s']:10.0f}{row['peak_rss_mib']:10.0f}")
    return "\n".join(lines)


def _shown(value: float | str | None, how: str) -> str:
    """A dash for what does not apply."""
    return format(value, how) if value is not None else format("-", how.partition(".")[0])
