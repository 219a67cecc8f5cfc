"""The ablation study: teachers obey rule 2, controls know nothing, rows line up, figures are
right."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from local_runs import score, train
from scipy import stats
from small_runs import flip_labels, rewrite, small_config
from workers import Workers

from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.readers import WindowPass
from exfm_ray.data.stream import EventStream, list_values
from exfm_ray.stores.readers import AugmentedReader
from exfm_ray.stores.snapshot_policy import SnapshotPolicy
from exfm_ray.stores.supervision import TEACHER_COLUMN, SupervisionStore
from exfm_ray.training.job import Job
from studies.ablation.figures import teacher_figures, variant_figures
from studies.ablation.plot import draw
from studies.ablation.tables import markdown
from studies.ablation.teachers import (
    CONTROL_TEACHERS,
    FM,
    Teacher,
    controls,
    student_rows,
    supervised,
    teach,
    teacher_nes,
    teachers,
)
from studies.ablation.variants import MOST_TOGETHER, calls, variants
from tuning.trial import Figures

FLIPPED = 1
WINDOWS = 4
LAGS = (1, 2)
MODELS = [{"name": name, "domain": name, "task": "click"} for name in ("feed", "search")]


@pytest.fixture(scope="module")
def config(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny run whose FM and DAS are done, at lag 1, with seed 0."""
    config = small_config(tmp_path_factory.mktemp("study"), "taught", vm={"models": MODELS})
    windows = prepare(config).windows()
    groups[1].run(train, Job("fm", config), windows, None)
    groups[1].run(score, config)
    return config


def own_rows(
    config: Config,
    student: StudentConfig,
    window: int,
) -> pa.Table:
    """The student's rows of a window, read from its files without the project's readers."""
    stream = EventStream.open(config.folder / "stream")
    files = sorted((stream.root / f"window={window:03d}").glob("fragment=*.parquet"))
    table = pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])
    return table.filter(pc.equal(table["domain"], stream.schema.domains.index(student.domain)))


def test_the_base_teacher_says_what_the_das_writes(
    config: Config, groups: dict[int, Workers]
) -> None:
    """Wrong: the study's teacher is not that of a run, or its predictions belong to other rows."""
    (predictions,) = groups[1].run(
        teach, config, Teacher(FM, {}, config.vm.models, LAGS), config.seed, WINDOWS
    )
    store = SupervisionStore(config.folder / "supervision", config.fm.name)
    for number, student in enumerate(config.vm.models):
        reader = AugmentedReader(
            config.folder / "stream", store, SnapshotPolicy(1), (number,), student.tasks
        )
        assert sorted(predictions[student.name, "lag 1"]) == [1, 2, 3] and sorted(
            predictions[student.name, "lag 2"]
        ) == [2, 3]
        for window, p_N in predictions[student.name, "lag 1"].items():
            window_pass = WindowPass(window, "learn")
            written_N = np.concatenate(
                [
                    list_values(reader.read(window_pass, f)[TEACHER_COLUMN], 1)[:, 0]
                    for f in reader.fragments(window_pass)
                ]
            )
            np.testing.assert_allclose(
                p_N, written_N, rtol=1e-5
            )  # other batches: float32 sums in another order
            assert p_N.dtype == np.float32 and not np.allclose(
                np.roll(p_N, 1), written_N, rtol=1e-5
            )  # they would show it


@pytest.mark.parametrize("domain", [None, "feed"])
def test_teachers_keep_rule_2(
    groups: dict[int, Workers],
    tmp_path: Path,
    domain: str | None,
) -> None:
    """Wrong: a prediction at lag L depends on labels of its own window, or of windows later than
    L before."""
    config = small_config(tmp_path, "flipped", vm={"models": MODELS})
    stream = prepare(config)
    teacher = Teacher(FM, {}, config.vm.models[: 1 if domain else 2], LAGS, domain)
    (before,) = groups[1].run(teach, config, teacher, 3, WINDOWS)
    for window in range(FLIPPED, WINDOWS):
        rewrite(stream, window, flip_labels)
    (after,) = groups[1].run(teach, config, teacher, 3, WINDOWS)
    assert before.keys() == after.keys() and len(before) == len(LAGS) * len(teacher.students)
    for (student, column), predictions in before.items():
        lag = int(column.removeprefix("lag "))
        for window, p_N in predictions.items():
            same = bool(np.array_equal(p_N, after[student, column][window]))
            assert same == (window < FLIPPED + lag), (student, column, window)


def test_one_domains_teacher_has_seen_no_other(groups: dict[int, Workers], tmp_path: Path) -> None:
    """Wrong: the FM of one domain has learned other domains."""
    config = small_config(tmp_path, "domains")
    stream = prepare(config)
    feed = next(t for t in teachers(config, (1,)) if t.domain == "feed")
    (before,) = groups[1].run(teach, config, feed, 0, WINDOWS)

    def only_others(table: pa.Table) -> pa.Table:
        """Flip labels outside of the domain."""
        mask = pc.equal(table["domain"], 0)
        return pa.concat_tables(
            [table.filter(mask), flip_labels(table.filter(pc.invert(mask)))]
        ).sort_by("example_id")

    assert stream.schema.domains[0] == "feed"
    for window in range(WINDOWS):
        rewrite(stream, window, only_others)
    (after,) = groups[1].run(teach, config, feed, 0, WINDOWS)
    assert list(before) == [("feed", "one_domain")]
    for window, p_N in before["feed", "one_domain"].items():
        np.testing.assert_array_equal(p_N, after["feed", "one_domain"][window])


def test_controls_are_what_they_say() -> None:
    """Wrong: the shuffled teacher still matches its examples or has other values, or the
    constant one knows its own window."""
    rng = np.random.default_rng(0)
    labels = {
        window: (rng.random(rows) < 0.3).astype(np.float32)
        for window, rows in enumerate((50, 200, 80))
    }
    predictions = {window: rng.random(len(labels[window]), np.float32) for window in (1, 2)}
    found = controls(labels, predictions, seed=4)
    assert tuple(found) == CONTROL_TEACHERS and all(sorted(by) == [1, 2] for by in found.values())
    for window in predictions:
        np.testing.assert_array_equal(
            np.sort(found["shuffled"][window]), np.sort(predictions[window])
        )
        assert (found["shuffled"][window] == predictions[window]).mean() < 0.1
        np.testing.assert_array_equal(found["own_label"][window], labels[window])
    assert not np.array_equal(
        controls(labels, predictions, seed=5)["shuffled"][1], found["shuffled"][1]
    )
    np.testing.assert_allclose(found["constant"][1], labels[0].sum() / 50, rtol=1e-6)
    np.testing.assert_allclose(
        found["constant"][2], (labels[0].sum() + labels[1].sum()) / 250, rtol=1e-6
    )
    other = controls({**labels, 2: 1 - labels[2]}, predictions, seed=4)
    np.testing.assert_array_equal(other["constant"][2], found["constant"][2])


def test_rows_line_up_with_the_stream(config: Config) -> None:
    """Wrong: a prediction belongs to another example, or a teacher supervises windows for which
    it has no version."""
    student = config.vm.models[1]
    parts = {window: own_rows(config, student, window) for window in range(WINDOWS)}
    marks = {
        w: (table["example_id"].to_numpy() % 997 / 1000).astype(np.float32)
        for w, table in parts.items()
    }
    by_seed = {
        seed: {f"lag {lag}": {w: marks[w] + seed for w in range(lag, WINDOWS)} for lag in LAGS}
        for seed in (0, 1)
    }
    rows, columns = student_rows(config, student, WINDOWS, by_seed)
    names = ("lag 1", "lag 2", *CONTROL_TEACHERS)
    assert columns == [(seed, name) for seed in (0, 1) for name in names]
    for window, part in parts.items():
        (fragment,) = rows.fragments(WindowPass(window, "learn"))
        table = rows.read(WindowPass(window, "learn"), fragment)
        assert table.drop_columns([TEACHER_COLUMN]).equals(part.combine_chunks())
        assert (
            TEACHER_COLUMN not in rows.read(WindowPass(window, "evaluate"), fragment).column_names
        )
        p_NC = list_values(table[TEACHER_COLUMN], len(columns))
        for number, (seed, name) in enumerate(columns):
            first = 2 if name == "lag 2" else 1
            assert (
                bool(np.isnan(p_NC[:, number]).all())
                == bool(np.isnan(p_NC[:, number]).any())
                == (window < first)
            )
            if name.startswith("lag") and window >= first:
                np.testing.assert_array_equal(p_NC[:, number], marks[window] + np.float32(seed))
    # What one call of `learn` reads: a column a training, from the window on from which its
    # teachers supervise.
    chosen = [columns.index((1, "lag 2")), columns.index((0, "lag 1"))]
    late = supervised(rows, chosen, 2)
    for window in range(WINDOWS):
        (table,) = (
            late.read(WindowPass(window, "learn"), f)
            for f in late.fragments(WindowPass(window, "learn"))
        )
        assert (TEACHER_COLUMN in table.column_names) == (window >= 2)
        if window >= 2:
            np.testing.assert_array_equal(
                list_values(table[TEACHER_COLUMN], 2),
                np.stack([marks[window] + 1, marks[window]], axis=1),
            )
    with pytest.raises(AssertionError, match="does not supervise this window yet"):
        supervised(rows, chosen, 1)


def test_teachers_ne(config: Config) -> None:
    """Wrong: a teacher's NE is of other windows than the students', or of part of them only."""
    student = config.vm.models[0]
    windows = range(1, WINDOWS)
    labels = [list_values(own_rows(config, student, w)["labels"], 2)[:, 0] for w in range(WINDOWS)]
    rng = np.random.default_rng(1)
    predictions = {w: rng.uniform(0.05, 0.6, len(labels[w])).astype(np.float32) for w in windows}
    rows, columns = student_rows(
        config,
        student,
        WINDOWS,
        {7: {"lag 1": predictions, "lag 2": {w: predictions[w] for w in (2, 3)}}},
    )
    told = teacher_nes(config, student, rows, columns, windows)
    y_N = np.concatenate(labels[1:]).astype(np.float64)
    p_N = np.concatenate([predictions[w] for w in windows]).astype(np.float64)
    rate = y_N.mean()
    loss = -np.where(y_N == 1, np.log(p_N), np.log(1 - p_N)).mean()
    assert told[7, "lag 1"] == pytest.approx(
        loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)), rel=1e-9
    )
    assert (7, "lag 2") not in told and (7, "lag 2") in teacher_nes(
        config, student, rows, columns, range(2, WINDOWS)
    )


@pytest.mark.parametrize("windows", [3, 6, 12])
def test_calls_hold_every_training_once(config: Config, windows: int) -> None:
    """Wrong: a training is left out or done twice, or a call mixes structures or windows of
    supervision."""
    wanted = variants(windows)
    seeds = (0, 1, 2, 3, 4)
    found = calls(config, wanted, seeds)
    trained = [(one.variant.name, one.seed) for call in found for one in call]
    assert sorted(trained) == sorted((variant.name, seed) for variant in wanted for seed in seeds)
    assert len({variant.name for variant in wanted}) == len(wanted)
    for call in found:
        assert len(call) <= MOST_TOGETHER
        assert (
            len({(one.variant.arm, one.variant.first, one.variant.teacher is None) for one in call})
            == 1
        )
        assert (
            len(
                {
                    tuple(
                        one.variant.settings.get("distillation.ah.mlp", config.distillation.ah.mlp)
                    )
                    for one in call
                }
            )
            == 1
        )
    names = {variant.name for variant in wanted}
    assert all(variant.against in names for variant in wanted if variant.against)
    knobs = [variant for variant in wanted if variant.name.startswith("neutral, ")]
    base = next(variant for variant in wanted if variant.name == "neutral ah").settings
    assert len(knobs) == 7 and all(
        sum(variant.settings[key] != base[key] for key in base) == 1 for variant in knobs
    )
    assert {f"ah, lag {lag}" for lag in (2, 4, 8) if lag < windows - 1} == {
        n for n in names if n.startswith("ah, lag") and "from" not in n
    }


def test_figures_and_what_they_say(config: Config, tmp_path: Path) -> None:
    """Wrong: gains are over another seed's labels, an interval is too narrow, or a verdict
    contradicts its interval."""
    wanted = variants(6)
    seeds = (0, 1, 2)
    shift = {"ah": 0.02, "ah_sa": 0.022, "kd": -0.01, "ah, small FM": 0.02}
    noise = np.random.default_rng(0).normal(0, 0.001, (len(wanted), len(seeds)))
    ne = {
        (v.name, s): 0.9 + 0.05 * s - shift.get(v.name, 0.0) + noise[i, s]
        for i, v in enumerate(wanted)
        for s in seeds
    }
    outcomes: dict[tuple[str, int], Figures | str] = {
        key: Figures(5, value, 1.01, 50.0) for key, value in ne.items()
    }
    outcomes["ah_sa", 2] = "diverged"
    fm = {s: ne["labels", s] * (1 - 0.04) for s in seeds}
    told = variant_figures(wanted, outcomes, fm)
    gains = np.array([1 - ne["ah", s] / ne["labels", s] for s in seeds])
    low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert (
        told["ah"]["ne_gain"]["mean"],
        told["ah"]["ne_gain"]["low"],
        told["ah"]["ne_gain"]["high"],
    ) == pytest.approx((gains.mean(), low, high))
    assert told["ah"]["transfer_ratio"]["mean"] == pytest.approx((gains / 0.04).mean())
    assert [told[name]["over_labels"] for name in ("ah", "kd", "labels")] == [
        "helps",
        "hurts",
        None,
    ]
    small = gains - np.array([1 - ne["ah, small FM", s] / ne["labels", s] for s in seeds])
    assert (
        told["ah, small FM"]["difference"]["mean"] == pytest.approx(-small.mean())
        and told["ah, small FM"]["over_against"] == "no difference seen"
    )
    assert told["ah_sa"]["errors"] == ["diverged"] and told["ah_sa"]["ne_gain"]["seeds"] == 2
    silent = variant_figures(
        wanted, outcomes, {0: ne["labels", 0] * 0.9, 1: ne["labels", 1] * 1.1, 2: ne["labels", 2]}
    )
    assert (
        silent["ah"]["transfer_ratio"] is None and silent["ah"]["ne_gain"] == told["ah"]["ne_gain"]
    )
    nes = {(s, "lag 1"): fm[s] for s in seeds}
    taught_by = teacher_figures(
        nes, {**nes, **{(s, "lag 4"): fm[s] for s in seeds}}, {s: ne["labels", s] for s in seeds}
    )
    assert (
        taught_by["lag 1"]["ne_gain"]["mean"] == pytest.approx(0.04)
        and taught_by["lag 4"]["ne"] is None
    )
    one = {
        "title": "A < B",
        "judged_windows": (3, 5),
        "late_windows": (4, 5),
        "seeds": seeds,
        "lags": (1, 2, 4),
        "fm_flops": {"small": 1e5},
        "students": {
            name: {"variants": told, "teachers": taught_by} for name in ("feed", "search")
        },
    }
    text = markdown(one)
    assert f"| ah | {100 * gains.mean():+.2f} ± {100 * (high - gains.mean()):.2f} |" in text
    assert (
        "- ah: over labels helps." in text
        and "- kd: over labels hurts." in text
        and "1 trainings failed" not in text.split("- ah:")[0]
    )
    draw({"one": one}, tmp_path / "study.svg")
    dots = (
        ElementTree.parse(tmp_path / "study.svg")
        .getroot()
        .findall("{http://www.w3.org/2000/svg}circle")
    )
    assert len(dots) == 2 * (
        1 + len(wanted) - 1 + 2 * (2 + 3)
    )  # a student: legend, variants, both arms at two lags and three sizes
