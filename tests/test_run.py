"""Whole runs on tiny models: real processes, really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from onpolicy.config import OptimConfig
from onpolicy.metrics import JsonLines
from onpolicy.optimization import NonFiniteError, Optimization, schedule_scale
from onpolicy.parity import ParityError, ParityMeter
from onpolicy.prepare import prepare
from onpolicy.rollouts.transformers_sampler import TransformersSampler
from onpolicy.run import Run, StoppedRun, execute
from onpolicy.teachers.local import LocalTeacher
from onpolicy.train import main, parse
from tests.conftest import as_options, make_model

ENVIRONMENT = {**os.environ, "ONPOLICY_NO_TUNE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def options(settings: dict, directory: Path, name: str = "run", **changes: object) -> list[str]:
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return as_options({**settings, "name": name, "output_dir": str(directory), **changed})


def train(settings: dict, directory: Path, name: str = "run", **changes: object) -> dict:
    """A run in this process; its summary."""
    config, resume = parse(options(settings, directory, name, **changes))
    return json.loads(execute(prepare(config, resume)).read_text())


def start(arguments: list[str], launcher: Sequence[str] = ()) -> subprocess.Popen:
    command = [sys.executable, *launcher, "-m", "onpolicy.train", *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def complete(arguments: list[str], launcher: Sequence[str] = ()) -> str:
    """Train in a process of its own, to the end; its output. Equal bits need equal threads, so all of them have one."""
    process = start(arguments, launcher)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return output


def lines(directory: Path, name: str = "run") -> list[dict]:
    path = directory / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(directory: Path, name: str = "run") -> list[tuple]:
    return [(r["step"], r["stage"], r["loss"], r["grad_norm"], r["completion_tokens"]) for r in lines(directory, name)]


@pytest.fixture(scope="module")
def finished(tiny_settings, tmp_path_factory) -> Path:
    """One uninterrupted run, with everything it leaves."""
    directory = tmp_path_factory.mktemp("finished")
    complete(options(tiny_settings, directory))
    return directory


def test_a_run_leaves_what_it_promises(finished) -> None:
    run = finished / "run"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "student/README.md",
        "student/config.json",
    ):
        assert (run / name).exists(), name
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["heldout"]) == {"start", "after_warm_start", "end"}
    figures = summary["heldout"]["end"]
    for name in ("reverse_kl", "forward_kl", "acceptance_t1", "acceptance_t0", "agreement", "perplexity"):
        assert figures[name] >= 0 and figures[name + "_on_student"] >= 0
    assert 0 < figures["acceptance_t1"] < 1
    assert summary["throughput"]["on_policy"]["completion_tokens"] == sum(
        r["completion_tokens"] for r in lines(finished) if r["stage"] == "on_policy"
    )


def test_the_summary_says_how_fast_each_phase_was_and_what_produced_it(finished) -> None:
    summary = json.loads((finished / "run" / "summary.json").read_text())
    for stage, entry in summary["throughput"].items():
        steps = [r for r in lines(finished) if r["stage"] == stage]
        tokens = sum(r["completion_tokens"] for r in steps)
        for phase, seconds in entry["seconds_by_phase"].items():
            if seconds > max(0.01, 1e-3 * entry["seconds"]):  # rounded to thousandths
                assert entry["tok_s_by_phase"][phase] == pytest.approx(tokens / seconds, rel=0.1)
        present = {"score", "update"} if stage == "warm_start" else {"rollout", "score", "update", "sync"}
        assert present <= set(entry["tok_s_by_phase"])
        assert all(rate < 1000 * entry["tok_s"] * 1.01 for rate in entry["tok_s_by_phase"].values())
        in_steps = sum(r["seconds"]["score"] for r in steps)
        if stage == "warm_start":  # the teacher's scores were made before the first step
            assert entry["seconds_by_phase"]["score"] > 2 * in_steps
        else:
            assert entry["seconds_by_phase"]["score"] == pytest.approx(in_steps, abs=2e-3)
    produced = summary["provenance"]
    assert "--name=run" in produced["argv"] and produced["versions"]["torch"] == torch.__version__


def test_the_final_student_loads_and_is_the_trained_one(finished, teacher_dir) -> None:
    from transformers import AutoTokenizer

    student = AutoModelForCausalLM.from_pretrained(finished / "run" / "student", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    assert student.config.num_hidden_layers == 2
    moved = (student.model.layers[0].mlp.up_proj.weight - teacher.model.layers[0].mlp.up_proj.weight).abs().max()
    assert moved > 1e-3
    assert AutoTokenizer.from_pretrained(finished / "run" / "student").chat_template


def test_the_resolved_config_reproduces_the_run(finished, tmp_path) -> None:
    saved = yaml.safe_load((finished / "run" / "config.yaml").read_text())
    saved["output_dir"] = str(tmp_path)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(saved))
    complete(["--config", str(tmp_path / "again.yaml")])
    assert losses(tmp_path) == losses(finished)


def test_sampler_and_trainer_agree_in_every_on_policy_step(finished) -> None:
    steps = [r for r in lines(finished) if r["stage"] == "on_policy"]
    assert len(steps) == 4 and all(r["sync/logprob_abs_diff"] < 1e-4 for r in steps)


@pytest.mark.parametrize("kill_after", [1, 2, 3, 5])
def test_killed_at_any_moment_and_resumed_gives_the_same_losses(finished, tiny_settings, tmp_path, kill_after) -> None:
    arguments = options(tiny_settings, tmp_path)
    process = start(arguments)
    deadline = time.time() + 120
    while len(lines(tmp_path)) < kill_after and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(lines(tmp_path)) >= kill_after and not (tmp_path / "run" / "summary.json").exists()
    output = complete([*arguments, "--resume"])
    assert output.strip().endswith("summary.json")
    assert losses(tmp_path) == losses(finished)
    ours, theirs = ((d / "run" / "summary.json").read_text() for d in (tmp_path, finished))
    assert json.loads(ours)["heldout"] == json.loads(theirs)["heldout"]


def test_interrupt_saves_and_exits_and_the_run_can_go_on(finished, tiny_settings, tmp_path) -> None:
    arguments = options(tiny_settings, tmp_path, checkpoint__every=100)
    process = start(arguments)
    while len(lines(tmp_path)) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "--resume" in errors and "Traceback" not in errors
    complete([*arguments, "--resume"])
    assert losses(tmp_path) == losses(finished)


@pytest.mark.parametrize(
    ("owner", "method", "changes"),
    [
        (TransformersSampler, "_decode", {"rollouts__max_num_seqs": 4}),
        (LocalTeacher, "score", {"evaluation__num_prompts": 0}),
        (LocalTeacher, "score", {"warm_start__num_prompts": 0}),
    ],
    ids=["sampling", "warm start", "evaluation"],
)
def test_an_interrupt_outside_of_steps_is_heeded_at_once(
    tiny_settings, tmp_path, monkeypatch, capsys, owner, method, changes
) -> None:
    monkeypatch.setenv("ONPOLICY_NO_TUNE", "1")
    whole, calls = getattr(owner, method), []

    def interrupted(self, *arguments: object):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        return whole(self, *arguments)

    changes = {"batching__token_budget": 64, "steps": 1, **changes}
    arguments = options(tiny_settings, tmp_path, **changes)
    with monkeypatch.context() as patched:
        patched.setattr(owner, method, interrupted)
        assert main(arguments) == 1
    assert len(calls) == 1
    assert "stopped; continue with --resume --name run" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0


def test_a_second_interrupt_stops_at_once_without_a_traceback(tiny_settings, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("ONPOLICY_NO_TUNE", "1")

    def twice(self, *_: object) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # Python's handler runs between two instructions
        raise AssertionError("still running")

    monkeypatch.setattr(TransformersSampler, "_decode", twice)
    assert main(options(tiny_settings, tmp_path)) == 1
    assert "interrupted; --resume --name run continues" in capsys.readouterr().err


def test_a_damaged_checkpoint_falls_back_and_still_ends_the_same(finished, tiny_settings, tmp_path) -> None:
    arguments = options(tiny_settings, tmp_path)
    process = start(arguments)
    while len(lines(tmp_path)) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))[-1]
    (newest / "state.pt").write_bytes(b"damaged")
    output = complete([*arguments, "--resume"])
    assert "is damaged" in output
    assert losses(tmp_path) == losses(finished)


def test_trackers_of_a_killed_and_resumed_run_tell_each_step_once(tiny_settings, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def told(name: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(tmp_path / "run" / "tracker"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(name)]

    watched = {"logging.trackers": "[tensorboard]", "logging.progress": "true", "evaluation.num_prompts": 0}
    changes = {"steps": 8, "warm_start__num_prompts": 0, "checkpoint__every": 3}
    arguments = options({**tiny_settings, **watched}, tmp_path, **changes)
    process = start(arguments)
    while len(lines(tmp_path)) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 4 in dict(told("loss"))  # of which the checkpoint of step 3 knows nothing
    complete([*arguments, "--resume"])
    records = lines(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 9))
    for name in ("loss", "grad_norm", "completion_tokens", "sync/logprob_abs_diff"):
        assert len(told(name)) == 8
        assert dict(told(name)) == pytest.approx({record["step"]: record[name] for record in records}, rel=1e-6)


def test_a_finished_run_is_not_run_again(finished, tiny_settings) -> None:
    before = (finished / "run" / "summary.json").stat().st_mtime_ns
    config, resume = parse([*options(tiny_settings, finished), "--resume"])
    assert execute(prepare(config, resume)).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "policy_gradient"},
        {"algorithm": "policy_gradient", "policy_gradient__discount": 1.0, "policy_gradient__control_variate": "none"},
        {"gkd__divergence": "forward_kl", "gkd__lmbda": 0.5},
        {"student__lora__rank": 4},
        {"sampling__top_p": 0.8, "sampling__top_k": 50, "sampling__temperature": 0.7},
        {"optim__updates_per_step": 2, "optim__normalize": "sequence"},
        {"sampling__temperature": 0.0},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)
def test_every_way_to_train_moves_the_student_and_keeps_parity(tiny_settings, tmp_path, changes) -> None:
    summary = train(tiny_settings, tmp_path, **changes, warm_start__num_prompts=0, steps=3)
    updates = int(changes.get("optim__updates_per_step", 1))
    assert [r["policy_version"] for r in lines(tmp_path)] == [updates, 2 * updates, 3 * updates]
    records = [r for r in lines(tmp_path) if "sync/logprob_abs_diff" in r]
    assert records and all(r["sync/logprob_abs_diff"] < 1e-3 for r in records)
    assert summary["heldout"]["start"] != summary["heldout"]["end"]


@pytest.mark.parametrize(
    ("longer", "changes"),
    [("student", {"algorithm": "policy_gradient", "optim__updates_per_step": 2}), ("teacher", {}), ("student", {})],
)
def test_output_rows_without_a_token_are_never_drawn_scored_or_trained(
    tiny_settings, teacher_dir, tokenizer, tmp_path, changes, longer
) -> None:
    """Half of the probability is on 64 rows of padding: whoever has them, the run is that of models without them."""

    def padded(source: Path, path: Path, **how) -> Path:
        make_model(path, tokenizer, rows=len(tokenizer) + 64, **how)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
        state = model.state_dict()
        for name, value in plain.items():
            state[name][: len(value)] = value
        model.load_state_dict(state)
        model.save_pretrained(path)
        return path

    plain = make_model(tmp_path / "student", tokenizer, layers=2, seed=1)
    models = {"student__model": plain, "teacher__model": teacher_dir, **changes}
    source = models[f"{longer}__model"]
    layers = 2 if longer == "student" else 4
    models |= {f"{longer}__model": padded(source, tmp_path / "padded", layers=layers, seed=5)}
    summary = train(tiny_settings, tmp_path, "padded_run", **models)
    models[f"{longer}__model"] = source
    assert train(tiny_settings, tmp_path, "plain_run", **models)["heldout"] == summary["heldout"]
    assert losses(tmp_path, "padded_run") == losses(tmp_path, "plain_run")
    records = [r for r in lines(tmp_path, "padded_run") if "sync/logprob_abs_diff" in r]
    assert len(records) == 4 and all(r["sync/logprob_abs_diff"] < 1e-4 for r in records)
    if longer == "student":
        rows = len(tokenizer)
        before = AutoModelForCausalLM.from_pretrained(tmp_path / "padded", dtype=torch.bfloat16)
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "padded_run" / "student", dtype=torch.bfloat16)
        before, after = (model.get_output_embeddings().weight for model in (before, after))
        assert torch.equal(before[rows:], after[rows:]) and not torch.equal(before[:rows], after[:rows])


def test_whitening_does_not_depend_on_how_rollouts_are_batched(tiny_settings, tmp_path) -> None:
    changes = {"algorithm": "policy_gradient", "policy_gradient__whitening": "mean_std", "steps": 2}
    changes |= {"warm_start__num_prompts": 0, "evaluation__num_prompts": 0}
    for budget in (40, 1000):
        train(tiny_settings, tmp_path, str(budget), batching__token_budget=budget, **changes)
    small, large = ([r["grad_norm"] for r in lines(tmp_path, name)] for name in ("40", "1000"))
    assert small == pytest.approx(large, rel=1e-4)


def test_distillation_brings_the_student_closer(tiny_settings, tmp_path) -> None:
    changes = {"warm_start__num_prompts": 32, "warm_start__epochs": 6, "optim__learning_rate": 3e-3, "steps": 20}
    heldout = train(tiny_settings, tmp_path, warm_start__learning_rate=3e-3, **changes)["heldout"]
    assert heldout["after_warm_start"]["forward_kl"] < 0.7 * heldout["start"]["forward_kl"]
    assert heldout["end"]["reverse_kl_on_student"] < heldout["after_warm_start"]["reverse_kl_on_student"]


def test_a_student_knows_which_tokens_it_drafts(tiny_settings, tmp_path) -> None:
    """Chosen from what the teacher wrote for the warm start, and from nothing held out."""
    from spec.drafters.vocabulary import DraftVocabulary, token_rows

    changes = {"student__draft_vocabulary": 40, "warm_start__epochs": 1, "steps": 1}
    train(tiny_settings, tmp_path, warm_start__num_prompts=8, **changes)
    chosen = DraftVocabulary.load(tmp_path / "run" / "student")
    assert chosen is not None and len(chosen) == 40
    rows = token_rows(tmp_path / "run" / "samples" / "teacher_warm_start.jsonl")
    counts = Counter(token for row in rows for token in row)
    assert counts.most_common(1)[0][0] in chosen.ids
    assert sum(counts[token] for token in chosen.ids.tolist()) == pytest.approx(chosen.mass * counts.total())
    train(tiny_settings, tmp_path, name="whole", student__draft_vocabulary=0, warm_start__num_prompts=8, steps=1)
    assert DraftVocabulary.load(tmp_path / "whole" / "student") is None


def test_stale_sampler_weights_stop_the_run(tiny_settings, tmp_path, monkeypatch) -> None:
    """The fault this guards against: the engine says it took the new weights, and did not."""

    def forgets(self, weights, policy_version):
        self.policy_version = policy_version

    monkeypatch.setattr(TransformersSampler, "sync", forgets)
    with pytest.raises(
        StoppedRun, match="does not have the weights.*another --name with rollouts.engine: transformers"
    ):
        train(tiny_settings, tmp_path, optim__learning_rate=0.05, steps=6)


def test_a_full_disk_stops_the_run_with_what_to_do(tiny_settings, tmp_path, monkeypatch) -> None:
    opened = JsonLines.__init__

    def on_a_full_disk(self, path: Path, keep: int = 0) -> None:
        opened(self, path, keep)
        path.unlink()
        path.symlink_to("/dev/full")

    monkeypatch.setattr(JsonLines, "__init__", on_a_full_disk)
    with pytest.raises(StoppedRun, match="no space left while writing .*free some space.*--resume"):
        train(tiny_settings, tmp_path, warm_start__num_prompts=0, evaluation__num_prompts=0)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tiny_settings, tmp_path) -> None:
    config, resume = parse(options(tiny_settings, tmp_path, warm_start__num_prompts=0))
    prepared = prepare(config, resume)
    with Run(prepared) as run:
        run.build()
        stage = run.stages()[0]
        stage.settings = replace(stage.settings, steps=2)
        run.trainer.run_stage(stage)
        good = {name: p.clone() for name, p in run.student.trainable().items()}
        next(iter(run.student.trainable().values())).data.fill_(float("nan"))
        stage.settings = replace(stage.settings, steps=3)
        stage.sampler.sync = lambda *_: None  # type: ignore[attr-defined]
        with pytest.raises(NonFiniteError, match="the loss is nan.*Lower optim.learning_rate") as error:
            run.trainer.run_stage(stage)
        saved, _ = run.trainer.store.load_latest()
    assert saved is not None and all(torch.equal(saved["student"][k], good[k]) for k in good)
    # What the message says to do works.
    assert "continue with --resume" in str(error.value)
    remedy = {"optim.learning_rate": 1e-4, "warm_start.learning_rate": 1e-4, "optim.max_grad_norm": 0.5}
    again = {**tiny_settings, "warm_start.num_prompts": 0, **remedy}
    config, resume = parse([*options(again, tmp_path), "--resume"])
    execute(prepare(config, resume))
    steps = lines(tmp_path)
    assert [r["step"] for r in steps] == [1, 2, 3, 4] and max(r["learning_rate"] for r in steps[2:]) <= 1e-4


def test_what_only_building_refuses_is_a_users_mistake_and_the_name_stays_free(
    tiny_settings, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("ONPOLICY_NO_TUNE", "1")
    adapter = {"student__lora__rank": 2, "evaluation__num_prompts": 0, "warm_start__num_prompts": 0}
    wrong = options(tiny_settings, tmp_path, **adapter, student__lora__target_modules="[norm]")  # no linear layer
    assert main(wrong) == 2
    errors = capsys.readouterr().err
    assert "error: Target module" in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists()
    unused = {"steps": 1, "student__freeze_embeddings": "true"}
    assert main(options(tiny_settings, tmp_path, **adapter, **unused, student__lora__target_modules="[q_proj]")) == 0
    assert "note: student.freeze_embeddings" in capsys.readouterr().out


def test_the_schedule_by_hand() -> None:
    def scales(schedule: str) -> list[float]:
        return [schedule_scale(step, 6, 2, schedule, final=0.1) for step in range(7)]  # type: ignore[arg-type]

    warm_up = [1 / 3, 2 / 3]
    assert scales("constant") == pytest.approx([*warm_up, 1, 1, 1, 1, 1])
    assert scales("linear") == pytest.approx([*warm_up, 1, 0.775, 0.55, 0.325, 0.1])
    cosine = [1, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5), 0.1]
    assert scales("cosine") == pytest.approx([*warm_up, *cosine])
    assert schedule_scale(0, 3, 0, "cosine", final=0.0) == 1 and schedule_scale(4, 5, 9, "linear", 0.1) == 0.5


def test_the_schedule_spans_the_updates_of_a_phase(tiny_settings, tmp_path) -> None:
    changes = {"optim__updates_per_step": 2, "optim__schedule": "linear", "optim__warmup_steps": 1}
    changes |= {"evaluation__num_prompts": 0, "optim__final_scale": 0.0, "optim__learning_rate": 1e-3}
    train(tiny_settings, tmp_path, steps=3, warm_start__num_prompts=0, **changes)
    used = [1e-3 * schedule_scale(update, 6, 1, "linear", 0.0) for update in range(6)]
    means = [sum(used[2 * step : 2 * step + 2]) / 2 for step in range(3)]
    assert [r["learning_rate"] for r in lines(tmp_path)] == pytest.approx(means)


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimization = Optimization([parameter], OptimConfig())
    parameter.grad = torch.tensor([1.0, float("inf"), 0.0])
    with pytest.raises(NonFiniteError, match="here: the gradient is.*Lower optim.learning_rate.*another --name"):
        optimization.apply(0.1, "here")
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_parity_error_is_raised_before_the_update() -> None:
    meter = ParityMeter()
    meter.add(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.5, float("nan")]))
    assert meter.mean == pytest.approx(0.5) and meter.tokens == 2
    meter.check(0.5, 1)
    with pytest.raises(ParityError, match="step 7.*0.500 nats"):
        meter.check(0.49, 7)
