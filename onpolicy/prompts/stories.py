"""What the built-in word problems tell. Written for this project.

A story's question has slots for its numbers ({a}, {b}, ...), for people ({A}, {B}, {C}; {he}, {He}, {his} are A's
pronouns) and for things ({thing}, {things} and {other}, {others}: singular and plural). ``derived`` numbers are
computed from the drawn ones, so that divisions come out even; some of either serve only that. ``steps`` work the answer
out, "what: formula", where s1, s2 ... are the results of earlier steps; ``answer`` is the same in one formula of the
numbers alone, and the two are compared for every problem made. No number told is below 2, so that plurals are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Noun = tuple[str, str]  # singular, plural

# fmt: off
SMALL: tuple[Noun, ...] = tuple((noun, noun + "s") for noun in (
    "pencil", "sticker", "marble", "crayon", "button", "bead", "postcard", "stamp", "paper clip", "shell",
    "balloon", "magnet",
))
GOODS: tuple[Noun, ...] = tuple((noun, noun + "s") for noun in (
    "notebook", "poster", "puzzle", "tray", "kite", "mug", "plant", "lamp", "cushion", "ball", "pillow", "game"
))
FRUIT: tuple[Noun, ...] = (
    ("plum", "plums"), ("pear", "pears"), ("lemon", "lemons"), ("peach", "peaches"), ("fig", "figs"),
    ("mango", "mangoes"),
    ("tomato", "tomatoes"), ("kiwi", "kiwis"),
)
BAKED: tuple[Noun, ...] = (
    ("muffin", "muffins"), ("cookie", "cookies"), ("pretzel", "pretzels"), ("scone", "scones"), ("bun", "buns"),
    ("waffle", "waffles"), ("bagel", "bagels"),
)
TOYS: tuple[Noun, ...] = tuple((noun, noun + "s") for noun in (
    "toy car", "puppet", "toy boat", "robot", "doll", "toy train", "top", "drum"
))

PEOPLE: tuple[tuple[str, str, str], ...] = (
    *((name, "she", "her") for name in (
        "Maya", "Lena", "Priya", "Sofia", "Aisha", "Nora", "Yuki", "Clara", "Zuri", "Hana", "Ines", "Ruth", "Leila",
        "Freya", "Carmen", "Mei", "Olga", "Tara", "Amara", "Vera",
    )),
    *((name, "he", "his") for name in (
        "Omar", "Ben", "Luca", "Kofi", "Diego", "Hugo", "Ravi", "Tomas", "Jonas", "Emil", "Mateo", "Idris", "Felix",
        "Anton", "Kenji", "Samir", "Paul", "Nico", "Oscar", "Theo",
    )),
)
# fmt: on


@dataclass(frozen=True)
class Story:
    """A template of word problems; see the module's text."""

    name: str
    question: str
    numbers: dict[str, Sequence[int]]
    steps: tuple[str, ...]
    answer: str
    derived: dict[str, str] = field(default_factory=dict)
    things: tuple[Noun, ...] = ()


def to(low: int, high: int, step: int = 1) -> range:
    """Numbers from ``low`` to ``high``, both included."""
    return range(low, high + 1, step)


STORIES: tuple[Story, ...] = (
    Story(
        "boxes",
        "{A} buys {a} boxes with {b} {things} in each. {He} gives {c} {things} to {B}. How many {things} does"
        " {A} have left?",
        {"a": to(2, 9), "b": to(4, 15), "c": to(2, 30)},
        ("In the boxes: a * b", "Left: s1 - c"),
        "a * b - c",
        things=SMALL,
    ),
    Story(
        "equal_shares",
        "{A} has {a} {things} and finds {b} more. {He} shares all of them equally among {c} friends. How many"
        " {things} does each friend get?",
        {"a": to(5, 40), "c": to(2, 9), "k": to(3, 15)},
        ("In all: a + b", "For each friend: s1 / c"),
        "(a + b) / c",
        {"b": "c * k - a"},
        SMALL,
    ),
    Story(
        "bags",
        "{A} picks {a} {things} in the morning and {b} in the afternoon, and packs {c} into each bag. How "
        "many bags does {he} fill?",
        {"a": to(6, 60), "c": to(3, 12), "k": to(3, 14)},
        ("Picked: a + b", "Bags: s1 / c"),
        "(a + b) / c",
        {"b": "c * k - a"},
        FRUIT,
    ),
    Story(
        "shopping",
        "One {thing} costs ${a} and one {other} costs ${b}. How many dollars do {c} {things} and {d} {others}"
        " cost together?",
        {"a": to(2, 18), "b": to(3, 25), "c": to(2, 8), "d": to(2, 6)},
        ("First: c * a", "Second: d * b", "Together: s1 + s2"),
        "a * c + b * d",
        things=GOODS,
    ),
    Story(
        "change",
        "{A} buys {a} {things} at ${b} each and pays with ${c}. How many dollars does {he} get back?",
        {"a": to(2, 9), "b": to(2, 19), "c": (20, 30, 40, 50, 60, 80, 100)},
        ("Price: a * b", "Change: c - s1"),
        "c - a * b",
        things=GOODS,
    ),
    Story(
        "two_speeds",
        "A bus goes {a} miles an hour for {b} hours and then {c} miles an hour for {d} hours. How many miles "
        "does it go?",
        {"a": to(20, 60, 2), "b": to(2, 6), "c": to(25, 70, 5), "d": to(2, 5)},
        ("First part: a * b", "Second part: c * d", "Together: s1 + s2"),
        "a * b + c * d",
    ),
    Story(
        "round_trip",
        "{A} rides {a} miles to the coast at {b} miles an hour. The way back takes {c} hours longer. How many"
        " hours does {he} ride in all?",
        {"b": to(6, 20), "k": to(2, 8), "c": to(2, 5)},
        ("There: a / b", "Back: s1 + c", "In all: s1 + s2"),
        "2 * (a / b) + c",
        {"a": "b * k"},
    ),
    Story(
        "ages",
        "{A} is {a} years old. {B} is {b} years older than {A}. How old will {B} be in {c} years?",
        {"a": to(4, 40), "b": to(2, 15), "c": to(2, 20)},
        ("Now: a + b", "Later: s1 + c"),
        "a + b + c",
    ),
    Story(
        "neighbor",
        "{A} is {a} years old, and {his} neighbor is {b} times as old. How old will the neighbor be in {c} years?",
        {"a": to(5, 20), "b": to(2, 4), "c": to(2, 20)},
        ("Age now: a * b", "Age then: s1 + c"),
        "c + b * a",
    ),
    Story(
        "batches",
        "One batch of {things} needs {a} cups of flour and {b} cups of milk. How many cups are needed in all "
        "for {c} batches?",
        {"a": to(2, 9), "b": to(2, 6), "c": to(2, 15)},
        ("One batch: a + b", "All batches: s1 * c"),
        "a * c + b * c",
        things=BAKED,
    ),
    Story(
        "soup",
        "A soup for {a} people needs {b} carrots. How many carrots does the same soup need for {c} people?",
        {"a": to(2, 9), "k": to(2, 6), "c": to(3, 40)},
        ("For one person: b / a", "For all: s1 * c"),
        "b * c / a",
        {"b": "a * k"},
    ),
    Story(
        "saving",
        "{A} wants to buy skates for ${c}. {He} has ${b} and saves ${a} every week. How many weeks does {he} need?",
        {"a": to(3, 15), "b": to(5, 60), "k": to(2, 14)},
        ("Still missing: c - b", "Weeks: s1 / a"),
        "(c - b) / a",
        {"c": "b + a * k"},
    ),
    Story(
        "wages",
        "{A} earns ${a} an hour and works {b} hours a day. How many dollars does {he} earn in {c} days?",
        {"a": to(8, 30), "b": to(2, 8), "c": to(2, 10)},
        ("In a day: a * b", "In all: s1 * c"),
        "a * b * c",
    ),
    Story(
        "car_wash",
        "{A} washes {a} cars for ${b} each and spends ${c} on soap. How many dollars of profit does {he} make?",
        {"a": to(3, 20), "b": to(4, 15), "c": to(4, 25)},
        ("Income: a * b", "Profit: s1 - c"),
        "a * b - c",
    ),
    Story(
        "reading",
        "{A} reads {a} pages a day of a book that has {b} pages. How many pages are left after {c} days?",
        {"a": to(8, 40), "c": to(2, 9), "k": to(5, 120)},
        ("Read: a * c", "Left: b - s1"),
        "b - a * c",
        {"b": "a * c + k"},
    ),
    Story(
        "garden",
        "A garden has {a} rows of {b} {things} and {c} rows of {d} {others}. How many plants does it have?",
        {"a": to(2, 12), "b": to(3, 15), "c": to(2, 9), "d": to(3, 12)},
        ("First kind: a * b", "Second kind: c * d", "Together: s1 + s2"),
        "a * b + c * d",
        things=(("tulip", "tulips"), ("rose", "roses"), ("lily", "lilies"), ("fern", "ferns"), ("daisy", "daisies")),
    ),
    Story(
        "laps",
        "A rectangular park is {a} meters long and {b} meters wide. {A} walks around it {c} times. How many "
        "meters does {he} walk?",
        {"b": to(20, 150, 5), "k": to(10, 100, 10), "c": to(2, 6)},
        ("Half a lap: a + b", "One lap: 2 * s1", "In all: s2 * c"),
        "2 * c * (a + b)",
        {"a": "b + k"},
    ),
    Story(
        "tiles",
        "A floor of {a} by {b} feet is covered with tiles of one square foot. A box holds {c} tiles. How many"
        " boxes are needed?",
        {"b": to(4, 20), "c": to(2, 12), "k": to(2, 6)},
        ("Tiles: a * b", "Boxes: s1 / c"),
        "a * b / c",
        {"a": "c * k"},
    ),
    Story(
        "times_as_many",
        "{A} has {a} {things}, and {B} has {b} times as many. How many {things} do they have together?",
        {"a": to(4, 40), "b": to(2, 9)},
        ("The second has: a * b", "Together: a + s1"),
        "a * (b + 1)",
        things=SMALL,
    ),
    Story(
        "chain",
        "{A} has {a} {things}. {B} has {b} fewer than {A}, and {C} has {c} more than {B}. How many {things} "
        "does {C} have?",
        {"b": to(2, 20), "c": to(2, 30), "k": to(3, 40)},
        ("The second has: a - b", "The third has: s1 + c"),
        "a - b + c",
        {"a": "b + k"},
        SMALL,
    ),
    Story(
        "bus_stops",
        "A bus starts with {a} passengers. At the first stop {b} get off and {c} get on, and at the second "
        "stop {d} get off. How many passengers are on the bus now?",
        {"b": to(2, 15), "c": to(2, 12), "d": to(2, 12), "k": to(12, 30)},
        ("After getting off: a - b", "After getting on: s1 + c", "Now: s2 - d"),
        "a + c - b - d",
        {"a": "b + k"},
    ),
    Story(
        "shelves",
        "A library has {b} storybooks and {c} picture books. Each shelf holds {a} books. How many shelves do "
        "the books fill?",
        {"a": to(5, 25), "b": to(20, 120), "k": to(4, 20)},
        ("Books: b + c", "Shelves: s1 / a"),
        "(b + c) / a",
        {"c": "a * k - b"},
    ),
    Story(
        "pizza",
        "{A} orders {a} pizzas with {b} slices each. {c} guests eat {d} slices each. How many slices are left?",
        {"a": to(2, 9), "b": (6, 8, 10, 12), "c": to(3, 15), "d": to(2, 4)},
        ("Slices: a * b", "Eaten: c * d", "Left: s1 - s2"),
        "a * b - c * d",
    ),
    Story(
        "tank",
        "An empty tank holds {a} liters. A hose adds {b} liters a minute while {c} liters a minute leak out. "
        "How many minutes does it take to fill the tank?",
        {"c": to(2, 12), "g": to(3, 20), "k": to(3, 25)},
        ("Gain a minute: b - c", "Minutes: a / s1"),
        "a / (b - c)",
        {"b": "c + g", "a": "g * k"},
    ),
    Story(
        "half_spent",
        "{A} has ${a}. {He} spends half of it on a {thing} and ${b} on lunch. How many dollars does {he} have left?",
        {"k": to(12, 90), "b": to(4, 20)},
        ("Half: a / 2", "Left: s1 - b"),
        "(a - 2 * b) / 2",
        {"a": "2 * k"},
        GOODS,
    ),
    Story(
        "coupons",
        "A {thing} costs ${a}. A coupon makes it ${b} cheaper. How many dollars do {c} {things} cost with a "
        "coupon for each?",
        {"b": to(2, 9), "k": to(3, 25), "c": to(2, 9)},
        ("One costs: a - b", "All cost: s1 * c"),
        "a * c - b * c",
        {"a": "b + k"},
        GOODS,
    ),
    Story(
        "tickets",
        "A ticket costs ${a} for adults and ${b} for children. How many dollars do {c} adults and {d} children pay?",
        {"b": to(3, 12), "k": to(2, 10), "c": to(2, 9), "d": to(2, 20)},
        ("Adults: c * a", "Children: d * b", "Together: s1 + s2"),
        "a * c + b * d",
        {"a": "b + k"},
    ),
    Story(
        "average",
        "{A} scores {a}, {b} and {c} points in three games. What is {his} average score?",
        {"a": to(5, 40), "b": to(5, 40), "k": to(8, 35)},
        ("Points: a + b + c", "Average: s1 / 3"),
        "(a + b + c) / 3",
        {"c": "3 * k - a - b"},
    ),
    Story(
        "legs",
        "{A} keeps {a} hens and {b} goats. How many legs do the animals have altogether?",
        {"a": to(2, 40), "b": to(2, 30)},
        ("Legs of hens: a * 2", "Legs of goats: b * 4", "Altogether: s1 + s2"),
        "2 * (a + 2 * b)",
    ),
    Story(
        "practice",
        "{A} practices the piano for {a} minutes on each of the five weekdays and {b} minutes on Saturday. "
        "How many minutes is that in {c} weeks?",
        {"a": to(10, 45, 5), "b": to(20, 90, 5), "c": to(2, 8)},
        ("Weekdays: 5 * a", "One week: s1 + b", "In all: s2 * c"),
        "5 * a * c + b * c",
    ),
    Story(
        "album",
        "An album has {a} pages with room for {b} {things} on each. {A} has put in {c} {things}. How many more fit in?",
        {"a": to(6, 40), "b": to(4, 12), "c": to(5, 90)},
        ("Room: a * b", "More: s1 - c"),
        "a * b - c",
        things=(("photo", "photos"), ("stamp", "stamps"), ("postcard", "postcards"), ("sticker", "stickers")),
    ),
    Story(
        "machines",
        "One machine makes {a} {things} an hour, and another makes {b}. How many {things} do both make in {c} hours?",
        {"a": to(5, 60), "b": to(5, 60), "c": to(2, 12)},
        ("In an hour: a + b", "In all: s1 * c"),
        "a * c + b * c",
        things=TOYS,
    ),
    Story(
        "eggs",
        "Each of {a} hens lays {b} eggs a week. {A} packs the eggs of a week into cartons of {c}. How many "
        "cartons does {he} fill?",
        {"a": to(4, 36), "b": to(3, 6), "c": (4, 6, 8, 10, 12)},
        ("Eggs: a * b", "Cartons: s1 / c"),
        "a * b / c",
    ),
    Story(
        "candles",
        "{A} makes {a} candles, sells {b} of them for ${c} each and the rest for ${d} each. How many dollars "
        "does {he} get?",
        {"b": to(3, 20), "k": to(2, 20), "c": to(5, 15), "d": to(2, 9)},
        ("First sale: b * c", "The rest: a - b", "Second sale: s2 * d", "In all: s1 + s3"),
        "b * c + (a - b) * d",
        {"a": "b + k"},
    ),
    Story(
        "running",
        "Every week {A} runs {a} miles on Monday and {b} miles on Friday. How many miles does {he} run in {c} weeks?",
        {"a": to(2, 12), "b": to(2, 15), "c": to(2, 12)},
        ("In a week: a + b", "In all: s1 * c"),
        "a * c + b * c",
    ),
    Story(
        "ribbon",
        "A ribbon is {a} inches long. {A} cuts off {b} inches and cuts the rest into pieces of {c} inches. "
        "How many pieces does {he} get?",
        {"b": to(3, 30), "c": to(2, 12), "k": to(3, 15)},
        ("The rest: a - b", "Pieces: s1 / c"),
        "(a - b) / c",
        {"a": "b + c * k"},
    ),
    Story(
        "teams",
        "A class has {a} girls and {b} boys, and {d} of them are absent. The others form teams of {c}. How "
        "many teams are there?",
        {"a": to(6, 18), "c": to(3, 6), "d": to(2, 6), "k": to(3, 7)},
        ("In the class: a + b", "Present: s1 - d", "Teams: s2 / c"),
        "(a + b - d) / c",
        {"b": "c * k + d - a"},
    ),
    Story(
        "painters",
        "{A} paints {a} fence posts an hour and {B} paints {b}. How many more posts than {A} does {B} paint "
        "in {c} hours?",
        {"a": to(4, 20), "k": to(2, 12), "c": to(2, 9)},
        ("More in an hour: b - a", "More in all: s1 * c"),
        "b * c - a * c",
        {"b": "a + k"},
    ),
    Story(
        "burning",
        "A candle is {a} millimeters tall and gets {b} millimeters shorter every hour. How many millimeters "
        "tall is it after {c} hours?",
        {"b": to(4, 25), "c": to(2, 8), "k": to(10, 90)},
        ("Burned: b * c", "Left: a - s1"),
        "a - b * c",
        {"a": "b * c + k"},
    ),
    Story(
        "fair",
        "At a fair {A} wins {a} tickets in each of {b} games and {c} in a raffle. A {thing} costs {d} "
        "tickets. How many {things} can {he} get?",
        {"a": to(3, 12), "b": to(2, 8), "d": to(4, 12), "k": to(2, 9)},
        ("From games: a * b", "Tickets: s1 + c", "Prizes: s2 / d"),
        "(a * b + c) / d",
        {"c": "d * k - a * b"},
        TOYS,
    ),
)
