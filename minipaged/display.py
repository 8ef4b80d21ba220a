"""Small tables as plain text and as HTML; whatever stands in a cell is data and is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence as Rows


def text_table(header: Rows[str], rows: Rows[Rows[object]], title: str = "") -> str:
    """Columns aligned with spaces, numbers to the right.

    Parameters
    ----------
    header : sequence of str
        One name per column.
    rows : sequence of rows
        Anything; shown by ``str``.
    title : str
        A line above, if not empty.
    """
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)).rstrip()
             for row in cells]
    rule = "  ".join("-" * w for w in widths)
    return "\n".join([*([title] if title else []), lines[0], rule, *lines[1:]])


def html_table(header: Rows[str], rows: Rows[Rows[object]], title: str = "") -> str:
    """The same table for a notebook, with every cell escaped; parameters as in `text_table`."""
    def row_of(tag: str, row: Rows[object]) -> str:
        """One row of cells, each escaped."""
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"

    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    body = "".join(row_of("td", row) for row in rows)
    return f"<table>{caption}<thead>{row_of('th', header)}</thead><tbody>{body}</tbody></table>"


class Shown:
    """Shows itself in a terminal and in a notebook as the table that ``_rows`` returns: header, rows, title."""

    __slots__ = ()

    def __repr__(self) -> str:
        return text_table(*self._rows())

    def _repr_html_(self) -> str:
        return html_table(*self._rows())
