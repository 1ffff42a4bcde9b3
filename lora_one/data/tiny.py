"""Generated arithmetic word problems, for experiments that run offline on two CPU cores.

The problems come in two families that share no template, no name and no object:

* family A feeds the pre-training of the small model in ``lora_one/assets/tiny_llama``: sums, facts,
  short stories and one-step problems that are answered with "The answer is 17."; of family B it
  shows single words only;
* family B is the fine-tuning task: problems of two or three steps whose answers are written as in
  GSM8K, one equation per line and then ``#### 42``.

A problem's identity is its kind of reasoning and its numbers. A hash of that identity decides the
split, so no identity, and hence no question, can occur in two splits.
"""

import hashlib
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# Hash buckets of ten that belong to each split.
SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}
MAX_RESULT = 99
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}

SMALL, TABLE, LARGE, WIDE = (2, 5), (2, 9), (2, 60), (1, 98)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True)
class Kind:
    """One kind of reasoning: the ranges of its numbers, its equations and its wordings.

    An equation is ``"left operation right"``; an operand is a letter (``a`` is the first number) or
    the position of an earlier equation, whose result it takes.
    """

    name: str
    ranges: tuple[tuple[int, int], ...]
    equations: tuple[str, ...]
    templates: tuple[str, ...]


MULTI_STEP = (
    Kind(
        "groups_minus",
        (TABLE, TABLE, LARGE),
        ("a * b", "0 - c"),
        (
            ("{x} has {a} {g} with {b} {o} each. {s} gives {c} {o} to {y}. How many {o} does {x} have left?"),
            (
                "There are {a} {g} in the hall and each one holds {b} {o}. {x} takes {c} of the {o} "
                "away. How many {o} remain?"
            ),
        ),
    ),
    Kind(
        "groups_plus",
        (TABLE, TABLE, LARGE),
        ("a * b", "0 + c"),
        (
            (
                "{x} packs {a} {g} with {b} {o} each and keeps {c} {o} on the desk. "
                "How many {o} does {x} own in total?"
            ),
            (
                "{y} owns {c} {o}. {x} brings {a} more {g} of {b} {o} each. "
                "How many {o} are there now in total?"
            ),
        ),
    ),
    Kind(
        "plus_minus",
        (LARGE, LARGE, LARGE),
        ("a + b", "0 - c"),
        (
            (
                "{x} collects {a} {o} on Monday and {b} {o} on Tuesday. On Friday {x} sells {c} of "
                "them. How many {o} does {x} keep?"
            ),
            (
                "A shelf holds {a} {o}. {x} adds {b} {o} and later {y} removes {c}. "
                "How many {o} does the shelf hold now?"
            ),
        ),
    ),
    Kind(
        "minus_minus",
        (LARGE, LARGE, LARGE),
        ("a - b", "0 - c"),
        (
            ("Of the {a} {o} in the store, {x} buys {b} and {y} buys {c}. How many {o} remain in the store?"),
            "{x} owns {a} {o}, lends {b} to {y} and breaks {c}. How many {o} does {x} keep?",
        ),
    ),
    Kind(
        "more_total",
        (LARGE, LARGE),
        ("a + b", "0 + a"),
        (
            "{x} owns {a} {o} and {y} owns {b} more than {x}. How many {o} do they own together?",
            (
                "{x} sold {a} {o} on Monday and on Tuesday {b} more than on Monday. "
                "How many {o} did {x} sell on both days together?"
            ),
        ),
    ),
    Kind(
        "fewer_total",
        (LARGE, LARGE),
        ("a - b", "0 + a"),
        (
            "{x} owns {a} {o} and {y} owns {b} fewer than {x}. How many {o} do they own together?",
            (
                "{x} sold {a} {o} on Monday and on Tuesday {b} fewer than on Monday. "
                "How many {o} did {x} sell on both days together?"
            ),
        ),
    ),
    Kind(
        "times_total",
        (LARGE, SMALL),
        ("a * b", "0 + a"),
        (
            "{x} owns {a} {o} and {y} owns {b} times as many. How many {o} do they own together?",
            (
                "{x} sold {a} {o} on Monday and {b} times as many on Tuesday. "
                "How many {o} did {x} sell on both days together?"
            ),
        ),
    ),
    Kind(
        "twice_minus",
        (LARGE, LARGE),
        ("a + a", "0 - b"),
        (
            ("{x} owns {a} {o}. {y} owns twice as many but loses {b} of them. How many {o} does {y} keep?"),
            (
                "{x} sold {a} {o} on Monday. On Tuesday {x} sold {b} fewer than twice as many. "
                "How many {o} did {x} sell on Tuesday?"
            ),
        ),
    ),
    Kind(
        "share_sum",
        (LARGE, LARGE, TABLE),
        ("a + b", "0 / c"),
        (
            (
                "{x} brings {a} {o} and {y} brings {b}. They share all of them equally among {c} "
                "pupils. How many {o} does each pupil receive?"
            ),
            (
                "{x} packs {a} old {o} and {b} new {o} into {c} {g}, equally many in each. "
                "How many {o} does each one hold?"
            ),
        ),
    ),
    Kind(
        "share_rest",
        (LARGE, LARGE, TABLE),
        ("a - b", "0 / c"),
        (
            (
                "{x} owns {a} {o}, keeps {b} and shares the rest equally among {c} pupils. "
                "How many {o} does each pupil receive?"
            ),
            (
                "Of {a} {o}, {b} are broken. {x} packs the good ones into {c} {g}, equally many in "
                "each. How many {o} does each one hold?"
            ),
        ),
    ),
    Kind(
        "daily",
        (TABLE, TABLE, TABLE),
        ("a + b", "0 * c"),
        (
            (
                "{x} makes {a} {o} every morning and {b} {o} every evening. "
                "How many {o} does {x} make in {c} days?"
            ),
            ("Each of {c} pupils owns {a} old {o} and {b} new {o}. How many {o} do the pupils own together?"),
        ),
    ),
    Kind(
        "two_groups",
        (TABLE, TABLE, TABLE, TABLE),
        ("a * b", "c * d", "0 + 1"),
        (
            (
                "{x} packs {a} {g} with {b} {o} each and {y} packs {c} {g} with {d} {o} each. "
                "How many {o} do they pack together?"
            ),
            (
                "In the hall are {a} {g} of {b} {o} each and {c} {g} of {d} {o} each. "
                "How many {o} are in the hall?"
            ),
        ),
    ),
)

ONE_STEP = (
    Kind(
        "groups",
        (TABLE, TABLE),
        ("a * b",),
        (
            "{x} has {a} {g} with {b} {o} each. How many {o} does {x} own in total?",
            "There are {a} {g} in the hall and each one holds {b} {o}. How many {o} are there?",
        ),
    ),
    Kind(
        "plus",
        (LARGE, LARGE),
        ("a + b",),
        (
            ("{x} collects {a} {o} on Monday and {b} {o} on Tuesday. How many {o} does {x} have in total?"),
            "{x} owns {a} {o} and {y} owns {b} more than {x}. How many {o} does {y} own?",
        ),
    ),
    Kind(
        "minus",
        (LARGE, LARGE),
        ("a - b",),
        (
            "A shelf holds {a} {o}. {y} removes {b}. How many {o} does the shelf hold now?",
            "{x} owns {a} {o} and {y} owns {b} fewer than {x}. How many {o} does {y} own?",
        ),
    ),
    Kind(
        "times",
        (LARGE, SMALL),
        ("a * b",),
        ("{x} owns {a} {o} and {y} owns {b} times as many. How many {o} does {y} own?",),
    ),
    Kind(
        "twice",
        (LARGE,),
        ("a + a",),
        ("{x} sold {a} {o} on Monday and twice as many on Tuesday. How many on Tuesday?",),
    ),
    Kind(
        "share",
        (LARGE, TABLE),
        ("a / b",),
        (
            (
                "{x} owns {a} {o} and shares all of them equally among {b} pupils. "
                "How many {o} does each pupil receive?"
            ),
            ("{x} packs {a} {o} into {b} {g}, equally many in each. How many {o} does each one hold?"),
        ),
    ),
)

KINDS = {"multi": MULTI_STEP, "one": ONE_STEP}

# Names with their pronouns, single things and containers of family B.
NAMES = tuple(
    (name, pronoun)
    for pronoun, names in (
        ("She", "Ada Iris Nora Olga Rosa Vera Clara Greta Helen Irma Wanda Yara"),
        ("He", "Ben Carl Emil Hugo Ivan Kurt Otto Paul Ralf Sven Theo Viktor"),
    )
    for name in _words(names)
)
OBJECTS = _words(
    "pens plates stamps coins cards lamps tiles masks nails bolts forks spoons bells candles "
    "ropes screws ribbons magnets badges bricks"
)
CONTAINERS = _words("boxes crates drawers cases trays chests barrels packs")

# Family A: one-step problems of the pre-training, answered by "The answer is 17.".
PRETRAINING_KINDS = (
    Kind(
        "gain",
        (WIDE, WIDE),
        ("a + b",),
        (
            "{x} had {a} {o}. {x} found {b} more {o}. How many {o} did {x} have then?",
            "{x} got {a} {o} from {y} and {b} {o} from {z}. How many {o} did {x} get?",
            "There were {a} {o} in the garden. Then came {b} more. How many {o} were there?",
            "{x} saw {a} {o} and {y} saw {b} {o}. How many {o} did the two of them see?",
            "{x} is {b} {o} ahead of {y}, who has {a} {o}. What is the number for {x}?",
        ),
    ),
    Kind(
        "loss",
        (WIDE, WIDE),
        ("a - b",),
        (
            "{x} had {a} {o}. {x} lost {b} {o}. How many {o} were left?",
            "There were {a} {o} in the garden. {x} took {b} of them. How many {o} stayed?",
            "{x} had {a} {o} and gave {b} {o} to {y}. How many {o} were left for {x}?",
            "{x} picked {a} {o}, and {b} of them were bad. How many {o} were good?",
            "{x} is {b} {o} behind {y}, who has {a} {o}. What is the number for {x}?",
        ),
    ),
    Kind(
        "rows",
        ((2, 49), TABLE),
        ("a * b",),
        (
            "{x} put the {o} in {a} rows of {b}. How many {o} did {x} put there?",
            "{x} saw {b} {o} every day for {a} days. How many {o} did {x} see?",
        ),
    ),
    Kind(
        "split",
        (WIDE, TABLE),
        ("a / b",),
        (
            "{x} put {a} {o} in {b} equal rows. How many {o} were in a row?",
            "{x} split {a} {o} fairly between {b} children. How many {o} did a child get?",
        ),
    ),
)
PRETRAINING_NAMES = _words(
    "Tom Sue Mia Max Lily Sam Anna Jack Kate Leo Emma Tim Lucy Bob Jane Dan Amy Fred Ella Nick "
    "Rose Will Zoe Jim"
)
PRETRAINING_OBJECTS = _words(
    "apples pears plums nuts shells stones flowers birds ducks frogs leaves eggs cakes balls kites "
    "dolls books hats shoes berries fish cats dogs bees"
)
COLOURS = _words("red blue green yellow white black brown grey")
PLACES = _words("park garden forest school market lake farm beach house hill")
FACTS = {
    "+": (
        "The sum of {a} and {b} is {c}.",
        "{b} more than {a} is {c}.",
        "{a} and {b} make {c} together.",
    ),
    "-": (
        "{b} less than {a} is {c}.",
        "{b} fewer than {a} is {c}.",
        "If {b} of {a} are gone, the rest is {c}.",
    ),
    "*": ("{a} times {b} is {c}.", "{a} groups of {b} each make {c} in total."),
    "/": ("{a} shared equally among {b} is {c} for each.", "{a} in {b} equal parts is {c} each."),
}
STORIES = (
    (
        "{x} and {y} went to the {p}. They saw {q} {o} there. {x} liked the {o}, but {y} wanted to go "
        "home. So they went home and had dinner."
    ),
    (
        "One day {x} was at the {p} with {y}. It was a warm day. They played with {q} {o} until the "
        "evening. Then they were tired and happy."
    ),
    (
        "{x} loves {o}. The {o} of {x} are {q}. {y} does not own any {o}, so {x} shares them with {y}. "
        "Now they are friends."
    ),
    (
        "In the morning {x} walks to the {p}. In the evening {x} walks back. {y} stays at home and "
        "draws {q} {o} on each page of a book."
    ),
    "#### At the {p}\n{x} has {q} {o}. {y} has none.\n#### At home\n{x} and {y} eat {q} {o}.",
)
# The words of the fine-tuning task, which the pre-training shows without a problem around them, so
# that the embedding of every token is trained.
WORDS = tuple(
    sorted(
        {name for name, _ in NAMES}.union(
            OBJECTS,
            CONTAINERS,
            *(
                re.findall(r"[A-Za-z]{2,}", template)
                for kind in MULTI_STEP + ONE_STEP
                for template in kind.templates
            ),
        )
    )
)


def problems(split: str, n: int, seed: int = 0, steps: str = "multi") -> list[dict[str, str]]:
    """Generates distinct word problems of one split.

    Args:
        split: ``train``, ``validation`` or ``test``; they share no question and no pair of a kind
            of reasoning and its numbers.
        n: Number of problems; a smaller number gives the head of the same list.
        seed: Seed of the choice and of the order.
        steps: ``multi`` for the fine-tuning task, ``one`` for one-step problems in the same wording
            and answer form.

    Returns:
        Rows with a ``question`` and an ``answer`` that ends in ``#### `` and the number.

    Raises:
        ValueError: For an unknown split or steps, or if there are no ``n`` distinct problems.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if steps not in KINDS:
        raise ValueError(f"unknown steps {steps!r}; choose one of {', '.join(KINDS)}")
    rng = random.Random(f"{split}/{steps}/{seed}")
    rows: dict[str, str] = {}
    # The bound is generous: a tenth of the draws falls into the smallest splits.
    for _ in range(100 * n + 1000):
        if len(rows) >= n:
            break
        kind = _pick(rng, KINDS[steps])
        numbers = _draw_numbers(rng, kind)
        if _bucket(kind, numbers) in SPLITS[split]:
            rows.setdefault(_word(rng, kind, numbers), _solution(kind, numbers))
    if len(rows) < n:
        raise ValueError(f"cannot make {n} distinct {steps}-step problems for split {split!r}")
    return [{"question": question, "answer": answer} for question, answer in rows.items()]


def pretraining_texts(n: int, seed: int = 0) -> Iterator[str]:
    """Yields the short texts of the pre-training corpus (family A).

    Args:
        n: Number of texts.
        seed: Seed of the corpus.

    Yields:
        A text of a few sentences: sums, facts, one-step problems, look-ups and stories.
    """
    rng = random.Random(f"pretraining/{seed}")
    for _ in range(n):
        yield _pick(rng, WRITERS)(rng)


def _below(rng: random.Random, n: int) -> int:
    # Only random() is guaranteed to give the same numbers in every version of Python.
    return int(rng.random() * n)


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[_below(rng, len(items))]


def _pick_distinct(rng: random.Random, items: Sequence[T], n: int) -> list[T]:
    rest = list(items)
    return [rest.pop(_below(rng, len(rest))) for _ in range(n)]


def _draw(rng: random.Random, kind: Kind) -> list[int]:
    return [low + _below(rng, high - low + 1) for low, high in kind.ranges]


def _draw_numbers(rng: random.Random, kind: Kind) -> list[int]:
    while True:
        numbers = _draw(rng, kind)
        if _evaluate(kind, numbers):
            return numbers


def _evaluate(kind: Kind, numbers: Sequence[int]) -> list[tuple[int, str, int, int]]:
    """Lists (left, operation, right, result), or nothing where a result is out of range."""
    lines: list[tuple[int, str, int, int]] = []
    for equation in kind.equations:
        first, sign, second = equation.split()
        left, right = (
            lines[int(name)][3] if name.isdigit() else numbers[ord(name) - ord("a")]
            for name in (first, second)
        )
        result = OPERATIONS[sign](left, right)
        if not 1 <= result <= MAX_RESULT or (sign == "/" and result * right != left):
            return []
        lines.append((left, sign, right, result))
    return lines


def _bucket(kind: Kind, numbers: Sequence[int]) -> int:
    identity = f"{kind.name}:{','.join(map(str, numbers))}"
    return hashlib.sha256(identity.encode()).digest()[0] % 10


def _solution(kind: Kind, numbers: Sequence[int]) -> str:
    lines = _evaluate(kind, numbers)
    chain = "".join(f"{left} {sign} {right} = {result}\n" for left, sign, right, result in lines)
    return f"{chain}#### {lines[-1][3]}"


def _word(rng: random.Random, kind: Kind, numbers: Sequence[int]) -> str:
    (first, pronoun), (second, _) = _pick_distinct(rng, NAMES, 2)
    return _pick(rng, kind.templates).format(
        x=first,
        s=pronoun,
        y=second,
        o=_pick(rng, OBJECTS),
        g=_pick(rng, CONTAINERS),
        **dict(zip("abcd", numbers, strict=False)),
    )


def _sum(rng: random.Random, known: Sequence[int] = ()) -> tuple[int, str, int, int]:
    """Draws a true equation; with known results, its numbers are often some of those."""
    while True:
        kind = _pick(rng, PRETRAINING_KINDS)
        numbers = _draw(rng, kind)
        for place, chance in enumerate((0.5, 0.25)):
            if known and rng.random() < chance:
                numbers[place] = _pick(rng, known)
        if lines := _evaluate(kind, numbers):
            return lines[0]


def _write_sums(rng: random.Random) -> str:
    sums: list[tuple[int, str, int, int]] = []
    for _ in range(2 + _below(rng, 5)):
        sums.append(_sum(rng, [result for *_, result in sums]))
    return " ".join("{} {} {} = {}.".format(*line) for line in sums)


def _write_facts(rng: random.Random) -> str:
    facts = []
    for _ in range(1 + _below(rng, 4)):
        left, sign, right, result = _sum(rng)
        facts.append(_pick(rng, FACTS[sign]).format(a=left, b=right, c=result))
    return " ".join(facts)


def _write_problem(rng: random.Random) -> str:
    kind = _pick(rng, PRETRAINING_KINDS)
    numbers = _draw_numbers(rng, kind)
    x, y, z = _pick_distinct(rng, PRETRAINING_NAMES, 3)
    question = _pick(rng, kind.templates).format(
        x=x,
        y=y,
        z=z,
        o=_pick(rng, PRETRAINING_OBJECTS),
        **dict(zip("ab", numbers, strict=True)),
    )
    return f"Q: {question}\nA: The answer is {_evaluate(kind, numbers)[0][3]}."


def _write_lookup(rng: random.Random) -> str:
    names = _pick_distinct(rng, PRETRAINING_NAMES, 2 + _below(rng, 2))
    counts = [2 + _below(rng, MAX_RESULT - 1) for _ in names]
    thing = _pick(rng, PRETRAINING_OBJECTS)
    story = " ".join(f"{name} has {count} {thing}." for name, count in zip(names, counts, strict=True))
    asked = _below(rng, len(names))
    question = f"{story} How many {thing} does {names[asked]} have?"
    return f"Q: {question}\nA: The answer is {counts[asked]}."


def _write_story(rng: random.Random) -> str:
    x, y = _pick_distinct(rng, PRETRAINING_NAMES, 2)
    return _pick(rng, STORIES).format(
        x=x,
        y=y,
        o=_pick(rng, PRETRAINING_OBJECTS),
        p=_pick(rng, PLACES),
        q=_pick(rng, COLOURS),
    )


def _write_words(rng: random.Random) -> str:
    return " ".join(_pick_distinct(rng, WORDS, 8)) + "."


# A writer is drawn with equal chances, so its repetition is its weight.
WRITERS = (
    *(_write_sums,) * 3,
    *(_write_facts,) * 2,
    *(_write_problem,) * 4,
    *(_write_lookup,) * 2,
    _write_story,
    _write_words,
)
