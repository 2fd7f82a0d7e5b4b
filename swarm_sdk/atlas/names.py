"""Invented names and values: syllables, random letters, splices of real words, digits redrawn.

    Tavoril   Xqzbe   Nairobelsk   San Mekora de Lui   Örvik-Talon   Kel'dara   Povem (Hadri)

Half of what a small model must copy looks like real names and half like nothing at all, so that
it learns to copy whatever stands there.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from functools import cache, partial

from swarm_sdk.atlas.pages import world
from swarm_sdk.atlas.vocabulary import COMMON_WORDS, CONNECTORS, PREFIXES, SUFFIXES

ONSETS = (
    *("b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "y"),
    *("b", "d", "k", "l", "m", "n", "r", "s", "t", "", "", "z", "br", "ch", "gr", "kh", "sh", "th"),
)
VOWELS = (*"aeiouaeioaeio", "ai", "ou", "ei", "ia", "y", "ua")
CODAS = (
    *[""] * 8,
    "n",
    "r",
    "l",
    "s",
    "m",
    "t",
    "k",
    "n",
    "r",
    "l",
    "ng",
    "rd",
    "st",
    "nd",
    "x",
    "p",
)
ACCENTS = dict(
    zip(
        "aeiouncsz",
        ("áàâäãåā", "éèêëē", "íìîïī", "óòôöõøō", "úùûüū", "ñ", "ç", "ş", "ž"),
        strict=True,
    )
)


@cache
def real_words() -> tuple[str, ...]:
    """The words of the training titles, as material for splices."""
    titles = (e.title for e in world("train").entities)
    heldout = {e.title for e in world("heldout").entities}
    words = {w.strip("(),") for title in titles for w in title.split()} - heldout
    return tuple(sorted(w for w in words if len(w) >= 3 and w[0].isupper()))


class Names:
    """Draws names and values; no title is drawn twice."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._used: set[str] = set()

    def word(self) -> str:
        """One capitalised word."""
        makers = (self._syllables, self._letters, self._splice, self._real)
        word = self.rng.choices(makers, (40, 15, 33, 12))[0]()
        if self.rng.random() < 0.15:
            word = self._accented(word)
        return word[:1].upper() + word[1:]

    def name(self) -> str:
        """One to four words, as titles are.

        In the patterns w stands for a word, p a prefix, s a suffix, c a connector, # a number.
        """
        rng = self.rng
        pattern = rng.choices(
            ("w", "w w", "p w", "w s", "w c w", "w-w", "w'w", "w w w", "w (w)", "w #", "w and w"),
            (58, 15, 6, 5, 4, 3, 2, 1, 3, 2, 1),
        )[0]
        parts: dict[str, Callable[[], str]] = {
            "w": self.word,
            "p": lambda: rng.choice(PREFIXES),
            "s": lambda: rng.choice(SUFFIXES),
            "c": lambda: rng.choice(CONNECTORS),
            "#": lambda: str(rng.randint(1, 999)),
        }
        if pattern == "w and w":
            return f"{self.word()} and {self.word()}"
        return "".join(parts[c]() if c in parts else c for c in pattern).strip()

    def title(self) -> str:
        """A name that is no other title."""
        return self._fresh(self.name)

    def cluster(self, num_titles: int) -> list[str]:
        """``num_titles`` titles; about a third of them resemble another one."""
        titles: list[str] = []
        while len(titles) < num_titles:
            if titles and self.rng.random() < 0.35:
                titles.append(self._fresh(partial(self._similar, self.rng.choice(titles))))
            else:
                titles.append(self.title())
        return titles

    def attribute(self) -> str:
        """An invented attribute: one or two small words."""
        rng = self.rng

        def draw() -> str:
            words = [self.word() if rng.random() < 0.75 else rng.choice(COMMON_WORDS)]
            if rng.random() < 0.35:
                words.append(
                    self.word()
                    if rng.random() < 0.5
                    else rng.choice(("code", "year", "rate", "number", "index", "point"))
                )
            return " ".join(words).lower().replace("-", "").replace("'", "")

        return self._fresh(draw)

    def value(self, look: str) -> str:
        """A value that looks as ``look`` says (the second column of ``vocabulary.ATTRIBUTES``)."""
        rng = self.rng
        match look:
            case "digit":
                return str(rng.randint(1, 9))
            case "count":
                return str(rng.randint(1, 10 ** rng.randint(1, 3)))
            case "large":
                return self._digits(rng.randint(3, 10))
            case "digits":
                return self._digits(rng.randint(2, 6))
            case "decimal":
                fraction = f"{rng.randint(0, 99):02d}" + rng.choice(("", "", "5", "7"))
                return f"{self._digits(rng.randint(1, 4))}.{fraction}"
            case "degrees":
                return f"{rng.uniform(-180, 180):.2f}"
            case "year":
                return str(rng.randint(1000, 2099))
            case "letter":
                return rng.choice(string.ascii_lowercase)
            case "code":
                code = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 4)))
                return code if rng.random() < 0.7 else code.title()
            case "mixed":
                letters = "".join(rng.choices(string.ascii_uppercase, k=2))
                return f"{letters}{rng.choice(('', '-', ' '))}{rng.randint(1, 9999)}"
            case "domain":
                return "." + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 3)))
            case "word":
                return rng.choice(COMMON_WORDS) if rng.random() < 0.6 else self.word().lower()
            case "phrase":
                return f"{rng.choice(COMMON_WORDS)} {self.value('word')}"
            case "path":
                return f"{self.word()}/{self.word()}" + (
                    f"_{self.word()}" if rng.random() < 0.25 else ""
                )
            case "codes":
                return ", ".join(self._code() for _ in range(rng.randint(1, 3)))
            case "names":
                return ", ".join(self.name() for _ in range(rng.randint(1, 4)))
            case "name":
                return self.name()
        raise AssertionError(look)

    def _code(self) -> str:
        return "".join(self.rng.choices(string.ascii_lowercase, k=self.rng.randint(2, 3)))

    def _digits(self, num_digits: int) -> str:
        first = self.rng.choice("123456789")
        return first + "".join(self.rng.choices(string.digits, k=num_digits - 1))

    def _fresh(self, draw: Callable[[], str]) -> str:
        while True:
            name = draw()
            if name.lower() not in self._used:
                self._used.add(name.lower())
                return name

    def _syllables(self) -> str:
        rng = self.rng
        return "".join(
            rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
            for _ in range(rng.choices((1, 2, 3), (15, 60, 25))[0])
        )

    def _letters(self) -> str:
        return "".join(self.rng.choices(string.ascii_lowercase, k=self.rng.randint(3, 6)))

    def _splice(self) -> str:
        one, two = self.rng.sample(real_words(), 2)
        head = one[: self.rng.randint(2, min(5, len(one)))]
        return head + two[-self.rng.randint(2, min(5, len(two))) :].lower()

    def _real(self) -> str:
        return self.rng.choice(real_words())

    def _accented(self, word: str) -> str:
        spots = [i for i, c in enumerate(word) if c in ACCENTS]
        if not spots:
            return word
        i = self.rng.choice(spots)
        return word[:i] + self.rng.choice(ACCENTS[word[i]]) + word[i + 1 :]

    def _similar(self, base: str) -> str:
        stem = base.split(" (", maxsplit=1)[0]
        match self.rng.randrange(5):
            case 0:
                return f"{stem} ({self.word()})"
            case 1:
                return f"{stem} {self.rng.choice((*SUFFIXES, self.word()))}"
            case 2:
                return f"{self.rng.choice((*PREFIXES, self.word()))} {stem}"
            case 3:
                return stem[: max(2, len(stem) - 2)] + self._syllables()
        words = stem.split()
        words[self.rng.randrange(len(words))] = self.word()
        return " ".join(words)
