"""Pages of text, searched by words.

    from_pages   [Page(title, text), …]        ─┐
    from_folder  *.txt *.md *.html, recursive  ─┴─> SQLite FTS5, ranked by BM25

A page's title is its address: ``search`` gives titles, ``page`` takes one. A word in the title
counts ``TITLE_WEIGHT`` times as much as in the text, and a page whose whole title stands in the
query comes first. Case, accents and English word endings do not matter. Whatever the query holds
is taken as words, never as FTS5 syntax.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import unicodedata
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from swarm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TITLE_WEIGHT = 5.0
MAX_PAGE_CHARS = 4000
"""Longer files become several pages."""
MAX_SNIPPET_CHARS = 80
_MAX_QUERY_WORDS = 32
_SUFFIXES = (".txt", ".md", ".html", ".htm")
_WORD = re.compile(r"[^\W_]+")
_MARKDOWN_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.*?)[ \t#]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a corpus."""

    title: str
    """One line, unique in the corpus."""
    text: str


@dataclass(frozen=True, slots=True)
class Hit:
    """One page that a search found."""

    title: str
    snippet: str
    """At most ``MAX_SNIPPET_CHARS`` characters: where the words stand, else the text's start."""


class Corpus:
    """Pages in memory; safe to read from several threads.

    Args:
        pages: what to search. Titles must be unique, not empty, and of one line.
        num_skipped: files that ``from_folder`` could not read.

    Raises:
        ConfigError: a title is empty, of several lines, or given twice.
    """

    def __init__(self, pages: Iterable[Page], *, num_skipped: int = 0) -> None:
        self.num_skipped = num_skipped
        self._rows: dict[str, int] = {}
        self._folded: dict[str, int] = {}
        self._by_words: dict[str, int] = {}
        self._max_page_chars = 0
        self._lock = threading.Lock()
        self._db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._db.execute(
            "CREATE VIRTUAL TABLE pages USING fts5(title, text, "
            "tokenize = 'porter unicode61 remove_diacritics 2')"
        )
        self._db.execute("BEGIN")
        self._db.executemany(
            "INSERT INTO pages(rowid, title, text) VALUES (?, ?, ?)", self._add(pages)
        )
        self._db.execute("COMMIT")
        ranking = f"bm25({TITLE_WEIGHT}, 1.0)"
        self._db.execute("INSERT INTO pages(pages, rank) VALUES ('rank', ?)", (ranking,))

    def _add(self, pages: Iterable[Page]) -> Iterator[tuple[int, str, str]]:
        for row, page in enumerate(pages, start=1):
            if not page.title.strip() or len(page.title.splitlines()) > 1:
                raise ConfigError(f"a page's title must be one line of text, got {page.title!r}")
            if page.title in self._rows:
                raise ConfigError(f"two pages are titled '{page.title}'; rename one of them")
            self._rows[page.title] = row
            folded = _fold(page.title)
            self._folded.setdefault(folded, row)
            self._by_words.setdefault(" ".join(_WORD.findall(folded)), row)
            self._max_page_chars = max(self._max_page_chars, len(page.text))
            yield row, page.title, page.text

    @staticmethod
    def from_pages(pages: Iterable[Page]) -> Corpus:
        """Index pages that are at hand (8,000 of them take about 0.2 s).

        Raises:
            ConfigError: as ``Corpus``.
        """
        return Corpus(pages)

    @staticmethod
    def from_folder(path: Path | str) -> Corpus:
        """Index a folder's .txt, .md and .html files, subfolders included.

        The title is the first heading, else the file's stem; where two files would share one, both
        take their relative path. A file of more than ``MAX_PAGE_CHARS`` becomes pages titled
        "TITLE (part 1 of 3)". Hidden folders are left out. Files that are empty, unreadable or not
        UTF-8 text are counted in ``num_skipped``.

        Raises:
            ConfigError: the folder is missing or holds no document.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"there is no folder '{folder}'; check the path")
        documents: dict[str, tuple[str, list[str]]] = {}
        num_skipped = 0
        for file in _files(folder):
            name = file.relative_to(folder).as_posix()
            text = _read(file)
            title, body = ("", "") if text is None else _parse(file, text)
            if body.strip():
                documents[name] = (title, _split(body))
            else:
                num_skipped += 1
        if not documents:
            raise ConfigError(
                f"the folder '{folder}' holds no .txt, .md or .html document with text in it"
            )
        return Corpus(_titled(documents), num_skipped=num_skipped)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def titles(self) -> tuple[str, ...]:
        """All titles, in the order of the pages."""
        return tuple(self._rows)

    @property
    def max_page_chars(self) -> int:
        """Length of the longest page."""
        return self._max_page_chars

    def search(self, query: str, limit: int = 4) -> list[Hit]:
        """Find the pages that fit best, best first; pages that the query names come before others.

        A page is named where its whole title stands in the query ("capital of South Korea"). Any
        text is a query; pages that hold none of its words are not found.
        """
        words = list(dict.fromkeys(_WORD.findall(query)))[:_MAX_QUERY_WORDS]
        if not words or limit < 1:
            return []
        match = " OR ".join(f'"{word}"' for word in words)
        with self._lock:
            best = self._db.execute(
                "SELECT rowid FROM pages WHERE pages MATCH ? ORDER BY rank, rowid LIMIT ?",
                (match, limit),
            ).fetchall()
            rows = dict.fromkeys([*self._named_in(query), *(row for (row,) in best)])
            hits = (self._hit(match, row) for row in rows)
            return list(islice((hit for hit in hits if hit is not None), limit))

    def _named_in(self, query: str) -> list[int]:
        """Rows of the pages whose titles stand in the query, longest title first."""
        words = _WORD.findall(_fold(query))[:_MAX_QUERY_WORDS]
        return [
            self._by_words[key]
            for length in range(len(words), 0, -1)
            for start in range(len(words) - length + 1)
            if (key := " ".join(words[start : start + length])) in self._by_words
        ]

    def _hit(self, match: str, row: int) -> Hit | None:
        found = self._db.execute(
            "SELECT title, snippet(pages, 1, '', '', '', 16) FROM pages "
            "WHERE pages MATCH ? AND rowid = ?",
            (match, row),
        ).fetchone()
        return None if found is None else Hit(found[0], _one_line(found[1]))

    def page(self, title: str) -> Page | None:
        """Give the page of this title: exactly, else whatever the case and the accents."""
        row = self._rows.get(title) or self._folded.get(_fold(title))
        if row is None:
            return None
        with self._lock:
            found = self._db.execute("SELECT title, text FROM pages WHERE rowid = ?", (row,))
            return Page(*found.fetchone())


def _fold(text: str) -> str:
    """Without case, accents and runs of spaces."""
    parts = unicodedata.normalize("NFKD", text)
    bare = "".join(char for char in parts if not unicodedata.combining(char))
    return " ".join(bare.casefold().split())


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    if len(line) <= MAX_SNIPPET_CHARS:
        return line
    cut = line[: MAX_SNIPPET_CHARS + 1]
    return cut.rpartition(" ")[0] or line[:MAX_SNIPPET_CHARS]


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(_SUFFIXES):
                yield Path(root, name)


def _read(file: Path) -> str | None:
    """Give the file's text; ``None`` where it cannot be read as such."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


def _parse(file: Path, text: str) -> tuple[str, str]:
    """Title and text of a document."""
    if file.suffix.lower() in (".html", ".htm"):
        parser = _HtmlText()
        parser.feed(text)
        parser.close()
        return parser.heading or file.stem, parser.text
    if file.suffix.lower() == ".md":
        heading = next((one[1].strip() for one in _MARKDOWN_HEADING.finditer(text) if one[1]), "")
        return " ".join(heading.split()) or file.stem, text
    return file.stem, text


def _split(text: str) -> list[str]:
    """Cut a text in parts of at most ``MAX_PAGE_CHARS``, at paragraphs, else lines, else words."""
    parts = []
    rest = text.strip()
    while len(rest) > MAX_PAGE_CHARS:
        window = rest[: MAX_PAGE_CHARS + 1]
        cuts = (window.rfind(mark) for mark in ("\n\n", "\n", " "))
        cut = next((cut for cut in cuts if cut >= MAX_PAGE_CHARS // 2), MAX_PAGE_CHARS)
        parts.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*parts, rest] if rest else parts


def _titled(documents: dict[str, tuple[str, list[str]]]) -> list[Page]:
    """Name the parts of all documents; where titles collide, the paths take their place."""
    titles = {name: title for name, (title, _) in documents.items()}
    while True:
        pages = [
            (name, Page(_part_title(titles[name], index, len(parts)), part))
            for name, (_, parts) in documents.items()
            for index, part in enumerate(parts, start=1)
        ]
        num_of = Counter(page.title for _, page in pages)
        doubles = {name for name, page in pages if num_of[page.title] > 1}
        renamed = {name for name in doubles if titles[name] != name}
        if not renamed:
            return [page for _, page in pages]
        titles.update({name: name for name in renamed})


def _part_title(title: str, index: int, num_parts: int) -> str:
    return title if num_parts == 1 else f"{title} (part {index} of {num_parts})"


class _HtmlText(HTMLParser):
    """The readable text of an HTML document, a line per block, and its first heading."""

    _HIDDEN = frozenset({"script", "style", "template", "noscript", "svg"})
    _HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
    _BLOCKS = _HEADINGS | {
        *("address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "div", "dl"),
        *("dt", "figure", "figcaption", "footer", "form", "head", "header", "hr", "li", "main"),
        *("nav", "ol", "p", "pre", "section", "table", "title", "tr", "ul"),
    }

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._num_hidden = 0
        self._open_title = ""
        self._titles: dict[str, str] = {}

    @property
    def heading(self) -> str:
        """The first heading, else the document's title, on one line."""
        found = (" ".join(self._titles.get(kind, "").split()) for kind in ("heading", "title"))
        return next(filter(None, found), "")

    @property
    def text(self) -> str:
        lines = (" ".join(line.split()) for line in "".join(self._parts).split("\n"))
        return "\n".join(line for line in lines if line)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        if tag in self._HIDDEN:
            self._num_hidden += 1
        if tag in self._BLOCKS:
            self._parts.append("\n- " if tag == "li" else "\n")
        if tag in ("td", "th") and self._parts and not self._parts[-1].endswith("\n"):
            self._parts.append(" | ")
        kind = "heading" if tag in self._HEADINGS else tag
        if kind in ("heading", "title") and not self._titles.get(kind, "").strip():
            self._open_title = kind
            self._titles[kind] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in self._HIDDEN:
            self._num_hidden = max(0, self._num_hidden - 1)
        if tag in self._BLOCKS:
            self._parts.append("\n")
        if tag in self._HEADINGS or tag == "title":
            self._open_title = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self._HIDDEN:
            self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        if self._num_hidden:
            return
        if self._open_title:
            self._titles[self._open_title] += data
        if self._open_title != "title":
            self._parts.append(" ".join(data.split("\n")))
