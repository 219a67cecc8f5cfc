"""A run as its files tell it, whole or not: settings, figures by window and over all of them, how
far it has come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from exfm_ray.errors import UserError
from exfm_ray.metrics.gain import gains_over_labels, pool
from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.storage.atomic import read_json
from exfm_ray.storage.paths import store_root_of_run
from exfm_ray.tracking.plot_styles import listing
from exfm_ray.tracking.recorder import TIMELINE, read_metrics, read_timeline

Row = dict[str, Any]
KEY = ("role", "model", "arm", "domain", "task")
LABELS = "labels"
SECTIONS = ("data", "fm", "fm.model", "vm", "vm.model", "metrics")
"""Parts of a run's settings without which nothing can be told of it."""
NOT_ADDITIVE = ("auc", "gauc", "best_ne", "calibration")
"""Figures over several windows that only summary.json has: they do not follow from those of the
windows."""


def _figures_of(summary: Row) -> bool:
    """True where a summary holds rows of figures."""
    rows = summary.get("figures")
    return isinstance(rows, list) and all(
        isinstance(row, dict) and {*KEY, "examples"} <= row.keys() and _numbers(row) for row in rows
    )


def _numbers(row: Row) -> bool:
    return all(
        key in KEY or value is None or isinstance(value, int | float) for key, value in row.items()
    )


@dataclass(frozen=True)
class RunFiles:
    """The run in `folder`; `RunFiles.open` checks that there is one."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> RunFiles:
        """UserError where the folder holds no run."""
        if not (folder / "config.yaml").exists():
            near = folder.parent / "runs" / folder.name
            hint = (
                f"; did you mean {near}?"
                if (near / "config.yaml").exists()
                else "; `run.py runs DIR` lists the runs of a folder"
            )
            raise UserError(
                f"{folder}: {'no run here: it has no config.yaml' if folder.is_dir() else 'no such folder'}{hint}"
            )
        run = cls(folder)
        if not isinstance(run.config, dict):
            raise UserError(f"{folder / 'config.yaml'}: not the settings of a run")
        lacking = [name for name in SECTIONS if not isinstance(run.setting(name), dict)]
        if lacking:
            raise UserError(
                f"{folder / 'config.yaml'}: has no section '{lacking[0]}'; give the run's command again in a folder without this file"
            )
        return run

    @cached_property
    def config(self) -> Any:
        """The resolved settings, as plain values: those of an earlier version, too."""
        try:
            return next(iter(yaml.safe_load_all((self.folder / "config.yaml").read_text())), None)
        except (yaml.YAMLError, UnicodeDecodeError):
            raise UserError(
                f"{self.folder / 'config.yaml'}: not valid YAML; start the run again, which writes it anew"
            ) from None

    def setting(self, name: str, default: Any = None) -> Any:
        """The value of a dotted setting; `default` where the run's version did not have it."""
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
        """Packages and their versions."""
        text = (self.folder / "config.yaml").read_text()
        return [
            line.removeprefix("# ")
            for line in text.partition("\n---\n")[2].splitlines()
            if line.startswith("# ")
        ]

    @cached_property
    def rows(self) -> list[Row]:
        """Of metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

    @cached_property
    def spans(self) -> list[Row]:
        """Of timeline.jsonl."""
        return read_timeline(self.folder / TIMELINE)

    @cached_property
    def new_ids(self) -> list[Row]:
        """Of new_ids.json, once a command has ended."""
        path = self.folder / "new_ids.json"
        rows: list[Row] = read_json(path) if path.exists() else []
        return rows

    @cached_property
    def summary(self) -> Row | None:
        """Of summary.json, once a command has ended."""
        path = self.folder / "summary.json"
        summary: Row | None = read_json(path) if path.exists() else None
        if summary is not None and not (isinstance(summary, dict) and _figures_of(summary)):
            raise UserError(
                f"{path}: not the summary of a run; give the run's command again, which writes it anew"
            )
        return summary

    @property
    def static(self) -> bool:
        """True for passes over a static set."""
        return bool(self.setting("fm.static"))

    @cached_property
    def windows(self) -> int:
        """Windows of the stream."""
        return len(list((store_root_of_run(self.folder) / "stream").glob("window=*/manifest.json")))

    @cached_property
    def done(self) -> dict[str, int]:
        """Model -> windows (or passes) whose figures are there."""
        place = "pass" if self.static else "window"
        names = [
            self.setting("fm.name", "fm"),
            *(student["name"] for student in self.setting("vm.models") or ()),
        ]
        return {
            name: len({row[place] for row in self.rows if row["model"] == name}) for name in names
        }

    @property
    def state(self) -> str:
        """done, failed or unfinished; a run that is at work now is unfinished, too."""
        if (self.folder / "logs" / "error.txt").exists():
            return "failed"
        whole = (
            self.summary is not None
            if self.static
            else self.windows and min(self.done.values()) >= self.windows
        )
        return "done" if whole else "unfinished"

    @cached_property
    def figures(self) -> list[Row]:
        """Over all windows after the warm-up that are done so far; of a static set those of the
        best pass. In the arms' order."""
        summed = self.summary["figures"] if self.summary else []
        if self.static:
            return list(summed)
        told = {tuple(row[key] for key in KEY): row for row in summed}
        rows = combine_windows(
            [row for row in self.rows if row["window"] >= self.setting("metrics.warmup_windows", 0)]
        )
        for row in rows:
            same = told.get(tuple(row[key] for key in KEY), {})
            if same.get("examples") == row["examples"]:  # or the summary is of fewer windows
                row |= {name: same.get(name) for name in NOT_ADDITIVE}
        return with_gains(rows)


def combine_windows(rows: Sequence[Row]) -> list[Row]:
    """The rows of each model, arm, domain and task as one: sums of log loss, labels and predictions
    add up over windows."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["examples"]:
            groups[tuple(row[key] for key in KEY)].append(row)
    return [
        dict(zip(KEY, key, strict=True)) | _sums(groups[key])
        for key in sorted(groups, key=lambda key: listing(key[2]))
    ]


def _sums(rows: Sequence[Row]) -> Row:
    pooled = pool(rows)
    return {
        "examples": pooled.examples,
        "label_rate": pooled.label_rate,
        "log_loss": pooled.log_loss,
        "ne": pooled.ne,
        "calibration": pooled.calibration if pooled.has_all_predictions else None,
    }


def with_gains(rows: Sequence[Row]) -> list[Row]:
    """The rows, those of vertical models with ne_gain, fm_ne (the FM's on the same examples),
    fm_ne_gain and transfer_ratio."""
    fm = {(row["domain"], row["task"]): row["ne"] for row in rows if row["role"] == "fm"}
    labels = {
        (row["model"], row["domain"], row["task"]): row["ne"]
        for row in rows
        if row["arm"] == LABELS
    }
    return [row | _gains(row, fm, labels) if row["role"] == "vm" else row for row in rows]


def _gains(
    row: Row,
    fm: Mapping[tuple[str, str], float | None],
    labels: Mapping[tuple[str, str, str], float | None],
) -> Row:
    place = (row["domain"], row["task"])
    teacher = fm.get(place)
    baseline = labels.get((row["model"], *place))
    is_labels_arm = row["arm"] == LABELS
    gains = gains_over_labels(row["ne"], baseline, teacher, is_labels_arm)
    return {"fm_ne": teacher, **gains._asdict()}


@dataclass(frozen=True)
class Panel:
    """What is drawn together: a vertical model's arms, with the FM on the same examples; or the FM
    alone (`model` None)."""

    model: str | None
    domain: str
    task: str
    curves: dict[str, list[Row]]

    @property
    def title(self) -> str:
        """For people."""
        place = "all domains" if self.domain == ALL_DOMAINS else self.domain
        return f"{self.model or 'FM'}: {self.task}, {place}"


def panels(run: RunFiles) -> list[Panel]:
    """The FM over all domains, then each vertical model. Of a static set: on its validation window,
    pass by pass."""
    rows = run.rows
    by = "window"
    if run.static and rows:
        validation = min(row["window"] for row in rows)
        by = "pass"
        rows = [row for row in rows if row["window"] == validation]
    curves: dict[tuple[str, str, str, str, str], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row[by]):
        curves[row["role"], row["model"], row["arm"], row["domain"], row["task"]].append(row)
    places: dict[tuple[str | None, str, str], None]
    places = {
        (None, domain, task): None
        for role, _, _, domain, task in curves
        if role == "fm" and domain == ALL_DOMAINS
    }
    places |= {
        (model, domain, task): None for role, model, _, domain, task in curves if role == "vm"
    }
    found = []
    for model, domain, task in places:
        mine = {
            arm: curve
            for (role, name, arm, d, t), curve in curves.items()
            if (d, t) == (domain, task) and (role == "fm" or name == model)
        }
        found.append(
            Panel(model, domain, task, {arm: mine[arm] for arm in sorted(mine, key=listing)})
        )
    return found
