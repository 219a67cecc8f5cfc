"""Plot styles: every arm has one, and no two are alike without color."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from run_folders import write_run

from exfm_ray.config.arms import Arm, Objective
from exfm_ray.tracking.plot_styles import arm_order, style_of_arm
from exfm_ray.tracking.report import write_report

ARMS = [
    Arm(f"{objective}{options}")
    for objective, options in product(Objective, ("", "+share", "+history", "+share+history"))
]


def test_arms_differ_without_color() -> None:
    """Wrong: two arms of one plot differ by color alone, or an arm has no style."""
    styles = {arm: style_of_arm(arm) for arm in (*ARMS, "fm")}
    assert len({style.symbol for style in styles.values()}) == len(styles)
    assert len({(style.color, style.dash) for style in styles.values()}) == len(styles)


def test_order_of_arms() -> None:
    """Wrong: an arm with options is listed away from its objective."""
    in_order = sorted([*reversed(ARMS), "fm"], key=arm_order)
    assert in_order[0] == "fm" and in_order[1:5] == [
        "labels",
        "labels+history",
        "labels+share",
        "labels+share+history",
    ]
    assert [Arm(arm).objective for arm in in_order[1:]] == [
        objective for objective in Objective for _ in range(4)
    ]


def test_the_report_describes_options_of_arms(tmp_path: Path) -> None:
    """Wrong: arms with +share seem to learn their tables at the plain arms' rate, or runs with
    different settings of the options look alike."""
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
    shared_rows = (
        "rate 0.02 (tables), of tables user, ad, mode average, weight 0.25, optimizer keep, "
        "projection none"
    )
    histories = (
        "layer backbone, by the schema&#39;s group_by, 16 numbers per example, "
        "the last 5 in order, embedding space aligned"
    )
    assert shared_rows in page and histories in page
    config, _ = write_run(tmp_path, "plain", vm={"arms": ["labels", "kd"]}, distillation=settings)
    page = write_report(config.folder).read_text()
    assert "0.02 (tables)" not in page and "embedding space aligned" not in page


def test_the_report_lists_costs_at_serving(tmp_path: Path) -> None:
    """Wrong: an arm that needs a feature store looks as cheap to serve as one that does not."""
    config, _ = write_run(
        tmp_path, "arms", vm={"arms": ["labels", "ah+share", "labels+history", "kd+share+history"]}
    )
    page = write_report(config.folder).read_text()
    assert "nothing: labels, ah+share; a feature store: labels+history, kd+share+history" in page
