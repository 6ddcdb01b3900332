"""Figures and tables of the report."""

import base64
import html
import io

from etils import epath

COLOURS = ("#4c566a", "#d1495b", "#edae49", "#3a7ca5", "#2a9d5c", "#8e6c8a", "#c97b63", "#577590")


def figure_tag(path: epath.Path, draw) -> str:
    """Draws, saves a PNG and returns it as an `<img>`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = draw(plt)
    drawn.tight_layout()
    buffer = io.BytesIO()
    drawn.savefig(buffer, dpi=120, format="png")
    plt.close(drawn)
    path.write_bytes(buffer.getvalue())
    encoded = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{encoded}">'
    return f'<div class="scroll">{image}</div>'  # on a phone, wide figures stay legible


def html_table(header, rows, kind="") -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'
