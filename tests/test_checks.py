"""Users' mistakes: a clear message with the remedy, exit status 2, before any model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from onpolicy import models
from onpolicy.doctor.__main__ import main as doctor
from onpolicy.prepare import prepare
from onpolicy.setting_checks import ignored_settings
from onpolicy.train import main, parse
from tests.conftest import as_options, make_model, make_tokenizer

POLICY_GRADIENT = {"algorithm": "policy_gradient"}


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(models, "load_causal_lm", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ONPOLICY_NO_TUNE", "1")


def mistake(settings: dict, **changes: object) -> str:
    """The message of the error that preparing such a run raises."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    config, resume = parse(as_options({**settings, **changed}))
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prepare(config, resume)
    return str(error.value)


@pytest.fixture
def settings(tiny_settings, tmp_path) -> dict:
    return {**tiny_settings, "output_dir": str(tmp_path)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher__model": "/no/such/model"}, ["teacher.model", "/no/such/model"]),
        ({"student__model": "./missing"}, ["student.model", "./missing"]),
        ({"student__layers": "[0,4]"}, ["student.layers: 4", "layers 0 to 3"]),
        ({"student__num_layers": 9}, ["student.num_layers", "4 layers"]),
        ({"prompts__source": "/no/such/data.jsonl"}, ["/no/such/data.jsonl"]),
        ({"prompts__max_prompt_tokens": 5}, ["5", "max_prompt_tokens"]),
        ({"sampling__max_tokens": 500}, ["12 are allowed", "shorten the completions"]),
        ({"gkd__divergence": "revers_kl"}, ["gkd.divergence", "revers_kl", "reverse_kl"]),
        ({"gkd__beta": 1.5}, ["gkd.beta"]),
        ({"gkd__options": "{top_kk: 64}"}, ["gkd.options: jsd has no option top_kk", "top_k"]),
        ({"gkd__options": "{temperature: 2}"}, ["gkd.options: jsd has no option temperature"]),
        ({"gkd__options": "{beta: 0.3}"}, ["gkd.options has beta", "gkd.beta"]),
        ({"gkd__options": "{support: student}"}, ["gkd.options: support", "set top_k too"]),
        ({"gkd__options": "{top_k: 64, support: both}"}, ["gkd.options: support must be"]),
        ({"gkd__options": "{top_k: many}"}, ["gkd.options: top_k must be a whole number"]),
        ({"gkd__options": "{skew: much}", "gkd__divergence": "skew_forward_kl"}, ["skew must be a number"]),
        ({"gkd__divergence": "forward_kl", "gkd__beta": 0.5}, ["gkd.beta: 0.5 has no effect", "jsd"]),
        ({"steps": 0, "warm_start__num_prompts": 0}, ["nothing to do"]),
        ({"batching__token_budget": 0}, ["batching.token_budget must be positive"]),
        ({"evaluation__num_prompts": 99}, ["prompts.heldout_size"]),
        ({"algorithm": "policy_gradient", "sampling__temperature": 0.0}, ["sampling.temperature above 0"]),
        ({"policy_gradient__ratio_cap": -1, "algorithm": "policy_gradient"}, ["ratio_cap"]),
        ({"policy_gradient__extrapolation": 1.5, "algorithm": "policy_gradient"}, ["reference_model", "set both"]),
        ({"policy_gradient__reference_model": "/x", "algorithm": "policy_gradient"}, ["extrapolation is 1.0"]),
        ({"policy_gradient__task_weight": -1, "algorithm": "policy_gradient"}, ["task_weight at least 0"]),
        ({"policy_gradient__place": "loss", "algorithm": "policy_gradient"}, ["control_variate: none"]),
        (
            {"policy_gradient__task_weight": 1, "policy_gradient__task_placement": "last", **POLICY_GRADIENT},
            ["last tokens alone", "task_placement: sequence"],
        ),
        (
            {"policy_gradient__reference_model": "/x", "policy_gradient__extrapolation": 2, **POLICY_GRADIENT},
            ["policy_gradient.reference_model", "no such model"],
        ),
        ({"other_teachers": '[{"model": "/no/such/model"}]'}, ["other_teachers[0].model", "/no/such/model"]),
        ({"other_teachers": '[{"weight": 0}]'}, ["other_teachers[0].weight must be positive"]),
        ({"teacher__weight": -1}, ["teacher.weight must be positive"]),
        ({"sampling__temperature": -1}, ["sampling.temperature must be >= 0"]),
        ({"sampling__top_p": 1.5}, ["sampling.top_p must be in (0, 1]"]),
        ({"sampling__top_k": -1}, ["sampling.top_k must be >= 0"]),
        ({"optim__max_grad_norm": 0}, ["optim.max_grad_norm must be positive"]),
        ({"optim__learning_rate": ".nan"}, ["optim.learning_rate must be positive, got nan"]),
        ({"optim__warmup_steps": -1}, ["optim.warmup_steps must not be negative"]),
        ({"optim__final_scale": 1.5}, ["optim.final_scale must be in [0, 1]"]),
        ({"optim__betas": "[0.9, 1.0]"}, ["optim.betas must be in [0, 1)"]),
        ({"rollouts__kv_cache_gib": 0}, ["rollouts.kv_cache_gib must be positive"]),
        ({"logging__trackers": "[tensorbord]"}, ["logging.trackers: 'tensorbord'", "tensorboard"]),
        (
            {"student__lora__rank": 4, "student__lora__target_modules": "[q_projj]"},
            ["student.lora.target_modules", "'q_projj'", "q_proj, "],
        ),
        ({"output_dir": "/dev/null/runs"}, ["'/dev/null' takes no files", "--output_dir"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_the_message_names_the_mistake(settings, changes, said) -> None:
    message = mistake(settings, **changes)
    for words in said:
        assert words in message


def test_exit_status_is_2_with_one_message_and_no_traceback(settings, capsys) -> None:
    assert main(as_options({**settings, "teacher.model": "/no/such/model"})) == 2
    errors = capsys.readouterr().err
    assert "error: teacher.model" in errors and "Traceback" not in errors


def test_a_tracker_that_is_not_installed_is_not_passed_over(settings, monkeypatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    assert "'wandb' is not installed" in mistake(settings, logging__trackers="[wandb]")


@pytest.mark.parametrize("program", [main, doctor])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompts.size=0"], "prompts.size must be at least 1"),
        (["--prompts.template=plain", "--prompts.chat_template=x"], "remove one of the two"),
        (["--config=CONFIG"], "prompts.size must be at least 1"),
        (["--no_such=1"], "no_such"),
    ],
)
def test_what_a_section_refuses_is_a_usage_error(options, said, program, capsys, tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("prompts:\n  size: 0\n")
    with pytest.raises(SystemExit) as stopped:
        program([option.replace("CONFIG", str(tmp_path / "c.yaml")) for option in options])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and said in errors and "Traceback" not in errors and len(errors.splitlines()) < 12


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "holds no weights"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\0" * 50), "model.safetensors' cannot be read"),
        (lambda path: truncate(path / "model.safetensors"), "model.safetensors' cannot be read"),
        (
            lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-2.bin"}}'),
            "lacks part-2.bin",
        ),
        (lambda path: (path / "tokenizer.json").unlink(), "cannot load the tokenizer"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_found_before_anything_is_sampled(
    settings, tokenizer, tmp_path, spoil, said
) -> None:
    spoil(make_model(tmp_path / "broken", tokenizer, layers=2))
    message = mistake(settings, student__model=str(tmp_path / "broken"))
    assert said in message and message.startswith("student.model: ")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_directory_without_leave_to_write_is_refused(settings, monkeypatch) -> None:
    monkeypatch.setattr("onpolicy.checks.os.access", lambda path, mode: False)
    assert "cannot be written" in mistake(settings)


def test_settings_without_effect_are_said() -> None:
    def notes(*options: str) -> list[str]:
        return ignored_settings(parse(list(options))[0])

    assert notes() == [] and notes("--student.num_layers=6") == []
    (note,) = notes("--student.model=a/b", "--student.num_layers=6", "--student.layers=[1]")
    assert "student.num_layers and student.layers" in note
    assert "freeze_embeddings" in notes("--student.lora.rank=2", "--student.freeze_embeddings=true")[0]
    assert "rank: 0" in notes("--student.lora.target_modules=[q_proj]")[0]
    assert notes("--policy_gradient.discount=1")[0].startswith("policy_gradient:")
    assert notes("--gkd.lmbda=0.5", "--algorithm=policy_gradient")[0].startswith("gkd:")


def test_a_directory_that_holds_a_run_is_refused_unless_resumed(settings, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert "--resume" in mistake(settings)
    config, _ = parse(as_options(settings))
    assert prepare(config, resume=True).directory == tmp_path / "run"


def test_resuming_with_other_settings_names_them(settings, tmp_path) -> None:
    config, _ = parse(as_options(settings))
    from onpolicy.prepare import plain

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(plain(config)))
    assert prepare(config, resume=True)
    other, _ = parse(as_options({**settings, "optim.weight_decay": 0.5, "checkpoint.every": 7}))
    with pytest.raises(ValueError, match="optim.weight_decay: 0.0 then, 0.5 now") as error:
        prepare(other, resume=True)
    assert "checkpoint" not in str(error.value)


def test_an_empty_dataset_is_named(settings, tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in mistake(settings, prompts__source=str(tmp_path / "empty.jsonl"))


def test_a_missing_chat_template_names_both_remedies(settings, teacher_dir, tmp_path) -> None:
    shutil.copytree(teacher_dir, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    message = mistake(settings, teacher__model=str(tmp_path / "base"))
    assert "prompts.chat_template" in message and "plain" in message


def test_another_tokenizer_is_refused(settings, tmp_path) -> None:
    make_model(tmp_path / "other", make_tokenizer(300))
    message = mistake(settings, student__model=str(tmp_path / "other"))
    assert "different tokenizers" in message and "leave student.model unset" in message


def test_another_chat_template_is_refused(settings, tokenizer, tmp_path) -> None:
    make_model(tmp_path / "other", tokenizer)
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert "different chat templates" in mistake(settings, student__model=str(tmp_path / "other"))


def test_padded_vocabularies_are_not_refused(settings, tokenizer, tmp_path) -> None:
    make_model(tmp_path / "padded", tokenizer, layers=2, rows=len(tokenizer) + 64)
    config, _ = parse(as_options({**settings, "student.model": str(tmp_path / "padded")}))
    assert prepare(config, resume=False).train_prompts


def test_a_vocabulary_without_a_row_for_every_token_is_refused(settings, tokenizer, tmp_path) -> None:
    make_model(tmp_path / "short", tokenizer, layers=2, rows=len(tokenizer) - 8)
    assert "a row for every token" in mistake(settings, student__model=str(tmp_path / "short"))


def test_dataset_completions_are_needed_where_they_are_used(settings, tmp_path) -> None:
    rows = [json.dumps({"prompt": f"How much is {i} and {i}?"}) for i in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    message = mistake(settings, prompts__source=str(tmp_path / "d.jsonl"), gkd__lmbda=0.5)
    assert "prompts.completion_column" in message and "gkd.lmbda" in message


def test_a_task_needs_answers(settings, tmp_path) -> None:
    rows = [json.dumps({"prompt": f"How much is {i} and {i}?"}) for i in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    changes = {"prompts__source": str(tmp_path / "d.jsonl"), "policy_gradient__task_weight": 1.0}
    message = mistake(settings, **changes, **POLICY_GRADIENT)
    assert "prompts.answer_column" in message and "32 of 32 prompts" in message
    config, _ = parse(as_options({**settings, "policy_gradient.task_weight": 1.0, **POLICY_GRADIENT}))
    assert prepare(config, resume=False).train_prompts  # the built-in problems have answers


def test_everyone_who_scores_reads_the_same_ids(settings, tokenizer, teacher_dir, tmp_path) -> None:
    """Tokens, rows and chat template of further teachers and of the reference."""
    beyond = {**POLICY_GRADIENT, "policy_gradient__extrapolation": 2}
    make_model(tmp_path / "tokens", make_tokenizer(300))
    message = mistake(settings, **beyond, policy_gradient__reference_model=str(tmp_path / "tokens"))
    assert "policy_gradient.reference_model has another tokenizer" in message
    make_model(tmp_path / "rows", tokenizer, layers=2, rows=len(tokenizer) - 8)
    message = mistake(settings, other_teachers=f'[{{"model": "{tmp_path / "rows"}"}}]')
    assert "other_teachers[0].model has 376 output rows" in message
    shutil.copytree(teacher_dir, tmp_path / "template")
    (tmp_path / "template" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    others = f'[{{"model": "{teacher_dir}"}}, {{"model": "{tmp_path / "template"}"}}]'
    assert "other_teachers[1].model has another chat template" in mistake(settings, other_teachers=others)
    (tmp_path / "template" / "chat_template.jinja").unlink()  # a base model
    config, _ = parse(as_options({**settings, "other_teachers": others}))
    assert prepare(config, resume=False).train_prompts


def test_a_full_disk_is_foreseen(tmp_path) -> None:
    from onpolicy.checks import check_disk

    check_disk(tmp_path / "run", 1)
    with pytest.raises(ValueError, match="checkpoint.keep"):
        check_disk(tmp_path / "run" / "deep", 1 << 60)
