"""What each process has of a step, and what a launcher changes before any model is loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onpolicy.prepare import engine_name, prepare
from onpolicy.processes import Share
from onpolicy.train import parse
from onpolicy.trainer import split
from onpolicy.types import Prompt, Rollout
from tests.conftest import as_options


def groups(count: int) -> list[list[Rollout]]:
    """Two completions of each of ``count`` prompts."""
    return [
        [Rollout(Prompt(str(i), (1,)), np.array([i]), np.zeros(1, np.float32), "stop", 0, k) for k in range(2)]
        for i in range(count)
    ]


@pytest.mark.parametrize(("prompts", "parts", "processes"), [(5, 2, 2), (4, 4, 3), (3, 8, 2), (1, 1, 4)])
def test_every_process_makes_the_same_parts_of_its_share(prompts: int, parts: int, processes: int) -> None:
    whole = split(groups(prompts), parts)
    shares = [
        split([group if Share(p, processes).has(i) else [] for i, group in enumerate(groups(prompts))], parts)
        for p in range(processes)
    ]
    assert {len(each) for each in shares} == {len(whole)}
    for part, everything in enumerate(whole):
        together = [rollout.prompt.id for each in shares for rollout in each[part]]
        assert sorted(together) == sorted(rollout.prompt.id for rollout in everything)
        assert everything


def test_several_processes_do_not_use_vllm(tiny_settings, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("onpolicy.prepare.has_vllm", lambda: True)
    settings = {**tiny_settings, "output_dir": str(tmp_path)}
    automatic, _ = parse(as_options({**settings, "rollouts.engine": "auto"}))
    assert engine_name(automatic) == "vllm"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert engine_name(automatic) == "transformers"
    config, resume = parse(as_options({**settings, "rollouts.engine": "vllm"}))
    with pytest.raises(ValueError, match="2 processes.*rollouts.engine: transformers"):
        prepare(config, resume)


def test_only_the_first_process_minds_what_is_in_the_directory(tiny_settings, tmp_path, monkeypatch) -> None:
    config, resume = parse(as_options({**tiny_settings, "output_dir": str(tmp_path)}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    monkeypatch.setenv("RANK", "1")
    assert prepare(config, resume).train_prompts
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="already holds a run"):
        prepare(config, resume)


def test_the_sampler_stands_where_the_run_does(tiny_settings, tmp_path, monkeypatch) -> None:
    from onpolicy.models import load_causal_lm
    from onpolicy.rollouts import opening

    config, resume = parse(as_options({**tiny_settings, "output_dir": str(tmp_path)}))
    asked = []

    def load(name, dtype, device):
        asked.append(device)
        return load_causal_lm(name, dtype)

    monkeypatch.setattr(opening, "load_causal_lm", load)
    with opening.open_sampler(prepare(config, resume), config.teacher.model, "student", torch.device("cuda", 3)):
        assert asked == [torch.device("cuda", 3)]
