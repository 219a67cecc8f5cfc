"""report.html in a browser: every value of metrics.jsonl in its place, on a screen and on a phone.

No network is needed.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import Seen, browser_path, look
from run_folders import NEW, WINDOWS, write_run

from exfm_ray.storage.atomic import write_json
from exfm_ray.tracking.charts import by_window, drift, largest
from exfm_ray.tracking.report import write_report
from exfm_ray.tracking.run_files import RunFiles, panels

pytestmark = pytest.mark.heavy

browser = pytest.mark.skipif(
    browser_path() is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)
NARROWEST = 1001
"""Width in pixels from which on the table is shown as a table."""
SCRIPT = """({
    wide: document.documentElement.scrollWidth,
    shown: innerWidth,
    paper: getComputedStyle(document.body).backgroundColor,
    outside: [...document.querySelectorAll('body *')].filter(
        e => e.getBoundingClientRect().right > innerWidth + 1).length,
    ink: getComputedStyle(document.querySelector('#ne-0 .xtick text')).fill,
    marks: Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(
        e => [e.id, e.querySelectorAll('.scatterlayer .point, .barlayer .point').length])),
    plots: Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(
        e => [e.id, e.data.map(t => ({
            name: t.name, x: t.x, y: t.y, base: t.base, symbol: t.marker.symbol,
            dash: (t.line || {}).dash, color: t.marker.color || t.line.color,
        }))])),
    rows: [...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.textContent)),
    head: [...document.querySelectorAll('thead th')].map(c => c.textContent),
})"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run whose name contains markup."""
    config, _ = write_run(tmp_path_factory.mktemp("runs"), "a_b", data={"source": "synthetic"})
    settings = config.folder / "config.yaml"
    settings.write_text(settings.read_text().replace("name: a_b", "name: <a&b>"))
    write_report(config.folder)
    return config.folder


@pytest.fixture(scope="module")
def screen(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return look(folder / "report.html", SCRIPT, tmp_path_factory.mktemp("screen"), width=NARROWEST)


@pytest.fixture(scope="module")
def phone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return look(
        folder / "report.html", SCRIPT, tmp_path_factory.mktemp("phone"), width=390, dark=True
    )


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@browser
def test_nothing_goes_wrong_in_a_browser(screen: Seen, phone: Seen) -> None:
    """Wrong: the page's script fails, the page needs the network, or a plot is not drawn."""
    for seen in (screen, phone):
        assert seen.complaints == [] and seen.requests == []
        drawn = {re.sub(r"-\d+", "", place) for place in seen.value["plots"]}
        assert drawn == {"ne", "calibration", "gain", "timeline", "time", "drift"}
        assert all(count > 0 for count in seen.value["marks"].values()), seen.value["marks"]


@browser
def test_fits_a_phone(phone: Seen, screen: Seen) -> None:
    """Wrong: a phone has to scroll sideways, or dark mode shows dark text."""
    assert (
        phone.value["shown"] == 390 and phone.value["wide"] == 390 and phone.value["outside"] == 0
    )
    assert screen.value["wide"] <= screen.value["shown"] == NARROWEST

    def lightness(color: str) -> int:
        return sum(int(part) for part in re.findall(r"\d+", color)[:3])

    assert lightness(screen.value["paper"]) > 700 and lightness(screen.value["ink"]) < 200
    assert lightness(phone.value["paper"]) < 100 and lightness(phone.value["ink"]) > 500


@browser
@pytest.mark.parametrize("figure", ["ne", "calibration"])
def test_curves_are_those_of_metrics_jsonl(
    folder: Path,
    screen: Seen,
    figure: str,
) -> None:
    """Wrong: a point is at another window, arm or value, a curve is missing, or the FM's is of
    other examples."""
    expected: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in written(folder):
        if row["role"] == "vm" or row["domain"] == "all":
            expected[row["model"], row["task"]][row["arm"]][row["window"]] = row[figure]
    for model, task in list(expected):
        for row in written(folder):
            if row["role"] == "fm" and row["domain"] == model and row["task"] == task:
                expected[model, task]["fm"][row["window"]] = row[figure]
    drawn = [
        {trace["name"]: dict(zip(trace["x"], trace["y"], strict=True)) for trace in traces}
        for place, traces in screen.value["plots"].items()
        if place.startswith(f"{figure}-")
    ]
    assert drawn == [
        expected[place]
        for place in (
            ("fm", "click"),
            ("fm", "conversion"),
            ("feed", "click"),
            ("stories", "conversion"),
        )
    ]


@browser
def test_arms_differ_without_color(screen: Seen) -> None:
    """Wrong: two curves of one plot differ by color alone."""
    for place, traces in screen.value["plots"].items():
        if place.startswith(("ne-", "calibration-", "drift-")):
            assert all(
                len({trace[what] for trace in traces}) == len(traces)
                for what in ("symbol", "dash", "color")
            ), place


@browser
def test_the_table_and_the_data(folder: Path, screen: Seen) -> None:
    """Wrong: a figure is in another column or row, or the label rate or the fraction of new ids is
    another domain's."""
    table = {
        (row[0], row[1], row[2], row[3]): dict(zip(screen.value["head"], row, strict=True))
        for row in screen.value["rows"]
    }
    assert len(table) == len(screen.value["rows"]) == 2 + 4 + 4
    examples = sum(
        row["examples"]
        for row in written(folder)
        if (row["model"], row["arm"]) == ("feed", "kd") and row["window"] >= 1
    )
    kd, labels = (table["feed", "feed", "click", arm] for arm in ("kd", "labels"))
    assert kd["examples"] == f"{examples:,}"
    assert float(kd["NE gain"].rstrip("%")) / 100 == pytest.approx(
        1 - float(kd["NE"]) / float(labels["NE"]), abs=2e-4
    )
    gain = {trace["name"]: trace["x"][0] for trace in screen.value["plots"]["gain-0"]}
    assert gain["kd"] == pytest.approx(float(kd["NE gain"].rstrip("%")), abs=0.006) and list(
        gain
    ) == ["kd", "ah", "ah_sa", "fm"]
    clicks = {trace["name"]: trace["y"] for trace in screen.value["plots"]["drift-0"]}
    for domain in ("all", "feed", "stories"):
        rates = {
            row["window"]: row["label_rate"]
            for row in written(folder)
            if (row["domain"], row["task"], row["role"]) == (domain, "click", "fm")
        }
        assert clicks["all domains" if domain == "all" else domain] == [
            rates[w] for w in range(WINDOWS)
        ]
    for place, share in (("drift-3", NEW["user"]), ("drift-4", NEW["ad"])):
        new = {trace["name"]: (trace["x"], trace["y"]) for trace in screen.value["plots"][place]}
        assert new == dict.fromkeys(
            ("all domains", "feed", "stories"), ([1, 2, 3], [share, share / 2, share / 3])
        )


@browser
def test_the_timeline(screen: Seen) -> None:
    """Wrong: a phase is at another time or role, or waiting counts as work."""
    timeline = {trace["name"]: trace for trace in screen.value["plots"]["timeline"]}
    assert timeline["learn"]["base"] == pytest.approx(
        [1.0 + 3 * w for w in range(WINDOWS) for _ in ("fm", "vm")]
    )
    assert (
        timeline["learn"]["x"] == pytest.approx([0.5] * 2 * WINDOWS)
        and timeline["learn"]["y"] == ["fm", "vm"] * WINDOWS
    )
    spent = {
        trace["name"]: dict(zip(trace["y"], trace["x"], strict=True))
        for trace in screen.value["plots"]["time"]
    }
    assert spent["learn"] == {
        "fm": pytest.approx(0.5 * WINDOWS),
        "vm": pytest.approx(0.5 * WINDOWS),
    }
    assert spent["waiting"]["fm"] == pytest.approx(
        0.25 * (2 * WINDOWS - 1)
    )  # the clock starts with the first work


def test_drift_of_many_domains() -> None:
    """Wrong: a stream of many domains is drawn as a tangle, or the domains of the vertical models
    are left out."""
    rows = [
        {
            "role": "fm",
            "domain": f"d{i}",
            "task": "t",
            "window": 0,
            "examples": 100 * i,
            "label_rate": i / 100,
        }
        for i in range(1, 30)
    ]
    rows += [
        rows[0] | {"domain": "all", "examples": 43_500},
        rows[1] | {"role": "vm", "domain": "d2"},
    ]
    shown = ["all", "d2", "d29", "d28", "d27", "d26", "d25"]
    assert largest(rows) == shown
    rates = {trace["name"]: trace["y"] for trace in drift(rows, "t", "label_rate", "")["data"]}
    assert rates == {"all domains": [0.01], **{name: [int(name[1:]) / 100] for name in shown[1:]}}
    marks = {
        kind: {t["name"]: t["line"] for t in drift(rows, "t", kind, "")["data"]}
        for kind in ("label_rate", "examples")
    }
    assert marks["examples"] == {
        name: mark for name, mark in marks["label_rate"].items() if name != "all domains"
    }


class Texts(HTMLParser):
    """Collects the texts outside of scripts and styles."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.texts.append(data)


def test_facts_of_the_run(folder: Path) -> None:
    """Wrong: names are taken for markup, or the page omits what was run, that there is no interval,
    or which windows count."""
    page = Texts(folder / "report.html")
    text = " ".join(page.texts)
    assert not page._open and not page.links
    for text_on_page in (
        "<a&b>",
        "done: fm 4 of 4 windows",
        "synthetic, 4 windows; the first 1 are warm-up",
        "wukong (dim 4, ",
        "alpha 1.0, beta 4.0",
        "feed (feed, click, mlp), stories (stories, conversion, dcnv2)",
        "one seed, so no figure here has an interval",
    ):
        assert text_on_page in text, text_on_page


PARTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "begun": ({"windows": 0}, ["No window after the warm-up has been evaluated yet."]),
    "in its warm-up": (
        {"windows": 1},
        ["No window after the warm-up", "Normalized entropy by window"],
    ),
    "no VMs": ({"roles": ("fm",)}, ["Normalized entropy by window", "Timeline"]),
    "no FM": ({"roles": ("vm",)}, ["NE gain", "Timeline", "The data by window"]),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_run_has_a_page(tmp_path: Path, name: str) -> None:
    """Wrong: an unfinished run has no report."""
    arguments, expected = PARTS[name]
    config, _ = write_run(tmp_path, "part", **arguments)
    (config.folder / "timeline.jsonl").open("a").write(
        '{"role": "fm", "wind'
    )  # a line that is being written
    text = " ".join(Texts(write_report(config.folder)).texts)
    assert "unfinished" in text and all(phrase in text for phrase in expected)


def test_a_static_set(tmp_path: Path) -> None:
    """Wrong: passes over a static set are drawn as windows, figures of the tests are drawn among
    those of the validation window, or the best pass is not shown."""
    config, _ = write_run(
        tmp_path, "static", windows=0, vm={"models": []}, fm={"static": {"validation_window": 2}}
    )
    rows = [
        {
            "pass": p,
            "window": w,
            "role": "fm",
            "model": "fm",
            "arm": "fm",
            "domain": "all",
            "task": "click",
            "seed": 0,
            "snapshot": None,
            "ne": 0.9 - p / 100 + w / 1000,
            "auc": 0.5,
            "gauc": None,
            "log_loss": 0.3,
            "calibration": 1.0,
            "label_rate": 0.5,
            "examples": 10,
        }
        for p in (1, 2, 3)
        for w in (2, 3)
    ]
    (config.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "unfinished: fm 3 passes" in " ".join(Texts(write_report(config.folder)).texts)
    write_json(
        config.folder / "summary.json",
        {"figures": [row for row in rows if row["pass"] == 2], "peak_memory_bytes": 2**30},
    )
    (panel,) = panels(RunFiles.open(config.folder))
    (trace,) = by_window(panel, "ne", 2)["data"]
    assert (trace["x"], trace["y"]) == (
        [1, 2, 3],
        [pytest.approx(0.892), pytest.approx(0.882), pytest.approx(0.872)],
    )
    text = " ".join(Texts(write_report(config.folder)).texts)
    for phrase in (
        "done: fm 3 passes",
        "those before window 2 are learned",
        "Figures over the best pass",
        "0.8820",
        "0.8830",
        "by pass",
    ):
        assert phrase in text, phrase
    assert "0.8920" not in text and "by window" not in text


def test_only_settings(tmp_path: Path) -> None:
    """Wrong: a folder that holds only the settings of a run has no report."""
    config, _ = write_run(tmp_path, "bare")
    for file in ("metrics.jsonl", "timeline.jsonl"):
        (config.folder / file).unlink()
    assert "unfinished" in " ".join(Texts(write_report(config.folder)).texts)
