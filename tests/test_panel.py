"""Several teachers, extrapolated rewards and the task's, proved on batches whose every sample can be listed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from onpolicy.batching import Batch, pack
from onpolicy.config import PolicyGradientConfig
from onpolicy.losses import names, per_token
from onpolicy.losses.normalise import Normalisation
from onpolicy.losses.rewards import expected_rewards, least_variance_baseline
from onpolicy.task import answer_grader, task_metrics
from onpolicy.teachers import Score, Verdict
from onpolicy.teachers.panel import Panel, task_rewards
from onpolicy.types import Prompt, Rollout
from onpolicy.updates import PolicyGradientUpdate, divergence_update, whole_vocabulary
from tests.test_run import complete, lines, losses, options, start, train

VOCAB = 5
WEIGHTS = (0.7, 0.3)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def models() -> SimpleNamespace:
    """Logits [2, V] of a student, two teachers and a reference at two prefixes; heads of their own."""
    head = torch.eye(VOCAB, dtype=torch.float64)  # the student's hidden states are its logits
    scores = [Score(normal(k, 2, 4), normal(10 + k, VOCAB, 4)) for k in range(3)]
    logits = [score.hidden @ score.head.T for score in scores]
    return SimpleNamespace(
        student=normal(7, 2, VOCAB).requires_grad_(), head=head, teachers=tuple(scores[:2]), reference=scores[2],
        teacher_logits=logits[:2], reference_logits=logits[2],
    )  # fmt: skip


def outcomes(student: torch.Tensor) -> Iterator[tuple[float, Batch, list[Rollout]]]:
    """Every pair of one-token completions with its probability; a task reward of 1 for an even token."""
    probabilities = student.detach().softmax(-1)
    for tokens in itertools.product(range(VOCAB), repeat=2):
        rollouts = [
            Rollout(Prompt(str(i), (1, i)), np.array([y]), probabilities[i, y : y + 1].log().float().numpy(), "stop", 0,
                    task_reward=float(y % 2 == 0))
            for i, y in enumerate(tokens)
        ]  # fmt: skip
        (batch,) = pack(rollouts, 100)
        yield math.prod(probabilities[i, y].item() for i, y in enumerate(tokens)), batch, rollouts


def expectation(models: SimpleNamespace, config: PolicyGradientConfig, verdict: Verdict) -> tuple[torch.Tensor, float]:
    """Mean and variance of the update's gradient by the student's logits, over all outcomes."""
    update = PolicyGradientUpdate(config, 1.0, "token")
    weights, gradients = [], []
    for probability, batch, rollouts in outcomes(models.student):
        said = Verdict(verdict.teachers, verdict.weights, verdict.reference, task_rewards(batch, rollouts))
        loss = update(batch, models.student, models.head, said, 2).loss
        weights.append(probability)
        gradients.append(torch.autograd.grad(loss, models.student)[0])
    law, samples = torch.tensor(weights, dtype=torch.float64), torch.stack(gradients)
    mean = torch.einsum("s,snv->nv", law, samples)
    return mean, float((law * (samples - mean).square().sum((1, 2))).sum())


def kl(student: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    p, q = student.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


CONTROLS = ("none", "expected", "least_variance")


@pytest.mark.parametrize("control", CONTROLS)
def test_everything_at_once_descends_what_it_says(models: SimpleNamespace, control: str) -> None:
    """λ Σ w_k KL(S‖T_k) - (λ-1) KL(S‖R) - weight * E[task], whatever is subtracted."""
    config = PolicyGradientConfig(
        control_variate=control, extrapolation=1.5, reference_model="r", task_weight=2.0, ratio_cap=1e9
    )  # type: ignore[arg-type]
    verdict = Verdict(models.teachers, WEIGHTS, models.reference)
    mean, _ = expectation(models, config, verdict)
    s = models.student
    distance = sum(w * kl(s, t) for w, t in zip(WEIGHTS, models.teacher_logits, strict=True))
    right = s.softmax(-1)[:, ::2].sum(-1)
    objective = (1.5 * distance - 0.5 * kl(s, models.reference_logits) - 2.0 * right).mean()
    (exact,) = torch.autograd.grad(objective, s)
    torch.testing.assert_close(mean, exact, rtol=1e-5, atol=1e-6)  # the sampler's log-probs are float32
    (without,) = torch.autograd.grad(kl(s, models.teacher_logits[0]).mean(), s)
    assert (mean - without).norm() > 0.1 * mean.norm()


def test_the_least_variance_is_the_least(models: SimpleNamespace) -> None:
    verdict = Verdict(models.teachers, WEIGHTS, models.reference)
    settings = {"extrapolation": 1.5, "reference_model": "r", "ratio_cap": 1e9}
    variance = {
        control: expectation(models, PolicyGradientConfig(control_variate=control, **settings), verdict)[1]  # type: ignore[arg-type]
        for control in CONTROLS
    }
    assert variance["least_variance"] < 0.99 * min(variance["none"], variance["expected"])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("control", CONTROLS[1:])
def test_chunks_give_the_control_variates_of_full_logits(models, control: str, temperature: float) -> None:
    verdict = Verdict(models.teachers, WEIGHTS, models.reference)
    ours = whole_vocabulary(control, models.student, models.head, verdict, 1.5, temperature)
    rule = {"expected": expected_rewards, "least_variance": least_variance_baseline}[control]
    student = models.student / temperature
    beyond = {"reference_logits": models.reference_logits / temperature, "extrapolation": 1.5}
    each = [rule(student, teacher / temperature, **beyond) for teacher in models.teacher_logits]
    torch.testing.assert_close(ours["control_variate"], WEIGHTS[0] * each[0] + WEIGHTS[1] * each[1])
    distances = [kl(student, teacher / temperature) for teacher in models.teacher_logits]
    torch.testing.assert_close(ours["divergence"], WEIGHTS[0] * distances[0] + WEIGHTS[1] * distances[1])
    p = student.log_softmax(-1)
    torch.testing.assert_close(ours["student_entropy"], -(p.exp() * p).sum(-1))


# --- gkd ---


def gradient(
    models: SimpleNamespace, name: str, verdict: Verdict, normalize: Normalisation = "token"
) -> tuple[float, torch.Tensor]:
    _, batch, _ = next(outcomes(models.student))
    loss = divergence_update(name, 1.0, normalize)(batch, models.student, models.head, verdict, 2).loss
    return loss.item(), torch.autograd.grad(loss, models.student)[0]


@pytest.mark.parametrize("normalize", ["token", "sequence"])  # the same for completions of one token
@pytest.mark.parametrize("name", [name for name in names() if name != "kd"])
def test_gkd_descends_the_weighted_mean_of_divergences(models: SimpleNamespace, name: str, normalize) -> None:
    value, ours = gradient(models, name, Verdict(models.teachers, WEIGHTS), normalize)
    mean = sum(
        w * per_token(name, models.student, t).mean() for w, t in zip(WEIGHTS, models.teacher_logits, strict=True)
    )
    assert value == pytest.approx(mean.item(), rel=1e-6)  # weights of tokens are float32
    torch.testing.assert_close(ours, torch.autograd.grad(mean, models.student)[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_the_mean_of_kls_is_the_kl_from_a_mixture(models: SimpleNamespace, name: str) -> None:
    """Forward: from the arithmetic mean of the teachers; reverse: from their geometric mean; up to a constant."""
    logs = [logits.log_softmax(-1) for logits in models.teacher_logits]
    arithmetic = (WEIGHTS[0] * logs[0].exp() + WEIGHTS[1] * logs[1].exp()).log()
    mixed = arithmetic if name == "forward_kl" else WEIGHTS[0] * logs[0] + WEIGHTS[1] * logs[1]
    mixture = Score(mixed, torch.eye(VOCAB, dtype=torch.float64))
    value, ours = gradient(models, name, Verdict(models.teachers, WEIGHTS))
    of_mixture, theirs = gradient(models, name, Verdict((mixture,)))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert value > of_mixture + 1e-3  # the constant: how far the teachers are from one another


# --- the task ---


def test_only_finished_right_answers_are_rewarded(tokenizer) -> None:
    grade = answer_grader(tokenizer)

    def completion(text: str, finish: str = "stop", answer: str = "42") -> Rollout:
        ids = np.array(tokenizer.encode(text) + [tokenizer.eos_token_id] * (finish == "stop"))
        return Rollout(Prompt("p", (1,), answer), ids, np.zeros(len(ids), np.float32), finish, 0)  # type: ignore[arg-type]

    assert grade(completion("So it is 42.")) == 1.0
    assert grade(completion("It was 42, now 43.")) == 0.0
    assert grade(completion("So it is 42.", finish="length")) == 0.0
    assert grade(completion("I say yes!", answer="Yes")) == 1.0


def test_rewards_follow_their_rollouts_into_the_batch() -> None:
    rollouts = [
        Rollout(Prompt(str(i), (1,) * (i + 1)), np.array([1] * (3 - i)), np.zeros(3 - i, np.float32), "stop", 0,
                task_reward=float(i))
        for i in range(3)
    ]  # fmt: skip
    (batch,) = pack(rollouts, 100)
    said = task_rewards(batch, rollouts)
    assert said is not None and said.tolist() == [float(i) for i in batch.indices]
    unrewarded = [Rollout(r.prompt, r.completion_ids, r.logprobs, "stop", 0) for r in rollouts]
    assert task_rewards(batch, unrewarded) is None and task_metrics(unrewarded) == {}
    assert task_metrics(rollouts) == {"task_reward": 1.0}


def test_weights_are_shares() -> None:
    class Fixed:
        def score(self, batch: Batch) -> Score:
            return Score(torch.zeros(1, 1), torch.zeros(1, 1))

    _, batch, _ = next(outcomes(torch.zeros(2, VOCAB)))
    verdict = Panel([Fixed(), Fixed()], [3.0, 1.0]).judge(batch)
    assert verdict.weights == (0.75, 0.25) and verdict.reference is None and verdict.task_rewards is None


# --- whole runs ---


@pytest.fixture(scope="module")
def second_dir(tmp_path_factory, tokenizer) -> Path:
    from tests.conftest import make_model

    return make_model(tmp_path_factory.mktemp("models") / "second", tokenizer, seed=1)


def other_teachers(path: Path) -> dict[str, object]:
    return {"other_teachers": f'[{{"model": "{path}", "dtype": "float32", "weight": 3.0}}]'}


SHORT = {"warm_start__num_prompts": 0, "evaluation__num_prompts": 0, "prompts__heldout_size": 0, "steps": 3}


@pytest.mark.parametrize("algorithm", ["gkd", "policy_gradient"])
def test_a_second_teacher_takes_part(tiny_settings, second_dir, tmp_path, algorithm: str) -> None:
    first = {**SHORT, "algorithm": algorithm, "steps": 1}
    train(tiny_settings, tmp_path, name="one", **first)
    train(tiny_settings, tmp_path, name="two", **first, **other_teachers(second_dir))
    (one,), (two,) = lines(tmp_path, "one"), lines(tmp_path, "two")
    assert one["completion_tokens"] == two["completion_tokens"] and one["divergence"] != two["divergence"]


def test_rewards_led_away_from_a_reference(tiny_settings, second_dir, tmp_path) -> None:
    changes = {**SHORT, "algorithm": "policy_gradient", "policy_gradient__control_variate": "least_variance"}
    train(tiny_settings, tmp_path, name="plain", **changes)
    train(tiny_settings, tmp_path, name="beyond", **changes, policy_gradient__extrapolation=1.5,
          policy_gradient__reference_model=second_dir)  # fmt: skip
    plain, beyond = lines(tmp_path, "plain"), lines(tmp_path, "beyond")
    assert plain[0]["divergence"] == beyond[0]["divergence"]  # the same student, the same teacher
    assert plain[0]["grad_norm"] != beyond[0]["grad_norm"]


def test_a_task_reward_is_learned(tiny_settings, tmp_path, monkeypatch) -> None:
    """A task that a random model can do by chance: say an even token first."""

    def even(tokenizer):
        return lambda rollout: 1.0 if rollout.completion_ids[0] % 2 == 0 else -1.0

    monkeypatch.setattr("onpolicy.run.answer_grader", even)
    train(tiny_settings, tmp_path, **SHORT | {"steps": 30}, algorithm="policy_gradient", prompts_per_step=16,
          policy_gradient__task_weight=20.0, sampling__max_tokens=1, optim__learning_rate=1e-2)  # fmt: skip
    rewards = [line["task_reward"] for line in lines(tmp_path)]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.4, rewards


def test_a_task_whose_answers_are_never_right_is_watched(tiny_settings, tmp_path) -> None:
    changes = {**SHORT, "algorithm": "policy_gradient", "policy_gradient__task_weight": 1.0, "steps": 2}
    train(tiny_settings, tmp_path, **changes)
    assert [line["task_reward"] for line in lines(tmp_path)] == [0.0, 0.0]


@pytest.mark.slow
def test_killed_and_resumed_with_everything_on_gives_the_same_losses(tiny_settings, second_dir, tmp_path) -> None:
    changes = {
        **SHORT, "algorithm": "policy_gradient", "steps": 4, "policy_gradient__task_weight": 1.0,
        "policy_gradient__extrapolation": 1.25, "policy_gradient__reference_model": second_dir,
        "policy_gradient__control_variate": "least_variance", **other_teachers(second_dir),
    }  # fmt: skip
    complete(options(tiny_settings, tmp_path / "whole", **changes))
    arguments = options(tiny_settings, tmp_path / "killed", **changes)
    process = start(arguments)
    while len(lines(tmp_path / "killed")) < 3 and process.poll() is None:
        pass
    process.kill()
    process.communicate()
    complete([*arguments, "--resume"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
