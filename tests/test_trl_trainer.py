"""The TRL subclass: TRL's own numbers where the objectives coincide, ours where they differ, and what it refuses."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from onpolicy.losses import divergence
from onpolicy.prompts import word_problems
from tests.conftest import make_model

pytestmark = pytest.mark.filterwarnings("ignore:TRL currently supports vLLM", "ignore:.*pin_memory")
DOC = Path(__file__).parents[1] / "docs" / "trl.md"


@pytest.fixture(scope="module")
def ours():
    """The module under test; importing TRL takes seconds, so not while tests are collected."""
    from onpolicy import trl_trainer

    return trl_trainer


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory, tokenizer) -> Path:
    return make_model(tmp_path_factory.mktemp("trl") / "student", tokenizer, layers=2, seed=1)


@pytest.fixture
def make(student_dir, teacher_dir, tmp_path):
    """A trainer on tiny models. Plain SGD: weights then differ as the gradients do."""

    def build(cls: type, settings: dict[str, Any] | None = None, **arguments: Any):
        from datasets import Dataset
        from trl import DistillationConfig

        prompts = [{"prompt": [{"role": "user", "content": p.question}]} for p in islice(word_problems(0), 8)]
        defaults = {"bf16": False, "max_steps": 2, "learning_rate": 0.5}
        args = DistillationConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_completion_length=8, use_cpu=True, report_to=[], logging_steps=1, optim="sgd", max_grad_norm=1e9,
            save_strategy="no", disable_tqdm=True, **(defaults | (settings or {})),
        )  # fmt: skip
        data = Dataset.from_list(prompts)
        arguments = {"model": str(student_dir), "teacher_model": str(teacher_dir)} | arguments
        return cls(args=args, train_dataset=data, eval_dataset=data.select([0, 1]), **arguments)

    return build


def run(trainer) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """What two steps and an evaluation log, and the weights they leave. The weights must have moved."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    logged = {name: [step[name] for step in steps] for name in ("loss", "entropy", "grad_norm")}
    after = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(steps) == 2 and max((after[n] - before[n]).abs().max() for n in before) > 1e-3
    return logged | {"eval_loss": [trainer.evaluate()["eval_loss"]]}, after


def assert_same(first, second) -> None:
    """Float32 sums in another order differ by some units in the last place of larger terms; steps repeat that."""
    for name, values in first[0].items():
        assert second[0][name] == pytest.approx(values, rel=1e-4), name
    for name, weight in first[1].items():
        torch.testing.assert_close(second[1][name], weight, rtol=1e-5, atol=3e-6)


def eager_trainer(name: str, options: dict[str, Any], temperature: float) -> type:
    """TRL's trainer with the eager definition on whole logits: what ours must equal."""
    from trl import DistillationTrainer

    class Eager(DistillationTrainer):
        def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
            ids, mask = (torch.cat([inputs[f"prompt_{k}"], inputs[f"completion_{k}"]], 1) for k in ("ids", "mask"))
            kept, length = inputs["completion_mask"].bool(), inputs["completion_ids"].shape[1]
            student = unwrapped_student(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
            with torch.no_grad():
                teacher = self.teacher_model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
            loss, _ = divergence(
                name, student, teacher, kept, temperature=temperature, token_ids=inputs["completion_ids"],
                denominator=None if num_items_in_batch is None else float(num_items_in_batch), **options,
            )  # fmt: skip
            logs = (student.detach() / temperature).log_softmax(-1)
            entropy = -(logs.exp() * logs).sum(-1)
            return loss, entropy[kept].sum(), kept.sum()

    return Eager


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
def test_jsd_is_trls_own_loss(make, ours, beta) -> None:
    from trl import DistillationTrainer

    settings = {"beta": beta, "temperature": 0.8}
    theirs = run(make(DistillationTrainer, settings))
    assert_same(theirs, run(make(ours.OnPolicyDistillationTrainer, settings)))
    assert theirs[0]["loss"][0] > 0.01


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("skew_reverse_kl", {"skew": 0.2}),
        ("total_variation", {"top_k": 16, "support": "student"}),
        ("kd", {"alpha": 0.3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_other_divergence_is_ours(make, ours, name, options) -> None:
    settings = {"temperature": 0.8}
    expected = run(make(eager_trainer(name, options, 0.8), settings))
    trainer = make(ours.OnPolicyDistillationTrainer, settings, divergence=name, divergence_options=options)
    assert_same(expected, run(trainer))


def test_mixed_precision_is_as_close_as_bf16_allows(make, ours) -> None:
    """TRL's default. A bf16 operand is off by up to 2^-9, and both losses round at different places."""
    from trl import DistillationTrainer

    first = {}
    for cls in (DistillationTrainer, ours.OnPolicyDistillationTrainer):
        trainer = make(cls, {"bf16": True, "max_steps": 1})
        trainer.train()
        first[cls] = trainer.state.log_history[0]
    theirs, mine = first.values()
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-2) and mine["loss"] > 0.01
    assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-2)


def test_what_a_tool_said_is_not_trained_on(make, ours) -> None:
    trainer = make(ours.OnPolicyDistillationTrainer, divergence="reverse_kl")
    ids = torch.arange(20).reshape(2, 10) + 5
    ones = torch.ones(2, 4, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :6], "prompt_mask": torch.ones(2, 6, dtype=torch.int64),
        "completion_ids": ids[:, 6:], "completion_mask": ones,
    }  # fmt: skip
    tool_mask = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0]])
    loss, _, count = trainer._compute_loss(trainer.model, inputs | {"tool_mask": tool_mask}, None)
    with torch.no_grad():
        student, teacher = (m(input_ids=ids).logits[:, 5:-1] for m in (trainer.model, trainer.teacher_model))
    expected, _ = divergence("reverse_kl", student, teacher, tool_mask.bool())
    everywhere, _ = divergence("reverse_kl", student, teacher, ones.bool())
    assert count == 4 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(loss.item() - everywhere.item()) > 1e-4


def test_a_lora_student_gets_trls_gradients(make, ours) -> None:
    from peft import LoraConfig
    from trl import DistillationTrainer

    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    settings = {"beta": 0.5, "learning_rate": 10.0}
    theirs = run(make(DistillationTrainer, settings, peft_config=lora))
    assert_same(theirs, run(make(ours.OnPolicyDistillationTrainer, settings, peft_config=lora)))
    assert all("lora_" in name for name in theirs[1])


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"divergence": "wasserstein"}, "unknown divergence 'wasserstein'.*reverse_kl"),
        ({}, {"divergence": "reverse_kl", "divergence_options": {"skew": 0.1}}, "reverse_kl has no option skew"),
        ({}, {"divergence": "skew_reverse_kl", "divergence_options": {"skew": 1.5}}, "skew must lie in"),
        ({}, {"divergence": "reverse_kl", "divergence_options": {"top_k": 0}}, "top_k must be at least 1"),
        ({}, {"divergence": "reverse_kl", "divergence_options": {"support": "student"}}, "no effect without"),
        ({}, {"divergence": "reverse_kl", "divergence_options": {"support": "both", "top_k": 2}}, "support must be"),
        ({}, {"divergence": "reverse_kl", "divergence_options": {"temperature": 2.0}}, "no option temperature"),
        ({"beta": 0.5}, {"divergence": "reverse_kl"}, "args.beta=0.5 has no effect"),
        ({"beta": 0.5}, {"divergence_options": {"beta": 0.1}}, "set one of them"),
        ({}, {"teacher_model": None}, "teacher_model is missing.*server"),
        ({"use_liger_kernel": True}, {}, "use_liger_kernel"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_a_model_is_loaded(make, ours, settings, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(ours.OnPolicyDistillationTrainer, settings, **({"model": "no/such-model"} | arguments))


def test_beta_in_the_options_is_the_same_as_in_args(ours) -> None:
    from trl import DistillationConfig

    given = ours.check_divergence("jsd", {"beta": 0.25, "top_k": 3}, DistillationConfig(bf16=False))
    assert given == {"beta": 0.25, "top_k": 3}
    assert ours.check_divergence("jsd", {}, DistillationConfig(bf16=False, beta=0.25)) == {"beta": 0.25}
    assert ours.check_divergence("jsd", {}, DistillationConfig(bf16=False)) == {"beta": 1.0}


@pytest.mark.parametrize(
    ("family", "extra", "plain"),
    [
        ("Llama", {}, True),
        ("Phi", {}, True),  # a head with bias
        ("Granite", {"logits_scaling": 4.0}, False),
        ("Gemma2", {"final_logit_softcapping": 30.0, "head_dim": 16}, False),
    ],
)
def test_only_plain_heads_are_taken(ours, family, extra, plain) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None, **extra,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5)
    if plain:
        ours.check_plain_head("student", model)
    else:
        with pytest.raises(ValueError, match=f"student, a {family}ForCausalLM.*plain matrix product"):
            ours.check_plain_head("student", model)
    assert model.training


def test_a_trl_without_the_hook_is_refused(ours, monkeypatch) -> None:
    """TRL renames a private method: training would go on with TRL's loss."""
    monkeypatch.setattr(ours.DistillationTrainer, "_compute_loss", lambda self, model, batch: None)
    with pytest.raises(ImportError, match="no _compute_loss.*install trl 1.16"):
        ours._check_trl()


def test_the_documented_script_runs(student_dir, teacher_dir, tmp_path, monkeypatch) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    tiny = 'bf16=False, use_cpu=True, report_to=[], max_steps=1, per_device_train_batch_size=2, save_strategy="no", '
    for old, new in {
        '"Qwen/Qwen3-0.6B"': repr(str(student_dir)),
        '"Qwen/Qwen3-4B"': repr(str(teacher_dir)),
        "max_steps=100, max_completion_length=96": tiny + "max_completion_length=4, disable_tqdm=True",
    }.items():
        assert old in script
        script = script.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(script, str(DOC), "exec"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 1 and trainer.divergence_options == {"skew": 0.1}
