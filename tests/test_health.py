"""Health of rollouts: figures worked out by hand on degenerate completions, and guards that keep a rollout whole."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpolicy.batching import pack, text_rollout
from onpolicy.guards import apply_guards, curriculum_tokens, max_tokens_at
from onpolicy.health import StepTokens, health_warnings, position_buckets, rollout_health, token_health
from onpolicy.health_config import HealthConfig, check_health
from onpolicy.losses.toy import STOP, Tree, brute_force, gradient, token_kl
from onpolicy.repetition import count_ngrams, longest_loop, loop_end
from onpolicy.types import FinishReason, Prompt, Rollout

PROMPT = Prompt("p", (11, 12, 13))
NAN = math.nan


def rollout(ids: list[int], finish: FinishReason = "stop", **changes: object) -> Rollout:
    """Log-probs are minus the position, so that a shifted cut shows."""
    logprobs = -np.arange(len(ids), dtype=np.float32)
    return replace(Rollout(PROMPT, np.array(ids, np.int64), logprobs, finish, policy_version=3), **changes)


ALL_ONE = rollout([7] * 10, "length")
PERIOD_3 = rollout([1, 2, 3] * 4 + [1], "length")
SINGLE = rollout([0])
HONEST = rollout([4, 5, 6, 8, 9, 0])

# -- repetition


def said_in_a_row(ids: tuple[int, ...], unit: int, start: int) -> int:
    """Whole repeats of the ``unit`` tokens at ``start``, straight from the definition."""
    word, count = ids[start : start + unit], 0
    while len(word) == unit and ids[start + count * unit : start + (count + 1) * unit] == word:
        count += 1
    return count


def slow_loop_end(ids: tuple[int, ...], loop_length: int, repeats: int) -> int:
    ends = [
        start + unit * repeats
        for unit in range(1, loop_length + 1)
        for start in range(len(ids))
        if said_in_a_row(ids, unit, start) >= repeats
    ]
    return min(ends, default=len(ids))


def slow_longest_loop(ids: tuple[int, ...], loop_length: int) -> int:
    """Longest stretch that is two or more units and the beginning of one more."""
    longest = 0
    for start in range(len(ids)):
        for end in range(start + 2, len(ids) + 1):
            stretch = ids[start:end]
            for unit in range(1, min(loop_length, len(stretch) // 2) + 1):
                if all(stretch[t] == stretch[t % unit] for t in range(len(stretch))):
                    longest = max(longest, len(stretch))
    return longest


WORDS = st.lists(st.integers(0, 2), min_size=1, max_size=24).map(tuple)


@settings(deadline=None)  # a first call compiles, and machines stall
@given(WORDS, st.integers(1, 5), st.integers(2, 4))
def test_loops_are_found_where_the_definition_finds_them(ids, loop_length, repeats) -> None:
    array = np.array(ids)
    assert loop_end(array, loop_length, repeats) == slow_loop_end(ids, loop_length, repeats)
    assert longest_loop(array, loop_length) == slow_longest_loop(ids, loop_length)


@settings(deadline=None)
@given(WORDS, st.integers(1, 5), st.integers(2, 4), st.integers(1, 24))
def test_where_a_loop_ends_does_not_depend_on_what_follows(ids, loop_length, repeats, seen) -> None:
    """It is a stopping rule: what was seen so far decides."""
    array = np.array(ids)
    end = loop_end(array, loop_length, repeats)
    assert loop_end(array[:seen], loop_length, repeats) == min(end, len(array[:seen]))


@pytest.mark.parametrize(
    ("ids", "loop_length", "longest", "end_of_three"),
    [
        ([7] * 10, 16, 10, 3),
        ([1, 2, 3] * 4 + [1], 3, 13, 9),
        ([1, 2, 3] * 4 + [1], 2, 0, 13),  # the unit is longer than what is looked for
        ([9, 9, 1, 2, 1, 2, 1, 2, 5], 4, 6, 8),
        ([0], 16, 0, 1),
        ([1, 2, 3, 4, 5], 16, 0, 5),
    ],
)
def test_loops_by_hand(ids, loop_length, longest, end_of_three) -> None:
    assert longest_loop(np.array(ids), loop_length) == longest
    assert loop_end(np.array(ids), loop_length, 3) == end_of_three


@pytest.mark.parametrize(
    ("ids", "n", "repeated", "total"),
    [([7] * 10, 4, 6, 7), ([1, 2, 3] * 4 + [1], 4, 7, 10), ([1, 2, 3], 4, 0, 0), ([1, 1, 2, 1], 1, 2, 4)],
)
def test_ngrams_by_hand(ids, n, repeated, total) -> None:
    assert count_ngrams(np.array(ids), n) == (repeated, total)


# -- figures of rollouts


def test_figures_of_degenerate_rollouts_by_hand() -> None:
    figures = rollout_health([ALL_ONE, PERIOD_3, SINGLE, HONEST], HealthConfig(ngram=4))
    assert figures == pytest.approx({
        "health/truncated": 2 / 4,
        "health/one_token": 1 / 4,
        "health/length/mean": 30 / 4,  # 10, 13, 1, 6
        "health/length/q10": 1 + 0.3 * 5,
        "health/length/q50": 8.0,
        "health/length/q90": 10 + 0.7 * 3,
        "health/length/max": 13.0,
        "health/repeated_ngrams": (6 + 7) / (7 + 10 + 0 + 3),
        "health/loop_share": (10 + 13) / 30,
        "health/loop_max": 13.0,
        "health/missing_logprobs": 0.0,
    })  # fmt: skip


def test_figures_of_single_tokens_and_of_nothing() -> None:
    figures = rollout_health([SINGLE] * 3, HealthConfig())
    assert figures["health/one_token"] == 1 and figures["health/repeated_ngrams"] == 0
    assert figures["health/loop_max"] == 0 and figures["health/length/q90"] == 1
    assert rollout_health([], HealthConfig()) == {}


def test_missing_logprobs_are_counted_where_a_sampler_should_have_given_them() -> None:
    lost = replace(HONEST, logprobs=np.array([NAN, NAN, NAN, 0, 0, 0], np.float32))
    text = text_rollout(PROMPT, [4, 5, 6])  # NaN by right
    assert rollout_health([lost, HONEST, text], HealthConfig())["health/missing_logprobs"] == 3 / 12
    assert rollout_health([text], HealthConfig())["health/missing_logprobs"] == 0


# -- figures of tokens


def step(lengths: list[int], student: list[float], sampler: list[float], **changes: torch.Tensor) -> StepTokens:
    ids = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    zeros = torch.zeros(len(ids))
    tokens = StepTokens(ids, torch.tensor(student), zeros - 1, torch.tensor(sampler), zeros)
    return replace(tokens, **changes)


def test_ratios_and_sample_sizes_by_hand() -> None:
    log2, log3 = math.log(2), math.log(3)
    tokens = step([2, 1, 1], [-1.0, -1.0, -1.0, -5.0], [-1 - log2, -1 - log3, -1 + log2, NAN])
    figures = token_health(tokens)  # ratios 2, 3, 1/2 and one token that no sampler drew
    assert figures["health/ratio/q50"] == pytest.approx(2)
    assert figures["health/ratio/q01"] == pytest.approx(0.5 + 0.02 * 1.5)
    assert figures["health/ratio/q99"] == pytest.approx(2 + 0.98)
    assert figures["health/ratio/max"] == pytest.approx(3)
    assert figures["health/sample_size"] == pytest.approx(5.5**2 / (3 * (4 + 9 + 0.25)))
    assert figures["health/sample_size/sequence"] == pytest.approx(6.5**2 / (2 * (36 + 0.25)))  # ratios 6 and 1/2
    assert figures["health/surprisal"] == pytest.approx(1)
    assert figures["health/kl/0-7"] == pytest.approx(0)  # the drawn tokens are as likely to the teacher


def test_one_token_that_rules_is_a_sample_size_of_one() -> None:
    figures = token_health(step([4], [0.0, -9.0, -9.0, -9.0], [-30.0, 0.0, 0.0, 0.0]))
    assert figures["health/sample_size"] == pytest.approx(1 / 4)
    assert math.isfinite(figures["health/ratio/max"])
    same = token_health(step([4], [-3.0] * 4, [-3.0] * 4))
    assert same["health/sample_size"] == 1 and same["health/ratio/q01"] == same["health/ratio/max"] == 1


def test_text_that_no_sampler_drew_has_divergence_and_entropy_only() -> None:
    tokens = step([2], [-1.0, -2.0], [NAN, NAN], divergence=torch.tensor([0.5, 1.5]), entropy=torch.tensor([1.0, 2.0]))
    assert token_health(tokens) == pytest.approx({"health/entropy": 1.5, "health/divergence/0-7": 1.0})
    assert token_health(step([], [], [])) == {}


def test_means_by_position_count_from_the_start_of_each_completion() -> None:
    position = [*range(40), *range(9)]
    per_token = torch.tensor(position, dtype=torch.float32)
    tokens = step([40, 9], [0.0] * 49, [0.0] * 49, divergence=per_token, teacher_logprobs=-2 * per_token)
    figures = token_health(tokens)
    expected = {"0-7": 3.5, "8-15": (8 * 11.5 + 8) / 9, "16-31": 23.5, "32-63": 35.5}
    for bucket, mean in expected.items():
        assert figures[f"health/divergence/{bucket}"] == pytest.approx(mean)
        assert figures[f"health/kl/{bucket}"] == pytest.approx(2 * mean)
    assert sum("/divergence/" in name for name in figures) == 4


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_position_buckets_double(lengths) -> None:
    buckets = position_buckets(torch.repeat_interleave(torch.tensor(lengths))).tolist()
    expected = [0 if t < 8 else (t // 8).bit_length() for length in lengths for t in range(length)]
    assert buckets == expected


def test_batches_of_a_step_are_joined_without_mixing_their_sequences() -> None:
    log2 = math.log(2)
    parts = [step([2], [0.0, 0.0], [-log2, -log2]), step([1, 1], [0.0, 0.0], [0.0, 0.0])]
    figures = token_health(StepTokens.join(parts))  # completions with ratios 4, 1, 1
    assert figures["health/sample_size/sequence"] == pytest.approx(36 / (3 * 18))
    assert "health/entropy" not in figures
    with_entropy = [replace(part, entropy=torch.full((2,), float(i))) for i, part in enumerate(parts)]
    assert token_health(StepTokens.join(with_entropy))["health/entropy"] == pytest.approx(0.5)


# -- guards

LOOPING = HealthConfig(loop_stop=3, loop_length=3)


def test_without_configuration_nothing_is_touched() -> None:
    drawn = [ALL_ONE, PERIOD_3, SINGLE, HONEST, text_rollout(PROMPT, [7] * 10)]
    assert all(a is b for a, b in zip(apply_guards(drawn, HealthConfig()), drawn, strict=True))
    assert max_tokens_at(0, HealthConfig(), 96) == 96
    assert health_warnings({"health/truncated": 1.0, "health/entropy": 0.0}, HealthConfig()) == {}


def test_a_loop_is_ended_after_its_last_allowed_repeat() -> None:
    finished = rollout([7, 7, 7, 7, 0])
    one, three, honest, stopped = apply_guards([ALL_ONE, PERIOD_3, HONEST, finished], LOOPING)
    assert one.completion_ids.tolist() == [7, 7, 7] and three.completion_ids.tolist() == [1, 2, 3] * 3
    assert three.logprobs.tolist() == [0, -1, -2, -3, -4, -5, -6, -7, -8]
    assert honest is HONEST
    assert stopped.finish_reason == "length" and stopped.completion_ids.tolist() == [7, 7, 7]


def test_a_loop_counts_as_truncated_and_a_prefix_does_not() -> None:
    config = replace(LOOPING, drop_truncated=True, prefix_tokens=2)
    kept = apply_guards([rollout([7, 7, 7, 7, 0]), SINGLE, HONEST, rollout([4, 5, 6], "length")], config)
    assert [k.completion_ids.tolist() for k in kept] == [[0], [4, 5]]
    assert [k.finish_reason for k in kept] == ["stop", "length"]


def test_when_all_are_truncated_nothing_is_left() -> None:
    assert apply_guards([ALL_ONE, PERIOD_3], HealthConfig(drop_truncated=True)) == []


def test_text_of_others_is_left_alone() -> None:
    config = HealthConfig(loop_stop=2, prefix_tokens=1, drop_truncated=True)
    others = [text_rollout(PROMPT, [7] * 10), replace(ALL_ONE, source="teacher")]
    assert all(a is b for a, b in zip(apply_guards(others, config), others, strict=True))


@settings(deadline=None)
@given(
    st.lists(WORDS, min_size=1, max_size=4),
    st.none() | st.integers(2, 4),
    st.none() | st.integers(1, 30),
    st.booleans(),
)
def test_guards_keep_a_rollout_whole(completions, loop_stop, prefix, drop) -> None:
    """Prefixes with their own log-probs, never empty, ready to pack; doing it twice changes nothing."""
    drawn = [
        rollout(list(ids), "length" if sum(ids) % 2 else "stop", sample_index=i) for i, ids in enumerate(completions)
    ]
    config = HealthConfig(loop_stop=loop_stop, loop_length=4, prefix_tokens=prefix, drop_truncated=drop)
    kept = apply_guards(drawn, config)
    for after in kept:
        before = drawn[after.sample_index]
        length = len(after)
        assert 1 <= length == len(after.logprobs) and (prefix is None or length <= prefix)
        assert np.array_equal(after.completion_ids, before.completion_ids[:length])
        assert np.array_equal(after.logprobs, before.logprobs[:length])
        cut = length < len(before)
        assert after.finish_reason == ("length" if cut else before.finish_reason)
        assert after == replace(
            before, **{k: getattr(after, k) for k in ("completion_ids", "logprobs", "finish_reason")}
        )
    if not drop:
        assert len(kept) == len(drawn)
        again = apply_guards(kept, config)
        assert all(a is b for a, b in zip(again, kept, strict=True))
    for batch in pack(kept, 64):
        lengths = torch.bincount(batch.sequence_ids).tolist()
        assert lengths == [len(kept[i]) for i in batch.indices]
        assert batch.sampler_logprobs.tolist() == [-float(t) for length in lengths for t in range(length)]


# -- what guards do to the gradient, by enumeration


def stop_kept(tree: Tree, loop_stop: int, prefix: int) -> tuple[torch.Tensor, list[int]]:
    """[P] whether a token after each prefix is trained on; tokens kept of each sequence, as the guards cut it."""
    alive = [len(h) < prefix and slow_loop_end((*h, -1), 2, loop_stop) > len(h) for h in tree.prefixes]
    config = HealthConfig(loop_stop=loop_stop, loop_length=2, prefix_tokens=prefix)
    cut = apply_guards([rollout(list(y)) for y in tree.sequences], config)
    return torch.tensor(alive, dtype=torch.float64), [len(r) for r in cut]


@pytest.mark.parametrize(("loop_stop", "prefix"), [(2, 4), (3, 4), (4, 2), (2, 3)])
def test_stopping_rules_leave_the_gradient_of_the_kept_positions_unbiased(loop_stop, prefix) -> None:
    tree = Tree.grow(vocabulary=3, max_length=4)
    student, teacher = tree.table(1), tree.table(2)
    alive, kept = stop_kept(tree, loop_stop, prefix)
    assert 0 < alive.sum() < len(alive)
    reward = teacher.log_softmax(-1) - student.log_softmax(-1)
    lengths = {tuple(steps): length for steps, length in zip(tree.walks(), kept, strict=True)}

    def coefficient(steps, t):
        return -reward[steps[t]].item() if t < lengths[tuple(steps)] else 0.0

    estimate = brute_force(tree, student, student, coefficient)
    visits = tree.visits(student)
    objective = gradient(lambda logits: (alive * visits * token_kl(logits, teacher)).sum(), student)
    torch.testing.assert_close(estimate, objective, rtol=0, atol=1e-12)


def test_dropping_truncated_completions_is_biased() -> None:
    tree = Tree.grow(vocabulary=3, max_length=3)
    student, teacher = tree.table(1), tree.table(2)
    drawn = [
        rollout(list(y), "stop" if y[-1] == STOP else "length", sample_index=i) for i, y in enumerate(tree.sequences)
    ]
    left = {r.sample_index for r in apply_guards(drawn, HealthConfig(drop_truncated=True))}
    assert left == set(tree.finished.nonzero().flatten().tolist())
    reward = teacher.log_softmax(-1) - student.log_softmax(-1)
    index = {tuple(steps): b for b, steps in enumerate(tree.walks())}
    estimate = brute_force(
        tree, student, student, lambda steps, t: -reward[steps[t]].item() if index[tuple(steps)] in left else 0.0
    )
    full = gradient(lambda logits: (tree.visits(student) * token_kl(logits, teacher)).sum(), student)
    cosine = torch.nn.functional.cosine_similarity(estimate.flatten(), full.flatten(), dim=0)
    assert cosine < 0.99  # not even its direction, whatever the number of completions it is divided by


# -- curriculum


def test_the_curriculum_grows_evenly_from_first_to_last() -> None:
    assert [curriculum_tokens(step, 16, 96, 8) for step in range(10)] == [16, 26, 36, 46, 56, 66, 76, 86, 96, 96]
    config = HealthConfig(curriculum_from=16, curriculum_steps=8)
    assert max_tokens_at(4, config, 96) == 56 and max_tokens_at(1000, config, 96) == 96


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 500), st.integers(1, 300))
def test_the_curriculum_never_shrinks(first, growth, steps) -> None:
    tokens = [curriculum_tokens(step, first, first + growth, steps) for step in range(steps + 2)]
    assert tokens[0] == first and tokens[steps] == first + growth and tokens == sorted(tokens)


# -- warnings and settings


def test_warnings_name_what_crossed_and_what_to_do() -> None:
    config = HealthConfig(warn_truncated=0.5, warn_repetition=0.3, warn_entropy=0.1, warn_sample_size=0.5)
    bad = {
        "health/truncated": 0.75, "health/repeated_ngrams": 0.4, "health/entropy": 0.05, "health/sample_size": 0.2,
        "health/missing_logprobs": 0.1,
    }  # fmt: skip
    said = health_warnings(bad, config)
    assert said.keys() == {"truncated", "repeated_ngrams", "entropy", "sample_size", "missing_logprobs"}
    assert said["truncated"].startswith("0.75 of completions") and "sampling.max_tokens" in said["truncated"]
    at_the_bounds = {
        "health/truncated": 0.5, "health/repeated_ngrams": 0.3, "health/entropy": 0.1, "health/sample_size": 0.5,
        "health/missing_logprobs": 0.0,
    }  # fmt: skip
    assert health_warnings(at_the_bounds, config) == health_warnings({}, config) == {}
    assert health_warnings({"health/entropy": NAN}, config) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loop_length": 0}, "health.loop_length"),
        ({"ngram": 0}, "health.ngram"),
        ({"loop_stop": 1}, "loop_stop must be at least 2"),
        ({"prefix_tokens": 0}, "prefix_tokens must be at least 1"),
        ({"curriculum_from": 97, "curriculum_steps": 5}, "between 1 and sampling.max_tokens=96"),
        ({"curriculum_from": 8}, "needs health.curriculum_steps"),
        ({"curriculum_steps": 8}, "needs health.curriculum_from"),
        ({"warn_truncated": 50.0}, "warn_truncated is a share"),
        ({"warn_entropy": -1.0}, "warn_entropy"),
    ],
)
def test_settings_that_cannot_work_are_refused(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_health(HealthConfig(**values), 96)


def test_settings_are_read_from_the_command_line_and_import_nothing_heavy() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(HealthConfig, "health")
    parsed = parser.parse_args(["--health.loop_stop=8", "--health.warn_truncated=0.5"])
    config = HealthConfig(**vars(parsed.health))
    assert config == HealthConfig(loop_stop=8, warn_truncated=0.5)
    check_health(config, 96)
    code = "import sys, onpolicy.health_config; sys.exit(bool({'numpy', 'torch', 'numba'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
