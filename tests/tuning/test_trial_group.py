"""Trial groups: members and seeds in one training, the reports on them, populations."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any

import pytest

import tuning.trial_group
from exfm_ray.config.root import Config
from exfm_ray.training.job import Job
from tuning.trial import Exploit, Figures, Outcome, score
from tuning.trial_group import mean, train_members

W = "distillation.ah.w"
MLP = "distillation.ah.mlp"
FIRST = 1
LAST = 3


def config(**changes: Any) -> Config:
    tune = {
        "validation_windows": [FIRST, LAST],
        "holdout_windows": [4, 5],
        "early_stopping": "none",
        "trials": 4,
        "space": {
            W: {"low": 0.1, "high": 4},
            MLP: {"choice": [[], [8]]},
        },
        **changes,
    }
    return Config.model_validate(
        {"vm": {"models": [{"name": "s", "domain": "s", "task": "click"}]}, "tune": tune}
    )


def reports_of(
    base: Config,
    monkeypatch: pytest.MonkeyPatch,
    weights: Sequence[float],
    fails: Collection[tuple[int, int]] = (),
) -> tuple[list[Any], list[Any]]:
    """A trial group's reports and the exploits that it sent.

    The training is fake: NE is the weight plus a hundredth of the seed.

    Args:
        fails: (window, position among the trainings) of failures; a training continues once it
            is replaced.
    """
    sent: list[Any] = []

    def learn(
        jobs: Sequence[Job],
        reader: Any,
        windows: Sequence[int],
    ) -> Generator[list[Outcome], Sequence[Exploit] | None, None]:
        jobs = list(jobs)
        failed = set[int]()
        for window in windows:
            failed |= {position for at, position in fails if at == window}
            figures = [
                Figures(window, job.config.distillation.ah.w + job.config.seed / 100, 1.0, 50.0)
                for job in jobs
            ]
            exploits = yield [
                "diverged" if i in failed else one if window >= FIRST else None
                for i, one in enumerate(figures)
            ]
            sent.append(exploits)
            for _, target, job in exploits or ():
                jobs[target] = job
                failed.discard(target)

    monkeypatch.setattr(tuning.trial_group, "learn", learn)
    members = [{"number": number, "settings": {W: w, MLP: [8]}} for number, w in enumerate(weights)]
    reader: Any = None
    return list(
        train_members(
            {"student": "s", "arm": "ah", "members": members}, base, base.vm.models[0], reader
        )
    ), sent


def test_members_with_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a member gets a sibling's figures or those of one seed only, or does not fail
    although one of its trainings does."""
    base = config(trials_per_process=2, seeds=3)
    reports, sent = reports_of(base, monkeypatch, [0.3, 0.7], {(2, 4)})
    assert [len(report) for report in reports] == [2, 2, 2] and sent == [None] * 3
    for window, (one, _) in enumerate(reports, FIRST):
        ne = pytest.approx((0.30 + 0.31 + 0.32) / 3, abs=1e-12)
        assert one == {
            "window": window,
            "ne": ne,
            "calibration": 1.0,
            "labels": 50.0,
            "score": ne,
            "settings": {W: 0.3, MLP: (8,)},
        }
    assert (
        reports[0][1]["ne"] == pytest.approx(0.71)
        and [report[1] for report in reports[1:]] == [{"failed": "diverged"}] * 2
    )


def test_mean_of_seeds() -> None:
    """Wrong: the chance in calibration shrinks with seeds, although all see the same labels, or
    a mean is wrong."""
    outcomes = [Figures(3, 0.8, 1.2, 100.0), Figures(3, 0.6, 0.9, 100.0)]
    assert mean(outcomes) == pytest.approx(Figures(3, 0.7, 1.05, 100.0))
    assert (
        mean(outcomes[:1]) is not None
        and mean(outcomes[:1]) == outcomes[0]
        and mean([None, None]) is None
    )
    assert mean([outcomes[0], "NaN", "more"]) == "NaN" == mean([None, "NaN"])


def test_a_trial_group_ends_with_its_last_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a process trains on although all members have failed, or ends silently because no
    window has counted yet."""
    reports, sent = reports_of(
        config(trials_per_process=2), monkeypatch, [0.3, 0.7], {(0, 0), (0, 1)}
    )
    assert reports == [[{"failed": "diverged"}] * 2] and sent == []
    reports, _ = reports_of(config(trials_per_process=2), monkeypatch, [0.3, 0.7], {(0, 0), (3, 1)})
    assert len(reports) == 3 and reports[-1] == [{"failed": "diverged"}] * 2


def test_population(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: members are replaced before a window has counted or after the last one, or by
    others than the best, or reported with other settings than they learned with."""
    base = config(trials_per_process=4, search="pbt")
    reports, sent = reports_of(base, monkeypatch, [0.3, 2.0, 0.5, 0.6])
    assert base.tune is not None
    assert [len(exploits or ()) for exploits in sent] == [0, 1, 1]
    weights = [[entry["settings"][W] for entry in report] for report in reports]
    assert weights[0] == [0.3, 2.0, 0.5, 0.6] and weights[1][1] in (
        pytest.approx(0.24),
        pytest.approx(0.375),
    )
    for before, after, exploits in zip(weights[:-1], weights[1:], sent[1:], strict=True):
        ((source, target, job),) = exploits
        assert (source, target) == (before.index(min(before)), before.index(max(before)))
        assert (
            after[target] == job.config.distillation.ah.w
            and job.config.distillation.ah.mlp == (8,)
            and job.config.seed == base.seed
        )
        assert [w for i, w in enumerate(after) if i != target] == [
            w for i, w in enumerate(before) if i != target
        ]
    for report in reports:  # the figures are those of the settings beside them
        assert [entry["ne"] for entry in report] == [entry["settings"][W] for entry in report]
        assert all(
            entry["score"]
            == score(Figures(entry["window"], entry["ne"], 1.0, 50.0), base.tune.calibration)
            for entry in report
        )
    assert reports_of(base, monkeypatch, [0.3, 2.0, 0.5, 0.6])[0] == reports


def test_a_failed_member_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a population shrinks with every member that diverges."""
    reports, sent = reports_of(
        config(trials_per_process=4, search="pbt"),
        monkeypatch,
        [0.3, 2.0, 0.5, 0.6],
        {(0, 0), (1, 2)},
    )
    assert ["failed" in entry for entry in reports[0]] == [True, False, True, False] and not any(
        "failed" in entry for entry in reports[1]
    )
    assert {target for _, target, _ in sent[1]} == {0, 2} and {
        source for source, _, _ in sent[1]
    } == {3}
