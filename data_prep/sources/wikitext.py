"""One page's wikitext in, its prose out: what would be read aloud from the article.

Removed: templates (but for the few that stand for words of a sentence), tables, references,
comments, files, categories, formulas, galleries, headings, and the sections that only point
elsewhere. Kept: the text of links, lists (a line an item), the content of other HTML tags. Headings
go because they are no sentences (Devlin et al. 2019, section 3.1: "we extract only the text
passages").

mwparserfromhell's tokenizer does the parsing; its tree of nodes is not built, since that takes five
times as long as the tokens.
"""

import html
import importlib
import re
from collections.abc import Callable
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(" ".join(text.split()).split(", "))


# Tags whose content is no prose.
_DROPPED_TAGS = _names(
    """ref, references, math, chem, ce, gallery, table, timeline, score, hiero, syntaxhighlight,
    source, pre, imagemap, graph, mapframe, maplink, templatedata, templatestyles, categorytree,
    inputbox, indicator, includeonly, style, script, del, s, strike, section"""
)
# Tags that end a paragraph.
_BLOCK_TAGS = _names("br, p, div, center, blockquote, li, ul, ol, dl, dt, dd, hr, poem")
# Sections of English articles that hold no prose, in lower case.
_DROPPED_SECTIONS = _names(
    """see also, references, external links, further reading, notes, bibliography, footnotes,
    citations, sources, works cited, literature cited, notes and references, references and notes,
    references and further reading, external links and references"""
)
# Templates of the English Wikipedia that stand for words of a sentence, and which of their
# arguments those are, -1 for the last. The name `lang-xx` is like `nowrap`.
_SPOKEN_TEMPLATES = {
    **dict.fromkeys(
        _names(
            """nowrap, nobr, small, smaller, big, larger, em, strong, nihongo, angbr, vanchor, sc,
            smallcaps, abbr, tooltip, mono, mvar, var, flag, flagcountry, quote, blockquote,
            cquote, quotation, ill"""
        ),
        1,
    ),
    **dict.fromkeys(_names("lang, color"), 2),
    **dict.fromkeys(_names("transl, transliteration"), -1),
}
_MEASURES = ("convert", "cvt")
# What stands before the unit in `{{convert|5|to|7|km}}`.
_OF_A_MEASURE = re.compile(r"[-+\d.,/e]+|to|and|or|by|x|\u2013|\u2212")
# Names that every wiki knows besides those of its own language.
_DROPPED_NAMESPACES = frozenset({"file", "image", "media", "category"})
_MEDIA_FILE = re.compile(r"\.(?:jpe?g|png|gif|svg|tiff?|webp|og[agv]|webm|mp3|wav|pdf|djvu)$")
_LANGUAGE_CODE = re.compile(r"(?:[a-z]{2,3}(?:-[a-z-]+)?|simple)$")

_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_LINE_OF_BROKEN_TABLE = re.compile(r"^[ \t]*(?:\{\||\|).*$", re.MULTILINE)
_WORD_CHARACTER = re.compile(r"[^\W_]")
_QUOTES = re.compile("'{5}|'{3}|'{2}")
_APOSTROPHE_AND_ITALIC = re.compile(r"(?<=[^\s'])'''(?!')")

# Stands where something was removed, until the punctuation around it is mended.
_GAP = "\0"
_EMPTY_BRACKETS = re.compile(r"[ \t]*\([\s,;:\0]*\0[\s,;:\0]*\)")
_GAP_BEHIND_BRACKET = re.compile(r"\([\s,;:]*\0[\s,;:\0]*")
_GAP_BETWEEN_COMMAS = re.compile(r",(?:[ \t]*\0[ \t\0]*,)+")
_GAP_BEFORE_MARK = re.compile(r"[ \t]*\0[ \t\0]*(?=[,.;:)])")

# A token is a dictionary whose class says what it is; the package ships no types for them.
_Token = Any


class WikiText:
    """Extracts prose; `namespaces` are the names of the wiki's file and category pages in its own
    language.
    """

    def __init__(self, namespaces: frozenset[str] = frozenset()) -> None:
        self._namespaces = _DROPPED_NAMESPACES | {name.lower() for name in namespaces}
        self._tokenize = _tokenizer()

    def prose(self, wikitext: str) -> str:
        """Return the prose, a line a paragraph; empty when there is none."""
        # The last argument leaves '' and ''' as text: as tags they break where they do not nest.
        tokens = self._tokenize(wikitext.replace(_GAP, ""), 0, True)
        return _mended(_Walk(tokens, self._namespaces).text())


class _Walk:
    """One walk over the tokens of a page. Each handler returns the index to go on at."""

    def __init__(self, tokens: list[_Token], namespaces: frozenset[str]) -> None:
        self._tokens = tokens
        self._kinds = [type(token).__name__ for token in tokens]
        self._namespaces = namespaces
        self._out: list[str] = []
        # What was being written where an open link or heading began, and the link's title once it
        # is read.
        self._outer: list[tuple[list[str], str | None]] = []
        self._kept: list[str] = []
        self._dropped_level = 0
        """Level of the dropped section that we are in, 0 for none."""
        self._handlers: dict[str, Callable[[int], int]] = {
            "TemplateOpen": self._open_template,
            "ArgumentOpen": self._skip_argument,
            "CommentStart": self._skip_comment,
            "TagOpenOpen": self._open_tag,
            "TagOpenClose": self._close_tag,
            "WikilinkOpen": self._open,
            "WikilinkSeparator": self._separate_wikilink,
            "WikilinkClose": self._close_wikilink,
            "ExternalLinkOpen": self._open,
            "ExternalLinkSeparator": self._separate,
            "ExternalLinkClose": self._close_external_link,
            "HeadingStart": self._open_heading,
            "HTMLEntityStart": self._entity,
        }

    def text(self) -> str:
        """Return the text outside dropped sections, with its gaps."""
        self._write(0, len(self._kinds))
        self._end_section()
        return "".join(self._kept)

    def _write(self, i: int, end: int) -> None:
        kinds, tokens = self._kinds, self._tokens
        while i < end:
            if kinds[i] == "Text":
                self._out.append(tokens[i]["text"])
                i += 1
            else:
                i = self._handlers.get(kinds[i], self._pass)(i)

    def _behind(self, i: int, start: str, *ends: str) -> int:
        """Return the index behind the end that belongs to the start at `i`."""
        depth = 0
        for j in range(i, len(self._kinds)):
            if self._kinds[j] == start:
                depth += 1
            elif self._kinds[j] in ends:
                depth -= 1
                if not depth:
                    return j + 1
        return len(self._kinds)

    def _pass(self, i: int) -> int:
        return i + 1

    def _open_template(self, i: int) -> int:
        end = self._behind(i, "TemplateOpen", "TemplateClose")
        name = self._name(i)
        number = 1 if name.startswith("lang-") else _SPOKEN_TEMPLATES.get(name, 0)
        arguments = self._arguments(i, end) if number or name in _MEASURES else []
        if name in _MEASURES:
            arguments = self._measure(arguments)
        else:
            arguments = arguments[number - 1 :][:1] if number > 0 else arguments[number:]
        for count, (start, stop) in enumerate(arguments):
            self._out.append(" " if count else "")
            self._write(start, stop)
        if not arguments:
            self._out.append(_GAP)
        return end

    def _arguments(self, i: int, end: int) -> list[tuple[int, int]]:
        """Return the tokens, from and to, of each argument without a name."""
        depth, bars, is_named = 0, [], set()
        for j in range(i, end):
            kind = self._kinds[j]
            depth += (kind == "TemplateOpen") - (kind == "TemplateClose")
            if depth == 1 and kind == "TemplateParamSeparator":
                bars.append(j)
            elif depth == 1 and kind == "TemplateParamEquals":
                is_named.add(len(bars))
        ends = [*bars[1:], end - 1]
        return [
            (bar + 1, stop)
            for number, (bar, stop) in enumerate(zip(bars, ends, strict=False), 1)
            if number not in is_named
        ]

    def _measure(self, arguments: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the arguments of a measure up to its unit."""
        for count, (start, stop) in enumerate(arguments, 1):
            text = "".join(token["text"] or "" for token in self._tokens[start:stop])
            if not _OF_A_MEASURE.fullmatch(text.strip()):
                return arguments[:count]
        return arguments

    def _skip_argument(self, i: int) -> int:
        self._out.append(_GAP)
        return self._behind(i, "ArgumentOpen", "ArgumentClose")

    def _skip_comment(self, i: int) -> int:
        return self._behind(i, "CommentStart", "CommentEnd")

    def _open_tag(self, i: int) -> int:
        name = self._name(i)
        if name in _DROPPED_TAGS:
            self._out.append(_GAP)
            return self._behind(i, "TagOpenOpen", "TagCloseSelfclose", "TagCloseClose")
        if name in _BLOCK_TAGS:
            self._out.append("\n")
        return self._behind_opening(i)

    def _close_tag(self, i: int) -> int:
        if self._name(i) in _BLOCK_TAGS:
            self._out.append("\n")
        return self._kinds.index("TagCloseClose", i) + 1

    def _name(self, i: int) -> str:
        """Return the name of the tag or template that begins at `i`, in lower case."""
        is_plain = self._kinds[i + 1] == "Text"
        return str(self._tokens[i + 1]["text"]).strip().lower() if is_plain else ""

    def _behind_opening(self, i: int) -> int:
        """Return the index behind `<name attributes>`; attributes may hold whole tags."""
        i += 1
        while self._kinds[i] not in ("TagCloseOpen", "TagCloseSelfclose"):
            if self._kinds[i] == "TagOpenOpen":
                i = self._behind(i, "TagOpenOpen", "TagCloseSelfclose", "TagCloseClose")
            else:
                i += 1
        return i + 1

    def _open(self, i: int) -> int:
        self._outer.append((self._out, None))
        self._out = []
        return i + 1

    def _separate(self, i: int) -> int:
        self._outer[-1] = (self._outer[-1][0], "".join(self._out))
        self._out = []
        return i + 1

    def _separate_wikilink(self, i: int) -> int:
        if self._outer[-1][1] is not None:  # a second bar is text
            self._out.append("|")
            return i + 1
        self._separate(i)
        if not self._is_dropped_link(self._outer[-1][1] or ""):
            return i + 1
        self._out, _ = self._outer.pop()
        depth = 1
        while depth:
            i += 1
            depth += (self._kinds[i] == "WikilinkOpen") - (self._kinds[i] == "WikilinkClose")
        return i + 1

    def _close_wikilink(self, i: int) -> int:
        outer, title = self._outer.pop()
        text = "".join(self._out)
        self._out = outer
        if title is None:
            prefix, colon, _ = text.strip().partition(":")
            is_translation = bool(colon and _LANGUAGE_CODE.match(prefix))
            if not is_translation and not self._is_dropped_link(text):
                outer.append(text.strip().removeprefix(":"))
        else:
            outer.append(text if text.strip() else title.strip().removeprefix(":"))
        return i + 1

    def _is_dropped_link(self, title: str) -> bool:
        title = title.strip().lower().replace("_", " ")
        prefix, colon, _ = title.partition(":")
        is_named = bool(colon and prefix.strip() in self._namespaces)
        return is_named or bool(colon and prefix and _MEDIA_FILE.search(title))

    def _close_external_link(self, i: int) -> int:
        outer, address = self._outer.pop()
        outer.append("".join(self._out) if address is not None else _GAP)
        self._out = outer
        return i + 1

    def _open_heading(self, i: int) -> int:
        """Read the whole heading: it decides whether the section that begins here is dropped."""
        end = self._behind(i, "HeadingStart", "HeadingEnd")
        texts = (t["text"] for t in self._tokens[i:end] if type(t).__name__ == "Text")
        title = " ".join(_QUOTES.sub("", "".join(texts)).lower().split())
        if self._outer:  # inside a link: no section of the page
            return end
        self._end_section()
        level = int(self._tokens[i]["level"])
        if not self._dropped_level or level <= self._dropped_level:
            self._dropped_level = level if title in _DROPPED_SECTIONS else 0
        self._out.append("\n")
        return end

    def _end_section(self) -> None:
        if not self._dropped_level:
            self._kept += self._out
        self._out = []

    def _entity(self, i: int) -> int:
        end = self._kinds.index("HTMLEntityEnd", i)
        signs = {"HTMLEntityNumeric": "#", "HTMLEntityHex": "x"}
        inner = (
            signs.get(kind) or token["text"]
            for kind, token in zip(self._kinds[i + 1 : end], self._tokens[i + 1 : end], strict=True)
        )
        self._out.append(html.unescape(f"&{''.join(inner)};").replace(_GAP, ""))
        return end + 1


def _mended(text: str) -> str:
    """Close the gaps, and drop what is left of markup."""
    text = _LINE_OF_BROKEN_TABLE.sub("", _MAGIC_WORD.sub("", text))
    lines = (_without_quotes(line) if "''" in line else line for line in text.split("\n"))
    text = "\n".join(lines)
    if _GAP in text:
        text = _GAP_BEHIND_BRACKET.sub("(", _EMPTY_BRACKETS.sub("", text))
        text = _GAP_BETWEEN_COMMAS.sub(",", text)
        text = _GAP_BEFORE_MARK.sub("", text).replace(_GAP, "")
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if _WORD_CHARACTER.search(line))


def _without_quotes(line: str) -> str:
    """Remove the marks of italic and bold; where neither is closed, one ''' is an apostrophe and
    italic, as in "''Time'''s" (MediaWiki's rule).
    """
    sizes = [len(match[0]) for match in _QUOTES.finditer(line)]
    num_italic, num_bold = len(sizes) - sizes.count(3), len(sizes) - sizes.count(2)
    if num_italic % 2 and num_bold % 2:
        line = _APOSTROPHE_AND_ITALIC.sub("'", line, count=1)
    return _QUOTES.sub("", line)


def _tokenizer() -> Callable[[str, int, bool], list[_Token]]:
    """Return the tokenizer in C, or the one in Python where the package was built without it."""
    try:
        tokenizer = importlib.import_module("mwparserfromhell.parser._tokenizer").CTokenizer()
    except ImportError:
        tokenizer = importlib.import_module("mwparserfromhell.parser.tokenizer").Tokenizer()
    tokenize: Callable[[str, int, bool], list[_Token]] = tokenizer.tokenize
    return tokenize
