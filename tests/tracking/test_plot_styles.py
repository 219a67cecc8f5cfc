"""Marks: every arm has one, and no two are alike without colour."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from run_folders import write_run

from exfm_ray.config.arms import Arm, Objective
from exfm_ray.tracking.plot_styles import listing, mark_of
from exfm_ray.tracking.report import write_report

ARMS = [
    Arm(f"{objective}{options}")
    for objective, options in product(Objective, ("", "+share", "+history", "+share+history"))
]


def test_arms_differ_without_colour() -> None:
    """Wrong: two arms of one plot differ by colour alone, or an arm has no mark."""
    marks = {arm: mark_of(arm) for arm in (*ARMS, "fm")}
    assert len({mark.symbol for mark in marks.values()}) == len(marks)
    assert len({(mark.colour, mark.dash) for mark in marks.values()}) == len(marks)


def test_order_of_arms() -> None:
    """Wrong: an arm with options stands away from its objective."""
    found = sorted([*reversed(ARMS), "fm"], key=listing)
    assert found[0] == "fm" and found[1:5] == [
        "labels",
        "labels+history",
        "labels+share",
        "labels+share+history",
    ]
    assert [Arm(arm).objective for arm in found[1:]] == [
        objective for objective in Objective for _ in range(4)
    ]


def test_the_report_says_how_arms_with_options_are_given(tmp_path: Path) -> None:
    """Wrong: arms with +share seem to learn their tables at the plain arms' rate, or two runs that
    differ in these settings look alike."""
    settings = {
        "share": {"table_lr": 0.02, "mode": "average", "weight": 0.25, "tables": ["user", "ad"]},
        "history": {"last": 5, "drift": "aligned"},
    }
    config, _ = write_run(
        tmp_path,
        "given",
        vm={"arms": ["labels", "ah+share", "kd+share+history"]},
        distillation=settings,
    )
    page = write_report(config.folder).read_text()
    assert (
        "rate 0.02 (tables), of tables user, ad, mode average, weight 0.25, optimizer keep, projection none"
        in page
    )
    assert (
        "layer backbone, by the schema&#x27;s group_by, 16 numbers an example, the last 5 in order, drift aligned"
        in page
    )
    config, _ = write_run(tmp_path, "plain", vm={"arms": ["labels", "kd"]}, distillation=settings)
    page = write_report(config.folder).read_text()
    assert "0.02 (tables)" not in page and "drift aligned" not in page


def test_the_report_says_what_arms_cost_at_serving(tmp_path: Path) -> None:
    """Wrong: an arm that needs a feature store looks as cheap to serve as one that does not."""
    config, _ = write_run(
        tmp_path, "arms", vm={"arms": ["labels", "ah+share", "labels+history", "kd+share+history"]}
    )
    page = write_report(config.folder).read_text()
    assert "nothing: labels, ah+share; a feature store: labels+history, kd+share+history" in page
