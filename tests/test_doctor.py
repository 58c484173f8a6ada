"""Every finding of the doctor is provoked for real, on tiny models; a healthy run has none that worries."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from onpolicy.doctor import Finding, Report, costs, delivery, sampler, speed, teacher
from onpolicy.doctor.__main__ import main, parse
from onpolicy.doctor.examination import examine
from onpolicy.doctor.findings import plain_text, show
from onpolicy.models import read_causal_lm
from onpolicy.rollouts import transformers_sampler
from onpolicy.rollouts.transformers_sampler import TransformersSampler
from onpolicy.student import Student
from onpolicy.teachers.local import LocalTeacher
from onpolicy.types import Prompt, Rollout
from tests.conftest import as_options, make_model, make_tokenizer


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ONPOLICY_NO_TUNE", "1")


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    """A data set that a tiny model can learn: short questions, one-token answers."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"How much is {i} and {i}?", "completion": "Yes"} for i in range(10, 50)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tokenizer, sums) -> Path:
    """A tiny teacher that has learned the data set, with a licence: nothing about it is to be found fault with."""
    from transformers import AutoModelForCausalLM

    from onpolicy.prompts import PromptsConfig, load_prompts

    path = make_model(tmp_path_factory.mktemp("taught") / "teacher", tokenizer)
    prompts, _ = load_prompts(PromptsConfig(source=str(sums), heldout_size=4, system="Add."), tokenizer)
    ids = [[*prompt.token_ids, *(prompt.completion_ids or ())] for prompt in prompts]
    width = max(map(len, ids))
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in ids])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(labels.clamp_min(0), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    return path


@pytest.fixture
def settings(tiny_settings, taught, sums, tmp_path) -> dict[str, object]:
    return {
        **tiny_settings, "teacher.model": str(taught), "prompts.source": str(sums), "prompts.size": 32,
        "output_dir": str(tmp_path / "runs"),
    }  # fmt: skip


def diagnose(settings: dict, **changes: object) -> dict[str, Finding]:
    """Findings by name."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    config, resume, _ = parse(as_options({**settings, **changed}))
    return {finding.name: finding for finding in examine(config, resume).findings}


def altered(model: Path, to: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with some tensors replaced, or removed (None)."""
    shutil.copytree(model, to)
    state = load_file(to / "model.safetensors")
    for name, tensor in tensors.items():
        full = next(key for key in state if name in key.replace(".", "_"))
        removed = state.pop(full)
        if tensor is not None:
            state[full] = tensor.expand_as(removed).contiguous()
    save_file(state, to / "model.safetensors", {"format": "pt"})
    return to


# -- the healthy case


def test_a_healthy_run_has_no_warning_and_nothing_is_written(settings, tmp_path, capsys) -> None:
    assert main([*as_options(settings), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["level"] in ("ok", "note"), [f for f in report["findings"] if f["level"] in ("warning", "error")]
    assert {f["name"] for f in report["findings"]} == {
        "vocabularies", "special tokens", "chat templates", "prompt lengths", "teacher's licence", "run's directory",
        "teacher weights", "teacher head", "teacher on real text", "teacher determinism", "completion lengths", "disk",
        "temperature", "sampler and trainer", "weight sync", "memory", "throughput",
    }  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_a_healthy_adapter_is_delivered(settings) -> None:
    found = diagnose(settings, student__lora__rank=4)
    assert found["adapter delivery"].level == "ok" and "weight sync" not in found
    assert {f.level for f in found.values()} <= {"ok", "note"}


def test_a_users_mistake_has_status_2_and_errors_status_1(settings, taught, tmp_path, capsys) -> None:
    assert main(as_options({**settings, "teacher.model": "/no/such/model"})) == 2
    assert "error: teacher.model" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--no_such_key", "1"])
    assert stopped.value.code == 2
    capsys.readouterr()
    broken = altered(taught, tmp_path / "broken", norm=torch.tensor(math.nan))
    assert main(as_options({**settings, "teacher.model": str(broken)})) == 1
    printed = capsys.readouterr().out
    assert "error    teacher weights" in printed and "1 error" in printed.splitlines()[-1]


# -- text


def test_another_vocabulary_is_an_error_before_models_are_loaded(settings, tmp_path) -> None:
    make_model(tmp_path / "other", make_tokenizer(300))
    found = diagnose(settings, student__model=str(tmp_path / "other"))
    assert found["vocabularies"].level == "error" and "prune one" in found["vocabularies"].remedy
    assert "teacher weights" not in found and "not examined" in found


def test_padding_is_noted_and_its_mass_is_measured(settings, tokenizer, tmp_path) -> None:
    make_model(tmp_path / "padded", tokenizer, layers=2, rows=len(tokenizer) + 64)
    found = diagnose(settings, student__model=str(tmp_path / "padded"))
    assert found["vocabularies"].level == "note" and "448" in found["vocabularies"].found
    assert found["padded rows"].level == "warning" and "64 of the student's rows" in found["padded rows"].found
    assert found["sampler and trainer"].level == "ok" and found["weight sync"].level == "ok"


def test_end_tokens_that_contradict_each_other(settings, taught, tokenizer, tmp_path) -> None:
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for ends, words in (([other], "never stops"), ([other, tokenizer.eos_token_id], "rollouts go on")):
        path = tmp_path / str(len(ends))
        shutil.copytree(taught, path)
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        finding = diagnose(settings, teacher__model=str(path))["special tokens"]
        assert finding.level == "warning" and words in finding.cost and "<|endoftext|>" in finding.found


def test_another_template_is_an_error_that_shows_where_they_part(settings, taught, tmp_path) -> None:
    shutil.copytree(taught, tmp_path / "other")
    template = (taught / "chat_template.jinja").read_text()
    (tmp_path / "other" / "chat_template.jinja").write_text(template.replace("assistant", "model"))
    finding = diagnose(settings, student__model=str(tmp_path / "other"))["chat templates"]
    assert finding.level == "error" and "32 of 32 prompts" in finding.found and "'as" in finding.found
    assert "+0.287 nats" in finding.cost


def test_the_same_template_is_compared_on_real_prompts(settings, taught) -> None:
    found = diagnose(settings, student__model=str(taught))
    assert found["chat templates"].found == "teacher and student render 32 prompts to the same ids"
    assert found["student weights"].level == "ok"


def test_a_template_with_todays_date(settings, taught, tmp_path) -> None:
    shutil.copytree(taught, tmp_path / "dated")
    template = (taught / "chat_template.jinja").read_text()
    (tmp_path / "dated" / "chat_template.jinja").write_text("{{ strftime_now('%d') }}" + template)
    assert "resumed tomorrow" in diagnose(settings, teacher__model=str(tmp_path / "dated"))["chat templates"].cost


def test_dropped_prompts_and_cut_completions(settings, tmp_path) -> None:
    rows = [{"prompt": "How much is it? " + "Add 1. " * 20 * (i % 2) + str(i), "completion": "Yes"} for i in range(40)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"prompts__source": str(tmp_path / "long.jsonl"), "prompts__too_long": "drop"}
    found = diagnose(settings, **changes, prompts__max_prompt_tokens=50, sampling__max_tokens=1)
    assert found["prompt lengths"].level == "warning" and "dropped" in found["prompt lengths"].found
    assert found["completion lengths"].level == "warning" and "100% of 12" in found["completion lengths"].found


# -- the teacher


def test_lost_and_empty_weights(settings, taught, tmp_path) -> None:
    broken = altered(taught, tmp_path / "broken", layers_2_mlp_up=None, layers_1_mlp_up=torch.tensor(0.0))
    finding = diagnose(settings, teacher__model=str(broken))["teacher weights"]
    assert finding.level == "error" and "Relax#287" in finding.cost
    assert "1 not in the checkpoint and newly initialised: model.layers.2.mlp.up_proj.weight" in finding.found
    assert "1 zero throughout: model.layers.1.mlp.up_proj.weight" in finding.found


def test_a_teacher_with_fresh_weights_knows_no_more_than_chance(settings, taught, tokenizer, tmp_path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(taught, tmp_path / "fresh")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(taught)).save_pretrained(tmp_path / "fresh")
    finding = diagnose(settings, teacher__model=str(tmp_path / "fresh"))["teacher on real text"]
    assert finding.level == "error" and f"{-math.log(len(tokenizer)):.2f}" in finding.found


def test_a_head_that_is_no_plain_product(settings, tokenizer, tmp_path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, logits_scaling=4.0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path / "scaled")
    tokenizer.save_pretrained(tmp_path / "scaled")
    found = diagnose(settings, teacher__model=str(tmp_path / "scaled"))
    assert found["teacher head"].level == "error" and "Granite" in found["teacher head"].found
    assert "not examined" in found and "weight sync" not in found
    assert diagnose(settings, student__model=str(tmp_path / "scaled"))["student head"].level == "error"


def test_a_head_that_is_plain_on_the_probe_only(settings, taught, monkeypatch) -> None:
    """Soft-capping leaves small logits alone: the four tokens looked at when a model is loaded may not show it."""
    loaded = read_causal_lm(str(taught), torch.float32)
    monkeypatch.setattr(teacher, "check_linear_head", lambda model: None)
    ids = [prompt_text([2, 40, 41, 42, 43])]
    assert teacher.plain_head(loaded.model, ids, "teacher").level == "ok"
    loaded.model.lm_head.register_forward_hook(lambda module, inputs, output: 5 * torch.tanh(output / 5))
    finding = teacher.plain_head(loaded.model, ids, "teacher")
    assert finding.level == "error" and "on real text" in finding.found


def prompt_text(ids: list[int]) -> Rollout:
    return teacher.real_texts([Prompt("p", tuple(ids))])[0]


def test_scores_that_change_from_call_to_call(settings, monkeypatch) -> None:
    score = LocalTeacher.score

    def noisy(self, batch):
        exact = score(self, batch)
        return replace(exact, hidden=exact.hidden + 3.0 * torch.randn_like(exact.hidden))

    monkeypatch.setattr(LocalTeacher, "score", noisy)
    finding = diagnose(settings)["teacher determinism"]
    assert finding.level == "error" and "dropout" in finding.remedy


def test_a_model_that_ignores_the_mask_lets_samples_leak(settings, monkeypatch) -> None:
    from onpolicy import models

    plain = models.base_model

    class Unmasked:
        """A decoder that does not pass on how completions share a prompt: attention is causal over the whole row."""

        def __init__(self, decoder):
            self.decoder, self.config = decoder, decoder.config

        def __call__(self, shared_prompts=None, **inputs):
            return self.decoder(**inputs)

    class Model:
        def __init__(self, model):
            self.model = model

        def __getattr__(self, name):
            return getattr(self.model, name)

        def get_decoder(self):
            return Unmasked(self.model.get_decoder())

    monkeypatch.setattr(models, "base_model", lambda model: Model(plain(model)))
    finding = diagnose(settings, sampling__temperature=2.0)["teacher determinism"]
    assert finding.level in ("warning", "error") and "batching.share_prompts: false" in finding.remedy
    again = float(finding.found.split("twice: ")[1].split()[0])
    assert again == 0  # repeatable all the same: only other neighbours show it


# -- the sampler


def forgets(keep):
    """A sync that delivers only the weights whose name ``keep`` accepts, and says nothing."""
    sync = TransformersSampler.sync

    def partial(self, weights, policy_version):
        own = self._model.state_dict()
        sync(self, {n: w if keep(n) else own[n] for n, w in weights}.items(), policy_version)

    return partial


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("keep", "rank"),
    [(lambda n: False, 0), (lambda n: ".1.mlp" not in n, 0), (lambda n: "embed" not in n, 0), (lambda n: False, 4)],
    ids=["all", "one block", "head", "adapter"],
)
def test_a_sync_that_forgets_weights(settings, monkeypatch, keep, rank, dtype) -> None:
    precision = {"student__precision": dtype, "rollouts__dtype": dtype}
    healthy = diagnose(settings, student__lora__rank=rank, **precision)
    monkeypatch.setattr(TransformersSampler, "sync", forgets(keep))
    found = diagnose(settings, student__lora__rank=rank, **precision)
    name = "adapter delivery" if rank else "weight sync"
    assert healthy[name].level == "ok", healthy[name]
    assert found[name].level == "error" and "verl#7495" in found[name].cost
    assert found["sampler and trainer"].level == "ok"  # at the start nothing has moved yet


def test_an_engine_with_other_weights_from_the_start(settings, monkeypatch) -> None:
    sync = TransformersSampler.sync

    def scaled(self, weights, policy_version):
        sync(self, [(n, 1.5 * w if "mlp" in n else w) for n, w in weights], policy_version)

    monkeypatch.setattr(TransformersSampler, "sync", scaled)
    finding = diagnose(settings)["sampler and trainer"]
    assert finding.level == "error" and "rollouts.engine transformers" in finding.remedy


def test_log_probs_at_the_wrong_temperature(settings, monkeypatch) -> None:
    draw = transformers_sampler.draw_tokens

    def unprocessed(logits, uniform, params):
        tokens, _ = draw(logits, uniform, params)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(transformers_sampler, "draw_tokens", unprocessed)
    finding = diagnose(settings, rollouts__parity_bound=0.01)["temperature"]
    assert finding.level == "error" and "reports them at T=1" in finding.found


def test_tokens_drawn_at_the_wrong_temperature(settings, monkeypatch) -> None:
    draw = transformers_sampler.draw_tokens

    def hotter(logits, uniform, params):
        tokens, _ = draw(logits, uniform, replace(params, temperature=2 * params.temperature))
        logprobs = (logits / params.temperature).log_softmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(transformers_sampler, "draw_tokens", hotter)
    finding = diagnose(settings)["temperature"]
    assert finding.level == "error" and "not drawn at that temperature" in finding.found


def comparison(difference: float) -> sampler.Comparison:
    zeros = torch.zeros(8)
    return sampler.Comparison(zeros, zeros, zeros + difference, zeros, zeros + 1)


@pytest.mark.parametrize(
    ("floor", "warm_start", "level"), [(0.12, True, "note"), (0.12, False, "warning"), (0.01, True, "error")]
)
def test_rounding_is_told_from_other_weights(floor, warm_start, level) -> None:
    finding = sampler.weights_agree(comparison(0.2), floor, 0.1, "vllm", warm_start)
    assert finding.level == level and "0.2 nats" in finding.found


def test_the_student_is_left_as_it_was(taught, settings) -> None:
    from onpolicy.config import StudentConfig
    from onpolicy.student import build_student

    student = build_student(StudentConfig(model=str(taught)), None)
    before = {name: p.clone() for name, p in student.trainable().items()}
    with pytest.raises(KeyboardInterrupt), delivery.kept_weights(student):
        delivery.nudge([p for group in delivery.kinds(student).values() for p in group], 0.5)
        assert not any(torch.equal(before[n], p) for n, p in student.trainable().items())
        raise KeyboardInterrupt
    assert all(torch.equal(before[n], p) for n, p in student.trainable().items())


def test_everyone_who_scores_takes_part_in_the_small_step(settings, taught) -> None:
    changes = {
        "algorithm": "policy_gradient", "policy_gradient__extrapolation": 1.5, "policy_gradient__task_weight": 1.0,
        "policy_gradient__reference_model": taught, "other_teachers": f'[{{"model": "{taught}", "dtype": "float32"}}]',
    }  # fmt: skip
    with pytest.raises(ValueError, match="prompts.answer_column"):
        diagnose(settings, **changes)
    found = diagnose(settings, **changes | {"policy_gradient__task_weight": 0.0})
    assert found["other_teachers[0].model's licence"].level == "ok"
    assert found["policy_gradient.reference_model's licence"].level == "ok"
    assert "teachers 0.00" in found["memory"].found and found["throughput"].level in ("ok", "note")


# -- costs


def test_too_little_memory_and_disk(settings, monkeypatch) -> None:
    monkeypatch.setattr(costs, "available_bytes", lambda device: 2**30)
    finding = diagnose(settings)["memory"]
    assert finding.level == "error" and "batching.token_budget" in finding.remedy
    finding = diagnose(settings, checkpoint__keep=10**12)["disk"]
    assert finding.level == "error" and "checkpoint.keep" in finding.remedy


def test_memory_is_never_less_than_what_was_held() -> None:
    parts = {"teacher": 2 * 2**30, "student": 2**30}
    assert costs.memory(costs.Memory(parts, 8 * 2**30, 2**30)).level == "ok"  # 3 of 8 GiB
    assert costs.memory(costs.Memory(parts, 8 * 2**30, 7 * 2**30)).level == "warning"
    assert costs.memory(costs.Memory(parts, 8 * 2**30, 9 * 2**30)).level == "error"


def test_memory_counts_what_the_parts_take() -> None:
    """By the loss's and the engine's own figures."""
    from onpolicy.losses.chunked import BUFFER_BYTES
    from spec.vllm_engine import LARGEST_CACHE

    config, _, _ = parse(["--rollouts.max_num_seqs=1000000"])
    tiny = LlamaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    parts = costs.memory_parts(Student(LlamaForCausalLM(tiny)), [], 0.0, longest=1000, config=config)
    assert parts["loss"] == BUFFER_BYTES["cpu"] and parts["keys and values"] == LARGEST_CACHE


def test_licences(taught, tmp_path) -> None:
    assert costs.licence(str(taught)).level == "ok"
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: llama3.2\n---\n")
    assert "terms of its own" in costs.licence(str(tmp_path)).found
    card.unlink()
    assert costs.licence(str(tmp_path)).level == "warning" and "unknown" in costs.licence(str(tmp_path)).found


def test_an_occupied_directory(settings, tmp_path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "metrics.jsonl").write_text("{}\n")
    assert diagnose(settings, steps=1)["run's directory"].level == "warning"


def test_the_estimate_of_a_run_adds_up(settings) -> None:
    config, _, _ = parse(as_options(settings))
    measured = speed.Speed(rollout=0.5, score=0.01, update=0.02, apply=1.0, sync=2.0, saved=0.0)
    found = speed.throughput(measured, 2.0, 10.0, config, "transformers").found
    # 2 prompts of 10 tokens, 2 samples of 8 tokens each: 32 tokens, 2 * (10 + 16) = 52 positions
    assert "up to 20.6 s (rollout 16.0, score 0.5, update 2.0, sync 2.0)" in found
    assert "on-policy 82.2" in found  # 4 steps of 20.56 s
    assert "teacher's samples 192.0" in found  # 8 * 2 * 8 and, held out, 2 * 4 * 8 tokens at 0.5 s, times 2
    assert "warm start 8.2" in found  # 8 * 10 + 128 positions at 0.03 s, 2 updates
    # Three times 64 tokens drawn, 2 * 72 positions scored, 4 * 72 read; the teacher's 2 * 72 scored once.
    assert "evaluation 107.5" in found
    config.warm_start.epochs = 3
    found = speed.throughput(measured, 2.0, 10.0, config, "transformers").found
    assert "warm start 20.6" in found  # 208 positions, scored once at 0.01 s, learnt from three times at 0.02 s; 6 s
    slow = replace(measured, rollout=5.0)
    assert speed.throughput(slow, 2.0, 10.0, config, "transformers").level == "note"


def test_what_autograd_keeps_is_counted() -> None:
    layer = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    assert speed.saved_bytes(lambda: layer(x).sum().backward(), layer) == 16 * 8 * 4
    assert speed.saved_bytes(lambda: layer(x).exp().sum().backward(), layer) == 16 * 8 * 4 + 16 * 4 * 4


# -- the report


def test_the_report_puts_the_worst_last_and_wraps() -> None:
    findings = [Finding("error", "b", "x " * 100, "money", "do this"), Finding("ok", "a", "fine")]
    text = plain_text(sorted(findings, key=lambda f: f.level == "error"))
    assert text.startswith("ok       a: fine\nerror    b: x") and max(map(len, text.splitlines())) <= 120
    assert "         cost: money\n         mend: do this" in text
    report = Report(findings, {"engine": 3.0, "prompts": 1.0})
    assert report.exit_status == 1 and report.summary() == "1 error, 1 ok; 4 s: engine 3.0, prompts 1.0"


def test_a_terminal_gets_a_table() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    show(Report([Finding("warning", "disk [full]", "little", "hours", "free some")]), screen)
    printed = screen.getvalue()
    assert "disk [full]" in printed and "mend: free some" in printed and "no errors, 1 warning" in printed
