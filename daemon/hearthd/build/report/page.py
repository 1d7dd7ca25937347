"""The page of a build's report: HTML that needs nothing but itself, and forbids a browser to load anything else.

Knows texts and tables, no builds. What it is given is text and is escaped, but for arguments that are called `html`.
Called by `report` and `report_plots`.
"""

from __future__ import annotations

import html as html_text
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

__all__ = ["details", "escape", "facts", "figure", "legend", "page", "paragraph", "section", "table"]


def escape(text: str) -> str:
    """Return a text as HTML, also for an attribute: what the text says stays text, and can be written as UTF-8."""
    printable = (
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")
        else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
    return html_text.escape("".join(printable))


def page(title: str, html: Iterable[str]) -> str:
    """Return the whole document."""
    style = resources.files("hearthd.build.report").joinpath("report.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            # Whatever a hostile name or token managed to say, nothing is loaded and nothing runs.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>",
            *html,
            "</main>\n</body>\n</html>\n",
        ]
    )


def section(title: str, html: Iterable[str]) -> str:
    """Return a part of the page with its heading."""
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *html, "</section>"])


def paragraph(text: str, style: str = "") -> str:
    """Return a paragraph."""
    return f"<p{_class(style)}>{escape(text)}</p>"


def facts(rows: Mapping[str, str]) -> str:
    """Return a list of names and what they are."""
    items = (f"<div><dt>{escape(key)}</dt><dd><bdi>{escape(value)}</bdi></dd></div>" for key, value in rows.items())
    return f"<dl>{''.join(items)}</dl>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column names the rows. It scrolls by itself where it is too wide."""
    names = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(each)}</td>" for each in row[1:])}</tr>\n'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{names}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, html: str) -> str:
    """Return something that opens when it is wanted."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def figure(title: str, html: Iterable[str]) -> str:
    """Return a plot with its title and what belongs to it."""
    return f"<figure><figcaption><h3>{escape(title)}</h3></figcaption>{''.join(html)}</figure>"


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Return what the colours mean; entries: (class of the style sheet, what it means)."""
    items = (f'<li><span class="swatch {escape(style)}"></span>{escape(label)}</li>' for style, label in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _class(style: str) -> str:
    return f' class="{escape(style)}"' if style else ""
