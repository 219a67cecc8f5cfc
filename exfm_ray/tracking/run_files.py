"""The results of a run, read from the files in its folder, whether the run is complete or not.

`RunFiles` is the public way to read results; see examples/read_results.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from exfm_ray.errors import UserError
from exfm_ray.metrics.gain import gains_over_labels, pool
from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.storage.atomic import read_json
from exfm_ray.storage.paths import store_root_of_run
from exfm_ray.tracking.plot_styles import arm_order
from exfm_ray.tracking.recorder import TIMELINE, read_metrics, read_timeline

Row = dict[str, Any]
KEY = ("role", "model", "arm", "domain", "task")
LABELS = "labels"
SECTIONS = ("data", "fm", "fm.model", "vm", "vm.model", "metrics")
"""Sections of the settings that every run has."""
NOT_ADDITIVE = ("auc", "gauc", "best_ne", "calibration")
"""Figures that only summary.json has: they do not follow from those of single windows."""


@dataclass(frozen=True)
class RunFiles:
    """The files of one run. Create it with `RunFiles.open`, which checks the folder.

    Files are read when they are first needed. Those of a run that is still in progress hold what
    has been done so far.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> RunFiles:
        """Open the run in a folder.

        Raises:
            UserError: the folder holds no run.
        """
        settings = folder / "config.yaml"
        if not settings.exists():
            raise UserError(_no_run_message(folder))
        run = cls(folder)
        if not isinstance(run.config, dict):
            raise UserError(f"{settings}: not the settings of a run")
        for section in SECTIONS:
            if not isinstance(run.setting(section), dict):
                raise UserError(
                    f"{settings}: has no section '{section}'; rerun the run's command in a folder "
                    "without this file"
                )
        return run

    @cached_property
    def config(self) -> Any:
        """The resolved settings as plain values, possibly those of an earlier version."""
        path = self.folder / "config.yaml"
        try:
            documents = yaml.safe_load_all(path.read_text())
            return next(iter(documents), None)
        except (yaml.YAMLError, UnicodeDecodeError):
            raise UserError(
                f"{path}: not valid YAML; rerun the run's command, which writes it again"
            ) from None

    def setting(self, name: str, default: Any = None) -> Any:
        """The value of a setting, such as `das.fm_lag`; `default` if it is missing."""
        value = self.config
        for part in name.split("."):
            value = value.get(part, default) if isinstance(value, dict) else default
        return value

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.setting("name", self.folder.name))

    @cached_property
    def versions(self) -> list[str]:
        """Packages with their versions, such as `torch 2.13.0`."""
        path = self.folder / "config.yaml"
        _, _, comments = path.read_text().partition("\n---\n")
        versions = []
        for line in comments.splitlines():
            if line.startswith("# "):
                versions.append(line.removeprefix("# "))
        return versions

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of metrics.jsonl: one for each window, model, arm, domain and task."""
        return read_metrics(self.folder / "metrics.jsonl")

    @cached_property
    def spans(self) -> list[Row]:
        """The rows of timeline.jsonl: one for each pass of a role over a window."""
        return read_timeline(self.folder / TIMELINE)

    @cached_property
    def new_ids(self) -> list[Row]:
        """The rows of new_ids.json; empty until a command has finished."""
        path = self.folder / "new_ids.json"
        rows: list[Row] = read_json(path) if path.exists() else []
        return rows

    @cached_property
    def summary(self) -> Row | None:
        """The content of summary.json; None until a command has finished."""
        path = self.folder / "summary.json"
        if not path.exists():
            return None
        summary: Row = read_json(path)
        if not isinstance(summary, dict) or not _has_figures(summary):
            raise UserError(
                f"{path}: not the summary of a run; rerun the run's command, which writes it again"
            )
        return summary

    @property
    def static(self) -> bool:
        """Whether the run makes several passes over a static set."""
        return bool(self.setting("fm.static"))

    @cached_property
    def windows(self) -> int:
        """The number of windows of the stream."""
        stream = store_root_of_run(self.folder) / "stream"
        return len(list(stream.glob("window=*/manifest.json")))

    @cached_property
    def done(self) -> dict[str, int]:
        """Model -> number of windows (passes, for a static set) that have figures."""
        fm = self.setting("fm.name", "fm")
        students = self.setting("vm.models") or ()
        done: dict[str, set[int]] = {fm: set()}
        for student in students:
            done[student["name"]] = set()

        unit = "pass" if self.static else "window"
        for row in self.rows:
            model = row["model"]
            if model in done:
                done[model].add(row[unit])
        return {model: len(numbers) for model, numbers in done.items()}

    @property
    def state(self) -> str:
        """done, failed or unfinished; a run in progress is unfinished, too."""
        if (self.folder / "logs" / "error.txt").exists():
            return "failed"
        if self.static:
            is_complete = self.summary is not None
        else:
            windows_done = min(self.done.values())
            is_complete = self.windows > 0 and windows_done >= self.windows
        return "done" if is_complete else "unfinished"

    @cached_property
    def figures(self) -> list[Row]:
        """One row for each model, arm, domain and task, over all windows after the warm-up so far.

        Arms come in the order in which they are listed everywhere. For a static set these are the
        figures of the best pass.
        """
        in_summary = self.summary["figures"] if self.summary else []
        if self.static:
            return list(in_summary)

        summarized = {_key(row): row for row in in_summary}
        warmup = self.setting("metrics.warmup_windows", 0)
        rows = combine_windows([row for row in self.rows if row["window"] >= warmup])
        for row in rows:
            key = _key(row)
            match = summarized.get(key, {})
            # A summary of fewer windows has figures of other examples.
            if match.get("examples") == row["examples"]:
                row |= {name: match.get(name) for name in NOT_ADDITIVE}
        return with_gains(rows)


def _no_run_message(folder: Path) -> str:
    problem = "no such folder"
    if folder.is_dir():
        problem = "no run here: it has no config.yaml"
    hint = "`run.py runs DIR` lists the runs of a folder"
    candidate = folder.parent / "runs" / folder.name
    if (candidate / "config.yaml").exists():
        hint = f"did you mean {candidate}?"
    return f"{folder}: {problem}; {hint}"


def _has_figures(summary: Row) -> bool:
    """Whether a summary holds valid rows of figures."""
    rows = summary.get("figures")
    return isinstance(rows, list) and all(_is_figure_row(row) for row in rows)


def _is_figure_row(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    required = {*KEY, "examples"}
    if not row.keys() >= required:
        return False
    for name, value in row.items():
        is_figure = value is None or isinstance(value, int | float)
        if name not in KEY and not is_figure:
            return False
    return True


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def combine_windows(rows: Sequence[Row]) -> list[Row]:
    """Pool the windows of each model, arm, domain and task into one row.

    Sums of log loss, labels and predictions add up over windows.
    """
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["examples"]:
            groups[_key(row)].append(row)

    combined = []
    for key in sorted(groups, key=lambda key: arm_order(key[2])):
        identity = dict(zip(KEY, key, strict=True))
        figures = _pooled(groups[key])
        combined.append(identity | figures)
    return combined


def _pooled(rows: Sequence[Row]) -> Row:
    figures = pool(rows)
    # The calibration of a window without labels is undefined, so its predictions are unknown.
    calibration = figures.calibration if figures.has_all_predictions else None
    return {
        "examples": figures.examples,
        "label_rate": figures.label_rate,
        "log_loss": figures.log_loss,
        "ne": figures.ne,
        "calibration": calibration,
    }


def with_gains(rows: Sequence[Row]) -> list[Row]:
    """Add gains to the rows of vertical models.

    These are ne_gain, fm_ne (NE of the FM on the same examples), fm_ne_gain and transfer_ratio.
    """
    fm_ne = {}
    labels_ne = {}
    for row in rows:
        domain, task = row["domain"], row["task"]
        if row["role"] == "fm":
            fm_ne[domain, task] = row["ne"]
        if row["arm"] == LABELS:
            labels_ne[row["model"], domain, task] = row["ne"]

    result = []
    for row in rows:
        if row["role"] == "vm":
            row = row | _gains(row, fm_ne, labels_ne)
        result.append(row)
    return result


def _gains(
    row: Row,
    fm_ne: Mapping[tuple[str, str], float | None],
    labels_ne: Mapping[tuple[str, str, str], float | None],
) -> Row:
    model = row["model"]
    domain = row["domain"]
    task = row["task"]
    teacher_ne = fm_ne.get((domain, task))
    baseline = labels_ne.get((model, domain, task))
    gains = gains_over_labels(
        row["ne"],
        labels_ne=baseline,
        fm_ne=teacher_ne,
        is_labels_arm=row["arm"] == LABELS,
    )
    return {"fm_ne": teacher_ne, **gains._asdict()}


@dataclass(frozen=True)
class Panel:
    """Curves that are drawn in one plot.

    Attributes:
        model: a vertical model, drawn with the FM on the same examples; None for the FM alone.
        curves: arm (or `fm`) -> its rows of metrics.jsonl, in order.
    """

    model: str | None
    domain: str
    task: str
    curves: dict[str, list[Row]]

    @property
    def title(self) -> str:
        """The heading of the plot."""
        domain = "all domains" if self.domain == ALL_DOMAINS else self.domain
        return f"{self.model or 'FM'}: {self.task}, {domain}"


class _CurveKey(NamedTuple):
    """What identifies a curve: the fields of `KEY`."""

    role: str
    model: str
    arm: str
    domain: str
    task: str


class _Place(NamedTuple):
    """What a panel shows; see `Panel`."""

    model: str | None
    domain: str
    task: str

    def includes(self, key: _CurveKey) -> bool:
        """Whether a curve is drawn here."""
        same_examples = (key.domain, key.task) == (self.domain, self.task)
        return same_examples and (key.role == "fm" or key.model == self.model)


def panels(run: RunFiles) -> list[Panel]:
    """The FM over all domains, then each vertical model.

    For a static set the curves are those of its validation window, pass by pass.
    """
    curves = _curves(run)
    drawn = []
    for place in _places(curves):
        matches = {}
        for key, rows in curves.items():
            if place.includes(key):
                matches[key.arm] = rows
        arms = sorted(matches, key=arm_order)
        in_order = {arm: matches[arm] for arm in arms}
        drawn.append(Panel(*place, in_order))
    return drawn


def _curves(run: RunFiles) -> dict[_CurveKey, list[Row]]:
    """The rows of each curve, in order of windows or passes."""
    rows = run.rows
    unit = "window"
    if run.static and rows:
        validation = min(row["window"] for row in rows)
        rows = [row for row in rows if row["window"] == validation]
        unit = "pass"

    curves: dict[_CurveKey, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row[unit]):
        key = _CurveKey(*_key(row))
        curves[key].append(row)
    return curves


def _places(curves: Mapping[_CurveKey, Any]) -> list[_Place]:
    """The places of all panels: the FM's first, each once."""
    of_fm = []
    of_students = []
    for key in curves:
        if key.role == "vm":
            place = _Place(key.model, key.domain, key.task)
            of_students.append(place)
        elif key.domain == ALL_DOMAINS:
            place = _Place(None, key.domain, key.task)
            of_fm.append(place)
    return list(dict.fromkeys(of_fm + of_students))
