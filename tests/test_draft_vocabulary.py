"""The draft's reduced vocabulary: which tokens are kept, what it covers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from spec.drafters.vocabulary import FILE, DraftVocabulary, always_kept, choose, count_tokens, main, token_rows
from tests.conftest import make_model

counts_ = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(lambda counts: np.array(counts, dtype=np.int64))


@given(counts_, st.data())
def test_no_set_of_its_size_covers_more(counts: np.ndarray, data: st.DataObject) -> None:
    always = data.draw(st.sets(st.integers(0, len(counts) - 1), max_size=3))
    size = data.draw(st.integers(max(len(always), 1), len(counts)))
    chosen = choose(counts, size=size, always=always)
    kept = set(chosen.ids.tolist())
    assert always <= kept and len(chosen) == size and chosen.ids.tolist() == sorted(kept)
    free, left = kept - always, set(range(len(counts))) - kept
    if free and left:  # every free choice comes up more often than what is left out, or as often with a lower id
        rank = {token: (-counts[token], token) for token in range(len(counts))}
        assert max(rank[token] for token in free) < min(rank[token] for token in left)
    if counts.sum():
        assert chosen.mass == pytest.approx(sum(counts[list(kept)]) / counts.sum())


@given(counts_.filter(lambda counts: counts.sum() > 0), st.floats(0.01, 1))
def test_the_fewest_tokens_cover_a_mass(counts: np.ndarray, mass: float) -> None:
    chosen = choose(counts, mass=mass)
    assert chosen.mass >= mass - 1e-12
    fewer = np.sort(counts)[::-1][: len(chosen) - 1].sum()
    assert fewer / counts.sum() < mass
    assert set(choose(counts, mass=mass, always=[0]).ids) == {0, *chosen.ids}


def test_saved_and_loaded_alike(tmp_path: Path) -> None:
    assert DraftVocabulary.load(tmp_path) is None
    chosen = choose(np.array([0, 5, 1, 5, 0, 9]), size=3, always=[4])
    assert chosen.ids.tolist() == [1, 4, 5]
    assert chosen.save(tmp_path) == tmp_path / FILE
    again = DraftVocabulary.load(tmp_path, vocab_size=6)
    assert again is not None and again.ids.dtype == np.int64
    assert (again.ids.tolist(), again.vocab_size, again.mass) == ([1, 4, 5], 6, 14 / 20)
    assert list(tmp_path.rglob("*.*")) == [tmp_path / FILE]  # and nothing beside the weights, where vLLM would read it
    with pytest.raises(ValueError, match="the model has 7: choose it again"):
        DraftVocabulary.load(tmp_path, vocab_size=7)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    header = {"vocab_size": "9", "mass": "1.0"}
    (tmp_path / FILE).parent.mkdir()
    for tensors, metadata, problem in (
        ({"ids": np.array([1, 2])}, None, "is not a draft vocabulary"),
        ({"other": np.array([1, 2])}, header, "is not a draft vocabulary"),
        ({"ids": np.array([2, 1])}, header, "ascend"),
        ({"ids": np.array([1, 1])}, header, "ascend"),
        ({"ids": np.array([1, 9])}, header, "token 9, outside"),
        ({"ids": np.array([-1, 2])}, header, "token -1, outside"),
        ({"ids": np.array([1.0])}, header, "int64"),
    ):
        save_file(tensors, tmp_path / FILE, metadata)
        with pytest.raises(ValueError, match=problem):
            DraftVocabulary.load(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ValueError, match="remove it, or choose it again"):
        DraftVocabulary.load(tmp_path)


def test_ids_and_text_are_counted_alike(tmp_path: Path, tokenizer: Any) -> None:
    text = "How many apples are left?"
    ids = tokenizer(text)["input_ids"]
    path = tmp_path / "data.jsonl"
    records = [{"completion_ids": ids, "text": "not this"}, {"input_ids": ids}, {"text": text}, {"completion": text}]
    path.write_text("\n\n".join(map(json.dumps, records)))
    counts = count_tokens(token_rows(path, tokenizer), len(tokenizer))
    assert counts.tolist() == (4 * np.bincount(ids, minlength=len(tokenizer))).tolist()
    with pytest.raises(ValueError, match="line 5 is text .'text'.: pass the tokenizer"):
        list(token_rows(path))
    with pytest.raises(ValueError, match="is outside the vocabulary of 9"):
        count_tokens([[3], [9]], 9)
    for line in ("{}", "[1, 2]"):
        path.write_text(line)
        with pytest.raises(ValueError, match="line 1 has none of completion_ids"):
            list(token_rows(path))
    path.write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        list(token_rows(path))


def test_built_beside_a_student_with_everything_that_ends_a_text(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture
) -> None:
    student = make_model(tmp_path / "student", tokenizer, layers=1, rows=400)
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"completion_ids": [300, 300, 301, 5]}))
    main(student, [samples, samples], size=7)
    chosen = DraftVocabulary.load(student, vocab_size=400)
    assert chosen is not None
    special = set(always_kept(tokenizer))
    assert special == {0, 1, 2}
    assert set(chosen.ids.tolist()) == {0, 1, 2, 77, 5, 300, 301}
    assert "7 of 400 tokens, 100.00% of those counted" in capsys.readouterr().out


def test_mistakes_name_their_remedy() -> None:
    counts = np.array([3, 1, 0])
    for size, mass, always, remedy in (
        (None, None, (), "pass either size or mass"),
        (2, 0.5, (), "pass either size or mass"),
        (4, None, (), "to 3 .all."),
        (1, None, (0, 1), "from 2 .always kept."),
        (None, 1.5, (), "a share in"),
        (2, None, (7,), "outside the vocabulary of 3"),
    ):
        with pytest.raises(ValueError, match=remedy):
            choose(counts, size=size, mass=mass, always=always)
    with pytest.raises(ValueError, match="some text"):
        choose(np.zeros(3, dtype=np.int64), mass=0.9)
