"""The order of an examination: what costs nothing first, then the teacher, the student, the sampler, a small step.

It writes nothing into the run's directory and leaves every weight as it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from onpolicy.checks import panel_models
from onpolicy.config import TrainConfig
from onpolicy.doctor import costs, delivery, sampler, speed, teacher, text
from onpolicy.doctor.findings import Finding, Report
from onpolicy.metrics import PhaseTimer
from onpolicy.models import read_causal_lm
from onpolicy.prepare import engine_name, survey
from onpolicy.prompts import end_of_turn_id
from onpolicy.prompts.load import load_examples
from onpolicy.rollouts.opening import open_sampler
from onpolicy.rollouts.transformers_sampler import TransformersSampler
from onpolicy.seeds import derive
from onpolicy.setting_checks import ignored_settings
from onpolicy.student import build_student
from onpolicy.teachers.local import LocalTeacher
from onpolicy.teachers.panel import Panel, open_panel
from onpolicy.types import Prompt, Rollout, SamplingParams
from onpolicy.updates import loss_temperature

if TYPE_CHECKING:
    from onpolicy.rollouts.base import Sampler

_TEXTS = 8  # real texts scored
_TEACHER_PROMPTS, _TEACHER_SAMPLES, _TEACHER_TOKENS = 6, 2, 128
_DETERMINISM = 6  # of these, how many are scored again and alone
_PROBE_PROMPTS, _PROBE_TOKENS = 4, 16
_WIDTH, _STEP_TOKENS = 64, 24  # of the small step: completions at most, tokens of each
_SKIPPED = "not examined"


def examine(config: TrainConfig, resume: bool = False) -> Report:
    """Every check, in order; later ones are left out when an earlier error makes them meaningless.

    Raises ValueError or FileNotFoundError for a user's mistake, as training does.
    """
    examination = Examination()
    with torch.random.fork_rng(devices=[]):
        examination.execute(config, resume)
    return Report(examination.findings, examination.timer.seconds)


class Examination:
    """Findings as they are made, and the parts that later checks need."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.timer = PhaseTimer()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def execute(self, config: TrainConfig, resume: bool) -> None:
        with self.timer("prompts"):
            self.survey = survey(config, resume)
            self.config, self.prepared = config, self.survey.prepared
            self.available = costs.available_bytes(self.device)
            if self.before_models():
                return self.skip("the models")
        if self.the_teacher() or self.the_student():
            return self.skip("student, sampler and costs")
        self.the_sampler()

    def add(self, *findings: Finding | None) -> bool:
        """Note the findings; True when one is an error."""
        made = [finding for finding in findings if finding is not None]
        self.findings += made
        return any(finding.level == "error" for finding in made)

    def skip(self, what: str) -> None:
        self.add(Finding("note", _SKIPPED, f"{what}: mend the errors first, then run the doctor again"))

    # -- before any model is loaded

    def before_models(self) -> bool:
        config, prepared, seen = self.config, self.prepared, self.survey
        tokenizer, prompts = prepared.tokenizer, prepared.train_prompts
        rows = len(load_examples(config.prompts)[0]) if config.prompts.too_long == "drop" else len(prompts)
        end = end_of_turn_id(tokenizer, config.prompts.template)
        vocabulary = text.vocabularies(tokenizer, seen.student_tokenizer, seen.teacher_rows, seen.student_rows)
        fatal = self.add(vocabulary)
        self.add(
            text.special_tokens(tokenizer, config.teacher.model, prepared.stop_token_ids, end),
            text.chat_templates(tokenizer, seen.student_tokenizer, config.prompts, len(prompts)),
            text.prompt_lengths(prompts, rows, seen.prompt_limit),
            costs.licence(config.teacher.model),
            *(costs.licence(name, f"{option}'s") for option, name in panel_models(config).items()),
            costs.licence(config.student.model, "student's") if config.student.model is not None else None,
            costs.run_directory(prepared.directory, prepared.resume),
            *(Finding("note", "settings", note) for note in ignored_settings(config)),
        )
        return fatal

    # -- the teacher

    def the_teacher(self) -> bool:
        """True when there is no point in going on."""
        config = self.config
        with self.timer("loading models"):
            loaded = read_causal_lm(config.teacher.model, getattr(torch, config.teacher.dtype), self.device)
        with self.timer("teacher's scores"):
            self.texts = teacher.real_texts(self.prepared.train_prompts[:_TEXTS])
            finding = teacher.weights(loaded, "teacher")
            unusable = self.add(finding) and not loaded.invented
            if unusable or self.add(teacher.plain_head(loaded.model, self.texts, "teacher")):
                return True
            self.teacher = LocalTeacher(loaded.model, self.prepared.used_ids)
            logprobs = teacher.scores(self.teacher, self.texts, config.batching, 1.0)
            self.add(teacher.knows_language(logprobs, self.prepared.used_ids))
        self._teacher_completions()
        return False

    def _teacher_completions(self) -> None:
        sampling = self.config.sampling
        tokens = min(sampling.max_tokens, _TEACHER_TOKENS)
        with self.timer("teacher's completions"):
            engine = TransformersSampler(self.teacher.model, source="teacher", used_ids=self.prepared.used_ids)
            rollouts = engine.generate(self._prompts(_TEACHER_PROMPTS), self._params(tokens, n=_TEACHER_SAMPLES))
        with self.timer("teacher's scores"):
            temperature = loss_temperature(sampling.temperature)
            self.add(
                teacher.deterministic(self.teacher, rollouts[:_DETERMINISM], self.config.batching, temperature),
                teacher.completion_lengths(rollouts, sampling.max_tokens, tokens),
            )

    # -- the student

    def the_student(self) -> bool:
        """True when there is no point in going on."""
        settings = self.config.student
        with self.timer("loading models"):
            if settings.model is not None:
                loaded = read_causal_lm(settings.model, torch.float32)
                if self.add(
                    teacher.weights(loaded, "student"), teacher.plain_head(loaded.model, self.texts, "student")
                ):
                    return True
            self.student = build_student(settings, self.teacher.model, self.device, self.prepared.used_ids)
        trained = sum(p.numel() for p in self.student.trainable().values())
        everything = sum(p.numel() for p in self.student.model.parameters())
        self.add(costs.disk(self.prepared.directory, trained, everything, self.config))
        self.add(sampler.unused_rows(self.student, self.texts, self.config.batching))
        return False

    # -- the sampler and a small step

    def the_sampler(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            with self.timer("engine"):
                self.student.save(Path(scratch), self.prepared.tokenizer)
                engine = open_sampler(self.prepared, scratch, "student", self.device)
            with engine:
                with self.timer("sampler's checks"):
                    engine.sync(self.student.weights(), 0)  # as before a run's first rollouts
                    self.reference = sampler.Reference(self.student, Path(scratch), self.config.rollouts.dtype)
                    self._temperature(engine)
                rollouts, rate = self._small_rollouts(engine)
                with self.timer("sampler's checks"):
                    sync = self._agreement(engine, rollouts)
        with self.timer("loading models"):
            panel = open_panel(self.config, self.teacher, self.device, self.prepared.used_ids)
        with self.timer("one small step"):
            self._costs(panel, rollouts, rate, sync)

    def _compare(self, rollouts: Sequence[Rollout], params: SamplingParams) -> tuple[sampler.Comparison, float]:
        """Sampler against trainer, and how much of the difference is rounding."""
        return sampler.compare_with_floor(self.student, self.reference, rollouts, params, self.config.batching)

    def _temperature(self, engine: Sampler) -> None:
        params = replace(self._params(_PROBE_TOKENS, n=2), temperature=sampler.PROBE_TEMPERATURE)
        compared, floor = self._compare(engine.generate(self._prompts(_PROBE_PROMPTS), params), params)
        self.add(sampler.temperature_applied(compared, floor, self.config.rollouts.parity_bound))

    def _small_rollouts(self, engine: Sampler) -> tuple[list[Rollout], float]:
        """Rollouts of a step's width and their seconds a token."""
        n = self.config.sampling.samples_per_prompt
        count = max(1, min(self.config.prompts_per_step, _WIDTH // n))
        params = self._params(_STEP_TOKENS, n)
        timer = PhaseTimer()
        with timer("rollout"), self.timer("one small step"):
            rollouts = engine.generate(self._prompts(count), params)
        return rollouts, timer.seconds["rollout"] / sum(map(len, rollouts))

    def _agreement(self, engine: Sampler, rollouts: Sequence[Rollout]) -> float:
        """Sampler against trainer before and after a sync; seconds of a sync."""
        config, bound = self.config, self.config.rollouts.parity_bound
        params = self._params(_PROBE_TOKENS, n=1)
        compared, floor = self._compare(rollouts, params)
        warm_start = config.warm_start.num_prompts > 0
        self.add(sampler.weights_agree(compared, floor, bound, engine_name(config), warm_start))
        prompts = self._prompts(_PROBE_PROMPTS)
        handed = delivery.deliver(self.student, engine, self.reference, prompts, params, config.batching)
        self.add(delivery.delivered(handed, config.student.lora.rank > 0))
        return handed.seconds

    def _costs(self, panel: Panel, rollouts: Sequence[Rollout], rate: float, sync: float) -> None:
        config, prompts = self.config, [*self.prepared.train_prompts, *self.prepared.heldout_prompts]
        lengths = [len(prompt.token_ids) for prompt in prompts]
        score, update, apply, saved = speed.measure(self.student, panel, rollouts, config)
        measured = speed.Speed(rate, score, update, apply, sync, saved)
        longest = max(lengths) + max(config.sampling.max_tokens, config.evaluation.max_tokens)
        parts = costs.memory_parts(self.student, panel.models(), saved, longest, config)
        dearer = _parameters(self.teacher.model) / _parameters(self.student.model)
        self.add(
            costs.memory(costs.Memory(parts, self.available, costs.held_bytes(self.device))),
            speed.throughput(measured, dearer, sum(lengths) / len(lengths), config, engine_name(config)),
        )

    def _prompts(self, count: int) -> list[Prompt]:
        return self.prepared.train_prompts[:count]

    def _params(self, max_tokens: int, n: int) -> SamplingParams:
        sampling, seed = self.config.sampling, derive(self.config.seed, "doctor")
        tokens = min(max_tokens, sampling.max_tokens)  # what the engine has room for
        return SamplingParams(
            sampling.temperature, sampling.top_p, sampling.top_k, tokens, n, seed, self.prepared.stop_token_ids
        )


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
