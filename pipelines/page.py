"""Pieces of a report's page: cards, tables, bars, contact sheets, the document around them; HTML text in and out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pipelines.figures import data_uri


def document(title: str, header: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """A whole page that loads nothing.

    Args:
        title: of the browser's tab.
        header: HTML above the menu.
        sections: (key, title, HTML), each an entry of the menu too.
        footer: HTML at the end.
    """
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections)
    bodies = "".join(f'<section id="{key}"><h2>{escape(name)}</h2>{body}</section>' for key, name, body in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><header>{header}</header>"
        f'<nav><div>{links}</div></nav><main>{bodies}</main><footer class="note">{footer}</footer></body></html>'
    )


def lead(text: str) -> str:
    """The paragraph that opens a section."""
    return f'<p class="lead">{escape(text)}</p>'


def note(text: str) -> str:
    """A small remark."""
    return f'<p class="note">{escape(text)}</p>'


def card(title: str, figure: str, unit: str, passed: bool, paragraphs: Sequence[str]) -> str:
    """A headline number with its verdict and what it means."""
    verdict = '<span class="mark pass">reached</span>' if passed else '<span class="mark miss">missed</span>'
    said = "".join(f"<p>{escape(p)}</p>" for p in paragraphs if p)
    return (
        f'<div class="card">{verdict}<h3>{escape(title)}</h3><div class="figure">{escape(figure)} '
        f"<small>{escape(unit)}</small></div>{said}</div>"
    )


def cards(inside: Iterable[str], kind: str = "cards") -> str:
    """Cards or figures side by side, as many as fit: "cards", "pair" or "small"."""
    return f'<div class="{kind}">{"".join(inside)}</div>'


def figure(inside: str, caption: str = "") -> str:
    """A plot or picture with its caption."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{inside}{below}</figure>"


def chart(path: Path, caption: str) -> str:
    """An SVG file, put into the page so that it follows the page's colours."""
    return figure(path.read_text(encoding="utf-8"), caption)


def picture(path: Path, caption: str, rows: Sequence[str], columns: int) -> str:
    """A PNG file that is a grid of frames, its pixels kept sharp, its rows named."""
    names = "".join(f"<span>{escape(name)}</span>" for name in rows)
    image = (
        f'<img class="pixels" style="max-width:{columns * 6.2:g}rem" src="{data_uri(path.read_bytes())}" '
        f'alt="{escape(caption)}">'
    )
    return figure(f'<div class="rows"><div class="names">{names}</div>{image}</div>', caption)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, the first column words, the others figures."""
    top = "".join(f'<th class="{"n" if i else ""}">{escape(h)}</th>' for i, h in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f'<td class="{"n" if i else ""}">{escape(c)}</td>' for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>{body}</table></div>'


def bars(rows: Sequence[tuple[str, int]]) -> str:
    """Counts as bars, the longest full."""
    most = max(max(n for _, n in rows), 1)
    drawn = "".join(
        f'<span>{escape(name)}</span><span class="bar"><i style="width:{n / most:.1%}"></i></span><b>{n}</b>'
        for name, n in rows
    )
    return f'<div class="funnel">{drawn}</div>'


def heat(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[int]]]) -> str:
    """A table of counts as shares of their row, coloured; columns without any count are left out."""
    shown = [i for i in range(len(columns)) if any(counts[i] for _, counts in rows)]
    top = "".join(f"<th>{escape(columns[i])}</th>" for i in shown)
    body = "".join(_heat_row(name, [counts[i] for i in shown]) for name, counts in rows)
    head = f"<thead><tr><th></th>{top}<th>times</th></tr></thead>"
    return f'<div class="scroll"><table class="heat">{head}{body}</table></div>'


def _heat_row(name: str, counts: Sequence[int]) -> str:
    total = sum(counts)
    cells = "".join(
        f'<td style="background:color-mix(in srgb,var(--s0) {n / max(total, 1) * 85:.0f}%,transparent)">'
        f"{n / max(total, 1):.0%}</td>"
        for n in counts
    )
    return f"<tr><th>{escape(name)}</th>{cells}<td>{total}</td></tr>"


@dataclass(frozen=True)
class Shot:
    """A picture of a contact sheet; `jpeg` is empty for what can't be shown."""

    jpeg: bytes | None
    title: str
    note: str


def sheet(title: str, shots: Sequence[Shot], most: int, total: int | None = None) -> str:
    """A contact sheet of at most `most` pictures out of `total` (of those given); nothing at all for no pictures."""
    if not shots:
        return ""
    figures = "".join(map(_shot, shots[:most]))
    total = total or len(shots)
    more = note(f"and {total - most} more") if total > most else ""
    return f'<h3>{escape(title)}: {total}</h3><div class="sheet">{figures}</div>{more}'


def _shot(shot: Shot) -> str:
    seen = '<div class="blank">nothing to show</div>'
    if shot.jpeg:
        seen = f'<img src="{data_uri(shot.jpeg, "image/jpeg")}" alt="{escape(shot.title)}">'
    return f"<figure>{seen}<figcaption><b>{escape(shot.title)}</b><br>{escape(shot.note)}</figcaption></figure>"


def chain(links: Iterable[tuple[str, str, str]]) -> str:
    """Things that were made from one another, first to last: (kind, name, remark)."""
    boxes = (
        f'<div class="card">{escape(kind)}<b>{escape(name)}</b><span class="note">{escape(remark)}</span></div>'
        for kind, name, remark in links
    )
    return f'<div class="chain">{"<span class=arrow>→</span>".join(boxes)}</div>'
