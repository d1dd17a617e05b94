"""Pages of headings, paragraphs, tables and figures, as Markdown and as one HTML file that opens without a network."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; margin: 2rem auto; max-width: 76rem; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 60rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e3e3e3; }
th { border-bottom: 2px solid #999; font-weight: 600; } td:not(.n), th:not(.n) { text-align: left; }
td.n { white-space: nowrap; } img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
.tag { display: inline-block; border-radius: .6rem; padding: 0 .5rem; background: #eee; white-space: nowrap; }
.measured, .holds { background: #d5efe3; } .estimated { background: #fbe7c3; } .modelled { background: #e3e1f5; }
.fails { background: #f6d3cc; }
"""
_TAGS = {
    "measured": "measured", "estimated": "estimated", "modelled": "modelled", "holds": "holds",
    "does not hold": "fails", "cannot be told from these runs": "unknown",
}  # fmt: skip
_NUMBER = re.compile(r"-|(?:[≥≤] )?(?:[+-]?\d[\d.,]*(?:e-?\d+)?(?: %)?(?: \([^)]* to [^)]*\))?)?")


@dataclass
class Section:
    """A part of a page, for Markdown and HTML alike.

    Attributes:
        title: Heading.
        text: Paragraphs.
        columns: Names of the columns.
        rows: Cells, as many as columns.
        images: (caption, PNG).
    """

    title: str
    text: list[str] = field(default_factory=list)
    columns: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)
    images: list[tuple[str, bytes]] = field(default_factory=list)


def png(figure: Any) -> bytes:
    """A matplotlib figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Headings, paragraphs and tables; images are left out."""
    lines = [f"# {title}", ""]
    for section in sections:
        if not (section.text or section.rows):
            continue
        lines += [f"## {section.title}", ""]
        for paragraph in section.text:
            lines += [paragraph, ""]
        if section.rows:
            right = _right_aligned(section)
            lines.append("| " + " | ".join(section.columns) + " |")
            lines.append("|" + "|".join("---:" if r else "---" for r in right) + "|")
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section.rows]
            lines.append("")
    return "\n".join(lines)


def page(title: str, sections: Sequence[Section]) -> str:
    """One HTML file with everything in it."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text]
        if section.rows:
            parts.append(_table(section))
        for caption, image in section.images:
            data = base64.b64encode(image).decode("ascii")
            parts.append(f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">')
    return "\n".join([*parts, "</body>\n</html>\n"])


def _table(section: Section) -> str:
    right = _right_aligned(section)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="n">{html.escape(cell)}</{tag}>' if is_number else f"<{tag}>{_cell(cell)}</{tag}>"
            for cell, is_number in zip(row, right, strict=True)
        )

    lines = [f"<tr>{cells('td', row)}</tr>" for row in section.rows]
    head = f"<thead><tr>{cells('th', section.columns)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>\n' + "\n".join(lines) + "\n</tbody></table></div>"


def _cell(text: str) -> str:
    kind = _TAGS.get(text, "estimated" if text.endswith(("% measured", "partly measured")) else None)
    return html.escape(text) if kind is None else f'<span class="tag {kind}">{html.escape(text)}</span>'


def _right_aligned(section: Section) -> list[bool]:
    """Whether a column holds numbers."""
    columns = zip(*section.rows, strict=True)
    return [all(_NUMBER.fullmatch(cell) for cell in column) and any(column) for column in columns]


def percent(share: float | None, sign: bool = False) -> str:
    """A share as text; ``-`` where it is not known."""
    return "-" if share is None else f"{100 * share:{'+' if sign else ''}.0f} %"
