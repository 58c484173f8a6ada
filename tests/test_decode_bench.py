"""The decoding benchmark without its models: sides, prompts, and the report of canned measurements."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmarks import decode
from benchmarks.decode_plan import COPY_INSTRUCTION, SIDES, Cell, Plan, Side, cells, copy_prompts, missing, select
from benchmarks.decode_report import results, table
from benchmarks.decode_roofline import weight_bytes
from benchmarks.decode_runner import Counts, Runner
from benchmarks.decode_runner import decode as decode_cell

PLAN = Plan("target", "draft", None, tokens=8, draft_length=3, lookup_length=6, seed=0, cells=[])


def rounds(cells_of_round: list[list[tuple[str, int, float, float]]], acceptance: float | None = None) -> list[dict]:
    """Canned results of a side: rounds of (workload, batch, temperature, tok/s)."""
    return [
        {
            "peak_rss_mib": 900.0,
            "cells": [
                {
                    "workload": workload, "batch": batch, "temperature": temperature, "tok_s": rate,
                    "decode_tok_s": 3 * rate, "first_token_s": 0.02, "tokens_per_target_step": 1.5,
                    "acceptance": acceptance,
                }
                for workload, batch, temperature, rate in cells
            ],
        }
        for cells in cells_of_round
    ]  # fmt: skip


def canned() -> dict[str, list[dict]]:
    """The machine is half as fast in the second round, and a third as fast in the third."""
    cell = ("problems", 1, 1.0)
    return {
        "ours.plain": rounds([[(*cell, 90.0), ("copy", 1, 1.0, 80.0)], [(*cell, 45.0)], [(*cell, 30.0)]]),
        "ours.draft": rounds([[(*cell, 180.0)], [(*cell, 67.5)], [(*cell, 60.0)]], acceptance=0.4),
        "vllm.plain": rounds([[(*cell, 45.0)], [(*cell, 22.5)], [(*cell, 15.0)]]),
    }


# ------------------------------------------------------------------------------------------------------------- report


def test_ratios_are_taken_round_by_round() -> None:
    found = {(row["engine"], row["drafter"], row["workload"]): row for row in results(canned(), PLAN)}
    draft = found["ours", "draft", "problems"]
    assert draft["ratio_own_plain"] == draft["ratio_ours_plain"] == 2.0  # of the medians it would be 67.5 / 45 = 1.5
    assert draft["ratio_vllm_plain"] == 4.0
    assert (draft["decode_tok_s"], draft["decode_ratio_own_plain"]) == (202.5, 2.0)
    assert draft["tok_s"] == 67.5 and draft["rounds_tok_s"] == [180.0, 67.5, 60.0]
    assert draft["acceptance"] == 0.4 and draft["draft_length"] == 3
    vllm = found["vllm", "none", "problems"]
    assert (vllm["ratio_own_plain"], vllm["ratio_ours_plain"]) == (1.0, 0.5)
    assert vllm["acceptance"] is None and vllm["draft_length"] is None
    assert found["ours", "none", "copy"]["ratio_vllm_plain"] is None  # nothing to divide by


def test_a_quantised_side_is_compared_with_its_own_plain() -> None:
    cell = ("copy", 8, 0.0)
    runs = {name: rounds([[(*cell, rate)]]) for name, rate in
            (("ours.plain", 50.0), ("ours-int8.plain", 80.0), ("ours-int8.draft", 120.0))}  # fmt: skip
    row = results(runs, PLAN)[-1]
    assert (row["ratio_own_plain"], row["ratio_ours_plain"]) == (1.5, 2.4)


@pytest.mark.parametrize(
    ("side", "length"),
    [
        (Side("ours", "ngram"), 6),
        (Side("ours", "ngram+draft"), 3),
        (Side("ours", "suffix", adaptive=True), "auto"),
        (Side("transformers", "draft"), "auto"),
        (Side("vllm", "draft"), 3),
    ],
)
def test_the_table_names_every_side_and_its_draft_length(side: Side, length: int | str) -> None:
    found = results({side.name: rounds([[("problems", 8, 0.0, 50.0)]])}, PLAN)
    assert found[0]["draft_length"] == length
    block, heading, line = table(found, 115.0).strip().splitlines()
    assert block.startswith("problems, batch 8, T=0 ") and "115" in block
    assert line.split()[:3] == [side.name, str(length), "50.0"]
    assert len(line) == len(heading)


def test_the_last_line_is_what_is_promised(tmp_path, capsys) -> None:
    save_file({"lm_head.weight": np.zeros((1000, 500), np.float16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    args = decode.arguments(["--json", str(tmp_path / "out.json")])
    plan = Plan(str(tmp_path), "draft", None, 8, 3, 6, 0, [])
    decode.report(args, plan, canned(), 50e6, {"llama.cpp.plain": "llama_cpp is not installed"})
    lines = capsys.readouterr().out.splitlines()
    last = json.loads(lines[-1])
    assert last["roofline_tok_s"] == 50  # 50 MB/s over a million bytes
    wanted = {"engine", "drafter", "temperature", "batch", "tok_s", "tokens_per_target_step", "acceptance"}
    assert last["results"] and all(wanted <= row.keys() for row in last["results"])
    assert "llama.cpp.plain: llama_cpp is not installed" in lines
    assert json.loads((tmp_path / "out.json").read_text())["results"] == last["results"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_every_matrix_once_and_no_embedding(tied: bool, tmp_path) -> None:
    tensors = {"model.embed_tokens.weight": np.zeros((5, 4), np.float16), "layer.weight": np.zeros((3, 4), np.float16)}
    if not tied:
        tensors["lm_head.weight"] = np.zeros((5, 4), np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    assert weight_bytes(tmp_path) == 2 * (3 * 4 + 5 * 4)  # the layer and the head, which is the embedding where tied


def test_a_side_that_fails_is_left_out_and_the_others_are_measured(monkeypatch, capsys) -> None:
    started = []

    def run(name: str, plan, threads) -> dict:
        started.append((name, Plan.read(plan).seed))
        if name == "vllm.plain":
            raise RuntimeError("`python ...` exited 1; its output ended:\nno room for the cache")
        return {"bytes_per_s": 1e6} if name == "memory" else canned()[name][0]

    sides = [Side("ours"), Side("vllm"), Side("ours", "draft")]
    plans = [Plan("t", "d", None, 8, 3, 6, seed, []) for seed in (0, 1)]
    monkeypatch.setattr(sys, "argv", ["decode"])
    monkeypatch.setattr(decode, "prepare", lambda args: (sides, plans, {}))
    monkeypatch.setattr(decode, "run", run)
    monkeypatch.setattr(decode, "weight_bytes", lambda directory: 1000)
    decode.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["left_out"] == {"vllm.plain": "failed: no room for the cache"}
    assert {row["engine"] for row in last["results"]} == {"ours"}
    assert [name for name, seed in started if seed == 1] == ["memory", "ours.plain", "ours.draft"]
    assert all(len(row["rounds_tok_s"]) == 2 for row in last["results"])


# -------------------------------------------------------------------------------------------------------------- sides


def test_names_of_sides_are_distinct_and_selectable() -> None:
    names = [side.name for side in SIDES]
    assert len(set(names)) == len(names)
    assert {"ours.plain", "ours.draft.auto", "ours-int4.draft", "transformers.ngram", "vllm.draft"} <= set(names)
    assert [side.name for side in select(["vllm.*", "ours.plain"])] == [
        "ours.plain", "vllm.plain", "vllm.draft", "vllm.ngram",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--only ours\.eagle.*choose among ours\.plain"):
        select(["ours.eagle"])


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing(Side("llama.cpp"), "some.gguf") == "llama_cpp is not installed"
    assert missing(Side("ours"), None) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert missing(Side("llama.cpp"), "some.gguf") is None
    assert "--gguf" in (missing(Side("llama.cpp"), None) or "")


def test_a_missing_student_names_the_remedy(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(decode, "STUDENT", tmp_path)
    with pytest.raises(ValueError, match=r"make quickstart.*--draft"):
        decode.draft_directory(None)


# ---------------------------------------------------------------------------------------------------------- workloads


def test_copying_takes_the_whole_completion_and_fits(tokenizer) -> None:
    sentences: list[str] = []
    for ids in copy_prompts(tokenizer, 3, tokens=40, room=900):
        assert len(ids) <= 900
        text = tokenizer.decode(ids)
        passage = text.partition(f"{COPY_INSTRUCTION}\n\n")[2].partition("<|im_end|>")[0]
        assert text.count(passage) == 3  # asked for, and given twice
        begun = text.rpartition("<|im_start|>assistant\n")[2]
        assert begun and passage.startswith(f"{begun} ") and "?" not in passage
        assert len(tokenizer(passage.removeprefix(begun), add_special_tokens=False)["input_ids"]) >= 40
        sentences += passage.split(". ")
    assert len(set(sentences)) == len(sentences)
    with pytest.raises(ValueError, match="lower --tokens"):
        copy_prompts(tokenizer, 1, tokens=40, room=40)


def test_rounds_have_other_prompts_in_whole_batches(tmp_path) -> None:
    prompts = [[i] for i in range(10)]
    first, second = (cells({"problems": prompts}, [0.0, 1.0], [1, 4], 2, turn) for turn in (0, 1))
    assert [(cell.batch, cell.temperature) for cell in first] == [(1, 0.0), (1, 1.0), (4, 0.0), (4, 1.0)]
    assert [cell.prompts for cell in first] == 2 * [[[0], [1]]] + 2 * [[[0], [1], [2], [3]]]
    assert [cell.prompts for cell in second][::2] == [[[2], [3]], [[4], [5], [6], [7]]]
    third = cells({"problems": prompts}, [0.0], [4], 2, 2)
    assert third[0].prompts == [[8], [9], [0], [1]]  # a short file begins again
    plan = Plan("t", None, None, 8, 3, 6, 1, first)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


# ------------------------------------------------------------------------------------------------------------ running


class Canned(Runner):
    """Makes as many tokens as it is told, two a target step."""

    def __init__(self, short: int = 0):
        self.short, self.calls = short, []

    def generate(self, prompts, temperature, tokens, seed):
        self.calls.append((prompts, tokens, seed))
        made = len(prompts) * tokens - self.short
        return Counts(made, 0.5, [0.1] * len(prompts), made // 2, drafted=made, accepted=made // 2)


def test_a_cell_is_warmed_up_and_added_up() -> None:
    cell = Cell("problems", 1.0, 2, [[1], [2], [3], [4]])
    runner = Canned()
    figures = decode_cell(runner, cell, 20, seed=5).figures(batch=2)
    assert [(prompts, tokens) for prompts, tokens, _ in runner.calls] == [
        ([[1], [2]], 16), ([[1], [2]], 20), ([[3], [4]], 20),
    ]  # fmt: skip
    assert runner.calls[1][2] != runner.calls[2][2]  # no two batches share a seed
    assert figures == pytest.approx(
        {
            "tok_s": 80.0,
            "decode_tok_s": 76 / 0.8,
            "first_token_s": 0.1,
            "tokens_per_target_step": 2.0,
            "acceptance": 0.5,
        }
    )
    with pytest.raises(RuntimeError, match="80 tokens were asked for, 78 were made"):
        decode_cell(Canned(short=1), cell, 20, seed=5)


@pytest.fixture(scope="module")
def tiny_plan(teacher_dir) -> Plan:
    prompt = [5, 6, 7, 8] * 3
    problems, copied = (Cell(name, 0.0, 1, [prompt]) for name in ("problems", "copy"))
    return Plan(str(teacher_dir), str(teacher_dir), None, 12, 3, 6, 0, [problems, copied])


@pytest.mark.parametrize("engine", ["ours", "transformers"])
def test_a_target_that_drafts_for_itself_is_always_accepted(engine: str, tiny_plan: Plan) -> None:
    """The counts of both engines mean the same: all that was drafted is accepted, in steps of more than a token."""
    from benchmarks.decode_engines import measure

    plain = measure(Side(engine), tiny_plan)["cells"]
    assert [(cell["workload"], cell["tokens_per_target_step"]) for cell in plain] == [("problems", 1.0), ("copy", 1.0)]
    assert all(cell["acceptance"] is None and 0 < cell["first_token_s"] < 12 / cell["tok_s"] for cell in plain)
    (drafted,) = measure(Side(engine, "draft"), tiny_plan)["cells"]  # the copying task is not its own
    assert drafted["workload"] == "problems"
    assert drafted["acceptance"] > 0.6 and drafted["tokens_per_target_step"] >= 2


def test_llama_cpp_is_asked_for_the_whole_distribution_and_no_old_prefix(monkeypatch, tiny_plan: Plan) -> None:
    asked = []

    class Llama:
        def __init__(self, **options):
            asked.append(("new", options["n_ctx"] >= 12 + 12, options["n_threads"] == torch.get_num_threads()))

        def reset(self):
            asked.append("reset")

        def set_seed(self, seed):
            asked.append(seed)

        def generate(self, ids, **options):
            asked.append((ids, options))
            yield from iter(int, 1)  # without end

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    from benchmarks.decode_engines import LlamaCpp

    counts = LlamaCpp(Side("llama.cpp"), tiny_plan).generate([[1, 2]], 1.0, 12, seed=7)
    options = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
    assert asked == [("new", True, True), "reset", 7, ([1, 2], options)]
    assert (counts.tokens, counts.target_steps, len(counts.first_s)) == (12, 12, 1)
