"""HTML to plain text with code kept as fences: posts of question sites, mails, scraped answers.

    html_to_text("<p>Use <code>x</code>:</p><pre><code>print(1)</code></pre>")  ->  "Use `x`:\\n\\n```\\nprint(1)\\n```"

Standard library only. Scripts, styles and comments are removed; lists get dashes or numbers, quotes get "> ", links keep their
text.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

_BLOCKS = {"p", "div", "section", "article", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "table", "blockquote", "pre", "hr"}
_SILENT = {"script", "style", "head", "title", "template", "noscript"}
_DECLARATION = re.compile(r"<[!?][^>]*>")
_DEPTH = 20  # of quotes and lists in each other that are drawn
_VOID = {"br", "hr", "img"}
_TAG = re.compile(
    r"</?(p|div|br|span|a|b|i|u|em|strong|code|pre|ul|ol|li|blockquote|h[1-6]|table|tr|td|th|img|sub|sup|hr|font)(\s[^<>]*)?/?>",
    re.I,
)


def looks_like_html(text: str) -> bool:
    """Two or more tags of ordinary markup."""
    return text.count("<") >= 2 and sum(1 for _, _match in zip(range(2), _TAG.finditer(text), strict=False)) == 2


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0
        self.pre = 0
        self.quotes: list[int] = []
        self.lists: list[int | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SILENT:
            self.silent += 1
        elif tag == "br":
            self.parts.append("\n")
        elif tag == "pre":
            self.pre += 1
            self.parts.append("\n\n```\n")
        elif tag == "code" and not self.pre:
            self.parts.append("`")
        elif tag in ("ul", "ol"):
            self.lists.append(1 if tag == "ol" else None)
            self.parts.append("\n\n")
        elif tag == "li":
            mark = "- "
            if self.lists and self.lists[-1] is not None:
                mark = f"{self.lists[-1]}. "
                self.lists[-1] += 1
            self.parts.append("\n" + "  " * min(len(self.lists) - 1, _DEPTH) + mark)
        elif tag == "blockquote":
            self.parts.append("\n\n")
            self.quotes.append(len(self.parts))
        elif tag in ("tr",):
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")
        elif tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SILENT:
            self.silent = max(0, self.silent - 1)
        elif tag == "pre" and self.pre:
            self.pre -= 1
            if self.parts and self.parts[-1].endswith("\n"):
                self.parts[-1] = self.parts[-1].rstrip("\n")
            self.parts.append("\n```\n\n")
        elif tag == "code" and not self.pre:
            self.parts.append("`")
        elif tag in ("ul", "ol") and self.lists:
            self.lists.pop()
            self.parts.append("\n\n")
        elif tag == "blockquote" and self.quotes:
            start = self.quotes.pop()
            if len(self.quotes) >= _DEPTH:
                return
            inner = _tidy("".join(self.parts[start:]))
            self.parts[start:] = ["\n".join(f"> {line}".rstrip() for line in inner.split("\n")), "\n\n"]
        elif tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_to_text(html: str) -> str:
    """Plain text of an HTML fragment; never raises on broken markup."""
    reader = _Reader()
    reader.feed(_with_ends(html))
    reader.close()
    return _tidy("".join(reader.parts))


def _with_ends(html: str) -> str:
    """The markup without comments and declarations, in which everything that is opened ends.

    The parser of the standard library looks for the end of each `<` and `<!--` up to the end of the text, which takes quadratic
    time, and raises AssertionError for some `<![`.
    """
    parts, position = list[str](), 0
    while (start := html.find("<!--", position)) >= 0:
        end = html.find("-->", start + 4)
        if end < 0:
            break
        parts.append(html[position:start])
        position = end + 3
    whole, mark, rest = ("".join(parts) + html[position:]).rpartition(">")
    whole = _DECLARATION.sub("", whole + mark)
    return whole + rest.replace("<", "&lt;")


def _tidy(text: str) -> str:
    pieces = re.split(r"(^```\n.*?^```$)", text, flags=re.M | re.S)
    for k in range(0, len(pieces), 2):
        piece = re.sub(r"[^\S\n]+", " ", pieces[k])
        piece = re.sub(r" ?\n(?! +(?:- |\d+\. )) ?", "\n", piece)
        pieces[k] = re.sub(r"\n{3,}", "\n\n", piece)
    return "".join(pieces).strip()
