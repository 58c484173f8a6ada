"""Tiny models with a tokenizer and a chat template, made in a second: whole runs on them take seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(vocab_size: int = 384):
    """Byte-level BPE trained on the built-in word problems."""
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from onpolicy.prompts import word_problems

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([p.question for p in islice(word_problems(0), 300)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(
    path: Path, tokenizer, *, layers: int = 4, rows: int | None = None, seed: int = 0, tied: bool = True
) -> Path:
    """A random Llama that is sure enough of itself for divergences to be far from zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory, tokenizer) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "teacher", tokenizer)


@pytest.fixture(scope="session")
def tiny_settings(teacher_dir) -> dict[str, object]:
    """Options of a whole run on the tiny teacher, a few seconds long, with the transformers sampler."""
    return {
        "teacher.model": str(teacher_dir), "teacher.dtype": "float32", "student.num_layers": 2,
        "student.precision": "float32", "rollouts.engine": "transformers", "rollouts.dtype": "float32",
        "prompts.size": 32, "prompts.heldout_size": 4, "prompts.system": "Add.", "sampling.max_tokens": 8,
        "sampling.samples_per_prompt": 2, "prompts_per_step": 2, "steps": 4, "warm_start.num_prompts": 8,
        "warm_start.rollouts_per_step": 8, "warm_start.samples_per_prompt": 2, "evaluation.num_prompts": 4,
        "evaluation.max_tokens": 8, "checkpoint.every": 2, "logging.trackers": "[]", "logging.progress": "false",
        "optim.learning_rate": 1e-3,
    }  # fmt: skip


def as_options(settings: dict[str, object]) -> list[str]:
    """{"a.b": 1} -> ["--a.b=1"]."""
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(params=(1, 2))
def one_thread_or_two(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
