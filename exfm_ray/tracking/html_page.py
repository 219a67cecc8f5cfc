"""An HTML page of plotly figures: one file with plotly.js in it, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from exfm_ray.storage.atomic import write_text

Part = dict[str, Any]
"""A figure of plotly or a part of one, as in its JSON schema."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; color: #222; background: #fff }
h1, h2, h3 { font-weight: 600; line-height: 1.25 } h1 { font-size: 1.4rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: .5rem }
.grid > div { min-width: 0 }
"""
LAYOUT: Mapping[str, Any] = {
    "template": "none",
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
    "margin": {"l": 60, "r": 15, "t": 60, "b": 50},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    "dragmode": False,
    "hoverlabel": {"align": "left"},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#a0a0a0", "activecolor": "#606060"},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
}
"""Without a drag mode: on a phone a finger that scrolls the page would zoom into a plot. Without a
background: the page's shows."""

CONTROLS: Mapping[str, Any] = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["zoom2d", "autoScale2d", "resetScale2d", "toImage"]],
}


def write_page(
    path: Path,
    title: str,
    body: str,
    style: str = STYLE,
) -> None:
    """Write the page. `title`: plain text; `body`: HTML."""
    from plotly.offline import get_plotlyjs

    write_text(
        path,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style><script>{get_plotlyjs()}</script></head><body><h1>{escape(title)}</h1>"
        f"{body}</body></html>\n",
    )


def place_figure(
    figure: Part,
    place: str,
    height: int,
) -> str:
    """The figure as a div of the id `place` that follows the width of the page; plotly checks every
    property's name and value."""
    from plotly.io import to_html

    shown = to_html(
        figure,
        include_plotlyjs=False,
        full_html=False,
        div_id=place,
        default_height="100%",
        config=CONTROLS,
    )
    return f'<div style="height: {height}px">{shown}</div>'


def missing_supervision(summary: Mapping[str, Any]) -> list[str]:
    """A line for each fragment or window that is parked, and for each window that another snapshot
    scored than the one asked for."""
    lines = []
    for row in summary.get("parked", ()):
        what = f"window {row['window']}" + (f", {row['fragment']}" if row["fragment"] else "")
        lines.append(f"{what}: no supervision by '{row['teacher']}', parked: {row['cause']}")
    for row in summary.get("fallback_windows", ()):
        lines.append(
            f"window {row['window']}: supervised by snapshot {row['snapshot']} of '{row['teacher']}', snapshot {row['asked']} is left out"
        )
    return lines
