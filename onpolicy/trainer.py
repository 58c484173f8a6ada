"""The loop. One step: the student samples, the teacher scores, the update learns, the sampler is brought up to date."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onpolicy.batching import Batch, pack
from onpolicy.checkpoint import CheckpointStore
from onpolicy.guards import apply_guards
from onpolicy.health import StepTokens, health_warnings, rollout_health, token_health
from onpolicy.metrics import JsonLines, Means, PhaseTimer, Progress, mean_of, peak_rss_gib, rates
from onpolicy.optimization import LOWER_THE_RATE, NonFiniteError, Optimization, schedule_scale
from onpolicy.parity import ParityMeter, processed_as_sampled
from onpolicy.processes import Processes
from onpolicy.seeds import derive
from onpolicy.stages import Stage
from onpolicy.student import Student
from onpolicy.task import task_metrics
from onpolicy.teachers import Verdict
from onpolicy.types import Rollout, SamplingParams
from onpolicy.updates import PolicyGradientUpdate, Update, loss_share

if TYPE_CHECKING:
    from accelerate import Accelerator

    from onpolicy.config import TrainConfig


@dataclass
class RunState:
    """Where a run stands; saved with every checkpoint."""

    stage: int = 0  # index of the stage under way
    step: int = 0  # steps of it done
    steps_done: int = 0  # of the whole run
    policy_version: int = 0  # optimizer updates done
    completion_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by "stage/phase"
    tokens: dict[str, int] = field(default_factory=dict)  # completion tokens by stage
    elapsed: float = 0.0  # wall-clock seconds up to the checkpoint, interruptions not counted
    heldout: dict[str, dict[str, float]] = field(default_factory=dict)  # "start", "after_warm_start", "end"


class Trainer:
    """Runs stages over a student, and can be stopped and continued between any two steps."""

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        accelerator: Accelerator,
        store: CheckpointStore,
        progress: Progress,
    ):
        self.config, self.student, self.accelerator = config, student, accelerator
        self.processes = Processes(accelerator)
        self.store, self.progress = store, progress
        self.optimization = Optimization(student.trainable().values(), config.optim)
        self.state = RunState()
        self.started = time.perf_counter()
        self.lines: JsonLines | None = None
        self.warned: set[str] = set()  # health warnings of the last step: each is said when it appears
        self.stop_requested: Callable[[], bool] = lambda: False

    def run_stage(self, stage: Stage) -> bool:
        """All remaining steps of a stage. False when it was asked to stop before the end (a checkpoint is saved)."""
        settings = stage.settings
        if self.state.step < settings.steps:
            self.progress.stage(f"{settings.name}: preparing", 0)
            timer = PhaseTimer()
            with timer(stage.begins_with or "start"):
                stage.begin(self.state.policy_version)
            if stage.begins_with is not None:
                self._add_seconds(settings.name, timer)
        self.progress.stage(settings.name, settings.steps, self.state.step)
        while self.state.step < settings.steps:
            record = self.step(stage)
            self.record(record)
            last = self.state.step == settings.steps
            stopping = self.processes.any(self.stop_requested())  # a signal reaches one process before another
            if stopping or last or self.state.step % self.config.checkpoint.every == 0:
                self.save(stage)
            if stopping and not last:
                return False
        return True

    def step(self, stage: Stage) -> dict[str, Any]:
        """Sample, score, update, sync; what to log of it. Each process has its share of the prompts."""
        state, timer = self.state, PhaseTimer()
        where = f"{stage.settings.name} step {state.step}"
        self._seed_step(stage)
        with timer("rollout"):
            groups = stage.rollouts(state.step, self.processes.share)
        updates: list[dict[str, float]] = []
        kept = 0
        for part, drawn in enumerate(split(groups, stage.settings.updates_per_step)):
            chosen = apply_guards(drawn, self.config.health)
            kept += sum(map(len, chosen))
            batches = [b.to(self.student.device) for b in self._pack(chosen)]
            with timer("score"):
                scored = [(batch, stage.score(batch, chosen)) for batch in batches]
            with timer("update"):
                meter = None if updates else ParityMeter()  # afterwards the trainer has moved on
                done = self._update(stage, chosen, scored, meter, self._learning_rate(stage, part), where)
                updates += [] if done is None else [done]
        if not updates:
            self.progress.say(f"warning: {where}: every completion was dropped (health.drop_truncated), no update")
        with timer("sync"):
            stage.after_step(state.policy_version)
        everything = self.processes.gather([rollout for group in groups for rollout in group])
        metrics = mean_of(updates) | rollout_health(everything, self.config.health) | task_metrics(everything)
        metrics["health/kept_tokens"] = self.processes.sum(kept) / sum(map(len, everything))
        return self._finish_step(stage, everything, timer, metrics)

    def _seed_step(self, stage: Stage) -> None:
        """Every step has random streams of its own, so what ran before it, or in which process, does not matter."""
        seed = derive(self.config.seed, stage.settings.name, self.state.step)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _pack(self, rollouts: Sequence[Rollout]) -> list[Batch]:
        batching = self.config.batching
        return pack(rollouts, batching.token_budget, share_prompts=batching.share_prompts)

    def _learning_rate(self, stage: Stage, part: int) -> float:
        optim, per_step = self.config.optim, stage.settings.updates_per_step
        update, total = self.state.step * per_step + part, stage.settings.steps * per_step
        scale = schedule_scale(update, total, optim.warmup_steps, optim.schedule, optim.final_scale)
        return stage.settings.learning_rate * scale

    def _update(
        self,
        stage: Stage,
        rollouts: Sequence[Rollout],
        scored: Sequence[tuple[Batch, Verdict]],
        parity: ParityMeter | None,
        learning_rate: float,
        where: str,
    ) -> dict[str, float] | None:
        """One optimizer update from all processes' batches; the sampler's weights are checked before it is applied.

        None, in every process, where no process has anything left to learn from.
        """
        normalize = self.config.optim.normalize
        denominator = self.processes.sum(sum(loss_share(batch, normalize) for batch, _ in scored))
        if not denominator:
            return None
        update = self._whitening_all(stage.update, scored)
        means, total = Means(), 0.0
        watched: list[StepTokens] = []
        for batch, verdict in scored:
            hidden, head = self.student(batch)
            result = update(batch, hidden, head, verdict, denominator, self.student.head_grad())
            self.accelerator.backward(result.loss)
            total += result.loss.item()
            reward = result.teacher_logprobs - result.student_logprobs
            means.add(result.metrics | {"reward": reward}, len(batch.token_ids))
            watched.append(StepTokens.of(batch, result).cpu())
            if parity is not None:
                self._compare(parity, batch, rollouts, hidden, head, result.student_logprobs)
        total = self.processes.sum(total)
        if not math.isfinite(total):
            self.optimization.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(
                f"{where}: the loss is {total}; the update was not applied and the last checkpoint is intact. "
                f"{LOWER_THE_RATE}"
            )
        figures = {"loss": total, "learning_rate": learning_rate}
        if parity is not None:
            parity = ParityMeter.join(self.processes.gather([parity]))
            parity.check(self.config.rollouts.parity_bound, self.state.steps_done)
            figures |= parity.metrics()
        self.processes.sum_gradients(self.optimization.parameters)
        figures["grad_norm"] = self.optimization.apply(learning_rate, where)
        self.state.policy_version += 1
        figures |= Means.join(self.processes.gather([means])).result()
        return figures | token_health(StepTokens.join(self.processes.gather(watched)))

    def _whitening_all(self, update: Update, scored: Sequence[tuple[Batch, Verdict]]) -> Update:
        """The update, given where it whitens what the advantages of all batches and processes come to.

        By a forward pass of its own: otherwise gradients would depend on batching.token_budget.
        """
        if not (isinstance(update, PolicyGradientUpdate) and update.whitens):
            return update
        total = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            for batch, verdict in scored:
                total += update.moments(batch, *self.student(batch), verdict).cpu()
        everywhere = [self.processes.sum(value) for value in total.tolist()]
        moments = torch.tensor(everywhere, dtype=torch.float64, device=self.student.device)
        return partial(update, batch_moments=moments)

    def _compare(
        self,
        parity: ParityMeter,
        batch: Batch,
        rollouts: Sequence[Rollout],
        hidden: torch.Tensor,
        head: torch.Tensor,
        student_logprobs: torch.Tensor,
    ) -> None:
        fresh = [r.source == "student" and r.policy_version == self.state.policy_version for r in rollouts]
        drawn = torch.tensor([fresh[i] for i in batch.indices], device=batch.token_ids.device)[batch.sequence_ids]
        trainer, sampler = student_logprobs, batch.sampler_logprobs
        sampling = self.config.sampling
        if sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0):
            params = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k)
            trainer, sampler = processed_as_sampled(batch, hidden, head, params)
            drawn = drawn[: len(trainer)]
        parity.add(trainer[drawn], sampler[drawn])

    def _finish_step(
        self, stage: Stage, rollouts: Sequence[Rollout], timer: PhaseTimer, metrics: dict[str, float]
    ) -> dict[str, Any]:
        state, name = self.state, stage.settings.name
        tokens = sum(len(rollout) for rollout in rollouts)
        state.step += 1
        state.steps_done += 1
        state.completion_tokens += tokens
        state.tokens[name] = state.tokens.get(name, 0) + tokens
        self._add_seconds(name, timer)
        return {
            "step": state.steps_done, "stage": name, "policy_version": state.policy_version, **metrics,
            "rollouts": len(rollouts), "completion_tokens": tokens,
            "tok_s": rates(timer.seconds, tokens), "seconds": timer.seconds, "peak_rss_gib": peak_rss_gib(),
        }  # fmt: skip

    def _add_seconds(self, stage: str, timer: PhaseTimer) -> None:
        for phase, seconds in timer.seconds.items():
            key = f"{stage}/{phase}"
            self.state.seconds[key] = self.state.seconds.get(key, 0.0) + seconds

    def record(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, the trackers, the progress bar."""
        if not self.accelerator.is_main_process:
            return
        if self.lines is not None:
            self.lines.write(record)
        flat = {k: v for k, v in record.items() if isinstance(v, int | float)}
        flat |= {f"tok_s/{phase}": rate for phase, rate in record["tok_s"].items()}
        self.accelerator.log(flat, step=record["step"])
        said = health_warnings(record, self.config.health)
        for name in said.keys() - self.warned:
            self.progress.say(f"warning: step {record['step']}: {said[name]}")
        self.warned = set(said)
        speed = " ".join(f"{phase} {rate:,.0f}" for phase, rate in record["tok_s"].items())
        loss = f"loss {record['loss']:.3f}" if "loss" in record else "no update"
        self.progress.advance(f"{loss}  tok/s: {speed}")

    def save(self, stage: Stage) -> None:
        """A checkpoint of everything the next step depends on."""
        if self.accelerator.is_main_process:
            run = asdict(self.state) | {"elapsed": self.elapsed()}
            self.store.save(
                self.state.steps_done,
                {
                    "run": run,
                    "student": {name: p.detach() for name, p in self.student.trainable().items()},
                    "optimizer": self.optimization.optimizer.state_dict(),
                    "stage": stage.state_dict(),
                    "metrics_lines": self.lines.lines if self.lines else 0,
                },
            )
        self.processes.wait()

    def elapsed(self) -> float:
        """Wall-clock seconds of the run so far, those before a resume included."""
        return self.state.elapsed + time.perf_counter() - self.started

    @torch.no_grad()
    def load(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Take up a checkpoint's weights, optimizer and progress; returns the saved state of its stage."""
        self.state = RunState(**saved["run"])
        parameters = self.student.trainable()
        if parameters.keys() != saved["student"].keys():
            raise ValueError(
                "the checkpoint was made with another student (other layers, adapter or frozen parts); resume with the "
                "configuration in the run's config.yaml"
            )
        for name, parameter in parameters.items():
            parameter.copy_(saved["student"][name])
        self.optimization.optimizer.load_state_dict(saved["optimizer"])
        return saved["stage"]


def split(groups: Sequence[Sequence[Rollout]], parts: int) -> list[list[Rollout]]:
    """``parts`` lists of about as many groups each; a group (a prompt's completions) stays together.

    By the number of groups alone, empty ones included: every process makes as many parts, of the same prompts.
    """
    count = min(parts, len(groups))
    divided: list[list[Rollout]] = [[] for _ in range(count)]
    for index, group in enumerate(groups):
        divided[index * count // len(groups)].extend(group)
    return divided
