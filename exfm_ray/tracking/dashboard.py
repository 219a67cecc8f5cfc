"""Dashboards in wandb: a workspace over all runs of a pipeline and its sweep, and a report with a
few words beside the figures.

What they hold follows from the settings and the schema alone; no run is read. Saving them needs a
server.
"""

from __future__ import annotations

import os
from netrc import NetrcParseError, netrc
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import wandb
import wandb.errors
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from exfm_ray.config.root import Config
from exfm_ray.errors import UserError
from exfm_ray.schema import ALL_DOMAINS, Schema
from exfm_ray.tracking.wandb_pipeline import figure_name, overall_name

Panel = Any
"""Of wandb_workspaces.reports, which has no types that mypy can follow."""


class Place(NamedTuple):
    """Where an arm is compared with others: a student and one of its tasks, on its domain."""

    student: str
    task: str
    domain: str

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.student}: {self.task}"


class Part(NamedTuple):
    """A section: panels that belong together, the runs they are about, and what they tell."""

    name: str
    says: str
    job_types: tuple[str, ...]
    panels: list[Panel]


def places(config: Config) -> list[Place]:
    """All students' tasks."""
    return [
        Place(student.name, task, student.domain)
        for student in config.vm.models
        for task in student.tasks
    ]


def parts(config: Config, schema: Schema) -> list[Part]:
    """What the dashboards show, the FM first where there are no students."""
    found = [_foundation(config, schema)]
    if config.vm.models:
        found = [_arms(config), _transfer(config), *found, _das(config)]
    found.append(_load(config))
    return [*found, _sweep(config)] if config.tune else found


def workspace(
    config: Config,
    schema: Schema,
    entity: str,
) -> ws.Workspace:
    """The workspace `<run's name>` of the config's project: all parts, over the runs of the
    pipeline and of its sweep."""
    sections = [
        ws.Section(name=part.name, panels=part.panels, is_open=True)
        for part in parts(config, schema)
    ]
    groups = [config.name, *(f"{config.name}/{student.name}" for student in config.vm.models)]
    shown = ws.RunsetSettings(filters=[expr.Metric("Group").isin(groups)])
    return ws.Workspace(
        entity=entity,
        project=config.wandb.project,
        name=config.name,
        sections=sections,
        runset_settings=shown,
    )


def report(
    config: Config,
    schema: Schema,
    entity: str,
) -> wr.Report:
    """The same as a page to send around, each part over its own runs."""
    blocks: list[Any] = []
    for part in parts(config, schema):
        blocks += [
            wr.H2(part.name),
            wr.P(part.says),
            wr.PanelGrid(runsets=[_runs(config, part, entity)], panels=part.panels),
        ]
    return wr.Report(
        entity=entity,
        project=config.wandb.project,
        title=config.name,
        description="Written by run.py dashboard",
        blocks=blocks,
    )


def save(config: Config, schema: Schema) -> tuple[str, str]:
    """Make both on wandb's server, for the account of the API key; their addresses. UserError where
    the server cannot be asked."""
    if config.wandb.mode != "online":
        raise UserError(
            f"setting 'wandb.mode' is {config.wandb.mode}: dashboards lie on wandb's server; send the runs there with "
            f"`wandb sync {config.folder / 'wandb'}/offline-run-*`, then give this command --set wandb.mode=online"
        )
    if not _has_key():  # or wandb would ask for one and wait
        raise UserError("wandb has no API key: set WANDB_API_KEY, or run `wandb login`")
    try:
        entity = wandb.Api().default_entity
        if not entity:
            raise UserError(
                "wandb: the account of this API key has no default entity; choose one in its settings"
            )
        return workspace(config, schema, entity).save().url, report(
            config, schema, entity
        ).save().url
    except (wandb.errors.Error, ValueError) as error:  # ValueError: the project is not there yet
        raise UserError(
            f"wandb: {error}; the project '{config.wandb.project}' is made by its first run that is sent"
        ) from None


def _has_key() -> bool:
    host = urlsplit(wandb.setup().settings.base_url).hostname or ""
    try:
        return (
            bool(os.environ.get("WANDB_API_KEY"))
            or netrc(os.environ.get("NETRC")).authenticators(host) is not None
        )
    except (OSError, NetrcParseError):
        return False


def _runs(
    config: Config,
    part: Part,
    entity: str,
) -> wr.Runset:
    """The runs of a part: a pipeline's are one group, a sweep's one for each student."""
    groups = (
        [f"{config.name}/{student.name}" for student in config.vm.models]
        if part.job_types == ("tune",)
        else [config.name]
    )
    chosen = [expr.Metric("Group").isin(groups), expr.Metric("JobType").isin(list(part.job_types))]
    return wr.Runset(entity=entity, project=config.wandb.project, name=part.name, filters=chosen)


def _lines(
    config: Config,
    title: str,
    metric: str,
) -> wr.LinePlot:
    """A figure of every run, window by window (the FM has seen more examples than a student in the
    same window), or pass by pass."""
    axis = "pass" if config.fm.static else "window"
    return wr.LinePlot(title=title, x=axis, y=[metric], title_x=axis)


def _arms(config: Config) -> Part:
    panels = [
        _lines(config, f"{title}, {place.title}", figure_name(figure, place.task, place.domain))
        for place in places(config)
        for figure, title in (("ne", "NE"), ("calibration", "calibration"))
    ]
    says = "Each vertical model's arms against each other and the FM on the same examples, each window before it was learnt. NE: lower is better."
    return Part("Arms", says, ("vm", "fm"), panels)


def _transfer(config: Config) -> Part:
    panels = [
        wr.BarPlot(
            title=f"{title}, {place.title}",
            metrics=[overall_name(figure, place.task, place.domain)],
            groupby=wr.Config("arm"),
        )
        for place in places(config)
        for figure, title in (
            ("transfer_ratio", "transfer ratio"),
            ("ne_gain", "NE gain over labels"),
        )
    ]
    says = "Over all windows after the warm-up. The transfer ratio is the share of the FM's NE gain over the labels arm that an arm has."
    return Part("Transfer", says, ("vm",), panels)


def _foundation(config: Config, schema: Schema) -> Part:
    tasks = config.fm.tasks or schema.tasks
    panels = [_lines(config, f"NE, {task}", figure_name("ne", task, ALL_DOMAINS)) for task in tasks]
    panels += [
        _lines(config, f"label rate, {task}", figure_name("label_rate", task, ALL_DOMAINS))
        for task in tasks
    ]
    return Part(
        "Foundation model",
        "The FM over all domains, and the share of positive labels.",
        ("fm",),
        panels,
    )


def _das(config: Config) -> Part:
    titles = {
        "freshness_lag": "windows between teacher and data",
        "waited_s": "seconds waited for a snapshot",
        "examples_per_s": "examples/s scored",
    }
    says = "The Data Augmentation System: how stale its teacher is, whether it waits for the FM, how fast it scores."
    return Part(
        "DAS health",
        says,
        ("das",),
        [_lines(config, title, metric) for metric, title in titles.items()],
    )


def _load(config: Config) -> Part:
    memory = wr.BarPlot(title="peak memory, bytes", metrics=["peak_memory_bytes"])
    says = "Examples evaluated and learnt per second; peak memory of the command and of what it started on its own machine."
    return Part(
        "Speed and memory",
        says,
        ("fm", "vm") if config.vm.models else ("fm",),
        [_lines(config, "examples/s", "examples_per_s"), memory],
    )


def _sweep(config: Config) -> Part:
    assert config.tune is not None
    score = wr.SummaryMetric("score")
    searched = dict.fromkeys(name for arm in config.tune.arms for name in config.tune.space_of(arm))
    settings = {name: wr.Config(name) for name in searched}
    columns = [
        wr.ParallelCoordinatesPlotColumn(metric=metric, display_name=name)
        for name, metric in (*settings.items(), ("score", score))
    ]
    panels = [
        wr.ParallelCoordinatesPlot(title="trials", columns=columns),
        wr.ParameterImportancePlot(with_respect_to="score"),
    ]
    panels += [
        wr.ScatterPlot(title=f"score against {name}", x=metric, y=score)
        for name, metric in settings.items()
    ]
    says = "The trials of the sweep: their settings and score, which is NE with a penalty outside the calibration's bounds."
    return Part("Sweep", says, ("tune",), panels)
