"""Health in whole runs: figures of every step, guards that act, steps that have nothing left to train on."""

from __future__ import annotations

import pytest

from tests.test_run import lines, train


@pytest.mark.parametrize("changes", [{}, {"algorithm": "policy_gradient"}], ids=["gkd", "policy_gradient"])
def test_every_step_says_how_healthy_its_rollouts_are(tiny_settings, tmp_path, changes) -> None:
    train(tiny_settings, tmp_path, **changes, steps=2)
    for record in lines(tmp_path):
        names = {name for name in record if name.startswith("health/")}
        assert {"health/truncated", "health/entropy", "health/divergence/0-7", "health/kept_tokens"} <= names
        assert record["health/length/mean"] == record["completion_tokens"] / record["rollouts"]
        assert record["health/kept_tokens"] == 1
        if record["stage"] == "on_policy":  # equal weights on both sides: ratios of 1 but for rounding
            assert record["health/sample_size"] == pytest.approx(1, abs=1e-6)
            assert record["health/ratio/max"] == pytest.approx(1, abs=1e-3)
            assert record["health/surprisal"] == pytest.approx(record["health/entropy"], rel=0.5)


def test_the_curriculum_lengthens_what_is_sampled(tiny_settings, tmp_path) -> None:
    changes = {"health__curriculum_from": 2, "health__curriculum_steps": 3, "warm_start__num_prompts": 0}
    train(tiny_settings, tmp_path, **changes)
    assert [record["health/length/max"] for record in lines(tmp_path)] == [2, 4, 6, 8]


def test_guards_cut_what_is_trained_on_and_nothing_else(tiny_settings, tmp_path) -> None:
    train(tiny_settings, tmp_path, health__prefix_tokens=2, warm_start__num_prompts=0, steps=2)
    first, *_ = lines(tmp_path)
    assert first["health/length/max"] == 8 and first["health/kept_tokens"] == pytest.approx(2 / 8, abs=0.1)
    assert not any("divergence/8" in name for name in first)


def test_a_step_without_any_finished_completion_changes_nothing_and_says_so(tiny_settings, tmp_path, capsys) -> None:
    summary = train(tiny_settings, tmp_path, health__drop_truncated=True, warm_start__num_prompts=0, steps=3,
                    sampling__max_tokens=1, health__warn_truncated=0.5)  # fmt: skip
    output = capsys.readouterr().out
    assert all("loss" not in record and record["health/truncated"] == 1 for record in lines(tmp_path))
    assert summary["heldout"]["start"] == summary["heldout"]["end"]
    assert output.count("every completion was dropped") == 3 and output.count("of completions end without") == 1
