"""What a run draws, from which prompts and with which settings: all of it follows from the configuration."""

from __future__ import annotations

from collections.abc import Iterator

from onpolicy.evaluate.heldout import heldout_params
from onpolicy.prepare import Prepared
from onpolicy.prompts import PromptOrder
from onpolicy.seeds import derive
from onpolicy.types import Prompt, SamplingParams


class Draws:
    """Prompts and sampling settings by purpose; every purpose has a random stream of its own."""

    def __init__(self, prepared: Prepared):
        self.prepared, self.config = prepared, prepared.config

    def heldout_prompts(self) -> list[Prompt]:
        return self.prepared.heldout_prompts[: self.config.evaluation.num_prompts]

    def heldout(self) -> dict[bool, SamplingParams]:
        """How held-out prompts are answered, by greedy."""
        tokens, seed = self.config.evaluation.max_tokens, derive(self.config.seed, "heldout")
        return {g: heldout_params(tokens, seed, g, self.prepared.stop_token_ids) for g in (False, True)}

    def sampling(self, n: int, purpose: str) -> SamplingParams:
        """``n`` completions a prompt for the training phases."""
        sampling = self.config.sampling
        return SamplingParams(
            sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens, n,
            derive(self.config.seed, purpose), self.prepared.stop_token_ids,
        )  # fmt: skip

    def of_teacher(self) -> Iterator[tuple[str, list[Prompt], SamplingParams]]:
        """What the teacher answers, once: "sampled" and "greedy" held-out prompts, and those of the "warm_start"."""
        config, warm = self.config, self.config.warm_start
        if prompts := self.heldout_prompts():
            params = self.heldout()
            yield "sampled", prompts, params[False]
            yield "greedy", prompts, params[True]
        if warm.num_prompts:
            order = PromptOrder(self.prepared.train_prompts, derive(config.seed, "warm start prompts"))
            prompts = order.next_batch(min(warm.num_prompts, len(self.prepared.train_prompts)))
            yield "warm_start", prompts, self.sampling(warm.samples_per_prompt, "teacher")

    def prompt_order(self) -> PromptOrder:
        """Of the on-policy phase."""
        seed = derive(self.config.seed, "prompts")
        return PromptOrder(self.prepared.train_prompts, seed, self.config.prompts.shuffle)
