"""plots.html: every trial at its value with its arm's symbol; nothing fetched from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from exfm_ray.config.tune import Distribution, TuneConfig
from tuning.plots import write_plots
from tuning.results import Search, State, Trial
from tuning.trial import Figures

LR = "vm.optimizer.table_lr"
W = "distillation.ah.w"
SIZE = "vm.batch_size"
MLP = "distillation.ah.mlp"
HEAD = "distillation.sa.separate_head"
TUNE = TuneConfig(
    arms=("labels", "ah", "ah_sa"),
    score_windows=(2, 5),
    judge_windows=(6, 9),
    space={
        LR: Distribution(low=1e-4, high=0.1, log=True),
        W: Distribution(low=0, high=3),
        SIZE: Distribution(low=16, high=64, integer=True, log=True),
        MLP: Distribution(choice=((32, 8), ())),
        HEAD: Distribution(choice=(True, False)),
        "distillation.kd.w": Distribution(low=0, high=1),
    },
)


def trial(
    arm: str,
    number: int,
    ne: float,
    settings: dict[str, Any],
    state: State = "complete",
    over: float = 0.0,
) -> Trial:
    curve = (Figures(2, 0.5, 1.0, 100.0), Figures(5, ne, 1.25, 100.0))
    return Trial(
        Search("feed", arm),
        number,
        settings,
        state,
        None if state == "failed" else ne + over,
        () if state == "failed" else curve,
        1.0,
    )


TRIALS = [
    trial("labels", 0, 0.9, {LR: 0.001, SIZE: 16}),
    trial("labels", 1, 0.8, {LR: 0.002, SIZE: 64}, over=1.5),
    trial("ah", 0, 0.85, {LR: 0.01, W: 0.0, SIZE: 32, MLP: (32, 8)}),
    trial("ah", 1, 0.7, {LR: 0.02, W: 3.0, SIZE: 48, MLP: ()}, "stopped"),
    trial("ah", 2, 7.0, {LR: 0.1, W: 1.0, SIZE: 20, MLP: ()}),
    trial("ah_sa", 0, 0.86, {LR: 0.003, W: 0.5, SIZE: 33, MLP: (32, 8), HEAD: False}),
    trial("ah_sa", 1, 0.0, {LR: 0.004, W: 0.6, SIZE: 34, MLP: (), HEAD: True}, "failed"),
    trial("ah_sa", 2, 0.84, {LR: 0.005, W: 0.7, SIZE: 35, MLP: ()}),
]
NO_GAIN: dict[str, Any] = {"ne_gain": None}
WORSE: dict[str, Any] = {"ne_gain": {"mean": -0.02, "low": -0.03, "high": 0.0, "seeds": 3}}
BETTER: dict[str, Any] = {"ne_gain": {"mean": 0.01, "low": None, "high": None, "seeds": 1}}
SUMMARY: dict[str, Any] = {
    "name": "<sweep>",
    "students": {
        "feed": {
            "arms": {
                "labels": {"importance": {LR: 1.0, SIZE: 0.0}, "tuned": NO_GAIN, "untuned": WORSE},
                "ah": {"importance": {W: 0.75, LR: 0.25}, "tuned": BETTER, "untuned": NO_GAIN},
                "ah_sa": {"importance": {}, "tuned": NO_GAIN, "untuned": NO_GAIN},
            }
        },
        "search": {
            "arms": {
                arm: {"importance": {}, "tuned": NO_GAIN, "untuned": NO_GAIN}
                for arm in ("labels", "ah", "ah_sa")
            }
        },
    },
}


class Page(HTMLParser):
    """Texts outside of scripts, scripts, tags, and what the page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.texts).append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("plots") / "tune" / "plots.html"
    write_plots(TUNE, TRIALS, SUMMARY, path)
    assert [one.name for one in path.parent.iterdir()] == ["plots.html"]
    return Page(path.read_text())


@pytest.fixture(scope="module")
def figures(page: Page) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Position on the page -> (traces, layout), as the page passes them to plotly."""
    by_position = {}
    decoder = json.JSONDecoder()
    for script in page.scripts:
        call = re.search(r'Plotly\.newPlot\(\s*"([\w-]+)",\s*', script)
        if call and len(script) < 100_000:  # not plotly.js itself
            data, end = decoder.raw_decode(script, call.end())
            start = script.index("{", end)
            by_position[call[1]] = (data, decoder.raw_decode(script, start)[0])
    return by_position


@pytest.fixture(scope="module")
def against(
    figures: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]],
) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Setting -> (traces, layout) of the plot of NE against it."""
    return {
        one[1]["xaxis"]["title"]["text"]: one
        for place, one in figures.items()
        if place.startswith("trials")
    }


def points(traces: list[dict[str, Any]], ring: bool = False) -> dict[str, list[tuple[Any, float]]]:
    """Arm -> (x, y) of its trials, or of its rings."""
    return {
        one["name"].removeprefix("best "): list(zip(one["x"], one["y"], strict=True))
        for one in traces
        if one["name"].startswith("best ") == ring and one["x"] != [None]
    }


def test_every_trial_is_at_its_value(against: dict[str, Any]) -> None:
    """Wrong: trials are missing, or drawn at another setting's value, another window's NE or
    under another arm."""
    assert list(against) == [LR, W, SIZE, MLP, HEAD]  # kd is not among the arms
    for setting, (traces, _) in against.items():
        expected: dict[str, list[tuple[Any, float]]] = {}
        for one in TRIALS:
            if setting in one.settings and one.state != "failed":
                value = one.settings[setting]
                shown = json.dumps(value) if isinstance(value, tuple | bool) else value
                expected.setdefault(one.search.arm, []).append((shown, one.curve[-1].ne))
        assert points(traces) == expected


def test_axes(against: dict[str, Any]) -> None:
    """Wrong: a setting drawn on a log scale is squeezed into a corner, choices lie on a number
    line, or points lie outside of the axis."""
    axes = {setting: layout["xaxis"] for setting, (_, layout) in against.items()}
    assert {setting: axis["type"] for setting, axis in axes.items()} == {
        LR: "log",
        W: "linear",
        SIZE: "log",
        MLP: "category",
        HEAD: "category",
    }
    assert axes[MLP]["categoryarray"] == ["[32, 8]", "[]"] and axes[HEAD]["categoryarray"] == [
        "true",
        "false",
    ]
    for setting, low, high in (
        (LR, -4, -1),
        (W, 0, 3),
        (SIZE, 1.20412, 1.80618),
    ):  # log10 of 16 and 64
        left, right = axes[setting]["range"]
        assert low - 0.2 <= left < low + 1e-5 and high - 1e-5 < right <= high + 0.2
    low, high = against[LR][1]["yaxis"]["range"]
    assert 0.6 < low < 0.7 and 0.9 < high < 1  # the one at 7 would press all others into a line


def test_marks(against: dict[str, Any]) -> None:
    """Wrong: arms cannot be distinguished without color, or a trial that ranks behind looks like
    the others."""
    traces = {
        one["name"]: one["marker"]
        for one in against[LR][0]
        if not one["name"].startswith("best ") and one["x"] != [None]
    }
    assert traces["labels"]["symbol"] == ["circle", "circle-open"] and traces["labels"][
        "opacity"
    ] == [1, 1]
    assert (
        len(set(traces["ah"]["symbol"])) == 1
        and traces["ah"]["opacity"][1] < 0.5
        and traces["ah"]["opacity"][::2] == [1, 1]
    )
    assert (
        len({marker["symbol"][0] for marker in traces.values()})
        == len({marker["color"] for marker in traces.values()})
        == 3
    )
    legend = {
        one["name"]: (one["marker"]["symbol"], one["marker"]["color"])
        for one in against[LR][0]
        if one["showlegend"]
    }
    assert legend == {arm: (marker["symbol"][0], marker["color"]) for arm, marker in traces.items()}


def test_rings(against: dict[str, Any]) -> None:
    """Wrong: the ring is around a trial that was stopped or is out of bounds, or around the best
    of the trials that have a setting."""
    assert points(against[LR][0], ring=True) == {
        "labels": [(0.001, 0.9)],
        "ah": [(0.01, 0.85)],
        "ah_sa": [(0.005, 0.84)],
    }
    assert points(against[HEAD][0], ring=True) == {}


def test_importance_and_gains(figures: dict[str, Any]) -> None:
    """Wrong: an importance or gain is drawn for another arm or setting, or an interval has
    another length than the summary's."""
    bars = {
        one["name"]: dict(zip(one["y"], one["x"], strict=True))
        for one in figures["importance-0"][0]
    }
    assert bars == {"labels": {LR: 1.0, SIZE: 0.0}, "ah": {W: 0.75, LR: 0.25}}
    assert len({one["marker"]["pattern"]["shape"] for one in figures["importance-0"][0]}) == 2
    untuned, tuned = figures["gains-0"][0]
    assert (untuned["y"], untuned["x"]) == (["labels untuned"], [pytest.approx(-2)])
    assert (untuned["error_x"]["arrayminus"], untuned["error_x"]["array"]) == (
        [pytest.approx(1)],
        [pytest.approx(2)],
    )
    assert (tuned["y"], tuned["x"]) == (["ah tuned"], [pytest.approx(1)]) and "error_x" not in tuned


def test_the_page_stands_alone(page: Page) -> None:
    """Wrong: the page is empty without a network, or a name or a student without trials breaks
    it."""
    assert (
        not page.open
        and not page.references
        and max(len(script) for script in page.scripts) > 1_000_000
    )
    texts = " ".join(page.texts)
    assert "<sweep>: trials scored on windows 2 to 5, gains on windows 6 to 9" in texts
    for text in ("No trial has an NE.", "Too few complete trials.", "Nothing to compare."):
        assert texts.count(text) == 1  # of the student without trials
