"""Dashboards in wandb: a workspace over all runs of a pipeline and its sweep, and a report.

Their content follows from the settings and the schema alone; no run is read. Saving needs a server.
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
"""A panel of wandb_workspaces.reports, which has no types that mypy can follow."""


class StudentTask(NamedTuple):
    """A student and one of its tasks: its arms are compared on the student's domain."""

    student: str
    task: str
    domain: str

    @property
    def title(self) -> str:
        """The title of its panels."""
        return f"{self.student}: {self.task}"


class Section(NamedTuple):
    """Panels that belong together.

    Attributes:
        description: what the panels show, in a sentence.
        job_types: of the runs that are shown.
    """

    name: str
    description: str
    job_types: tuple[str, ...]
    panels: list[Panel]


def student_tasks(config: Config) -> list[StudentTask]:
    """The tasks of all students."""
    result = []
    for student in config.vm.models:
        for task in student.tasks:
            item = StudentTask(student.name, task, student.domain)
            result.append(item)
    return result


def sections(config: Config, schema: Schema) -> list[Section]:
    """What the dashboards show; without students the FM comes first."""
    result = []
    if config.vm.models:
        result.append(_arms(config))
        result.append(_transfer(config))
    result.append(_foundation(config, schema))
    if config.vm.models:
        result.append(_das(config))
    result.append(_load(config))
    if config.tune:
        result.append(_sweep(config))
    return result


def workspace(
    config: Config,
    schema: Schema,
    entity: str,
) -> ws.Workspace:
    """A workspace named as the run: all sections, over the runs of the pipeline and its sweep."""
    shown = [
        ws.Section(name=section.name, panels=section.panels, is_open=True)
        for section in sections(config, schema)
    ]
    groups = [config.name, *_sweep_groups(config)]
    in_groups = expr.Metric("Group").isin(groups)
    return ws.Workspace(
        entity=entity,
        project=config.wandb.project,
        name=config.name,
        sections=shown,
        runset_settings=ws.RunsetSettings(filters=[in_groups]),
    )


def report(
    config: Config,
    schema: Schema,
    entity: str,
) -> wr.Report:
    """The same content as a page to share, each section over its own runs."""
    blocks: list[Any] = []
    for section in sections(config, schema):
        runs = _runs(config, section, entity)
        blocks.append(wr.H2(section.name))
        blocks.append(wr.P(section.description))
        blocks.append(wr.PanelGrid(runsets=[runs], panels=section.panels))
    return wr.Report(
        entity=entity,
        project=config.wandb.project,
        title=config.name,
        description="Written by run.py dashboard",
        blocks=blocks,
    )


def save(config: Config, schema: Schema) -> tuple[str, str]:
    """Save both on wandb's server, for the account of the API key.

    Returns:
        The URLs of the workspace and the report.

    Raises:
        UserError: the server cannot be used.
    """
    if config.wandb.mode != "online":
        raise UserError(
            f"setting 'wandb.mode' is {config.wandb.mode}: dashboards are saved on wandb's server; "
            f"send the runs there with `wandb sync {config.folder / 'wandb'}/offline-run-*`, then "
            "rerun this command with --set wandb.mode=online"
        )
    if not _has_key():  # otherwise wandb would ask for one and wait
        raise UserError("wandb has no API key: set WANDB_API_KEY, or run `wandb login`")
    try:
        entity = wandb.Api().default_entity
        if not entity:
            raise UserError(
                "wandb: the account of this API key has no default entity; choose one in its "
                "settings"
            )
        saved_workspace = workspace(config, schema, entity).save()
        saved_report = report(config, schema, entity).save()
    except (wandb.errors.Error, ValueError) as error:  # ValueError: the project does not exist
        raise UserError(
            f"wandb: {error}; the project '{config.wandb.project}' is created by the first run "
            "that is sent"
        ) from None
    return saved_workspace.url, saved_report.url


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(wandb.setup().settings.base_url).hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _sweep_groups(config: Config) -> list[str]:
    """The groups of a sweep's trials: one for each student."""
    return [f"{config.name}/{student.name}" for student in config.vm.models]


def _runs(
    config: Config,
    section: Section,
    entity: str,
) -> wr.Runset:
    """The runs of a section: those of the pipeline, or the trials of the sweep."""
    is_sweep = section.job_types == ("tune",)
    groups = _sweep_groups(config) if is_sweep else [config.name]
    filters = [
        expr.Metric("Group").isin(groups),
        expr.Metric("JobType").isin(list(section.job_types)),
    ]
    return wr.Runset(
        entity=entity, project=config.wandb.project, name=section.name, filters=filters
    )


def _lines(
    config: Config,
    title: str,
    metric: str,
) -> wr.LinePlot:
    """Plot a figure of every run by window, or by pass over a static set.

    Examples seen would not do as the x-axis: the FM has seen more than a student in one window.
    """
    axis = "pass" if config.fm.static else "window"
    return wr.LinePlot(title=title, x=axis, y=[metric], title_x=axis)


def _arms(config: Config) -> Section:
    panels = []
    for place in student_tasks(config):
        for figure, title in (("ne", "NE"), ("calibration", "calibration")):
            metric = figure_name(figure, place.task, place.domain)
            panels.append(_lines(config, f"{title}, {place.title}", metric))
    description = (
        "The arms of each vertical model and the FM on the same examples, each window before it "
        "was learned. NE: lower is better."
    )
    return Section("Arms", description, ("vm", "fm"), panels)


def _transfer(config: Config) -> Section:
    titles = {"transfer_ratio": "transfer ratio", "ne_gain": "NE gain over labels"}
    panels = []
    for place in student_tasks(config):
        for figure, title in titles.items():
            metric = overall_name(figure, place.task, place.domain)
            panels.append(
                wr.BarPlot(
                    title=f"{title}, {place.title}",
                    metrics=[metric],
                    groupby=wr.Config("arm"),
                )
            )
    description = (
        "Over all windows after the warm-up. The transfer ratio is the fraction of the FM's NE "
        "gain over the labels arm that an arm has."
    )
    return Section("Transfer", description, ("vm",), panels)


def _foundation(config: Config, schema: Schema) -> Section:
    tasks = config.fm.tasks or schema.tasks
    titles = {"ne": "NE", "label_rate": "label rate"}
    panels = []
    for figure, title in titles.items():
        for task in tasks:
            metric = figure_name(figure, task, ALL_DOMAINS)
            panel = _lines(config, f"{title}, {task}", metric)
            panels.append(panel)
    description = "The FM over all domains, and the fraction of positive labels."
    return Section("Foundation model", description, ("fm",), panels)


def _das(config: Config) -> Section:
    titles = {
        "freshness_lag": "windows between teacher and data",
        "waited_s": "seconds waited for a snapshot",
        "examples_per_s": "examples/s scored",
    }
    panels = [_lines(config, title, metric) for metric, title in titles.items()]
    description = (
        "The Data Augmentation System: how stale its teacher is, whether it waits for the FM, how "
        "fast it scores."
    )
    return Section("DAS health", description, ("das",), panels)


def _load(config: Config) -> Section:
    panels = [
        _lines(config, "examples/s", "examples_per_s"),
        wr.BarPlot(title="peak memory, bytes", metrics=["peak_memory_bytes"]),
    ]
    description = (
        "Examples evaluated and learned per second; peak memory of the command and of the "
        "processes that it started on its own machine."
    )
    job_types = ("fm", "vm") if config.vm.models else ("fm",)
    return Section("Speed and memory", description, job_types, panels)


def _sweep(config: Config) -> Section:
    score = wr.SummaryMetric("score")
    settings = {name: wr.Config(name) for name in _searched_settings(config)}
    columns = [
        wr.ParallelCoordinatesPlotColumn(metric=metric, display_name=name)
        for name, metric in (*settings.items(), ("score", score))
    ]
    panels = [
        wr.ParallelCoordinatesPlot(title="trials", columns=columns),
        wr.ParameterImportancePlot(with_respect_to="score"),
    ]
    for name, metric in settings.items():
        panels.append(wr.ScatterPlot(title=f"score against {name}", x=metric, y=score))
    description = (
        "The trials of the sweep: their settings and score, which is NE with a penalty outside the "
        "calibration's bounds."
    )
    return Section("Sweep", description, ("tune",), panels)


def _searched_settings(config: Config) -> list[str]:
    """The settings that are searched for any arm, each once."""
    assert config.tune is not None
    names: dict[str, None] = {}
    for arm in config.tune.arms:
        names |= dict.fromkeys(config.tune.space_of(arm))
    return list(names)
