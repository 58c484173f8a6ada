"""The built-in source: grade-school word problems, made from the stories of ``stories.py``.

Problem ``index`` of ``seed`` depends on these two alone. Every quantity in a problem is a whole number above zero,
and every quantity told at least 2, so that plurals are right: other draws are drawn again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count
from random import Random

from onpolicy.prompts.stories import PEOPLE, STORIES, Story
from onpolicy.seeds import derive

_VARIABLE = re.compile(r"\b[a-z]\d?\b")
_TOLD = re.compile(r"{([a-z])}")  # a number's slot in a question
_MOST_DRAWS = 1000


class Unfit(ArithmeticError):
    """Numbers that do not make a problem: a quotient with a remainder, nothing left, only one of something."""


@dataclass(frozen=True)
class WordProblem:
    """One problem with its answer and a worked solution."""

    question: str  # one to three sentences
    answer: int  # above zero
    solution: str  # e.g. "In the boxes: 3 * 4 = 12. Left: 12 - 5 = 7. The answer is 7."
    story: str  # name of the story it is made from
    numbers: tuple[int, ...]  # the story's numbers, in its order

    @property
    def instance(self) -> str:
        """Story and numbers: the same for two problems that differ in names and things only."""
        return f"{self.story}:{','.join(map(str, self.numbers))}"


def word_problems(seed: int) -> Iterator[WordProblem]:
    """Problems without end; the same problem may come up more than once."""
    return (word_problem(seed, index) for index in count())


def word_problem(seed: int, index: int) -> WordProblem:
    """Problem number ``index`` of the stream of ``seed``."""
    draw = Random(derive(seed, "word_problem", index))
    story = draw.choice(STORIES)
    for _ in range(_MOST_DRAWS):
        try:
            return _tell(story, draw)
        except Unfit:
            continue
    raise AssertionError(f"story {story.name!r} has hardly any numbers that work out")


def _tell(story: Story, draw: Random) -> WordProblem:
    values = {name: draw.choice(choices) for name, choices in story.numbers.items()}
    for name, formula in story.derived.items():
        values[name] = evaluate(formula, values)
    if any(values[name] < 2 for name in _TOLD.findall(story.question)):
        raise Unfit(f"{story.name}: {values}")
    steps, results = [], dict(values)
    for number, step in enumerate(story.steps, start=1):
        what, formula = step.split(": ")
        results[f"s{number}"] = evaluate(formula, results)
        steps.append(f"{what}: {_spell_out(formula, results)} = {results[f's{number}']}.")
    answer = evaluate(story.answer, values)
    assert answer == results[f"s{len(steps)}"], f"story {story.name!r}: steps and answer disagree at {values}"
    return WordProblem(
        question=story.question.format(**values, **_cast(story, draw)),
        answer=answer,
        solution=" ".join([*steps, f"The answer is {answer}."]),
        story=story.name,
        numbers=tuple(values.values()),
    )


def _cast(story: Story, draw: Random) -> dict[str, str]:
    """Who and what appears: people A, B, C with A's pronouns, things and others."""
    people = draw.sample(PEOPLE, 3)
    he, his = people[0][1:]
    words = {"A": people[0][0], "B": people[1][0], "C": people[2][0], "he": he, "He": he.capitalize(), "his": his}
    if story.things:
        (thing, things), (other, others) = draw.sample(story.things, 2)
        words |= {"thing": thing, "things": things, "other": other, "others": others}
    return words


def evaluate(formula: str, values: Mapping[str, int]) -> int:
    """The value of an expression of ``values``, whole numbers, + - * / and brackets.

    Raises Unfit if it, or a quotient within it, is not a whole number above zero.
    """
    result = _value(_parse(formula), values)
    if result < 1:
        raise Unfit(f"{formula} = {result}")
    return result


@cache
def _parse(formula: str) -> ast.expr:
    return ast.parse(formula, mode="eval").body


def _value(node: ast.expr, values: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    assert isinstance(node, ast.BinOp), f"unexpected {ast.dump(node)}"
    left, right = _value(node.left, values), _value(node.right, values)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    assert isinstance(node.op, ast.Div), f"unexpected {ast.dump(node.op)}"
    if right == 0 or left % right:
        raise Unfit(f"{left} / {right}")
    return left // right


def _spell_out(formula: str, values: Mapping[str, int]) -> str:
    """The expression with numbers in place of names."""
    return _VARIABLE.sub(lambda name: str(values[name.group()]), formula)
