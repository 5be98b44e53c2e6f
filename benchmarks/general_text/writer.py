"""Fill in templates with words drawn by a seeded generator."""

from __future__ import annotations

import random
import re
from pathlib import Path

import yaml

HERE = Path(__file__).parent
WORDS: dict[str, list[str]] = yaml.safe_load((HERE / "words.yaml").read_text("utf-8"))
PHRASES: dict[str, list[str]] = yaml.safe_load((HERE / "phrases.yaml").read_text("utf-8"))
SLOT = re.compile(r"\{(\w+)(?: (\d+))?\}")
# Names in braces that stand for a number between two bounds.
NUMBERS = {
    "year": (1180, 2019),
    "number": (2, 98),
    "small": (2, 12),
    "day": (1, 28),
    "century": (13, 19),
}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "last")


class Writer:
    """Fills in templates; what it draws under a number stays the same for a document."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self._kept = draw, dict[str, str]()

    def fill(self, template: str) -> str:
        """Return the template with every brace replaced, a capital at its beginning."""
        filled = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", SLOT.sub(self._replace, template))
        return filled[:1].upper() + filled[1:]

    def say(self, kind: str) -> str:
        """Return one of the templates of a kind, filled in."""
        return self.fill(self.draw.choice(PHRASES[kind]))

    def pick(self, kind: str, count: int) -> list[str]:
        """Return several different templates of a kind, filled in."""
        return [self.fill(one) for one in self.draw.sample(PHRASES[kind], count)]

    def _replace(self, match: re.Match[str]) -> str:
        name, number = match.groups()
        if number is None:
            return self._draw_word(name)
        if match.group() not in self._kept:
            taken = [word for key, word in self._kept.items() if key.startswith(f"{{{name} ")]
            word = self._draw_word(name)
            while word in taken:
                word = self._draw_word(name)
            self._kept[match.group()] = word
        return self._kept[match.group()]

    def _draw_word(self, name: str) -> str:
        if name in NUMBERS:
            return str(self.draw.randint(*NUMBERS[name]))
        if name == "thousands":
            return f"{self.draw.randint(1, 480)},{self.draw.randint(0, 999):03}"
        return self.draw.choice(ORDINALS if name == "ordinal" else WORDS[name])
