"""The command line: what it prints is what the engine did, and mistakes end with one line that helps."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spec.engine import Engine
from spec.generate import main, make_parser, prepare
from spec.models.linear import _Int4, _Int8
from spec.models.transformers_model import TransformersModel
from spec.params import Params
from spec.request import Request
from tests.conftest import make_model

PROMPT = "Tom has 3 apples and buys 4 more."


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("generate")
    return make_model(folder / "target", tokenizer), make_model(folder / "draft", tokenizer, layers=2, seed=1)


def generate(capsys, *arguments: object) -> dict:
    assert main([str(argument) for argument in (*arguments, "--dtype", "float32")]) == 0
    return json.loads(capsys.readouterr().out)


def test_plain_and_speculative_text(models, tokenizer, capsys) -> None:
    """Greedy: one text by every route, and the one transformers' own generate gives for the chat template's ids."""
    target, draft = models
    common = ("--target", target, "--prompt", PROMPT, "--temperature", 0, "--max-tokens", 20, "--json")
    plain = generate(capsys, *common)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    expected = TransformersModel.load(target).model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert plain["token_ids"] == expected.tolist()
    assert plain["figures"]["prompt_tokens"] == ids.shape[1] and plain["figures"]["from_draft"] == 0
    for extra in (
        ("--draft", target),
        ("--draft", draft, "--mode", "token"),
        ("--draft", "ngram"),
        ("--draft", "suffix"),
    ):
        quick = generate(capsys, *common, *extra)
        assert (quick["token_ids"], quick["text"]) == (plain["token_ids"], plain["text"])
    perfect = generate(capsys, *common, "--draft", target, "--draft-length", 3)
    steps = len(plain["token_ids"]) / 4
    assert perfect["figures"]["target_steps"] == -(-len(plain["token_ids"]) // 4)
    assert perfect["figures"]["tokens_per_target_step"] == pytest.approx(4, abs=4 / steps)
    assert perfect["figures"]["accepted_by_position"] == [1.0] * 3 and set(perfect["from_draft"]) == {True, False}


def test_options_reach_the_engine(models, tokenizer, capsys) -> None:
    target, _ = models
    given = generate(
        capsys, "--target", target, "--prompt", PROMPT, "--raw", "--temperature", 0.8, "--top-k", 20, "--top-p", 0.9,
        "--min-p", 0.01, "--repetition-penalty", 1.2, "--seed", 7, "--max-tokens", 12, "--stop", "zzzz", "--json",
    )  # fmt: skip
    params = Params(0.8, 20, 0.9, 0.01, repetition_penalty=1.2, seed=7)
    engine = Engine(TransformersModel.load(target), tokenizer=tokenizer)
    request = Request(tokenizer(PROMPT)["input_ids"], params, 12, ("zzzz",))
    assert given["token_ids"] == engine.generate([request])[0].completions[0].token_ids


SEEN = {  # of an engine, and what it is by default and with the option
    "--mode token": (lambda engine: engine.mode, "block", "token"),
    "--drafting greedy": (lambda engine: engine.drafter._greedy, False, True),
    "--quantization int8": (lambda engine: isinstance(engine.target._head, _Int8), False, True),
    "--draft-quantization int4": (lambda engine: isinstance(engine.drafter.model._head, _Int4), False, True),
}


@pytest.mark.parametrize(("option", "seen"), SEEN.items(), ids=SEEN)
def test_options_of_models_drafts_and_verification_reach_the_engine(option: str, seen, models) -> None:
    look, default, changed = seen
    given = ["--target", str(models[0]), "--draft", str(models[1]), "--prompt", PROMPT, "--device", "cpu"]
    for arguments, expected in ((given, default), ([*given, *option.split()], changed)):
        engine, _ = prepare(make_parser().parse_args(arguments))
        assert look(engine) == expected


def test_text_in_two_colours_and_a_line_of_figures(models, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    target, _ = models
    arguments = ("--target", target, "--draft", target, "--prompt", PROMPT, "--max-tokens", 30, "--draft-length", 2)
    assert main([str(argument) for argument in arguments]) == 0
    shown, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    assert "\x1b[32m" in shown and "\x1b[36m" in shown
    assert "\x1b[32m20 tokens from the draft" in line and "\x1b[36m10 tokens by the target" in line
    assert "3.00 a target step" in line and "accepted by position 100% 100%" in line and "ended by length" in line


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--temperature", "-1"), "temperature=-1.0: must be finite and at least 0; use 0 for greedy"),
        (("--top-p", "0"), "top_p=0.0: must be in (0, 1]"),
        (("--draft-length", "-2"), "draft length -2: must be at least 0; use 0 for plain decoding"),
        (("--draft-length", "many"), "give a number (0 for plain decoding) or auto"),
        (("--draft", "no-such-draft"), "unknown draft 'no-such-draft': there is no such directory"),
        (("--draft", "EMPTY"), "has no config.json"),
        (("--draft", "OTHER"), "draft and target have different tokenizers"),
        (("--prompt", "", "--raw"), "the prompt is empty"),
        (("--prompt", "word " * 600), "shorten it"),
        (("--max-tokens", "0"), "max_tokens=0: must be at least 1"),
    ),
    ids=lambda value: "-".join(value)[:24] if isinstance(value, tuple) else "",
)
def test_mistakes_end_with_status_2_and_one_line(options, message, models, tmp_path, tokenizer, capsys) -> None:
    target, _ = models
    if "OTHER" in options:
        vocabulary = {f"<{token}>": id for token, id in tokenizer.get_vocab().items()}
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary)), eos_token="<<|im_end|>>")
        make_model(tmp_path / "other", other, layers=1)
    named = {"EMPTY": str(tmp_path), "OTHER": str(tmp_path / "other")}
    arguments = [named.get(option, option) for option in options]
    assert main(["--target", str(target), "--prompt", "x", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err and captured.out == ""


def test_help_is_quick() -> None:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "spec.generate", "--help"], capture_output=True, text=True, check=True)
    assert "--draft-length" in done.stdout
    imports = "import sys, spec.generate; assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", imports], check=True)
    assert time.perf_counter() - begin < 10  # loose: what makes it quick is checked above
