"""The model card of a student: what the hub reads, what a person reads, and snippets that run."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from onpolicy.config import TeacherConfig, TrainConfig
from onpolicy.evaluate import provenance
from onpolicy.evaluate.card import write_model_card
from onpolicy.evaluate.provenance import Origin, front_matter, num_parameters, origin_of
from onpolicy.evaluate.usage import code

SUMMARY: dict[str, Any] = {
    "heldout": {
        "start": {"reverse_kl": 8.0, "acceptance_t1": 0.001, "perplexity": 900.0, "reverse_kl_on_student": 9.0},
        "end": {"reverse_kl": 0.75, "acceptance_t1": 0.4712, "perplexity": 4.2, "reverse_kl_on_student": 0.5},
    }
}


@pytest.fixture(autouse=True)
def converted_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default teacher as its cache would hold it, without its weights."""
    fake = tmp_path / "cache"
    fake.mkdir()
    (fake / "config.json").write_text(json.dumps({"num_hidden_layers": 30}))
    monkeypatch.setattr(provenance, "default_teacher", lambda: fake)


def card(tmp_path: Path, config: TrainConfig, summary: dict[str, Any] | None = None) -> str:
    student = tmp_path / "student"
    student.mkdir(exist_ok=True)
    write_model_card(student, config, SUMMARY if summary is None else summary)
    return (student / "README.md").read_text()


def local_model(tmp_path: Path, name: str, files: dict[str, str]) -> str:
    directory = tmp_path / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": 6}))
    for file, text in files.items():
        (directory / file).write_text(text)
    return str(directory)


def test_front_matter_of_the_default_run(tmp_path: Path) -> None:
    assert front_matter(card(tmp_path, TrainConfig())) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["on-policy-distillation", "speculative-decoding"],
    }


def test_the_hub_library_reads_the_front_matter(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(card(tmp_path, TrainConfig())).data.to_dict()
    assert (data["license"], data["base_model"]) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_held_out_table(tmp_path: Path) -> None:
    text = card(tmp_path, TrainConfig())
    assert "acceptance at T=1 rose from 0.001 to 0.471 and reverse KL fell from 8.000 to 0.750 nats per token" in text
    assert [line for line in text.splitlines() if line.startswith("| Reverse KL")] == [
        "| Reverse KL | 8.000 | 0.750 |",
        "| Reverse KL | 9.000 | 0.500 |",
    ]
    assert text.count("| Forward KL | – | – |") == 2
    assert "On up to 32 held-out prompts, completions of up to 96 tokens" in text


def test_without_evaluation_the_card_says_so(tmp_path: Path) -> None:
    text = card(tmp_path, TrainConfig(), {})
    assert "## Held-out figures\n\nNot measured." in text and "No held-out figures were measured." in text


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: llama3.2\n---\n# x"}, "llama3.2"),
        (
            {"README.md": "# no front matter", "LICENSE": "   Apache License\n   Version 2.0, January 2004"},
            "apache-2.0",
        ),
        ({"LICENSE.txt": "MIT License\n\nCopyright"}, "mit"),
        ({"README.md": "---\nlicense: [broken\n---\n"}, "unknown"),
        ({"LICENSE": "Do what we say."}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_licence_of_a_local_teacher(tmp_path: Path, files: dict[str, str], licence: str) -> None:
    config = TrainConfig()
    config.teacher.model = local_model(tmp_path, "my-teacher", files)
    text = card(tmp_path, config)
    assert front_matter(text)["license"] == licence
    assert front_matter(text)["base_model"] == "my-teacher"
    assert ("unknown: check before publishing" in text) == (licence == "unknown")
    assert str(tmp_path) not in text  # a card is published: no path of this machine in it


def test_a_hub_teacher_that_is_not_cached_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: None)
    assert origin_of("some/where") == Origin("some/where", "unknown", True)


def test_a_hub_teacher_has_the_licence_of_its_cached_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: str(tmp_path / name))
    assert origin_of("some/where").licence == "gemma"


def test_a_student_with_another_licence_than_its_teacher(tmp_path: Path) -> None:
    config = TrainConfig()
    config.student.model = local_model(tmp_path, "small", {"README.md": "---\nlicense: mit\n---\n"})
    text = card(tmp_path, config)
    assert (front_matter(text)["license"], front_matter(text)["base_model"]) == ("other", "small")
    assert "licence: apache-2.0" in text and "licence: mit" in text and "The two licences differ" in text
    assert "- Start: `small`." in text


def test_how_it_was_made(tmp_path: Path) -> None:
    config = TrainConfig(steps=20, seed=7)
    config.warm_start.num_prompts, config.warm_start.epochs = 256, 2
    config.student.freeze_embeddings = True
    text = card(tmp_path, config)
    assert "pruned in depth to 4 of its 30 layers: 0, 10, 19, 29 (counted from 0)" in text
    assert "Embedding and output matrices were left as they are." in text
    assert "Warm start: `forward_kl` on the teacher's own completions, 256 prompts × 4, 2 epochs, learning rate" in text
    assert "On-policy: 20 steps of 8 prompts × 4 completions of up to 96 tokens, sampled at temperature 1;" in text
    assert "GKD, full-vocabulary `jsd` with β = 1, which is reverse KL." in text and "- Seed 7." in text
    assert "built-in generator (`word_problems`, seed 0); no outside data" in text
    assert "Completions were sampled from the models themselves." in text


def test_other_ways_to_make_one(tmp_path: Path) -> None:
    config = TrainConfig(algorithm="policy_gradient", steps=1)
    config.student.layers, config.student.lora.rank = [0, -1], 8
    config.sampling.top_p, config.sampling.top_k = 0.9, 40
    text = card(tmp_path, config)
    assert "2 of its 30 layers: 0, 29 (counted from 0)" in text
    assert "LoRA adapter of rank 8, alpha 16, on every linear layer but the head" in text
    assert "policy gradient with the per-token reward log π_T − log π_S (k1 in the reward, discount 0" in text
    assert "On-policy: 1 step of" in text and "temperature 1, top-p 0.9, top-k 40;" in text
    assert "Warm start" not in text


def test_a_warm_start_alone_is_not_called_on_policy(tmp_path: Path) -> None:
    config = TrainConfig(steps=0)
    config.warm_start.num_prompts = 8
    text = card(tmp_path, config)
    assert "trained on completions its teacher sampled" in text
    assert "On-policy:" not in text and "Update:" not in text


def test_data_sources_are_named(tmp_path: Path) -> None:
    from onpolicy.prompts.config import PromptsConfig, WeightedSource

    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    mixture = [WeightedSource("openai/gsm8k", subset="main", weight=3.0), WeightedSource(str(rows))]
    prompts = PromptsConfig(mixture=mixture, size=100, heldout_source="openai/gsm8k", heldout_split="test")
    config = TrainConfig(prompts=prompts)
    config.gkd.lmbda = 0.5
    text = card(tmp_path, config)
    assert "Training prompts: `openai/gsm8k`, subset `main` (weight 3)." in text
    assert "Training prompts: `rows.jsonl` (local) (weight 1)." in text
    assert "Held-out prompts: up to 256, `openai/gsm8k`, split `test`; none of them was trained on." in text
    assert "or came with the data" in text and "no outside data" not in text


def test_versions_are_those_installed(tmp_path: Path) -> None:
    text = card(tmp_path, TrainConfig())
    for package in ("torch", "transformers"):
        assert f"| {package} | {importlib.metadata.version(package)} |" in text


def test_a_missing_package_is_named_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    found = provenance.versions()
    assert found["vllm"] == "not installed" and found["onpolicy"] == "from a source checkout"


def test_same_input_same_card(tmp_path: Path) -> None:
    assert card(tmp_path, TrainConfig()) == card(tmp_path, TrainConfig())
    assert [p.name for p in (tmp_path / "student").iterdir()] == ["README.md"]


def test_awkward_names_do_not_break_out(tmp_path: Path) -> None:
    assert code("a`b``c\nd") == "``` a`b``c d ```"
    text = card(tmp_path, TrainConfig(name="x\n## y"))
    assert "# x ## y\n" in text and "\n## y" not in text


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)


def test_the_vllm_snippet_names_teacher_and_draft(tmp_path: Path) -> None:
    call = next(
        node for node in ast.walk(ast.parse(snippets(card(tmp_path, TrainConfig()))[1]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "LLM"
    )  # fmt: skip
    values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert values["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert values["speculative_config"]["model"] == "./student"
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(vllm.origin).parent / "config" / "speculative.py").read_text()  # read: importing it takes seconds
    (options,) = [c for c in ast.parse(source).body if isinstance(c, ast.ClassDef) and c.name == "SpeculativeConfig"]
    known = {f.target.id for f in options.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}
    assert values["speculative_config"].keys() <= known


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_transformers_snippet_runs(
    tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = save_tiny_student(tmp_path / "student")
    config = TrainConfig()
    config.prompts.template = template  # type: ignore[assignment]
    text = card(tmp_path, config)
    assert num_parameters(tmp_path / "student") == size == 2704
    assert "A student (0.003 million parameters) of" in text
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(snippets(text)[0], "card", "exec"), {})
    assert set(capsys.readouterr().out.split()) <= {"a", "b", "c", "d"}


def save_tiny_student(directory: Path) -> int:
    """Returns its number of parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3, "[UNK]": 4, "[EOS]": 5}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[EOS]")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=5, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def test_everyone_who_taught_is_named(tmp_path: Path) -> None:
    config = TrainConfig(algorithm="policy_gradient")
    config.other_teachers = [TeacherConfig(local_model(tmp_path, "second", {"LICENSE": "MIT License"}), weight=0.5)]
    config.policy_gradient.extrapolation, config.policy_gradient.reference_model = (
        1.5,
        local_model(tmp_path, "base", {}),
    )
    config.policy_gradient.task_weight = 2.0
    text = card(tmp_path, config)
    assert "Further teachers (the first has weight 1): `second` (a local checkpoint), licence: mit, weight 0.5." in text
    assert "closed-form control variate, extrapolated 1.5 times from `base`, right answers rewarded with 2" in text
