"""Arithmetic problems with worked answers, drawn by a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.general_text.writer import WORDS

# A question, the steps of its answer, and the result with its unit.
Problem = tuple[str, list[str], str]


def _words(draw: random.Random, kind: str, count: int) -> list[str]:
    return draw.sample(WORDS[kind], count)


def _plural(word: str) -> str:
    if word in ("fish", "sheep"):
        return word
    if word in ("goose", "pony"):
        return {"goose": "geese", "pony": "ponies"}[word]
    return f"{word}es" if word.endswith(("s", "x", "ch")) else f"{word}s"


def _pronoun(draw: random.Random) -> tuple[str, str]:
    return draw.choice((("he", "his"), ("she", "her"), ("they", "their")))


def make_share(draw: random.Random) -> Problem:
    """Make a problem of things that are given away and bought."""
    (a, b), thing = _words(draw, "name", 2), _plural(draw.choice(WORDS["thing"]))
    start, given, bought = draw.randint(20, 90), draw.randint(3, 18), draw.randint(2, 40)
    times = draw.randint(2, 5)
    left = start - given
    end = left + times * bought
    return (
        f"{a} has {start} {thing}. {a} gives {given} of them to {b} and then buys {times} packs of "
        f"{bought} {thing} each. How many {thing} does {a} have now?",
        [
            f"After giving some to {b}, {a} has {start} - {given} = {left} {thing}.",
            f"The new packs hold {times} * {bought} = {times * bought} {thing}.",
            f"In total, {a} has {left} + {times * bought} = {end} {thing}.",
        ],
        str(end),
    )


def make_wage(draw: random.Random) -> Problem:
    """Make a problem of hours of work, and what is left of the wage."""
    name, job = draw.choice(WORDS["name"]), draw.choice(WORDS["work"])
    rate, hours, days = draw.randint(8, 40), draw.randint(2, 9), draw.randint(2, 6)
    spent = draw.randint(5, rate * hours)
    he, his = _pronoun(draw)
    daily, total = rate * hours, rate * hours * days
    return (
        f"{name} {job} for ${rate} an hour. Last week {he} worked {hours} hours a day on {days} "
        f"days, and spent ${spent} of {his} money on food. How much money was left?",
        [
            f"{name} earned {hours} * ${rate} = ${daily} a day.",
            f"That makes {days} * ${daily} = ${total} for the week.",
            f"So ${total} - ${spent} = ${total - spent} was left.",
        ],
        f"${total - spent}",
    )


def make_price(draw: random.Random) -> Problem:
    """Make a problem of prices and change."""
    (a,), shop = _words(draw, "name", 1), draw.choice(WORDS["shop"])
    x, y = _words(draw, "thing", 2)
    n, m, p, q = (draw.randint(2, 12) for _ in range(4))
    total = n * p + m * q
    note = next(value for value in (20, 50, 100, 200, 500) if value >= total)
    return (
        f"At the {shop}, one {x} costs ${p} and one {y} costs ${q}. {a} buys {n} {_plural(x)} and "
        f"{m} {_plural(y)}, and pays with ${note}. How much change does {a} get?",
        [
            f"The {_plural(x)} cost {n} x ${p} = ${n * p}.",
            f"The {_plural(y)} cost {m} x ${q} = ${m * q}.",
            f"Together they cost ${n * p} + ${m * q} = ${total}.",
            f"The change is ${note} - ${total} = ${note - total}.",
        ],
        f"${note - total}",
    )


def make_half(draw: random.Random) -> Problem:
    """Make a problem of half as many and several times as many."""
    a, b, c = _words(draw, "name", 3)
    thing, k = _plural(draw.choice(WORDS["thing"])), draw.randint(2, 6)
    half = draw.randint(4, 45)
    first = 2 * half
    return (
        f"{a} collected {first} {thing} in {draw.choice(WORDS['month'])}. {b} collected half as "
        f"many, and {c} collected {k} times as many as {b}. How many {thing} did they collect "
        "altogether?",
        [
            f"{b} collected {first} / 2 = {half} {thing}.",
            f"{c} collected {half} * {k} = {half * k} {thing}.",
            f"Altogether they collected {first} + {half} + {half * k} = "
            f"{first + half + half * k} {thing}.",
        ],
        str(first + half + half * k),
    )


def make_percent(draw: random.Random) -> Problem:
    """Make a problem of a part in percent, and the rest."""
    place, percent = draw.choice(WORDS["place"]), draw.choice((10, 20, 25, 30, 40, 50, 60, 75))
    total = 20 * draw.randint(2, 40)
    part = total * percent // 100
    who, what = draw.choice(
        (("students", "walk to class"), ("visitors", "are children"), ("workers", "come by bus"))
    )
    return (
        f"There are {total} {who} at the {place}. {percent}% of the {who} {what}. How many of them "
        "do not?",
        [
            f"The number of those who do is {total} * {percent} / 100 = {part}.",
            f"So {total} - {part} = {total - part} do not.",
        ],
        str(total - part),
    )


def make_farm(draw: random.Random) -> Problem:
    """Make a problem of the food of animals on a farm."""
    name, (x, y) = draw.choice(WORDS["name"]), _words(draw, "animal", 2)
    n, m, p, q, days = (draw.randint(2, 12) for _ in range(5))
    daily = n * p + m * q
    return (
        f"{name} has {n} {_plural(x)} and {m} {_plural(y)}. Each {x} eats {p} pounds of food a day "
        f"and each {y} eats {q} pounds. How many pounds of food are needed for {days} days?",
        [
            f"The {_plural(x)} eat {n} * {p} = {n * p} pounds a day.",
            f"The {_plural(y)} eat {m} * {q} = {m * q} pounds a day.",
            f"That is {n * p} + {m * q} = {daily} pounds a day.",
            f"For {days} days, {daily} * {days} = {daily * days} pounds are needed.",
        ],
        f"{daily * days} pounds",
    )


def make_trip(draw: random.Random) -> Problem:
    """Make a problem of speed, time and distance."""
    name, (a, b) = draw.choice(WORDS["name"]), _words(draw, "town", 2)
    speed, hours, rest = draw.randint(3, 18) * 5, draw.randint(2, 7), draw.randint(5, 60)
    far = speed * hours
    return (
        f"{name} drives from {a} to {b} at {speed} miles per hour. After {hours} hours there are "
        f"still {rest} miles to go. How far is it from {a} to {b}?",
        [
            f"In {hours} hours {name} drives {speed} * {hours} = {far} miles.",
            f"The whole way is {far} + {rest} = {far + rest} miles.",
        ],
        f"{far + rest} miles",
    )


def make_age(draw: random.Random) -> Problem:
    """Make a problem of ages now and in some years."""
    a, b = _words(draw, "name", 2)
    young, times, years = draw.randint(3, 15), draw.randint(2, 4), draw.randint(2, 12)
    old = young * times
    return (
        f"{a} is {times} times as old as {b}, who is {young}. In {years} years, how old will they "
        "be together?",
        [
            f"{a} is {young} * {times} = {old} years old.",
            f"Now they are {old} + {young} = {old + young} years old together.",
            f"In {years} years each is {years} years older, so together they will be "
            f"{old + young} + 2 * {years} = {old + young + 2 * years}.",
        ],
        str(old + young + 2 * years),
    )


def make_boxes(draw: random.Random) -> Problem:
    """Make a problem of boxes of equal size, and their cost."""
    name, thing = draw.choice(WORDS["name"]), _plural(draw.choice(WORDS["thing"]))
    size, boxes, lost = draw.randint(3, 24), draw.randint(3, 20), draw.randint(1, 9)
    total = size * boxes + lost
    return (
        f"{name} made {total} {thing}, but {lost} of them broke. The rest is packed "
        f"in boxes of {size}. How many boxes does {name} need, and what do they cost, if one box "
        "costs 50 cents?",
        [
            f"There are {total} - {lost} = {total - lost} {thing} left.",
            f"They fill {total - lost} / {size} = {boxes} boxes.",
            f"These cost {boxes} * $0.50 = ${boxes / 2:.2f}.",
        ],
        f"${boxes / 2:.2f}",
    )


def make_pages(draw: random.Random) -> Problem:
    """Make a problem of the pages of a book, read day after day."""
    name, (x, y) = draw.choice(WORDS["name"]), _words(draw, "weekday", 2)
    first, more, days = draw.randint(8, 50), draw.randint(2, 25), draw.randint(2, 9)
    second = first + more
    rest = days * draw.randint(4, 20)
    pages = first + second + rest
    return (
        f"{name} is reading a book of {pages} pages. On {x} {name} read {first} pages, and on {y} "
        f"{more} more than that. How many pages a day are left for the next {days} days?",
        [
            f"On {y} {name} read {first} + {more} = {second} pages.",
            f"So {first} + {second} = {first + second} pages are done.",
            f"There are {pages} - {first + second} = {rest} pages left.",
            f"That is {rest} / {days} = {rest // days} pages a day.",
        ],
        f"{rest // days} pages",
    )


def make_equation(draw: random.Random) -> Problem:
    """Make an equation to be solved for x."""
    x, a, b = draw.randint(2, 30), draw.randint(2, 12), draw.randint(1, 60)
    return (
        f"Solve {a}x + {b} = {a * x + b} for x.",
        [
            f"Subtract {b} from both sides: {a}x = {a * x + b} - {b} = {a * x}.",
            f"Divide by {a}: x = {a * x} / {a} = {x}.",
        ],
        f"x = {x}",
    )


def make_sums(draw: random.Random) -> Problem:
    """Make a bare sum and product."""
    a, b, c = draw.randint(11, 999), draw.randint(11, 999), draw.randint(2, 19)
    return (
        f"What is ({a} + {b}) * {c}?",
        [f"{a} + {b} = {a + b}", f"{a + b} * {c} = {(a + b) * c}"],
        f"{(a + b) * c:,}",
    )


MAKERS: tuple[Callable[[random.Random], Problem], ...] = (
    make_share, make_wage, make_price, make_half, make_percent, make_farm, make_trip, make_age,
    make_boxes, make_pages, make_equation, make_sums,
)  # fmt: skip


def write_problem(draw: random.Random) -> str:
    """Write a problem and its answer in one of several forms."""
    question, steps, result = draw.choice(MAKERS)(draw)
    form = draw.randrange(4)
    if form == 0:
        return f"{question}\n" + "\n".join(steps) + f"\nThe answer is {result}."
    if form == 1:
        return f"Question: {question}\nAnswer: {' '.join(steps)} So the answer is {result}."
    if form == 2:
        numbered = "\n".join(f"{n}. {step}" for n, step in enumerate(steps, start=1))
        return f"Problem. {question}\nSolution.\n{numbered}\nResult: {result}"
    return f"{question} {' '.join(steps)} Therefore the result is {result}."
