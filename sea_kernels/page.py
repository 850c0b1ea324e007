"""A page of pictures with the areas of their regions: static HTML in one file."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from . import plot
from .regions import Regions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 14px/1.4 sans-serif; margin: 0 auto; max-width: 1600px; padding: 0 1em 2em; color: #222; background: #fff }
section { display: flex; flex-wrap: wrap; gap: 1.5em; align-items: flex-start; border-top: 1px solid #ccc; }
h2 { flex: 100%; margin: 1em 0 0; font-size: 16px; overflow-wrap: anywhere }
p { flex: 100%; margin: 0; color: #555; overflow-wrap: anywhere }
img { flex: 3 1 500px; min-width: 0; max-width: 100% }
table { flex: 1 1 420px; max-width: 100%; border-collapse: collapse }
th, td { text-align: right; padding: 2px 8px; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
th { white-space: pre-line }
th:first-child { text-align: left; min-width: 9em; overflow-wrap: break-word }
.none { background: #fbd5d5 }
caption { caption-side: bottom; text-align: left; color: #555; padding-top: 4px }
"""


def areas(regions: Regions, strides: Sequence[float], names: Sequence[str]) -> list[list[str]]:
    r"""Rows of a table: the pixels of each region (and of what belongs to none) on every level. The first is its head.

    Example:
        >>> import sea_kernels as sk, torch
        >>> boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([0])]
        >>> regions = sk.Regions.from_boxes(boxes, labels, [(4, 6)], [8])
        >>> areas(regions, [8], ["cat"])
        [['region', 'stride 8:\n4 x 6'], ['background', '8'], ['cat: center', '4'], ['cat: edge', '12']]
    """
    levels = range(len(strides))
    rows = [["region", *(f"stride {s:g}:\n{h} x {w}" for s, (h, w) in zip(strides, regions.level_shapes))]]
    for p, of_levels in enumerate(regions.area.long().t().tolist()):
        if p == 0 or regions.classes[(p - 1) // 2] >= 0:
            rows.append([plot.anchor_name(regions, p, names), *map(str, of_levels)])
    counts = [plot.kinds(regions, level).flatten().bincount(minlength=len(plot.KINDS)).tolist() for level in levels]
    for kind in (plot.UNCOUNTED, plot.PADDING):
        if any(count[kind] for count in counts):
            rows.append([plot.KINDS[kind], *(str(count[kind]) for count in counts)])
    return rows


def section(title: str, said: str, figure: "Figure", rows: Sequence[Sequence[str]]) -> str:
    """A picture, its figure and the table beside it."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for name, *cells in body:
        warns = name not in plot.KINDS[plot.UNCOUNTED :]  # a region without a pixel has no anchor
        marked = (f"<td{' class=none' * (warns and cell == '0')}>{cell}</td>" for cell in cells)
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(marked)}</tr>")
    image = base64.b64encode(png.getvalue()).decode()
    return (
        f'<section>\n<h2>{escape(title)}</h2>\n<p>{escape(said)}</p>\n<img alt="{escape(title)}" '
        f'src="data:image/png;base64,{image}">\n<table>\n<caption>Pixels of each region on every level</caption>\n'
        + "\n".join(lines)
        + "\n</table>\n</section>"
    )


def html(sections: Sequence[str]) -> bytes:
    """The page, in UTF-8."""
    title = f"Regions of {len(sections)} picture{'s' * (len(sections) != 1)}"
    text = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
        f'content="width=device-width">\n<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{title}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )
    return text.encode(errors="backslashreplace")  # file names may hold bytes that are no UTF-8
