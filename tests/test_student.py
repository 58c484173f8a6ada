"""Where students come from, and that what the sampler is given is what is trained."""

from __future__ import annotations

import pytest
import torch

from onpolicy.batching import pack, text_rollout
from onpolicy.config import LoraSettings, StudentConfig
from onpolicy.losses import chunked
from onpolicy.models import check_linear_head, head_weight, load_causal_lm
from onpolicy.student import build_student, check_layers, evenly_spaced, prune_layers
from onpolicy.types import Prompt


@pytest.fixture
def teacher(teacher_dir):
    return load_causal_lm(str(teacher_dir), torch.float32)


@pytest.fixture
def batch():
    return pack([text_rollout(Prompt("p", (5, 6, 7)), [8, 9, 10, 11])], 100)[0]


def logits_of_saved(directory, batch) -> torch.Tensor:
    model = load_causal_lm(str(directory), torch.float32)
    with torch.no_grad():
        return model(input_ids=batch.input_ids).logits[0, batch.predict]


def perturb(student, scale: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in student.trainable().values():
            parameter.add_(torch.randn_like(parameter) * scale)


@pytest.mark.parametrize(
    ("count", "of", "expected"), [(4, 30, [0, 10, 19, 29]), (2, 4, [0, 3]), (1, 4, [0]), (4, 4, [0, 1, 2, 3])]
)
def test_evenly_spaced_keeps_first_and_last(count, of, expected) -> None:
    assert evenly_spaced(count, of) == expected


@pytest.mark.parametrize(
    ("layers", "message"), [([0, 4], "out of range"), ([2, 1], "ascending"), ([1, 1], "distinct"), ([], "distinct")]
)
def test_bad_layers_are_named(layers, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_layers(layers, 4)
    with pytest.raises(ValueError, match="between 1 and the teacher's 4 layers"):
        evenly_spaced(5, 4)


def test_negative_layers_count_from_the_end() -> None:
    assert check_layers([0, -1], 4) == [0, 3]


def test_pruned_student_computes_the_kept_layers_only(teacher, batch) -> None:
    student = prune_layers(teacher, [0, 3])
    with torch.no_grad():
        hidden = student(input_ids=batch.input_ids).logits
        teacher.model.layers = torch.nn.ModuleList([teacher.model.layers[0], teacher.model.layers[3]])
        expected = teacher(input_ids=batch.input_ids, use_cache=False).logits
    torch.testing.assert_close(hidden, expected)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_keeping_every_layer_is_the_teacher(teacher, batch) -> None:
    student = build_student(StudentConfig(num_layers=4, precision="float32"), teacher)
    hidden, head = student(batch)
    with torch.no_grad():
        expected = teacher(input_ids=batch.input_ids).logits[0, batch.predict]
    torch.testing.assert_close((hidden @ head.T).detach(), expected, rtol=1e-4, atol=1e-4)


def test_frozen_embeddings_get_no_gradient_and_are_not_trained(teacher, batch) -> None:
    student = build_student(StudentConfig(num_layers=2, freeze_embeddings=True), teacher)
    assert not any("embed" in name or "lm_head" in name for name in student.trainable())
    hidden, head = student(batch)
    hidden.float().sum().backward()
    assert not head.requires_grad
    assert all(parameter.grad is not None for parameter in student.trainable().values())


def test_a_tied_heads_gradient_in_place_is_that_of_autograd(teacher, batch) -> None:
    """Head and embedding are one matrix: the loss adds to its .grad at once, the embedding's few rows come sparse."""

    def gradient(in_place: bool) -> torch.Tensor:
        student = build_student(StudentConfig(num_layers=2, precision="float32"), teacher)
        student.model.get_input_embeddings().sparse = in_place
        for _ in range(2):  # accumulated over micro-batches
            hidden, head = student(batch)
            flipped = hidden.detach().flip(0)
            sink = student.head_grad() if in_place else None
            chunked("reverse_kl", hidden, head, flipped, head.detach(), head_grad=sink)[0].backward()
        (weight,) = [p for name, p in student.trainable().items() if "embed" in name]
        assert not weight.grad.is_sparse
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-4, atol=1e-6)


def test_only_a_trained_head_has_a_gradient_to_add_to(teacher) -> None:
    assert build_student(StudentConfig(num_layers=2), teacher).head_grad() is not None
    assert build_student(StudentConfig(num_layers=2, freeze_embeddings=True), teacher).head_grad() is None
    adapted = StudentConfig(num_layers=2, lora=LoraSettings(rank=2, target_modules=["lm_head"]))
    assert build_student(adapted, teacher).head_grad() is None


@pytest.mark.parametrize("targets", [None, ["q_proj", "lm_head"]])
def test_lora_weights_merge_to_what_the_adapter_computes(teacher, tokenizer, batch, tmp_path, targets) -> None:
    config = StudentConfig(num_layers=2, precision="float32", lora=LoraSettings(rank=4, target_modules=targets))
    student = build_student(config, teacher)
    assert student.trainable() and all("lora_" in name for name in student.trainable())
    perturb(student)
    hidden, head = student(batch)
    adapted = (hidden @ head.T).detach()
    student.save(tmp_path / "student", tokenizer)
    torch.testing.assert_close(logits_of_saved(tmp_path / "student", batch), adapted, rtol=0.05, atol=0.05)
    assert (tmp_path / "student" / "adapter" / "adapter_config.json").exists()


def test_lora_on_the_head_reaches_loss_and_gradient(teacher, batch) -> None:
    config = StudentConfig(num_layers=2, precision="float32", lora=LoraSettings(rank=4, target_modules=["lm_head"]))
    student = build_student(config, teacher)
    perturb(student)
    head_weight(student.model).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.trainable().values())


def test_saved_student_is_the_trained_one(teacher, tokenizer, batch, tmp_path) -> None:
    student = build_student(StudentConfig(num_layers=2, precision="float32"), teacher)
    perturb(student)
    hidden, head = student(batch)
    student.save(tmp_path, tokenizer)
    torch.testing.assert_close(logits_of_saved(tmp_path, batch), (hidden @ head.T).detach(), rtol=0.05, atol=0.05)


def test_sampler_weights_are_checkpoint_names_without_a_second_head(teacher) -> None:
    student = build_student(StudentConfig(num_layers=2), teacher)
    names = [name for name, _ in student.weights()]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    adapted = build_student(StudentConfig(num_layers=2, lora=LoraSettings(rank=2)), teacher)
    assert [name for name, _ in adapted.weights()] == names


def test_a_head_that_is_no_plain_product_is_refused(teacher) -> None:
    class Capped(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 3.0 * torch.tanh(super().forward(hidden) / 3.0)

    capped = Capped(64, teacher.config.vocab_size, bias=False)
    capped.weight = teacher.lm_head.weight
    teacher.lm_head = capped
    with pytest.raises(ValueError, match="plain matrix product"):
        check_linear_head(teacher)
