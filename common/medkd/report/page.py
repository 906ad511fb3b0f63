# SPDX-License-Identifier: Apache-2.0
"""Parts of a report, and the one HTML file they end in: it loads nothing, for a phone and a desktop, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

__all__ = ["facts", "figure", "grid", "legend", "rows", "table", "write_page"]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, li { max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal; }
th:first-child, td:first-child { text-align: left; }
thead th { font-weight: 600; vertical-align: bottom; } .strong td { font-weight: 600; }
.facts td { text-align: left; } .edge { border-left: 1px solid var(--line); }
.grid { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 46%), 1fr));
  margin-bottom: 1.5rem; }
.rows { display: grid; gap: .5rem; margin-bottom: 1rem; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.plots svg { width: 100%; height: auto; }
figure { margin: 0; min-width: 0; } figure img { width: 100%; display: block; border-radius: 4px; background: #000; }
figcaption { font-size: .85rem; }
.legend span { display: inline-block; margin-right: 1rem; }
.legend i { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .35em;
  vertical-align: -.08em; outline: 1px solid var(--line); }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .82rem; border-radius: 4px; }
@media (max-width: 34rem) { th, td { padding: .2rem .28rem; font-size: .8rem; } }
"""

_MARK = " style='background:#ff2fd040'"       # of cells; see-through, for light and dark


def figure(png: bytes, caption: str) -> str:
    """Show a picture with its caption."""
    data, text = base64.b64encode(png).decode(), escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def grid(parts: Iterable[str], name: str = "grid") -> str:
    """Set parts side by side, as many as fit: `grid` for pictures, `plots` for the larger curves."""
    return f"<div class={name}>{''.join(parts)}</div>"


def rows(parts: Sequence[str], columns: int) -> str:
    """Set parts into rows of `columns` of one width, so that what belongs together stays side by side on any screen.

    Example:
        >>> rows(["a", "b"], 2)
        "<div class=wide><div class=rows style='grid-template-columns:repeat(2,minmax(8rem,1fr))'>ab</div></div>"
    """
    style = f"grid-template-columns:repeat({columns},minmax(8rem,1fr))"
    return f"<div class=wide><div class=rows style='{style}'>{''.join(parts)}</div></div>"


def legend(colors: Mapping[str, str]) -> str:
    """Say what the colors mean: text -> color.

    Example:
        >>> legend({"liver": "#ff9f1c"})
        "<p class=legend><span><i style='background:#ff9f1c'></i>liver</span></p>"
    """
    items = (f"<span><i style='background:{color}'></i>{escape(text)}</span>" for text, color in colors.items())
    return f"<p class=legend>{''.join(items)}</p>"


def table(
    rows: Sequence[Sequence[str]], head: Sequence[str], groups: Sequence[tuple[str, int]] = (),
    strong: Collection[str] = (), marked: Collection[tuple[int, int]] = (),
) -> str:
    """Set numbers in columns.

    Args:
        rows: cells as text, of which the first is the row's name; a short row leaves the last columns empty.
        head: title of each column.
        groups: title and number of columns of what stands together after the first column, as a line above `head`.
        strong: names of the rows that are emphasized.
        marked: row and column, from 0 on, of the cells that are to be seen first.
    """
    edges = {1 + sum(size for _, size in groups[:number]) for number in range(1, len(groups))}
    above = "".join(f"<th colspan={size}{_edge(number > 0)}>{escape(title)}</th>"
                    for number, (title, size) in enumerate(groups))
    titles = (f"<tr><th></th>{above}</tr>" if groups else "") + f"<tr>{_cells('th', head, edges)}</tr>"
    places = [{column for line, column in marked if line == number} for number in range(len(rows))]
    lines = (f"<tr{' class=strong' if row[0] in strong else ''}>{_cells('td', row, edges, there)}</tr>"
             for row, there in zip(rows, places, strict=True))
    return f"<div class=wide><table><thead>{titles}</thead><tbody>{''.join(lines)}</tbody></table></div>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """List names and what is told of them.

    Example:
        >>> facts([("seed", "0")])
        '<div class=wide><table class=facts><tr><td>seed</td><td>0</td></tr></table></div>'
    """
    rows = "".join(f"<tr>{_cells('td', pair)}</tr>" for pair in pairs)
    return f"<div class=wide><table class=facts>{rows}</table></div>"


def _cells(tag: str, texts: Sequence[str], edges: Collection[int] = (), marked: Collection[int] = ()) -> str:
    return "".join(
        f"<{tag}{_edge(n in edges)}{_MARK if n in marked else ''}>{escape(text)}</{tag}>"
        for n, text in enumerate(texts)
    )


def _edge(there: bool) -> str:
    return " class=edge" if there else ""


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page as one file, and the folders it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n",
        encoding="utf-8",
    )
