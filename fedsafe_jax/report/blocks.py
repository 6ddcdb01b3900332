"""What a section of the report is made of; `templates/page.html` renders it."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from fedsafe_jax import whole_files

COLOURS = ("#4c566a", "#d1495b", "#edae49", "#3a7ca5", "#2a9d5c", "#8e6c8a", "#c97b63", "#577590")

NOTES = {  # what may have been done to a dialogue: title of the column
    "merged": "turns merged",
    "control_tokens": "control tokens as text",
    "cut": "cut",
}


class Text(NamedTuple):
    """A paragraph; a note is set fainter."""

    text: str
    note: bool = True
    kind: str = "text"


class Heading(NamedTuple):
    """A heading within a section."""

    text: str
    kind: str = "heading"


class Code(NamedTuple):
    """Text set as it stands."""

    text: str
    kind: str = "code"


class Table(NamedTuple):
    """A table.

    Attributes:
      header: title of each column; "" in a table of figures leaves room beside the first column.
      rows: cells of each row.
      prose: whether cells hold prose, which is set to the left with its line breaks.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    prose: bool = False
    kind: str = "table"


class Figure(NamedTuple):
    """A picture.

    Attributes:
      alt: what it shows, for those who do not see it.
      png: PNG, base64.
    """

    alt: str
    png: str
    kind: str = "figure"


class Section(NamedTuple):
    """A section of the report.

    Attributes:
      title: its heading; "" for none.
      blocks: its content, in order.
    """

    title: str
    blocks: list


def figure(path: epath.Path, draw: Callable) -> Figure:
    """Draws a figure, and saves it as PNG.

    Args:
      path: file to write.
      draw: `pyplot -> matplotlib figure`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = draw(plt)
    drawn.tight_layout()
    buffer = io.BytesIO()
    drawn.savefig(buffer, dpi=120, format="png")
    plt.close(drawn)
    whole_files.write(path, buffer.getvalue())
    return Figure(path.stem.replace("_", " "), base64.b64encode(buffer.getvalue()).decode())
