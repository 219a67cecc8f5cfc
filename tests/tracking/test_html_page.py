"""HTML pages: what is escaped and what is not."""

from __future__ import annotations

from pathlib import Path

from exfm_ray.tracking.html_page import place_figure, write_page


def test_titles_are_text_and_bodies_are_html(tmp_path: Path) -> None:
    """Wrong: a run's name is taken for markup, or the body's markup is shown as text."""
    path = tmp_path / "page.html"
    write_page(path, "a <b> & c", "<p>Hollow: <i>out of bounds</i></p>")
    page = path.read_text()
    assert page.count("a &lt;b&gt; &amp; c") == 2, "in the title and in the heading"
    assert "<p>Hollow: <i>out of bounds</i></p>" in page
    assert "Plotly" in page and "<script src" not in page


def test_figures_can_be_joined_with_html() -> None:
    """Wrong: markup around a figure is escaped by the figure's own type."""
    figure = place_figure({"data": [], "layout": {}}, "here", 100)
    assert '<div style="height: 100px">' in figure and 'id="here"' in figure
    assert f"<h2>{figure}</h2>".startswith("<h2><div")
