"""One run from configuration to summary: what is built, in which order it is used, how it stops and goes on."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from onpolicy import checks
from onpolicy.checkpoint import CheckpointStore, DiskFullError, atomic_file, disk_errors
from onpolicy.draws import Draws
from onpolicy.evaluate.heldout import HeldOut
from onpolicy.metrics import JsonLines, Progress, Silent
from onpolicy.models import check_shared_prompts, load_causal_lm
from onpolicy.optimization import NonFiniteError
from onpolicy.parity import ParityError
from onpolicy.prepare import Prepared, plain
from onpolicy.processes import Processes, is_first
from onpolicy.results import Outcome, leave
from onpolicy.rollouts.opening import open_sampler
from onpolicy.setting_checks import ignored_settings
from onpolicy.stages import Stage, StageSettings
from onpolicy.stages.on_policy import OnPolicy
from onpolicy.stages.warm_start import WarmStart
from onpolicy.student import build_student
from onpolicy.task import answer_grader
from onpolicy.teacher_samples import TeacherSamples
from onpolicy.teachers.local import LocalTeacher
from onpolicy.teachers.panel import open_panel
from onpolicy.trainer import Trainer
from onpolicy.updates import divergence_update, loss_temperature, make_update

if TYPE_CHECKING:
    from onpolicy.rollouts.base import Sampler


CONFIG = "config.yaml"
_PATIENCE = timedelta(hours=12)  # for the first process, while it draws the teacher's samples alone


class Interrupted(Exception):
    """Stopped by the user; everything is saved."""


class StoppedRun(Exception):
    """Stopped by a fault that is not the user's, with what to do about it."""


class Refused(ValueError):
    """A user's mistake that only showed when the models were loaded; nothing has been trained."""


def execute(prepared: Prepared) -> Path:
    """Run to the end and return the path of summary.json. Raises Interrupted, StoppedRun or Refused: what to do."""
    if prepared.summary.exists():  # --resume of a finished run
        return prepared.summary
    try:
        with disk_errors(prepared.directory), Run(prepared) as run:
            _build(run)
            return run.execute()
    except (DiskFullError, NonFiniteError, ParityError) as error:
        raise StoppedRun(str(error)) from error


def _build(run: Run) -> None:
    """The run's parts; where they refuse, a directory that holds nothing yet goes, so that the name stays free."""
    try:
        run.build()
    except ValueError as error:
        config = run.directory / CONFIG
        if is_first() and config.exists() and list(run.directory.iterdir()) == [config]:
            shutil.rmtree(run.directory)
        raise Refused(str(error)) from error


class Run:
    """The parts of a run and the order in which they are used."""

    def __init__(self, prepared: Prepared):
        self.prepared, self.config, self.directory = prepared, prepared.config, prepared.directory
        self.draws = Draws(prepared)
        self.teacher_samples = TeacherSamples(self.directory / "samples", prepared, self.draws)
        self.started = time.perf_counter()
        self.resources = contextlib.ExitStack()
        self.stopping = False
        self.sampler: Sampler | None = None
        self.saved_stage: dict[str, Any] | None = None  # of the stage a resumed run stands in
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # until processes have met

    def __enter__(self) -> Run:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.resources.callback(signal.signal, signum, signal.signal(signum, self._on_signal))
        return self

    def __exit__(self, *exception: object) -> None:
        self.resources.close()

    def _on_signal(self, signum: int, frame: object) -> None:
        if self.stopping:  # the second time, at once
            raise KeyboardInterrupt
        self.stopping = True
        self.progress.say("stopping when the step, or the batch outside of steps, is done; once more to stop at once")

    def _watched(self, note: str) -> Callable[[int], None]:
        """A progress callback for work outside of steps; it leaves that work when the user has asked to stop.

        One of several processes goes on: the others would wait for it for ever.
        """

        def report(amount: int) -> None:
            self.progress.advance(note, by=amount)
            if self.stopping and not self.processes.several:
                raise Interrupted(f"stopped; continue with --resume --name {self.config.name}")

        return report

    def execute(self) -> Path:
        """All stages and evaluations of a run that was built; the path of its summary."""
        config = self.config
        stages = self.stages()
        labels = ["after_warm_start", "end"] if len(stages) == 2 else ["end"]
        self._evaluate("start")
        for index, (stage, label) in enumerate(zip(stages, labels, strict=True)):
            if index < self.trainer.state.stage:
                continue
            if self.saved_stage is not None:
                stage.load_state_dict(self.saved_stage)
                self.saved_stage = None
            if not self.trainer.run_stage(stage):
                raise Interrupted(f"stopped and saved; continue with --resume --name {config.name}")
            self._evaluate(label)
            self.trainer.state.stage, self.trainer.state.step = index + 1, 0
        return self._finish()

    # -- building

    def build(self) -> None:
        config = self.config
        self.directory.mkdir(parents=True, exist_ok=True)
        self._meet()
        if self.main:
            with atomic_file(self.directory / CONFIG) as file:
                yaml.safe_dump(plain(config), file, sort_keys=False)
        for note in ignored_settings(config):
            self.progress.say(f"note: {note}")
        if self.main:  # the others wait
            self.teacher_samples.draw(self.device, self.progress, self._watched("tokens, at most"))
        self.processes.wait()
        teacher_model = load_causal_lm(config.teacher.model, getattr(torch, config.teacher.dtype), self.device)
        self.student = build_student(config.student, teacher_model, self.device, self.prepared.used_ids)
        self.processes.start_alike(list(self.student.trainable().values()))
        self.teacher = LocalTeacher(teacher_model, self.prepared.used_ids)
        if config.batching.share_prompts:
            check_shared_prompts(teacher_model)
            check_shared_prompts(self.student.model)
        self.panel = open_panel(config, self.teacher, self.device, self.prepared.used_ids)
        self.heldout = self._held_out()
        trained = sum(p.numel() for p in self.student.trainable().values())
        checks.check_disk(self.directory, 12 * trained * (config.checkpoint.keep + 1))
        store = CheckpointStore(self.directory / "checkpoints", config.checkpoint.keep)
        self.trainer = Trainer(config, self.student, self.accelerator, store, self.progress)
        self.trainer.started = self.started
        self.trainer.stop_requested = lambda: self.stopping
        self._load_checkpoint(store)
        self._start_trackers()

    def _meet(self) -> None:
        """The processes of the run find each other; only the first writes and speaks."""
        from accelerate import Accelerator, InitProcessGroupKwargs

        self.accelerator = Accelerator(
            log_with=self.config.logging.trackers or None, project_dir=str(self.directory),
            cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )  # fmt: skip
        self.resources.callback(self.accelerator.end_training)
        self.processes, self.device = Processes(self.accelerator), self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.progress = Progress(self.config.logging.progress) if self.main else Silent()
        self.resources.callback(self.progress.close)

    def _load_checkpoint(self, store: CheckpointStore) -> None:
        saved, warnings = store.load_latest()
        for warning in warnings:
            self.progress.say(f"warning: {warning}")
        self.saved_stage = self.trainer.load(saved) if saved is not None else None
        lines = saved["metrics_lines"] if saved is not None else 0
        self.trainer.lines = JsonLines(self.directory / "metrics.jsonl", keep=lines) if self.main else None
        if saved is not None:
            self.progress.say(f"continuing after step {self.trainer.state.steps_done}")

    def _start_trackers(self) -> None:
        kwargs: dict[str, Any] = {}
        if "tensorboard" in self.config.logging.trackers:
            kwargs["tensorboard"] = {"purge_step": self.trainer.state.steps_done + 1}  # drop what a killed run wrote
        settings = {
            k: v for k, v in checks.flatten(plain(self.config)).items() if isinstance(v, int | float | str | bool)
        }
        self.accelerator.init_trackers("tracker", config=settings, init_kwargs=kwargs)

    def _open_student_sampler(self) -> Sampler:
        if self.sampler is None:
            with self._saved_student() as directory:
                opened = open_sampler(self.prepared, directory, "student", self.device)
                self.sampler = self.resources.enter_context(opened)
        return self.sampler

    @contextlib.contextmanager
    def _saved_student(self) -> Iterator[str]:
        """A directory with the student as it is, for all processes, while the block lasts."""
        directory = self.directory / ".student"
        if self.main:
            self.student.save(directory, self.prepared.tokenizer)
        self.processes.wait()
        yield str(directory)
        self.processes.wait()
        if self.main:
            shutil.rmtree(directory)

    def _held_out(self) -> HeldOut | None:
        prompts, batching = self.draws.heldout_prompts(), self.config.batching
        if not prompts:
            return None
        return HeldOut(
            prompts, self.draws.heldout(), self.teacher_samples.heldout(), self.teacher,
            token_budget=batching.token_budget, share_prompts=batching.share_prompts,
        )  # fmt: skip

    # -- stages and evaluation

    def stages(self) -> list[Stage]:
        config = self.config
        temperature, normalize = loss_temperature(config.sampling.temperature), config.optim.normalize
        stages: list[Stage] = []
        if config.warm_start.num_prompts:
            warm = config.warm_start
            update = divergence_update(warm.divergence, temperature, normalize)
            stages.append(
                WarmStart(
                    self.teacher_samples.warm_start(), self.teacher, update,
                    token_budget=config.batching.token_budget, share_prompts=config.batching.share_prompts,
                    progress=self._watched("tokens scored"),
                    epochs=warm.epochs, rollouts_per_step=warm.rollouts_per_step,
                    learning_rate=warm.learning_rate, seed=config.seed,
                )
            )  # fmt: skip
        if config.steps:
            stages.append(self._on_policy())
        return stages

    def _on_policy(self) -> OnPolicy:
        config = self.config
        settings = StageSettings("on_policy", config.steps, config.optim.learning_rate, config.optim.updates_per_step)
        rewarded = config.algorithm == "policy_gradient" and config.policy_gradient.task_weight != 0
        return OnPolicy(
            self.student, self.panel, self._open_student_sampler, self.draws.prompt_order(),
            self.draws.sampling(config.sampling.samples_per_prompt, "student"), make_update(config), settings,
            prompts_per_step=config.prompts_per_step, lmbda=config.gkd.lmbda if config.algorithm == "gkd" else 1.0,
            seed=config.seed, health=config.health,
            grade=answer_grader(self.prepared.tokenizer) if rewarded else None,
        )  # fmt: skip

    def _evaluate(self, label: str) -> None:
        """Held-out figures under ``label``, unless a resumed run already has them."""
        results = self.trainer.state.heldout
        if self.heldout is None or label in results:
            return
        most = 2 * self.config.evaluation.num_prompts * self.config.evaluation.max_tokens
        self.progress.stage(f"held-out evaluation: {label}", most)
        sampler = self._open_student_sampler()
        sampler.sync(self.student.weights(), self.trainer.state.policy_version)
        figures = results[label] = self.heldout.measure(self.student, sampler, self._watched("tokens, at most"))
        self.progress.say(
            f"{label}: reverse KL {figures['reverse_kl']:.3f}, acceptance {figures['acceptance_t1']:.3f} (T=1), "
            f"{figures['acceptance_t0']:.3f} (T=0)"
        )

    # -- the end

    def _finish(self) -> Path:
        if self.main:
            state = self.trainer.state
            outcome = Outcome(self.trainer.elapsed(), state.heldout, state.tokens, state.seconds)
            leave(self.prepared, self.student, self.teacher_samples, outcome)
        self.processes.wait()
        return self.prepared.summary
