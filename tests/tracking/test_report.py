"""report.html."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from exfm_ray.tracking.report import write_report


class Page(HTMLParser):
    """Collects the texts, the tags still open and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.fetched: list[str] = []
        self.curves = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href")]
        self.curves += tag == "polyline"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.curves += tag == "polyline"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def row(model: str, arm: str, window: int, ne: float | None) -> dict[str, object]:
    role = "fm" if arm == "fm" else "vm"
    return {"window": window, "role": role, "model": model, "arm": arm, "domain": "feed", "task": "<click>", "seed": 0, "ne": ne, "auc": 0.5}


def test_a_whole_page_that_fetches_nothing(tmp_path: Path) -> None:
    """Wrong: tags are left open, names are taken for markup, a curve is missing, or the page needs the network."""
    arms = [("fm", "fm"), ("v", "labels"), ("v", "kd"), ("v", "ah"), ("v", "ah_sa")]
    rows = [row(model, arm, w, None if w == 3 else 1 - 0.01 * w) for model, arm in arms for w in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = {"name": "a&b", "seed": 3, "windows": [2, 3, 4], "figures": [row(m, a, 0, 0.9) for m, a in arms], "peak_memory_bytes": 2**30}
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"roles": {"fm": {"seconds": 2.0, "examples": 1000}}}))
    page = Page()
    page.feed(write_report(tmp_path).read_text())
    assert not page.open and not page.fetched
    assert page.curves == len(arms)
    text = " ".join(page.texts)
    assert "feed, <click>" in text and "a&b" in text and "0.9000" in text
