"""The acceptance benchmark: what it predicts is what the engine does, and what it writes is what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from spec.bench import figures
from spec.bench.cli import main, make_parser, plan_of, prepare
from spec.bench.costs import Costs, non_decreasing
from spec.bench.counting import Step, Text, write
from spec.bench.plan import SERVED, Plan, Served, Setting, grid
from spec.bench.prompts import Prompt, conversation, load_prompts, mixed, read_rows
from spec.bench.replay import Expected, Replay, Trial, first_rates, trials
from spec.bench.results import results
from spec.bench.run import ARGMAX, DRAWN, Drafters, choose, measure
from spec.drafters.base import Drafter
from spec.drafters.model import ModelDrafter
from spec.drafters.ngram import NgramDrafter
from spec.models.base import Step as ModelStep
from spec.sampling import processed_probs
from spec.verify import Drafts, laws, length_law
from tests.conftest import make_model
from tests.spec_models import Logits, TableModel, random_logits

PLAN = Plan((Setting(1.0, 1.0),), draft_length=3, longest=5, max_tokens=24, rollouts=10_000)


def pair(vocabulary: int = 24) -> tuple[TableModel, TableModel]:
    """A target whose every prefix has a law of its own, and a draft that knows most of it."""
    own, other = random_logits(vocabulary, 1), random_logits(vocabulary, 2)
    target = TableModel(own, vocabulary)
    return target, TableModel(lambda text: 0.9 * own(text) + 0.4 * other(text), vocabulary)


def prompts(count: int, vocabulary: int = 24) -> list[Prompt]:
    drawn = np.random.default_rng(5).integers(0, vocabulary, (count, 4))
    return [Prompt(tuple(row), "even" if i % 2 == 0 else "odd") for i, row in enumerate(drawn.tolist())]


def walked(
    target: TableModel, drafters: dict[str, Drafter], plan: Plan, served_by: str, count: int, ends: frozenset[int]
) -> tuple[list[Text], list[Expected]]:
    setting = plan.settings[0]
    asked = prompts(count, target.vocab_size)
    texts = write(target, drafters[served_by], asked, setting, plan, ends)
    replay = Replay(
        target, drafters, setting, longest=plan.longest, max_tokens=plan.max_tokens, end_tokens=ends, batch=16
    )  # fmt: skip
    return texts, replay.run(texts, choose(texts, plan.rollouts, 0))


@pytest.mark.parametrize(
    ("served", "setting"), [*((served, Setting(1.0, 1.0)) for served in SERVED), ("block", Setting(0.7, 0.9))], ids=str
)
def test_prediction_and_engine_agree(served: Served, setting: Setting) -> None:
    """Thousands of tokens; texts that end early, which cuts blocks, among them."""
    target, draft = pair()
    plan, ends = replace(PLAN, settings=(setting,), served=served), frozenset({3})
    drafters: dict[str, Drafter] = {
        DRAWN: ModelDrafter(draft, target),
        ARGMAX: ModelDrafter(draft, target, drafting="greedy"),
    }
    name = ARGMAX if served == "greedy" else DRAWN
    texts, expected = walked(target, drafters, plan, name, 400, ends)
    assert sum(len(text.output_ids) for text in texts) > 5000
    assert any(text.output_ids[-1] in ends for text in texts), "no text ended early: nothing would test it"

    gap = figures.disagreement(expected, served, name, plan.draft_length)
    assert gap.hi - gap.lo < 0.15 and gap.lo <= 0 <= gap.hi
    counted = figures.counted_row(texts, plan.draft_length)
    row = figures.expected_row(expected, served, name, plan.draft_length)
    assert row is not None and row.steps == counted.steps
    assert counted.tokens_per_step.lo <= row.tokens_per_step.mean <= counted.tokens_per_step.hi
    if served == "block" and setting.temperature == 1:  # one way of serving is not predicted by the formula of another
        other = figures.expected_row(expected, "probabilistic", name, plan.draft_length)
        assert other is not None
        assert row.tokens_per_step.mean - other.tokens_per_step.mean > (gap.hi - gap.lo) / 2
    for predicted, shares in ((row.unconditional, counted.unconditional), (row.conditional, counted.conditional)):
        for value, share in zip(predicted, shares, strict=True):
            assert share is not None and share.lo - 0.02 <= value <= share.hi + 0.02


def test_rates_and_trials_are_those_of_the_definitions() -> None:
    """p, q and drafts by hand: sums of minima, p of the argmax, and the laws of each shorter draft."""
    draw = torch.Generator().manual_seed(0)
    p, q = ((1.5 * torch.randn(n, 7, dtype=torch.float64, generator=draw)).softmax(-1) for n in (7, 3))
    drafts = Drafts(torch.tensor([2, 0, 5, 4]), (3, 0, 1), q, torch.tensor([0, 1, 2, -1]))
    (overlap, argmax), nothing, one_hot = first_rates(p, drafts)
    assert overlap == pytest.approx(float(torch.minimum(p[0], q[0]).sum()))
    assert argmax == pytest.approx(float(p[0, q[0].argmax()]))
    assert all(np.isnan(nothing)) and one_hot == pytest.approx((float(p[5, 4]),) * 2)
    found = trials(p, drafts)
    for size in (1, 2, 3):
        shorter = Drafts(drafts.ids[:size], (size,), q[:size])
        trial = Trial(0, 9, size, False, *(part for part in found[0]))
        for served, mode in (("block", "block"), ("probabilistic", "token")):
            law = length_law(laws(p[: size + 1], shorter, mode=mode)[0], mode)  # type: ignore[arg-type]
            expected = law.flip(0).cumsum(0).flip(0)[1:]  # P(tau >= i)
            np.testing.assert_allclose(trial.survival(served, size), expected, atol=1e-12)  # type: ignore[arg-type]


def test_a_draft_that_ends_the_text_saves_the_targets_own_token() -> None:
    accept, nothing = np.array([0.5, 0.5, 0.5]), np.zeros(3)
    whole = Trial(0, 3, 3, False, accept, nothing, nothing)
    assert whole.tokens("probabilistic", 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    ends = Trial(0, 3, 2, True, accept, nothing, nothing)
    assert ends.tokens("probabilistic", 3) == pytest.approx(1 + 0.5 + 0.25 - 0.25)
    assert ends.tokens("probabilistic", 1) == pytest.approx(1.5)  # it is not drafted that far
    assert replace(whole, limit=0).tokens("probabilistic", 3) == 1


def test_rates_cover_every_prefix_with_the_processed_distributions() -> None:
    """sum min(p, q) of all prefixes of the texts, from the two tables themselves."""
    target, draft = pair()
    plan = replace(PLAN, settings=(Setting(0.7, 0.8),), max_tokens=6)
    texts, expected = walked(target, {DRAWN: ModelDrafter(draft, target)}, plan, DRAWN, 5, frozenset())
    for text, found in zip(texts, expected, strict=True):
        prefixes = [(*text.prompt.token_ids, *text.output_ids[:i]) for i in range(len(text.output_ids))]
        p, q = (
            processed_probs(
                torch.tensor(np.array([m._logits(prefix) for prefix in prefixes])), temperature=0.7, top_p=0.8
            )
            for m in (target, draft)
        )
        np.testing.assert_allclose(found.overlap, torch.minimum(p, q).sum(-1), atol=1e-9)
        np.testing.assert_allclose(found.argmax, p.gather(-1, q.argmax(-1, keepdim=True))[:, 0], atol=1e-9)


def test_a_lookup_has_one_hot_proposals_and_prefixes_without_any() -> None:
    """A text that repeats itself is drafted; acceptance there is p of the drafted token."""
    target, _ = pair(4)
    plan = replace(PLAN, settings=(Setting(1.0, 1.0),), max_tokens=20, served="greedy")
    _, expected = walked(target, {DRAWN: NgramDrafter(max_n=2, min_n=1)}, plan, DRAWN, 60, frozenset())
    rates = np.concatenate([text.overlap for text in expected])
    assert 0 < np.isfinite(rates).sum() < len(rates)
    np.testing.assert_array_equal(rates, np.concatenate([text.argmax for text in expected]))
    gap = figures.disagreement(expected, "greedy", DRAWN, plan.draft_length)
    assert gap.lo <= 0 <= gap.hi and gap.hi - gap.lo < 0.3


def test_steps_are_read_off_the_text() -> None:
    """Blocks of (2 drafts + own), (own), and one that ends within its drafts."""
    from spec.bench.counting import _steps

    flags = [True, True, False, False, True]
    assert _steps(flags, {0: 3, 3: 2, 4: 1}) == [Step(0, 3, 2, 3), Step(3, 2, 0, 1), Step(4, 1, 1, 1)]


def test_the_best_length_follows_costs() -> None:
    curves = [[(1.0, 1.0), (1.5, 1.2), (1.7, 1.1)], [(1.0, 1.0), (1.5, 0.9), (1.7, 1.3)]]
    assert figures.best_length(curves) == 2  # 1.2 * 0.9 < 1.1 * 1.3
    assert figures.best_length([[(1.0, 1.0), (1.0, 0.9)]]) == 0
    assert non_decreasing([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0] and non_decreasing([3.0, 2.0, 1.0]) == [2.0] * 3
    assert Costs([0.0, 0.1, 0.3], [1.0, 1.0, 1.0]).ratio == pytest.approx(0.15)


def test_grid_has_temperature_zero_once() -> None:
    assert grid([0.0, 1.0], [1.0, 0.9]) == [Setting(0.0, 1.0), Setting(1.0, 1.0), Setting(1.0, 0.9)]


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"question": "a"}, ["a"]),
        ({"turns": ["a", "b"], "category": "x"}, ["a"]),
        ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}, ["s", "a"]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ["a"]),
    ],
)
def test_the_fields_of_the_field(row: dict, content: list[str]) -> None:
    assert [message["content"] for message in conversation(row, "row")] == content


def test_samples_have_categories_in_proportion() -> None:
    categories = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    first = [categories[i] for i in mixed(categories, seed=1)[:20]]
    assert [first.count(name) for name in "abc"] in ([12, 6, 2], [11, 6, 3], [13, 6, 1], [12, 5, 3], [12, 7, 1])
    assert sorted(mixed(categories, seed=1)) == list(range(100)) and mixed(categories, 1) != mixed(categories, 2)


def test_parquet_json_and_long_prompts(tmp_path: Path, tokenizer) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": "word " * n, "category": "c"} for n in (1, 2, 300)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text(json.dumps(rows))
    for name in ("d.parquet", "d.json"):
        source = str(tmp_path / name)
        found = load_prompts(read_rows(source), source, tokenizer, limit=100)
        assert len(found.prompts) == 2 and found.too_long == 1 and found.categories == ["c"]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "word "}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert tuple(ids) in {prompt.token_ids for prompt in found.prompts}
    with pytest.raises(ValueError, match="are longer than 3 tokens"):
        load_prompts(rows, "d", tokenizer, limit=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    return make_model(folder / "target", tokenizer), make_model(folder / "draft", tokenizer, layers=2, seed=1)


def data(folder: Path) -> Path:
    path = folder / "data.jsonl"
    rows = [{"turns": [f"Tom has {i} apples. How many?"], "category": "ab"[i % 2]} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_whole_program(models, tmp_path, capsys) -> None:
    """The target as its own draft: everything is accepted, and every file says so."""
    out, html = tmp_path / "out" / "bench.json", tmp_path / "bench.html"
    arguments = (
        "--target", models[0], "--draft", models[0], "--data", data(tmp_path), "--max-tokens", 9, "--dtype", "float32",
        "--temperatures", 0, 1, "--top-ps", 1, "--draft-length", 2, "--longest", 3, "--speed-prompts", 2,
        "--prompts", 4, "--json", out, "--html", html,
    )  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    found = json.loads(out.read_text())
    assert {(r["temperature"], r["top_p"], r["mode"], r["category"]) for r in found["acceptance"]} == {
        (t, 1.0, mode, c) for t in (0.0, 1.0) for mode in SERVED for c in ("all", "a", "b")
    }
    for row in found["acceptance"]:
        if row["mode"] != "greedy" or row["temperature"] == 0:
            assert row["mean"] == pytest.approx(1, abs=1e-4) and row["per_position"] == pytest.approx([1, 1], abs=1e-4)
        assert row["lo"] <= row["mean"] + 1e-9 and row["mean"] <= row["hi"] + 1e-9
    for row in found["counted"]:
        assert [share["mean"] for share in row["per_position"]] == [1.0, 1.0]
    assert isinstance(found["best_draft_length"], int) and found["cost_ratio"] > 0
    for row, lengths in zip(found["speedup"], found["draft_lengths"], strict=True):
        assert row["measured"] == pytest.approx(row["spec_tok_s"] / row["plain_tok_s"])
        at = lengths["lengths"][2]
        took = at["draft_s"] + at["target_s"]
        assert row["predicted"] == pytest.approx(at["tokens_per_step"] * lengths["lengths"][0]["target_s"] / took)
    assert {"torch", "transformers", "python"} <= set(found["provenance"]["versions"])
    page = Page(html.read_text())
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(charts) == 2 + 2 + 1 + 2 and all("nan" not in attrs["aria-label"] for attrs in charts)
    assert not [a for _, attrs in page.tags for a in attrs if a in ("src", "href")]
    printed = capsys.readouterr().out
    assert "Expected acceptance" in printed and "cost ratio" in printed


def test_both_ways_of_drafting_share_one_draft_model(models, tmp_path) -> None:
    """Its cache too: no slot of one is written by the other, and the model is loaded once."""
    options = ("--target", models[0], "--draft", models[1], "--data", data(tmp_path), "--dtype", "float32")
    parsed = make_parser().parse_args([str(option) for option in options])
    target, drafters, asked, ends = prepare(parsed, plan_of(parsed))
    drawn, argmax = drafters.drawn, drafters.argmax
    assert isinstance(drawn, ModelDrafter) and isinstance(argmax, ModelDrafter) and drawn.model is argmax.model
    assert target.end_tokens and set(target.end_tokens) <= ends
    settings = replace(PLAN, max_tokens=8)
    texts = write(target, drawn, asked.prompts, settings.settings[0], settings, ends)

    def tried(named: dict[str, Drafter]) -> dict[str, list[Trial]]:
        replay = Replay(target, named, settings.settings[0], longest=5, max_tokens=8, end_tokens=ends)
        (first, *_) = replay.run(texts, choose(texts, 100, 0))
        return first.trials

    both = tried({DRAWN: drawn, ARGMAX: argmax})
    for name, drafter in ((DRAWN, drawn), (ARGMAX, argmax)):
        for mine, other in zip(tried({name: drafter})[name], both[name], strict=True):
            np.testing.assert_allclose(mine.token, other.token, atol=1e-4)


class Timed(TableModel):
    """Takes as long on the test's clock as it is told to: to begin with, and for every new token."""

    now = 0.0

    def __init__(self, logits: Logits, vocabulary: int, seconds: float, a_token: float):
        super().__init__(logits, vocabulary)
        self.seconds, self.a_token = seconds, a_token

    def forward(self, step: ModelStep) -> torch.Tensor:
        Timed.now += self.seconds + self.a_token * len(step.token_ids)
        return super().forward(step)


@pytest.mark.parametrize("served", ["greedy", "block"])
def test_predicted_and_measured_speed_agree(served: Served, monkeypatch) -> None:
    """On a clock that the models alone move: costs are theirs, and what they promise is what the engine reaches."""
    monkeypatch.setattr(time, "perf_counter", lambda: Timed.now)
    own, other = random_logits(12, 1), random_logits(12, 2)
    target = Timed(own, 12, 0.010, 0.001)
    draft = Timed(lambda text: 0.9 * own(text) + 0.3 * other(text), 12, 0.002, 0.0)
    plan = replace(PLAN, served=served, max_tokens=40, draft_length=2, longest=3, speed_prompts=40, cost_rounds=3)
    drafters = Drafters(ModelDrafter(draft, target), ModelDrafter(draft, target, drafting="greedy"))
    found = results(measure(target, drafters, prompts(40, 12), plan, frozenset()), plan, [])
    (speed,), (lengths,) = found["speedup"], found["draft_lengths"]
    assert [at["target_s"] for at in lengths["lengths"]] == pytest.approx([0.011, 0.012, 0.013, 0.014])
    assert [at["draft_s"] for at in lengths["lengths"]] == pytest.approx([0.0, 0.002, 0.004, 0.006])
    assert speed["plain_tok_s"] == pytest.approx(1 / 0.011)
    tokens = lengths["lengths"][2]["tokens_per_step"]
    assert 1.3 < tokens < 2.9
    assert speed["predicted"] == pytest.approx(tokens * 0.011 / (0.013 + 0.004))
    assert speed["measured"] == pytest.approx(speed["predicted"], rel=0.05)  # a text's last step drafts less


def test_same_seed_same_figures(models, tmp_path) -> None:
    """All but times; and another seed gives others."""
    kept = ("acceptance", "counted")
    found = []
    for seed in (0, 0, 1):
        out = tmp_path / "o.json"
        arguments = (
            "--target", models[0], "--draft", models[1], "--data", data(tmp_path), "--max-tokens", 8, "--temperatures",
            1, "--top-ps", 0.9, "--speed-prompts", 0, "--longest", 4, "--dtype", "float32", "--seed", seed,
            "--served", "probabilistic", "--json", out,
        )  # fmt: skip
        assert main([str(argument) for argument in arguments]) == 0
        found.append({name: json.loads(out.read_text())[name] for name in kept})
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "EMPTY"), "has no rows: give a file"),
        (("--data", "OTHER"), "has none of the fields messages, turns, prompt, question (found: text, id)"),
        (("--data", "BROKEN"), "line 1 is not JSON"),
        (("--data", "missing.jsonl"), "there is no file or folder missing.jsonl"),
        (("--temperatures", "-1"), "temperature=-1.0: must be finite and at least 0; use 0 for greedy"),
        (("--top-ps", "0"), "top_p=0.0: must be in (0, 1]"),
        (("--draft-length", "0"), "draft length 0: must be at least 1"),
        (("--longest", "2"), "must be at least the draft length of the runs, 4"),
        (("--draft", "no-such-draft"), "unknown draft 'no-such-draft'"),
        (("--max-tokens", "600"), "they leave no room for a prompt in the 512 positions"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_end_with_status_2_and_one_line(options, message, models, tmp_path, capsys) -> None:
    for name, text in (("EMPTY", ""), ("OTHER", '{"text": "x", "id": 1}\n'), ("BROKEN", "{\n")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("EMPTY", "OTHER", "BROKEN")}
    arguments = ["--target", str(models[0]), "--draft", "ngram", "--data", str(data(tmp_path))]
    assert main([*arguments, *(files.get(option, option) for option in options), "--dtype", "float32"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err and captured.out == ""


def test_help_is_quick() -> None:
    done = subprocess.run([sys.executable, "-m", "spec.bench", "--help"], capture_output=True, text=True, check=True)
    assert "--temperatures" in done.stdout
    imports = "import sys, spec.bench.cli; assert not {'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", imports], check=True)
