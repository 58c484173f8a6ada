"""Is the teacher the model one believes to have, and does it say the same thing twice?

Shape legend: N completion tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from onpolicy.batching import pack, text_rollout
from onpolicy.config import BatchingConfig
from onpolicy.doctor.findings import Finding
from onpolicy.models import Loaded, check_linear_head, head_weight
from onpolicy.teachers import Teacher
from onpolicy.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXT_TOKENS = 256  # of one prompt and its completion
_FLOOR_BOUND, _FLOOR_ERROR = 0.05, 0.2  # mean nats; bfloat16 alone gives a hundredth
_LEARNED_SHARE = 0.1  # of ln V, by which any trained model beats the uniform distribution on real text


def weights(loaded: Loaded, who: str) -> Finding:
    """Parameters that were not in the checkpoint, that are not finite, or that are zero throughout."""
    name = f"{who} weights"
    bad = {name: tensor for name, tensor in loaded.model.named_parameters() if not tensor.isfinite().all()}
    # Matrices only: a bias of zeros is common, and so are norms that add 1 to their weight.
    zero = [name for name, tensor in loaded.model.named_parameters() if tensor.ndim > 1 and not tensor.any()]
    problems = [(loaded.invented, "not in the checkpoint and newly initialised"), (sorted(bad), "not finite"),
                (zero, "zero throughout")]  # fmt: skip
    said = [f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for names, what in problems if names]  # fmt: skip
    if not said:
        count = sum(p.numel() for p in loaded.model.parameters())
        return Finding("ok", name, f"{count / 1e6:,.1f}M parameters, all loaded, finite, no matrix of zeros")
    return Finding(
        "error", name, "; ".join(said),
        "a model that is partly noise is fluent enough to go unnoticed: teacher weights were lost in silence in "
        "Relax#287",
        "download or convert the checkpoint again, and compare its tensor names with the architecture in config.json",
    )  # fmt: skip


def plain_head(model: PreTrainedModel, texts: Sequence[Rollout], who: str) -> Finding:
    """Logits must be ``hidden @ head.T``: on a probe (what loading checks) and on real text."""
    name, gap = f"{who} head", 0.0
    try:
        check_linear_head(model)
    except ValueError as error:
        refused = str(error).partition(". ")[0]
    else:
        gap = head_gap(model, texts[0])
        refused = f"on real text logits differ from hidden states @ head by {gap:.1%} of their largest"
        if gap <= 0.02:
            return Finding("ok", name, f"a plain matrix product of the last hidden states (largest gap {gap:.2%})")
    return Finding(
        "error", name, refused,
        "losses are computed from hidden states and head: they would be those of another model",
        "use a model with a plain output layer (Llama, Qwen, SmolLM, Mistral and most others have one)",
    )  # fmt: skip


@torch.no_grad()
def head_gap(model: PreTrainedModel, text: Rollout) -> float:
    """Largest |logit - (hidden @ head.T)| on a text, as a share of the largest logit."""
    ids = torch.tensor([[*text.prompt.token_ids, *text.completion_ids.tolist()]], device=model.device)
    output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    ours = output.hidden_states[-1] @ head_weight(model).T
    return float((ours - output.logits).abs().max() / output.logits.abs().max().clamp_min(1e-6))


def real_texts(prompts: Sequence[Prompt]) -> list[Rollout]:
    """Prompts, and the dataset's completions where it has any, as text to be scored from the second token on."""
    texts = []
    for prompt in prompts:
        ids = [*prompt.token_ids, *(prompt.completion_ids or ())][:_TEXT_TOKENS]
        if len(ids) > 1:
            texts.append(text_rollout(Prompt(prompt.id, (ids[0],)), ids[1:]))
    return texts


def knows_language(logprobs: Sequence[torch.Tensor], vocab: int) -> Finding:
    """Mean log-prob of real text against that of the uniform distribution, -ln V."""
    mean, uniform = float(torch.cat(list(logprobs)).mean()), math.log(vocab)
    found = f"real text has {mean:.2f} nats a token (uniform over {vocab:,} tokens: {-uniform:.2f})"
    if mean > -uniform * (1 - _LEARNED_SHARE):
        return Finding("ok", "teacher on real text", found)
    return Finding(
        "error", "teacher on real text", found + ": it knows no more than chance",
        "the whole run: the student is taught noise, and its divergence falls all the same (Relax#287)",
        "check that the checkpoint holds trained weights, and that tokenizer and weights belong together",
    )  # fmt: skip


def deterministic(
    teacher: Teacher, rollouts: Sequence[Rollout], batching: BatchingConfig, temperature: float
) -> Finding:
    """The same batch twice, then every rollout without neighbours or padding: the numerical floor of a score."""
    name = "teacher determinism"
    first, second = (scores(teacher, rollouts, batching, temperature) for _ in range(2))
    alone = [scores(teacher, [r], batching, temperature)[0] for r in rollouts]
    again = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
    difference = (torch.cat(first) - torch.cat(alone)).abs()
    floor, largest = float(difference.mean()), float(difference.max())
    found = (
        f"same batch twice: {again:.2g} nats at most; with other neighbours and padding {floor:.2g} on average, "
        f"{largest:.2g} at most"
    )
    if not again < _FLOOR_BOUND:
        return Finding(
            "error", name, found, "scores are random: the student learns their noise, and no run can be repeated",
            "look for dropout or noise that evaluation mode does not switch off; try --teacher.dtype float32",
        )  # fmt: skip
    if not floor < _FLOOR_BOUND:
        return Finding(
            "warning" if floor < _FLOOR_ERROR else "error", name, found,
            "a score depends on what else is in the batch: other samples leak in, or rounding is as large as the "
            "signal at the end of a run (cf. swift#9671, trl#5594)",
            "set batching.share_prompts: false (the model may ignore 4-D attention masks or positions), or "
            "teacher.dtype: float32",
        )  # fmt: skip
    return Finding("ok" if again == 0 else "note", name, found)


def scores(
    teacher: Teacher, rollouts: Sequence[Rollout], batching: BatchingConfig, temperature: float
) -> list[torch.Tensor]:
    """The teacher's log-probs of every rollout's tokens, [L] each, batched as training does."""
    result: list[torch.Tensor] = [torch.empty(0)] * len(rollouts)
    for batch in pack(rollouts, batching.token_budget, share_prompts=batching.share_prompts):
        score = teacher.score(batch)
        values = score.logprobs(batch.token_ids.to(score.head.device), temperature).cpu()
        for index, part in zip(batch.indices, values.split(torch.bincount(batch.sequence_ids).tolist()), strict=True):
            result[index] = part
    return result


def completion_lengths(rollouts: Sequence[Rollout], max_tokens: int, drawn: int) -> Finding:
    """Does ``max_tokens`` leave the teacher room to finish? ``drawn`` is how many tokens were tried."""
    name = "completion lengths"
    cut = sum(r.finish_reason == "length" for r in rollouts) / len(rollouts)
    mean = sum(map(len, rollouts)) / len(rollouts)
    found = (
        f"{cut:.0%} of {len(rollouts)} teacher completions are unfinished at {drawn} tokens (mean length {mean:.0f})"
    )
    if drawn < max_tokens:
        return Finding("ok" if not cut else "note", name, f"{found}; sampling.max_tokens is {max_tokens}")
    if cut <= 0.2:
        return Finding("ok", name, found)
    return Finding(
        "warning" if cut > 0.5 else "note", name, found,
        "cut completions teach no ending and lose the answer; the student learns to ramble up to the limit",
        f"raise sampling.max_tokens above {max_tokens}, or ask for shorter answers in prompts.system",
    )  # fmt: skip
