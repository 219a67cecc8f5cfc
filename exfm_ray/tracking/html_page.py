"""HTML pages of plotly figures: each is one file that contains plotly.js and loads nothing else.

The pages are rendered from the jinja2 templates in this folder, `*.html.j2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from exfm_ray.storage.atomic import write_text

Part = dict[str, Any]
"""A plotly figure or a part of one, as in its JSON schema."""

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
"""The drag mode is off: on a phone, a finger that scrolls the page would zoom into a plot.

There is no background, so that the page's shows in light and dark mode.
"""

CONTROLS: Mapping[str, Any] = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["zoom2d", "autoScale2d", "resetScale2d", "toImage"]],
}


def write_page(
    path: Path,
    title: str,
    body: str,
) -> None:
    """Write a page with a heading and a body.

    Args:
        title: plain text.
        body: HTML, which is not escaped.
    """
    render_page(path, "page.html.j2", title, body=Markup(body))


def render_page(
    path: Path,
    template: str,
    title: str,
    **values: Any,
) -> None:
    """Write a page from a template of this folder.

    Args:
        template: file name; it extends `page.html.j2`.
        title: plain text.
        values: what the template uses; strings are escaped unless they are `Markup`.
    """
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("exfm_ray", "tracking"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template(template)
    write_text(path, page.render(title=title, plotlyjs=Markup(get_plotlyjs()), **values))


def place_figure(
    figure: Part,
    place: str,
    height: int,
) -> Markup:
    """Render a figure as a div that follows the width of the page.

    Plotly checks the name and value of every property.

    Args:
        place: id of the div.
        height: in pixels.
    """
    from plotly.io import to_html

    html = to_html(
        figure,
        include_plotlyjs=False,
        full_html=False,
        div_id=place,
        default_height="100%",
        config=CONTROLS,
    )
    return Markup(f'<div style="height: {height}px">{html}</div>')
