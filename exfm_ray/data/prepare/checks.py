"""Checks of the settings against the raw source, before anything is written."""

from __future__ import annotations

from exfm_ray.config.root import Config
from exfm_ray.data.sources import synthetic
from exfm_ray.data.sources.base import RawSource
from exfm_ray.errors import UserError, nearest
from exfm_ray.schema import Schema


def check_windows(config: Config, source: RawSource | None) -> None:
    """Raise UserError if windows cannot be cut as `data.window.by` says."""
    by = config.data.window.by
    name = config.data.source
    if by == "time" and source and source.ordered_only:
        raise UserError(
            f"setting 'data.window.by' is 'time', but the data of '{name}' have only an order, "
            "no times: set data.window.by=rows and data.window.rows"
        )
    has_parts = source is not None and bool(source.parts)
    if by == "file" and not has_parts:
        raise UserError(
            f"setting 'data.window.by' is 'file', but the events of '{name}' do not follow one "
            "another file by file: set data.window.by to time or rows"
        )


def check_tasks(config: Config, schema: Schema) -> None:
    """Raise UserError if `data.attribution_s` names an unknown task."""
    for task in config.data.attribution_s:
        if task in schema.tasks:
            continue
        known = ", ".join(schema.tasks)
        suggestion = nearest(task, schema.tasks)
        way_out = suggestion or f" There are {known}."
        raise UserError(f"setting 'data.attribution_s': unknown task '{task}'.{way_out}")


def check_attribution(
    config: Config,
    schema: Schema,
    source: RawSource | None,
) -> None:
    """Raise UserError if labels of a task in `data.attribution_s` cannot come late."""
    check_tasks(config, schema)
    name = config.data.source
    delayed = config.data.delayed
    ordered_only = source is not None and source.ordered_only
    static = ordered_only or config.data.window.by == "file"
    if delayed and static:
        raise UserError(
            f"setting 'data.attribution_s' needs times, and the windows of '{name}' are static: "
            "a set without time or cut by files has all its labels at once; remove the setting"
        )

    label_time_tasks = source.label_time_tasks if source else synthetic.TASKS
    way_out = "a `table` source does with `label_time` in the schema file"
    if label_time_tasks:
        way_out = f"it does for {', '.join(label_time_tasks)}"
    for task in delayed:
        if task not in label_time_tasks:
            raise UserError(
                f"setting 'data.attribution_s.{task}': '{name}' does not say when its label "
                f"became known; {way_out}"
            )
