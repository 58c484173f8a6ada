"""One self-contained HTML page: skeleton, style sheet for screen (light and dark) and paper, tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark;
  --page: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --faint: #77766f; --line: #e1e0d9; --card: #ffffff;
  --limit: #c02f2f; --s0: #2a78d6; --s1: #1baf7a; --s2: #eb6834; --s3: #eda100; --s4: #8d8b84; }
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #131312; --ink: #f4f3ef; --soft: #c3c2b7; --faint: #98968d; --line: #33332f; --card: #1b1b19;
  --limit: #e66767; --s0: #3987e5; --s1: #199e70; --s2: #d95926; --s3: #c98500; --s4: #807e77; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .25rem }
h3 { font-size: .95rem; margin: 0 0 .25rem }
p { margin: .4rem 0; max-width: 46rem }
.kicker, .hint, figcaption { color: var(--soft); font-size: .9rem }
.headline { font-size: 1.2rem; line-height: 1.45; margin: 1rem 0 1.25rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 0 }
.tiles div, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem .9rem }
.tiles dt { color: var(--soft); font-size: .85rem } .tiles dd { margin: 0; font-size: 1.3rem; font-weight: 600 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; margin: .75rem 0; font-size: .92rem }
th, td { text-align: left; padding: .45rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap }
tbody th { font-weight: 600 } tbody th small { display: block; font-weight: 400; color: var(--soft); max-width: 34rem }
th.group { padding-top: 1.2rem }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.grid-of { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .9rem; margin: .75rem 0 }
figure { margin: 0; break-inside: avoid } figure.wide { margin: .75rem 0 }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0; margin: .2rem 0;
  font-size: .85rem; color: var(--soft) }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: 3px; margin-right: .4rem;
  vertical-align: -1px }
svg { display: block; width: 100%; height: auto; overflow: visible; font-size: 11px;
  font-variant-numeric: tabular-nums }
svg text { fill: var(--faint) } svg .label, svg .note { fill: var(--soft) } svg .label { font-size: 12px }
svg .grid { stroke: var(--line); stroke-width: 1 } svg .base { stroke: var(--faint); stroke-width: 1 }
svg .bound { stroke: var(--limit); stroke-width: 1.2; stroke-dasharray: 5 3 }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round } svg .hit { fill: transparent }
svg rect { stroke: var(--card); stroke-width: 1.5 } svg .point:hover .dot { r: 4 } svg .point:hover rect { opacity: .8 }
details { margin: 2.5rem 0 0; border-top: 1px solid var(--line); padding-top: .75rem } summary { cursor: pointer }
pre { overflow-x: auto; font-size: .85rem; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere }
@media (max-width: 40rem) { thead th.n { white-space: normal } th, td { padding: .45rem .35rem }
  tbody th { min-width: 10.5rem } }
@media print { body { max-width: none; padding: 0; font-size: 10pt } h2 { break-after: avoid }
  tr { break-inside: avoid }
  .grid-of { grid-template-columns: 1fr 1fr } details::details-content { content-visibility: visible; block-size: auto }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
""" + "".join(
    f"svg polyline.s{i} {{ stroke: var(--s{i}) }} svg .dot.s{i}, svg rect.s{i} {{ fill: var(--s{i}) }} "
    f".legend .s{i} {{ background: var(--s{i}) }}\n"
    for i in range(5)
)
COLOURS = 5


def page(title: str, body: str) -> str:
    """A whole document; ``title`` is text, ``body`` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def figure(title: str, chart: str, hint: str = "", legend: str = "", wide: bool = False) -> str:
    """A chart with its heading and caption; ``title`` and ``hint`` are text, the others HTML."""
    caption = f"<figcaption>{escape(hint)}</figcaption>" if hint else ""
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}><h3>{escape(title)}</h3>{legend}{chart}{caption}</figure>\n"


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """(name, palette index) pairs, for charts with more than one colour."""
    items = "".join(f'<li><i class="s{colour}"></i>{escape(name)}</li>' for name, colour in entries)
    return f'<ul class="legend">{items}</ul>'


def tiles(entries: Sequence[tuple[str, str]]) -> str:
    """(name, value) pairs as large figures."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in entries)
    return f'<dl class="tiles">{cells}</dl>\n'


def table(head: Sequence[str], rows: Sequence[str], numeric_from: int) -> str:
    """A table of ready-made rows (HTML); columns from ``numeric_from`` on are numbers."""
    cells = "".join(
        f'<th scope="col"{_numeric(index >= numeric_from)}>{escape(name)}</th>' for index, name in enumerate(head)
    )
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>{"".join(rows)}</table></div>\n'


def row(head: str, texts: Sequence[str], numbers: Sequence[str]) -> str:
    """A row: its header (HTML), then text cells, then numeric cells (text)."""
    cells = "".join(f"<td>{escape(t)}</td>" for t in texts) + "".join(
        f'<td class="n">{escape(n)}</td>' for n in numbers
    )
    return f'<tr><th scope="row">{head}</th>{cells}</tr>'


def _numeric(numeric: bool) -> str:
    return ' class="n"' if numeric else ""
