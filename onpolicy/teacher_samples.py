"""The teacher's own answers, which the warm start and the evaluation need: drawn once and kept with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from onpolicy.draws import Draws
from onpolicy.metrics import Progress, Silent
from onpolicy.prepare import Prepared
from onpolicy.rollouts.files import load_rollouts, save_rollouts
from onpolicy.rollouts.opening import open_sampler
from onpolicy.types import Rollout


class TeacherSamples:
    """Files of one directory, by the names of :meth:`onpolicy.draws.Draws.of_teacher`."""

    def __init__(self, directory: Path, prepared: Prepared, draws: Draws) -> None:
        self.directory, self.prepared, self.draws = directory, prepared, draws

    def file(self, name: str) -> Path:
        return self.directory / f"teacher_{name}.jsonl"

    def draw(self, device: torch.device, progress: Progress | Silent, report: Callable[[int], None]) -> None:
        """What an earlier start of the run has not left here. ``report`` takes tokens as they come."""
        missing = [job for job in self.draws.of_teacher() if not self.file(job[0]).exists()]
        if not missing:
            return
        from onpolicy.teachers.convert import resolve_model

        directory = resolve_model(self.prepared.config.teacher.model)
        with open_sampler(self.prepared, directory, "teacher", device) as sampler:
            for name, prompts, params in missing:
                progress.stage(f"teacher samples: {name}", len(prompts) * params.n * params.max_tokens)
                save_rollouts(self.file(name), sampler.generate(prompts, params, report))

    def warm_start(self) -> list[Rollout]:
        return load_rollouts(self.file("warm_start"))

    def heldout(self) -> dict[bool, list[Rollout]]:
        """Answers to the held-out prompts, by greedy."""
        return {False: load_rollouts(self.file("sampled")), True: load_rollouts(self.file("greedy"))}
