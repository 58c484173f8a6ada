"""benchmarks/serve.py: disjoint prompts, ratios within rounds, and what is held against what."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace

import httpx
import pytest

from benchmarks import serve
from benchmarks.serve_load import Load, Timing, figures


def test_no_prompt_is_asked_twice() -> None:
    args = Namespace(requests=11, rounds=2, loads=["alone", "full", "poisson"])
    warm_up, rounds = serve.shares(args)
    asked = [*warm_up, *(prompt for share in rounds for prompts in share.values() for prompt in prompts)]
    assert len(set(asked)) == len(asked) == 4 + 3 * 11
    assert [[len(prompts) for prompts in share.values()] for share in rounds] == [[6] * 3, [5] * 3]


def timings(seconds: float, count: int = 4, tokens: int = 10) -> list[Timing]:
    return [Timing(0.0, 0.1 * seconds, seconds, tokens) for _ in range(count)]


def test_ratios_are_taken_within_a_round() -> None:
    """The machine is twice as slow in the second round; the ratio is not."""
    found = {
        "ours-speculative": {"full": [timings(1.0), timings(2.0)]},
        "ours-plain": {"full": [timings(1.5), timings(3.0)]},
    }
    measured = serve.ratios(found)
    assert measured == {"ours_speculative_over_plain_full": {"median": pytest.approx(1.5), "rounds": [1.5, 1.5]}}
    row = figures(found["ours-plain"]["full"])
    assert row["tok_s"] == pytest.approx(80 / 4.5) and row["requests_s"] == pytest.approx(8 / 4.5)


def test_what_has_to_be_reached_is_said(tmp_path, monkeypatch) -> None:
    row = {"workload": "problems", "engine": "ours", "drafter": "draft", "batch": 1, "temperature": 1.0,
           "draft_length": 2, "ratio_own_plain": 1.4}  # fmt: skip
    (tmp_path / "decode.json").write_text(json.dumps({"settings": {"tokens": 96}, "results": [row]}))
    monkeypatch.setattr(serve, "_DECODE", tmp_path / "decode.json")
    names = "saturated_at_least_0.95_of_plain", "batch_1_gain_at_least_decodes_less_10_percent"

    def held(full: float, alone: float, **settings: float) -> list[bool | None]:
        measured = {f"ours_speculative_over_plain_{n}": {"median": r} for n, r in (("full", full), ("alone", alone))}
        found = serve.checks(measured, Namespace(**{"tokens": 96, "temperature": 1.0, **settings}))
        assert (found["decode"]["not_compared"] is None) == (found["decode"]["gain"] is not None)
        return [found[name] for name in names]

    assert held(0.96, 1.27) == [True, True]
    assert held(0.94, 1.25) == [False, False]
    assert held(0.96, 1.27, tokens=32) == [True, None]
    assert held(0.96, 1.27, temperature=0.5) == [True, None]


ROLE = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
FAILED = {"error": {"message": "the engine failed"}}


def usage(tokens: int) -> dict[str, object]:
    return {"choices": [], "usage": {"completion_tokens": tokens}}


@pytest.mark.parametrize(
    ("lines", "message"),
    (
        ([ROLE, usage(2)], None),
        ([FAILED, usage(2)], "engine failed"),
        ([usage(1)], "1 tokens instead of 2"),
    ),
)
def test_an_answer_without_text_has_times_and_a_wrong_one_is_an_error(lines, message) -> None:
    """Times of zero would pass for the fastest of all first tokens."""
    text = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
    load = Load("http://server", tokens=2, temperature=1.0)
    load._client = httpx.AsyncClient(
        base_url="http://server", transport=httpx.MockTransport(lambda _: httpx.Response(200, text=text))
    )
    if message is None:
        found = asyncio.run(load.ask("x"))
        assert found.sent < found.first <= found.last
    else:
        with pytest.raises(RuntimeError, match=message):
            asyncio.run(load.ask("x"))
