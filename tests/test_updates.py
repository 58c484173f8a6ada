"""The two updates on batches small enough to work out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from onpolicy.batching import pack
from onpolicy.config import GKDConfig, PolicyGradientConfig, TrainConfig
from onpolicy.teachers import Score, Verdict
from onpolicy.types import Prompt, Rollout
from onpolicy.updates import PolicyGradientUpdate, divergence_update, loss_share, make_update, token_weights

VOCAB, HIDDEN = 5, 5


def case(seed: int = 0, lengths: tuple[int, ...] = (3, 1, 2)):
    """A batch with random hidden states; float64, so that equality means equality."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for i, length in enumerate(lengths):
        ids = torch.randint(VOCAB, (length,), generator=generator).numpy()
        rollouts.append(Rollout(Prompt(str(i), (1, i)), ids, np.zeros(length, np.float32), "length", 0))
    (batch,) = pack(rollouts, 1000)
    n = len(batch.token_ids)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return batch, normal(n, HIDDEN).requires_grad_(), normal(VOCAB, HIDDEN), verdict(normal(n, 4), normal(VOCAB, 4))


def verdict(hidden: torch.Tensor, head: torch.Tensor) -> Verdict:
    """Of one teacher."""
    return Verdict((Score(hidden, head),))


def factors(said: Verdict) -> tuple[torch.Tensor, torch.Tensor]:
    """The only teacher's hidden states and head."""
    (score,) = said.teachers
    return score.hidden, score.head


def log_probs(hidden: torch.Tensor, head: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (hidden @ head.T / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_gkd_value_and_gradient(temperature, normalize) -> None:
    batch, hidden, head, score = case()
    config = TrainConfig(gkd=GKDConfig(beta=1.0))
    config.sampling.temperature, config.optim.normalize = temperature, normalize
    denominator = loss_share(batch, normalize)
    result = make_update(config)(batch, hidden, head, score, denominator)
    q, p = log_probs(hidden, head, temperature), log_probs(*factors(score), temperature)
    per_token = (q.exp() * (q - p)).sum(-1)
    if normalize == "token":
        expected = per_token.mean()
    else:
        expected = torch.stack([per_token[batch.sequence_ids == k].mean() for k in range(3)]).mean()
    torch.testing.assert_close(result.loss, expected)
    (ours,), (reference,) = torch.autograd.grad(result.loss, hidden), torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(ours, reference)
    chosen = q.gather(1, batch.token_ids[:, None])[:, 0].detach()
    torch.testing.assert_close(result.student_logprobs.double(), chosen)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_by_hand(beta) -> None:
    """One token, two entries: student (1/4, 3/4), teacher (1/2, 1/2)."""
    rollout = Rollout(Prompt("p", (0,)), np.array([0]), np.zeros(1, np.float32), "length", 0)
    (batch,) = pack([rollout], 10)
    head = torch.eye(2, dtype=torch.float64)
    hidden = torch.tensor([[math.log(0.25), math.log(0.75)]], dtype=torch.float64, requires_grad=True)
    score = verdict(torch.tensor([[math.log(0.5)] * 2], dtype=torch.float64), head)
    config = TrainConfig(gkd=GKDConfig(beta=beta))
    value = make_update(config)(batch, hidden, head, score, 1).loss.item()
    s, t = (0.25, 0.75), (0.5, 0.5)
    if beta == 0:
        expected = sum(b * math.log(b / a) for a, b in zip(s, t, strict=True))
    elif beta == 1:
        expected = sum(a * math.log(a / b) for a, b in zip(s, t, strict=True))
    else:
        m = [beta * b + (1 - beta) * a for a, b in zip(s, t, strict=True)]
        expected = sum(
            beta * b * math.log(b / c) + (1 - beta) * a * math.log(a / c) for a, b, c in zip(s, t, m, strict=True)
        )
    assert value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("control_variate", ["none", "expected", "least_variance"])
def test_policy_gradient_summed_over_all_samples_is_the_gradient_of_reverse_kl(control_variate) -> None:
    """One-token completions, every outcome weighted with its probability: the exact expectation."""
    _, hidden, head, score = case(lengths=(1, 1))
    config = PolicyGradientConfig(control_variate=control_variate, ratio_cap=1e9)
    update = PolicyGradientUpdate(config, 1.0, "token")
    q = log_probs(hidden, head)
    expectation = torch.zeros_like(hidden)
    for tokens in itertools.product(range(VOCAB), repeat=2):
        probability = math.exp(sum(q[i, y].item() for i, y in enumerate(tokens)))
        rollouts = [
            Rollout(Prompt(str(i), (1, i)), np.array([y]), np.array([q[i, y].item()], np.float32), "length", 0)
            for i, y in enumerate(tokens)
        ]
        (batch,) = pack(rollouts, 100)
        loss = update(batch, hidden, head, score, 2).loss
        expectation += probability * torch.autograd.grad(loss, hidden)[0]
    p = log_probs(*factors(score))
    (exact,) = torch.autograd.grad((q.exp() * (q - p)).sum(-1).mean(), hidden)
    torch.testing.assert_close(expectation, exact, rtol=1e-5, atol=1e-7)  # sampler log-probs are float32


def test_importance_ratio_is_cut_at_the_cap() -> None:
    batch, hidden, head, score = case(lengths=(1,))
    chosen = log_probs(hidden, head)[0, batch.token_ids[0]].item()
    gradients = []
    for ratio in (2.0, 50.0):
        sampled = torch.tensor([chosen - math.log(ratio)], dtype=torch.float32)
        update = PolicyGradientUpdate(PolicyGradientConfig(ratio_cap=2.0), 1.0, "token")
        shifted = type(batch)(**{**vars(batch), "sampler_logprobs": sampled})
        gradients.append(torch.autograd.grad(update(shifted, hidden, head, score, 1).loss, hidden)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize(
    ("algorithm", "whitening"),
    [("gkd", "none"), ("policy_gradient", "none"), ("policy_gradient", "mean"), ("policy_gradient", "mean_std")],
)
def test_micro_batches_add_up_to_one_big_batch(normalize, algorithm, whitening) -> None:
    weights = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    _, hidden, _, score = case(lengths=(3, 2, 4, 1))
    rng = np.random.default_rng(0)
    rollouts = [
        Rollout(Prompt(str(i), (1, i)), rng.integers(VOCAB, size=n), -rng.random(n).astype(np.float32), "length", 0)
        for i, n in enumerate((3, 2, 4, 1))
    ]
    starts = np.cumsum([0, 3, 2, 4, 1])
    config = TrainConfig(algorithm=algorithm)
    config.optim.normalize, config.policy_gradient.whitening = normalize, whitening
    update = make_update(config)
    denominator = 10 if normalize == "token" else 4

    def gradient(budget: int) -> torch.Tensor:
        total, parts = torch.zeros_like(weights), []
        for batch in pack(rollouts, budget):
            rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in batch.indices])
            part = verdict(score.teachers[0].hidden[rows], score.teachers[0].head)
            parts.append((batch, hidden.detach()[rows], weights, part))
        whole = {"batch_moments": sum(update.moments(*part) for part in parts)} if whitening != "none" else {}
        for part in parts:
            total += torch.autograd.grad(update(*part, denominator, **whole).loss, weights)[0]
        return total

    torch.testing.assert_close(gradient(1), gradient(1000))


def test_sequence_weights_sum_to_one_for_every_completion() -> None:
    ids = torch.tensor([0, 0, 0, 1, 2, 2])
    weights = token_weights(ids, "sequence")
    assert weights is not None
    torch.testing.assert_close(torch.zeros(3).scatter_add_(0, ids, weights), torch.ones(3))
    assert token_weights(ids, "token") is None


def test_a_greedy_policy_gradient_is_refused() -> None:
    config = TrainConfig(algorithm="policy_gradient")
    config.sampling.temperature = 0.0
    with pytest.raises(ValueError, match=r"sampling\.temperature above 0"):
        make_update(config)


def test_any_divergence_by_name() -> None:
    batch, hidden, head, score = case()
    result = divergence_update("total_variation", 1.0)(batch, hidden, head, score, len(batch.token_ids))
    q, p = log_probs(hidden, head).exp(), log_probs(*factors(score)).exp()
    torch.testing.assert_close(result.loss, 0.5 * (p - q).abs().sum(-1).mean())
