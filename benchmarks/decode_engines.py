"""The engines of benchmarks/decode.py, each in the process it is measured in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common import peak_rss_mib
from benchmarks.decode_plan import Plan, Side
from benchmarks.decode_runner import Counts, Runner, decode

_CACHE_GIB = 0.5  # vLLM's keys and values, the draft's too: some 20,000 tokens of the default target


class Ours(Runner):
    """``spec.engine.Engine``; parts as ``spec.generate`` opens them, a draft model's weights in int8 on a CPU."""

    def __init__(self, side: Side, plan: Plan):
        from spec.loading import ModelOptions, open_drafter, open_target, open_tokenizer

        models = ModelOptions()
        quantization: Any = side.engine.partition("-")[2] or "none"
        self._target = open_target(plan.target, models, quantization)
        name = side.drafter.replace("draft", str(plan.draft))
        tokenizer = open_tokenizer(plan.target)
        self._drafter = open_drafter(None if name == "none" else name, self._target, tokenizer, models)
        self._length = "auto" if side.adaptive else str(plan.length(side))
        self.begin()

    def begin(self) -> None:
        """A new engine: an adaptive length starts without experience."""
        from spec.engine import Engine
        from spec.loading import draft_length

        self._engine = Engine(self._target, self._drafter, draft_length=draft_length(self._length))

    def generate(self, prompts: Sequence[list[int]], temperature: float, tokens: int, seed: int) -> Counts:
        from spec.params import Params
        from spec.request import Request

        requests = [
            Request(ids, Params(temperature=temperature, seed=seed * 1000 + i), tokens, stop_token_ids=())
            for i, ids in enumerate(prompts)
        ]
        begin = time.perf_counter()
        results = self._engine.generate(requests)
        counts = Counts(seconds=time.perf_counter() - begin)
        for result in results:
            (completion,) = result.completions
            if completion.error is not None:
                raise RuntimeError(completion.error)
            assert result.seconds_to_first_token is not None
            counts += Counts(
                len(completion.token_ids), 0.0, [result.seconds_to_first_token], completion.target_steps,
                sum(completion.drafted), sum(completion.accepted),
            )  # fmt: skip
        return counts


class Transformers(Runner):
    """``generate`` in bf16 with a dynamic cache: plain, ``assistant_model``, ``prompt_lookup_num_tokens``.

    How many tokens the assistant drafts is left to transformers (up to 20, while it is confident).
    """

    def __init__(self, side: Side, plan: Plan):
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = self._load(plan.target)
        self._model.register_forward_hook(self._passed)
        self._model._get_candidate_generator = self._watched(self._model._get_candidate_generator)
        self._options: dict[str, Any] = {}
        if side.drafter == "draft":
            self._options["assistant_model"] = self._load(str(plan.draft))
        elif side.drafter == "ngram":
            self._options["prompt_lookup_num_tokens"] = plan.length(side)
        self._counts, self._began = Counts(), 0.0

    def generate(self, prompts: Sequence[list[int]], temperature: float, tokens: int, seed: int) -> Counts:
        import torch

        torch.manual_seed(seed)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        how: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        self._counts, self._began = Counts(), time.perf_counter()
        output = self._model.generate(
            ids.to(self._device), attention_mask=mask.to(self._device), max_new_tokens=tokens, pad_token_id=0,
            **how, **self._options,
        )  # fmt: skip
        new = output[:, longest:].tolist()
        counts = self._counts
        counts.seconds = time.perf_counter() - self._began
        counts.tokens = sum(map(len, new))
        counts.first_s *= len(prompts)
        counts.target_steps *= len(prompts)
        return counts

    def _load(self, directory: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, local_files_only=True)
        model.generation_config.eos_token_id = None  # every completion has the full length
        return model.to(self._device).eval()

    def _passed(self, *_: object) -> None:
        if not self._counts.target_steps:
            self._counts.first_s.append(time.perf_counter() - self._began)
        self._counts.target_steps += 1

    def _watched(self, get_generator: Any) -> Any:
        """``_get_candidate_generator`` whose generators count what they draft and how much of it is accepted."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            generator = get_generator(*args, **kwargs)
            get, update = generator.get_candidates, generator.update_candidate_strategy

            def get_candidates(input_ids: Any, *rest: Any, **named: Any) -> Any:
                candidates = get(input_ids, *rest, **named)
                self._counts.drafted += candidates[0].shape[1] - input_ids.shape[1]
                return candidates

            def update_candidate_strategy(input_ids: Any, scores: Any, matches: Any) -> Any:
                self._counts.accepted += int(matches)
                return update(input_ids, scores, matches)

            generator.get_candidates = get_candidates
            generator.update_candidate_strategy = update_candidate_strategy
            return generator

        return watched


class VLLM(Runner):
    """vLLM in this process, in bf16: plain, ``draft_model``, ``ngram``, with its own sampler.

    Without prefix caching: cells share prompts, and no other side remembers them. Drafts are drawn from the draft's
    distribution (``probabilistic``), as ours are. Stochastic speculation on a CPU is exact by ``spec.vllm_plugin``.
    """

    def __init__(self, side: Side, plan: Plan):
        from spec.vllm_engine import start_engine

        speculative: dict[str, Any] | None = None
        if side.drafter == "draft":
            speculative = {"method": "draft_model", "model": plan.draft, "draft_sample_method": "probabilistic"}
        elif side.drafter == "ngram":
            speculative = {
                "method": "ngram",
                "prompt_lookup_min": 2,
                "prompt_lookup_max": 4,
            }  # as our drafter's defaults
        options: dict[str, Any] = {} if speculative is None else {
            "speculative_config": speculative | {"num_speculative_tokens": plan.length(side)}
        }  # fmt: skip
        self._engine: Any = start_engine(
            _CACHE_GIB, model=plan.target, dtype="bfloat16", max_model_len=plan.longest,
            max_num_seqs=max(cell.batch for cell in plan.cells), max_num_batched_tokens=4096, block_size=32,
            enable_prefix_caching=False, enforce_eager=True, seed=plan.seed, **options,
        )  # fmt: skip
        self._counts, self._requests = Counts(), 0
        scheduler = self._engine.engine_core.engine_core.scheduler
        scheduler.make_spec_decoding_stats = self._observed(scheduler.make_spec_decoding_stats)

    def generate(self, prompts: Sequence[list[int]], temperature: float, tokens: int, seed: int) -> Counts:
        """``seed`` is not used: seeded requests draw one by one, more slowly. The engine's seed is the round's."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=temperature, max_tokens=tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        counts = self._counts = Counts()
        begin = time.perf_counter()
        waiting = set()
        for ids in prompts:
            self._requests += 1
            name = str(self._requests)
            waiting.add(name)
            self._engine.add_request(name, tokens_input(ids), params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.request_id in waiting:
                    waiting.remove(output.request_id)
                    counts.first_s.append(time.perf_counter() - begin)
                counts.tokens += len(output.outputs[0].token_ids)
                counts.target_steps += 1
        counts.seconds = time.perf_counter() - begin
        return counts

    def close(self) -> None:
        """So that nothing is printed when the process ends."""
        from spec.vllm_engine import stop_engine

        engine, self._engine = self._engine, None
        stop_engine(engine)

    def _observed(self, make_stats: Any) -> Any:
        """The scheduler's ``make_spec_decoding_stats``, told about every verified draft: counted here as well."""

        def observed(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *rest: Any, **named: Any) -> Any:
            self._counts.drafted += num_draft_tokens
            self._counts.accepted += num_accepted_tokens
            return make_stats(stats, num_draft_tokens, num_accepted_tokens, *rest, **named)

        return observed


class LlamaCpp(Runner):
    """llama-cpp-python on a GGUF file of the target, usually of fewer bits: another model in law, what a CPU user has.

    One sequence at a time: its ``generate`` has no batches.
    """

    def __init__(self, side: Side, plan: Plan):
        import torch
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self._model = Llama(
            model_path=plan.gguf, n_ctx=plan.longest, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0,
            seed=plan.seed, verbose=False,
        )  # fmt: skip

    def generate(self, prompts: Sequence[list[int]], temperature: float, tokens: int, seed: int) -> Counts:
        (ids,) = prompts
        self._model.reset()  # else it keeps the part of the last prompt that this one shares
        self._model.set_seed(seed)
        begin = time.perf_counter()
        stream = self._model.generate(ids, temp=temperature, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
        next(stream)
        first = time.perf_counter() - begin
        for _ in range(tokens - 1):
            next(stream)
        return Counts(tokens, time.perf_counter() - begin, [first], tokens)


_RUNNERS = {"ours": Ours, "transformers": Transformers, "vllm": VLLM, "llama.cpp": LlamaCpp}


def measure(side: Side, plan: Plan) -> dict[str, Any]:
    """``{"cells": [figures of a cell and which it is], "peak_rss_mib"}`` of a side, in this process."""
    import transformers

    from spec.allocator import keep_freed_memory

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it warns of options that it passes to itself
    keep_freed_memory()  # for every side: part of the environment they share
    runner: Runner = _RUNNERS[side.engine.partition("-")[0]](side, plan)
    cells = [cell for cell in plan.cells if side.decodes(cell.workload, cell.batch)]
    measured = [
        {"workload": cell.workload, "temperature": cell.temperature, "batch": cell.batch}
        | decode(runner, cell, plan.tokens, plan.seed).figures(cell.batch)
        for cell in cells
    ]
    runner.close()
    return {"cells": measured, "peak_rss_mib": peak_rss_mib()}
