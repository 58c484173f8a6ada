"""Prompts: sources, columns, held-out split, templating and order."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onpolicy.prompts import (
    PromptOrder,
    PromptsConfig,
    WeightedSource,
    check_answer,
    check_source,
    encode_completion,
    end_of_turn_id,
    load_prompts,
    render,
)
from onpolicy.prompts.answers import normalise
from onpolicy.prompts.load import load_examples
from onpolicy.types import Prompt

# Inserts a default system message, as SmolLM2's template does, and ends turns with a token that is not eos.
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|system|>be helpful<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER = [{"role": "user", "content": "How many figs?"}]


def make_tokenizer(chat_template: str | None = TEMPLATE):
    """Byte-level, so that every text survives a round trip; adds a bos token by itself, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(specials + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=specials[2:]
    )
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(count: int, start: int = 0) -> list[dict]:
    return [
        {"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}
        for n in range(start, start + count)
    ]


def texts(examples) -> list[str]:
    return [example.messages[-1]["content"] for example in examples]


# ---------------------------------------------------------------- templating


def test_render_is_the_chat_template_with_its_generation_prompt(tokenizer):
    ids = render(tokenizer, USER)
    assert tokenizer.decode(ids) == "<s><|system|>be helpful<|end|><|user|>How many figs?<|end|>\n<|assistant|>"
    assert ids == tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.apply_chat_template(USER, add_generation_prompt=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1  # the template writes it; the tokenizer must not add a second


def test_completion_ends_with_the_templates_end_of_turn(tokenizer):
    end = end_of_turn_id(tokenizer)
    assert end == tokenizer.convert_tokens_to_ids("<|end|>") != tokenizer.eos_token_id
    ids = encode_completion(tokenizer, " Two figs.\n", end)
    assert tokenizer.decode(ids) == "Two figs.<|end|>"
    assert (
        end_of_turn_id(make_tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}"))
        == tokenizer.eos_token_id
    )


def test_plain_template_feeds_the_text_as_it_is():
    base = make_tokenizer(chat_template=None)
    ids = render(base, [{"role": "system", "content": "Count."}, *USER], "plain")
    assert base.decode(ids) == "<s>Count.\n\nHow many figs?"
    assert base.decode(encode_completion(base, " Two", end_of_turn_id(base, "plain"), "plain")) == " Two</s>"


def test_missing_chat_template_names_the_remedy():
    with pytest.raises(ValueError, match=r"no chat template.*prompts\.chat_template.*plain"):
        load_prompts(PromptsConfig(size=2, heldout_size=0), make_tokenizer(chat_template=None))


def test_chat_template_file_replaces_the_tokenizers(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    own = make_tokenizer()
    train, _ = load_prompts(PromptsConfig(size=1, heldout_size=0, chat_template=str(file)), own)
    assert own.decode(train[0].token_ids).startswith("[") and own.decode(train[0].token_ids).endswith("]")
    with pytest.raises(FileNotFoundError, match=r"prompts.chat_template.*missing\.jinja"):
        check_source(PromptsConfig(chat_template=str(tmp_path / "missing.jinja")))


@pytest.mark.parametrize("broken", ["{{ raise_exception('System role not supported') }}", "{% for %}"])
def test_template_that_fails_names_roles_and_remedy(broken):
    with pytest.raises(ValueError, match=r"roles \['system', 'user'\].*prompts.system"):
        render(make_tokenizer(broken), [{"role": "system", "content": "x"}, *USER])


def test_system_message_goes_before_prompts_that_have_none(tmp_path, tokenizer):
    own = {"messages": [{"role": "system", "content": "OWN"}, *USER]}
    source = write_jsonl(tmp_path / "a.jsonl", [own, {"messages": [{"role": "user", "content": "And pears?"}]}])
    train, _ = load_prompts(PromptsConfig(source=source, heldout_size=0, system="BRIEF"), tokenizer)
    shown = [tokenizer.decode(prompt.token_ids) for prompt in train]
    assert shown[0].startswith("<s><|system|>OWN<|end|>\n<|user|>") and "BRIEF" not in shown[0]
    assert shown[1].startswith("<s><|system|>BRIEF<|end|>\n<|user|>And pears?")


# ------------------------------------------------------------------- columns

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A1"}, {"role": "user", "content": "R"}]


@pytest.mark.parametrize(
    ("row", "settings", "messages", "completion", "answer"),
    [
        ({"question": "Q", "answer": "so\n#### 1,042"}, {}, ["Q"], "so\n#### 1,042", "1042"),
        ({"question": "Q", "answer": 42}, {}, ["Q"], "42", "42"),
        ({"question": "Q", "answer": "blue "}, {}, ["Q"], "blue ", "blue"),
        ({"prompt": "Q"}, {}, ["Q"], None, None),
        ({"prompt": "Q", "completion": "C", "answer": "7"}, {}, ["Q"], "C", "7"),
        ({"prompt": CHAT[:1], "completion": [CHAT[1]]}, {}, ["Q"], "A1", None),
        ({"prompt": "Q", "messages": CHAT[:2]}, {}, ["Q"], "A1", None),
        ({"messages": CHAT}, {}, ["Q", "A1", "R"], None, None),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "#### 3"}]},
         {}, ["Q"], "#### 3", "3"),
        ({"turns": ["Q", "later"], "category": "x"}, {}, ["Q"], None, None),
        ({"text": "T", "question": "Q"}, {}, ["Q"], None, None),
        ({"ask": "Q", "say": "C", "gold": "9", "text": "T"},
         {"prompt_column": "ask", "completion_column": "say", "answer_column": "gold"}, ["Q"], "C", "9"),
        ({"chat": CHAT[:2], "prompt": "P"}, {"messages_column": "chat"}, ["Q"], "A1", None),
        ({"messages": CHAT, "text": "T"}, {"prompt_column": "text"}, ["T"], None, None),
    ],
)  # fmt: skip
def test_columns_are_found_or_named(tmp_path, row, settings, messages, completion, answer):
    source = write_jsonl(tmp_path / "rows.jsonl", [row])
    (example,), _ = load_examples(PromptsConfig(source=source, heldout_size=0, **settings))
    assert [message["content"] for message in example.messages] == messages
    assert [message["role"] for message in example.messages][-1] == "user"
    assert (example.completion, example.answer) == (completion, answer)


@pytest.mark.parametrize(
    ("rows", "settings", "error"),
    [
        ([{"body": "x", "label": 1}], {}, "it has body, label, and none.*prompts.prompt_column"),
        ([{"prompt": "x", "question": "y"}], {}, r"several could be the prompt \(prompt, question\)"),
        ([{"prompt": "x"}], {"answer_column": "gold"}, r"no column 'gold' \(prompts.answer_column\); it has prompt"),
        ([{"prompt": "x"}, {"prompt": None}], {}, r"rows.jsonl row 2: column 'prompt' must hold text.*None"),
        ([{"prompt": "  "}], {}, "rows.jsonl row 1.*must hold text"),
        ([{"messages": "x"}], {}, "rows.jsonl row 1.*must hold a list of messages, found 'x'"),
        ([{"messages": [{"role": "user"}]}], {}, "row 1: a message needs a role and a text content"),
        ([{"messages": CHAT[1:2]}], {}, "row 1.*has no user message"),
        ([{"prompt": CHAT[:2]}], {}, "ends with an assistant message; name the column in prompts.messages_column"),
        ([{"prompt": "x", "answer": {"a": 1}}], {}, "row 1: column 'answer' must hold text or a number"),
    ],
)
def test_unusable_columns_are_named(tmp_path, rows, settings, error):
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=error):
        check_source(PromptsConfig(source=source, heldout_size=0, **settings))


# ------------------------------------------------------------------- sources


@pytest.fixture
def no_hub(monkeypatch):
    import datasets

    def refuse(*arguments, **options):
        raise AssertionError("a local source must not be looked up on a hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def test_every_local_format_gives_the_same_examples(tmp_path, no_hub):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = questions(5)
    sources = [write_jsonl(tmp_path / "a.jsonl", rows)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hub/data/train-00000-of-00001.parquet")
    write_jsonl(tmp_path / "hub/data/test-00000-of-00001.jsonl", questions(3, start=50))
    sources += [str(tmp_path / name) for name in ("a.json", "a.parquet", "saved", "dict", "hub")]
    for source in sources:
        train, _ = load_examples(PromptsConfig(source=source, heldout_size=0))
        assert texts(train) == [row["question"] for row in rows], source
        assert [example.answer for example in train] == ["1", "2", "3", "4", "5"], source
    train, heldout = load_examples(PromptsConfig(source=str(tmp_path / "hub"), heldout_split="test", heldout_size=2))
    assert len(train) == 5 and set(texts(heldout)) < {row["question"] for row in questions(3, start=50)}


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("missing.jsonl", None, FileNotFoundError, r"there is no file or folder .*missing\.jsonl"),
        ("some/where/else", None, FileNotFoundError, "there is no file or folder"),
        ("empty.jsonl", "", ValueError, "has no rows"),
        ("empty.json", "[]", ValueError, "has no rows"),
        ("one.json", '{"prompt": "x"}', ValueError, "must hold a list of objects, found dict"),
        ("bad.jsonl", '{"prompt": "x"}\n{"prompt"\n', ValueError, "bad.jsonl line 2 is not valid JSON"),
        ("bare.jsonl", '"x"\n', ValueError, "line 1 must be an object with named columns, found str"),
        ("bad.parquet", "PAR?", ValueError, "is not a readable parquet file"),
        ("rows.csv", "prompt\nx\n", ValueError, r"cannot read \.csv; use one of \.jsonl, \.json, \.parquet"),
        ("folder/readme.md", "x", FileNotFoundError, r"holds no \.jsonl"),
        ("folder/test.jsonl", '{"prompt": "x"}', ValueError, r"no files of split 'train' \(found test.jsonl\)"),
    ],
)
def test_bad_sources(tmp_path, no_hub, name, content, error, match):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    source = path.parent if name.startswith("folder/") else path
    with pytest.raises(error, match=match):
        check_source(PromptsConfig(source=str(source), heldout_size=0))


@pytest.mark.parametrize(
    ("failure", "error", "match"),
    [
        (
            ConnectionError("offline"),
            FileNotFoundError,
            r"'gsm9k' \(main\), which is no local path.*offline.*connection",
        ),
        (
            ValueError("Unknown split"),
            ValueError,
            "cannot read split 'train' of 'gsm9k'.*Unknown split.*Set prompts.subset",
        ),
    ],
)
def test_hub_failures_are_the_users_errors(monkeypatch, failure, error, match):
    import datasets

    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(error, match=match):
        check_source(PromptsConfig(source="gsm9k", subset="main"))


def test_hub_dataset_is_asked_for_with_subset_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(questions(4, start=0 if split == "train" else 2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = PromptsConfig(source="openai/gsm8k", subset="main", heldout_split="test", heldout_size=4)
    train, heldout = load_examples(config)
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert texts(train) == ["What is 0 plus 1?", "What is 1 plus 1?"]  # the two others are held out
    assert len(heldout) == 4


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"size": 0}, "prompts.size must be at least 1"),
        ({"heldout_size": -1}, "prompts.heldout_size must be 0 or more"),
        ({"max_prompt_tokens": 0}, "prompts.max_prompt_tokens must be at least 1"),
        ({"source": " "}, "prompts.source is empty"),
        ({"messages_column": "a", "prompt_column": "b"}, "exclude each other"),
        ({"template": "plain", "chat_template": "x"}, "no effect with template: plain"),
        ({"heldout_subset": "x"}, "needs prompts.heldout_source"),
        ({"mixture": [WeightedSource()]}, "needs prompts.size"),
        ({"mixture": [WeightedSource()], "size": 2, "split": "x"}, "prompts.mixture replaces prompts.source"),
    ],
)
def test_contradictory_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        PromptsConfig(**settings)


def test_settings_parse_from_a_command_line():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--prompts", type=PromptsConfig)
    arguments = [
        "--prompts.size=10",
        '--prompts.mixture=[{"source": "a.jsonl", "weight": 2}, {"source": "word_problems"}]',
    ]
    config = parser.instantiate(parser.parse_args(arguments)).prompts
    assert config.sources() == [WeightedSource("a.jsonl", weight=2.0), WeightedSource()]
    assert config.heldout() is None


# ------------------------------------------------------------------ held out


def test_heldout_never_overlaps_a_source_with_duplicates(tmp_path, tokenizer):
    rows = questions(60)
    variants = [{**row, "question": row["question"].upper().replace(" ", "\n  ")} for row in rows]
    source = write_jsonl(tmp_path / "a.jsonl", rows + variants + rows)
    train, heldout = load_prompts(PromptsConfig(source=source, heldout_size=20), tokenizer)
    assert (len(train), len(heldout)) == (40, 20)
    decoded = [normalise(tokenizer.decode(prompt.token_ids)) for prompt in train + heldout]
    assert len(set(decoded)) == 60
    assert len({prompt.id for prompt in train + heldout}) == 60


def test_heldout_does_not_depend_on_row_order_size_or_seed(tmp_path):
    rows = questions(80)
    plain = write_jsonl(tmp_path / "a.jsonl", rows)
    random.Random(0).shuffle(rows)
    mixed = write_jsonl(tmp_path / "b.jsonl", rows)
    _, heldout = load_examples(PromptsConfig(source=plain, heldout_size=20))
    _, other = load_examples(PromptsConfig(source=mixed, heldout_size=20, size=10, seed=5))
    _, fewer = load_examples(PromptsConfig(source=plain, heldout_size=8))
    assert texts(heldout) == texts(other) and texts(fewer) == texts(heldout)[:8]
    assert texts(heldout) != texts(load_examples(PromptsConfig(source=plain, heldout_size=0))[0])[:20]


def test_training_prompts_that_a_heldout_file_repeats_are_left_out(tmp_path):
    train_file = write_jsonl(tmp_path / "train.jsonl", questions(10))
    heldout_file = write_jsonl(tmp_path / "test.jsonl", [{"question": "what is  3 plus 1?"}, {"question": "New?"}])
    config = PromptsConfig(source=train_file, heldout_source=heldout_file, heldout_size=2)
    train, heldout = load_examples(config)
    assert set(texts(heldout)) == {"what is  3 plus 1?", "New?"}
    assert texts(train) == [row["question"] for n, row in enumerate(questions(10)) if n != 3]


def test_word_problems_hold_out_instances_for_good():
    train, heldout = load_examples(PromptsConfig(size=3000, heldout_size=150))
    assert len({example.key for example in train + heldout}) == 3150
    # An instance held out under one seed is never trained on under another, whatever the sizes.
    others, _ = load_examples(PromptsConfig(size=2000, heldout_size=0, seed=1))
    assert not {example.instance for example in heldout} & {example.instance for example in train + others}
    stories = Counter(str(example.instance).split(":")[0] for example in heldout)
    assert len(stories) > 30  # the same stories on both sides
    assert texts(load_examples(PromptsConfig(size=5, heldout_size=150, seed=9))[1]) == texts(heldout)
    assert texts(train)[:50] != texts(others)[:50]


def test_mixture_shares_and_disjointness(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", questions(60))
    second = write_jsonl(tmp_path / "b.jsonl", questions(60, start=30))  # half of it is in the first as well
    mixture = [WeightedSource(first, weight=1), WeightedSource(second, weight=1), WeightedSource(weight=2)]
    train, heldout = load_examples(PromptsConfig(mixture=mixture, size=40, heldout_size=12))
    assert Counter(example.origin.split()[0] for example in train) == {
        "a.jsonl": 10,
        "b.jsonl": 10,
        "word_problems": 20,
    }
    assert Counter(example.origin.split()[0] for example in heldout) == {"a.jsonl": 3, "b.jsonl": 3, "word_problems": 6}
    assert len({example.key for example in train + heldout}) == 52


def test_size_takes_a_seeded_sample_or_the_first_rows(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", questions(50))
    first, _ = load_examples(PromptsConfig(source=source, heldout_size=0, size=5, shuffle=False))
    assert texts(first) == [row["question"] for row in questions(5)]
    samples = [texts(load_examples(PromptsConfig(source=source, heldout_size=0, size=5, seed=s))[0]) for s in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"heldout_size": 10}, "10 distinct prompts: holding out 10 leaves none.*heldout_size"),
        ({"heldout_size": 2, "size": 9}, "8 distinct training prompts, 9 are asked for: lower prompts.size"),
        ({"heldout_source": "SELF", "heldout_size": 10}, "every prompt is held out"),
        ({"heldout_source": "SELF", "heldout_size": 11}, "only 10 distinct prompts to hold out"),
    ],
)
def test_too_few_prompts(tmp_path, settings, match):
    source = write_jsonl(tmp_path / "a.jsonl", questions(10))
    settings = {name: source if value == "SELF" else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=match):
        check_source(PromptsConfig(source=source, **settings))


def test_too_long_prompts_are_an_error_or_dropped(tmp_path, tokenizer, caplog):
    rows = [{"prompt": "short"}, {"prompt": "long " * 40}, {"prompt": "brief"}]
    settings = {"source": write_jsonl(tmp_path / "a.jsonl", rows), "heldout_size": 0}
    length = len(render(tokenizer, [{"role": "user", "content": rows[1]["prompt"]}]))
    with pytest.raises(ValueError, match=rf"a\.jsonl row 2 is {length} tokens long, 100 are allowed.*too_long"):
        load_prompts(PromptsConfig(**settings, max_prompt_tokens=100), tokenizer)
    with pytest.raises(ValueError, match="90 are allowed"):
        load_prompts(PromptsConfig(**settings, max_prompt_tokens=1000), tokenizer, model_limit=90)
    train, _ = load_prompts(PromptsConfig(**settings, max_prompt_tokens=100, too_long="drop"), tokenizer)
    assert len(train) == 2 and "dropped 1 of 3 prompts" in caplog.text
    assert len(load_prompts(PromptsConfig(**settings, max_prompt_tokens=length), tokenizer)[0]) == 3
    with pytest.raises(ValueError, match="all 3 prompts are longer than 5 tokens"):
        load_prompts(PromptsConfig(**settings, max_prompt_tokens=5, too_long="drop"), tokenizer)


def test_prompts_carry_completion_and_answer(tokenizer):
    train, heldout = load_prompts(PromptsConfig(size=6, heldout_size=3), tokenizer)
    assert (len(train), len(heldout)) == (6, 3)
    for prompt in train + heldout:
        text = tokenizer.decode(prompt.completion_ids)
        assert text.endswith(f"The answer is {prompt.answer}.<|end|>")
        assert check_answer(text, prompt.answer)
        assert re.fullmatch("[0-9a-f]{12}", prompt.id)


# --------------------------------------------------------------------- order


def numbered(count: int) -> list[Prompt]:
    return [Prompt(id=f"{n:012x}", token_ids=(n,)) for n in range(count)]


def ids(batches: list[list[Prompt]]) -> list[int]:
    return [prompt.token_ids[0] for batch in batches for prompt in batch]


def test_every_epoch_is_a_new_order_of_all_prompts():
    order = PromptOrder(numbered(7), seed=3)
    visited = ids([order.next_batch(3) for _ in range(14)])  # batches that span epochs
    epochs = [visited[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert all(before != after for before, after in pairwise(epochs))
    assert ids([PromptOrder(numbered(7), seed=4).next_batch(7)]) != epochs[0]
    fixed = PromptOrder(numbered(3), seed=3, shuffle=False)
    assert ids([fixed.next_batch(7)]) == [0, 1, 2, 0, 1, 2, 0] and fixed.epoch == 2


@given(count=st.integers(1, 9), before=st.lists(st.integers(1, 11), max_size=5), size=st.integers(1, 11))
def test_resumed_order_is_the_uninterrupted_one(count, before, size):
    order = PromptOrder(numbered(count), seed=1)
    for batch in before:
        order.next_batch(batch)
    state = json.loads(json.dumps(order.state_dict()))
    resumed = PromptOrder(numbered(count), seed=1)
    resumed.load_state_dict(state)
    for _ in range(3):
        assert resumed.next_batch(size) == order.next_batch(size)
    assert resumed.state_dict() == order.state_dict()


@pytest.mark.parametrize(
    "other", [PromptOrder(numbered(5), 1), PromptOrder(numbered(6), 2), PromptOrder(numbered(6), 1, False)]
)
def test_order_of_other_prompts_is_not_resumed(other):
    with pytest.raises(ValueError, match="other prompts or another seed"):
        other.load_state_dict(PromptOrder(numbered(6), seed=1).state_dict())


def test_order_needs_prompts():
    with pytest.raises(ValueError, match="no prompts to order"):
        PromptOrder([], seed=0)
    with pytest.raises(ValueError, match="at least 1 prompt"):
        PromptOrder(numbered(2), seed=0).next_batch(0)
