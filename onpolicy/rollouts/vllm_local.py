"""Rollouts through vLLM in this very process: one copy of the weights, both cores, new weights from memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onpolicy.rollouts.base import ClosingSampler, Progress, check_room, completion_seed, make_rollout
from onpolicy.rollouts.vllm_layers import quicken
from onpolicy.rollouts.vllm_weights import own_products, reload_weights
from onpolicy.types import Prompt, Rollout, SamplingParams, Source
from spec.vllm_engine import caller_state_kept, checked, quiet, start_engine, stop_engine

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

_KV_BLOCK = 32  # tokens a cache block: prompts share whole blocks only, and the CPU kernels want multiples of 32


class VLLMSampler(ClosingSampler):
    """The :class:`~onpolicy.rollouts.base.Sampler` on an in-process vLLM engine.

    Args:
        model_dir: a checkpoint directory (never looked up on a hub) or a hub id.
        dtype: of weights and key/value cache.
        max_model_len: prompt and completion together, in tokens; fixes nothing but the longest request.
        max_num_seqs: completions decoded together; more waiting ones follow as these finish.
        kv_cache_gib: memory of the key/value cache; None makes room for ``max_num_seqs`` of the longest requests,
            up to 4 GiB. When it is full, completions wait or are computed again, with the same result.
        enable_prefix_caching: the n samples of a prompt share its prefill.
        compile: let vLLM compile the model: a much longer start, which needs a C++ compiler, for fewer small
            kernels a step.
        max_num_batched_tokens: of one forward pass: bounds the memory of a prefill.
        used_ids: of the tokenizer; rows of the output beyond them (padding) are never drawn. None: all rows are.
        repair_tied_head: False leaves the weight-sync fault in (see ``vllm_weights``); for its test alone.

    Raises ValueError where vLLM is missing or the directory holds no model.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        max_model_len: int,
        dtype: str = "bfloat16",
        max_num_seqs: int = 64,
        kv_cache_gib: float | None = None,
        source: Source = "student",
        policy_version: int = 0,
        enable_prefix_caching: bool = True,
        compile: bool = False,  # as vLLM and torch call it
        max_num_batched_tokens: int = 4096,
        used_ids: int | None = None,
        repair_tied_head: bool = True,
    ):
        self.source: Source = source
        self.policy_version = policy_version
        self.max_model_len = max_model_len
        self._repair_tied_head = repair_tied_head
        self._request = 0
        self._engine: LLMEngine | None = start_engine(
            building=own_products,
            model=checked(model_dir),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
            kv_cache_gib=kv_cache_gib,
            block_size=_KV_BLOCK,
            enable_prefix_caching=enable_prefix_caching,
            enforce_eager=not compile,
        )
        from onpolicy.rollouts.vllm_draw import install

        self._draw = install(self._runner, used_ids)
        quicken(self._runner.get_model())

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, progress: Progress | None = None
    ) -> list[Rollout]:
        """See :meth:`onpolicy.rollouts.base.Sampler.generate`."""
        check_room(prompts, params, self.max_model_len)
        engine = self._open_engine()
        # Which prefixes an earlier call left in the cache would show in the last bits of the log-probs.
        engine.reset_prefix_cache()
        self._draw.params = params
        pending: dict[str, tuple[int, Prompt, int]] = {}
        for number, prompt in enumerate(prompts):
            for sample in range(params.n):
                name = self._submit(engine, prompt, sample, params)
                pending[name] = (number * params.n + sample, prompt, sample)
        rollouts: list[Rollout | None] = [None] * len(pending)
        try:
            while pending:
                for output in engine.step():
                    place, prompt, sample = pending.pop(output.request_id)
                    drawn = output.outputs[0].token_ids, self._draw.logprobs.pop(output.request_id)
                    rollout = self._rollout(prompt, sample, *drawn, params)
                    rollouts[place] = rollout
                    if progress is not None:
                        progress(len(rollout))
        finally:
            # After an error or Ctrl-C the engine must not go on with these in the next call.
            engine.abort_request(list(pending))
            self._draw.logprobs.clear()
        return [rollout for rollout in rollouts if rollout is not None]

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """See :meth:`onpolicy.rollouts.base.Sampler.sync`; includes the tied-head repair."""
        engine = self._open_engine()
        with quiet(), caller_state_kept(), torch.no_grad():
            reload_weights(self._runner, weights, self._repair_tied_head)
        engine.reset_prefix_cache()
        self.policy_version = policy_version

    def close(self) -> None:
        """Free weights, cache and process group, so that another engine can be started in this process."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        del self._draw
        stop_engine(engine)

    @property
    def _runner(self) -> Any:
        return self._open_engine().model_executor.driver_worker.worker.model_runner

    def _open_engine(self) -> LLMEngine:
        if self._engine is None:
            raise ValueError("this sampler is closed; make a new VLLMSampler")
        return self._engine

    def _submit(self, engine: LLMEngine, prompt: Prompt, sample: int, params: SamplingParams) -> str:
        from vllm import SamplingParams as EngineParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        from onpolicy.rollouts.vllm_draw import NAME_KEY, SEED_KEY

        self._request += 1
        name = f"{self._request}"
        request = EngineParams(
            temperature=params.temperature,
            max_tokens=params.max_tokens,
            stop_token_ids=list(params.stop_token_ids),
            ignore_eos=True,  # the stop tokens are ours to name: the model's own list often lacks the chat template's
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={SEED_KEY: completion_seed(params, prompt, sample), NAME_KEY: name},
        )
        engine.add_request(name, tokens_input(list(prompt.token_ids)), request)
        return name

    def _rollout(
        self, prompt: Prompt, sample: int, ids: Sequence[int], logprobs: list[float], params: SamplingParams
    ) -> Rollout:
        return make_rollout(
            prompt, sample, list(ids), logprobs, params.stop_token_ids, self.policy_version, self.source
        )
