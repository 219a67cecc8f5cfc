"""A pipeline's models and its DAS as runs in wandb, in one group.

The job type of a run is fm, das or vm; its figures are logged against the examples seen. A thread
follows the files that the pipeline writes anyway, so nothing waits for wandb. An error in it ends
the logging, not the pipeline.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from exfm_ray.config.root import Config
from exfm_ray.schema import ALL_DOMAINS
from exfm_ray.storage.atomic import read_json, short_hash, write_json
from exfm_ray.storage.remote import AnyPath, RemotePath
from exfm_ray.tracking.recorder import TIMELINE, read_metrics, read_timeline
from exfm_ray.tracking.wandb_session import close_wandb, open_run

if TYPE_CHECKING:
    import wandb

POLL_S = 2.0
CLOSE_S = 600.0
"""Longest wait at the end until everything is written."""
FIGURES = ("ne", "auc", "gauc", "calibration", "label_rate")
OVERALL = ("ne", "auc", "calibration", "ne_gain", "transfer_ratio")
MODEL = "model.json"
"""The manifest of a snapshot or an exported student, with the hashes of its files."""
RERUN_HINT = "Rerun the same command after more windows to write the runs again"


class RunKey(NamedTuple):
    """What has a run of its own in wandb."""

    role: str
    model: str
    arm: str

    def __str__(self) -> str:
        return f"{self.model} {self.arm}" if self.role == "vm" else self.model


def figure_name(
    figure: str,
    task: str,
    domain: str,
) -> str:
    """The name of a figure of one window in a run."""
    return f"{figure}/{task}/{domain}"


def overall_name(
    figure: str,
    task: str,
    domain: str,
) -> str:
    """The name of a figure over all windows after the warm-up, in a run's summary."""
    return f"all_windows/{figure_name(figure, task, domain)}"


class PipelineRuns:
    """Writes the runs of a pipeline while it works.

    A pipeline that is resumed after a kill writes its runs again, from the first window. The file
    <run>/wandb/pipeline.json records how many lines of the pipeline's files have been written; as
    long as there are no new ones, no run is opened.
    """

    def __init__(self, config: Config, summarize: Callable[[], Mapping[str, Any]]) -> None:
        """Start following the pipeline's files, unless wandb is disabled.

        Args:
            summarize: called at the end; returns the content of `summary.json`.
        """
        self._config = config
        self._ledger = config.folder / "wandb" / "pipeline.json"
        self._runs: dict[RunKey, wandb.Run] = {}
        self._seen: dict[RunKey, int] = {}
        self._read = {"metrics": 0, "das": 0}
        self._over = Event()
        self._summarize = summarize
        self._thread = Thread(target=self._follow, daemon=True, name="wandb")
        if config.wandb.mode != "disabled":
            self._thread.start()

    def close(self) -> None:
        """Write the last figures, the summary and references to the snapshots and exports.

        Waits until everything is written, at most `CLOSE_S` seconds.
        """
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            _complain(
                f"the run waited {CLOSE_S:.0f} s for its last figures to be written and gave up"
            )

    def _follow(self) -> None:
        try:
            written = read_json(self._ledger) if self._ledger.exists() else self._read
            while not self._over.wait(POLL_S):
                self._log_new(written)
            self._log_new(written)
            if self._runs:
                self._finish_runs()
        except Exception as error:
            _complain(f"{type(error).__name__}: {error}. The run continues without wandb")

    def _finish_runs(self) -> None:
        summary = self._summarize()
        for key, run in self._runs.items():
            self._finish(key, run, summary)
        write_json(self._ledger, self._read)
        close_wandb()

    def _log_new(self, written: Mapping[str, int]) -> None:
        """Log what the pipeline has added to its files."""
        folder = self._config.folder
        rows = read_metrics(folder / "metrics.jsonl")
        spans = read_timeline(folder / TIMELINE)
        scored = [span for span in spans if span["role"] == "das"]
        lines = (len(rows), len(scored))
        written_lines = (written["metrics"], written["das"])
        if not self._runs and lines <= written_lines:
            return

        new_rows = rows[self._read["metrics"] :]
        self._read["metrics"] = len(rows)
        for (key, _, _), window_rows in groupby(new_rows, key=_window_of):
            self._log_window(key, list(window_rows))

        new_spans = scored[self._read["das"] :]
        self._read["das"] = len(scored)
        for span in new_spans:
            self._log_scored(span)

    def _log_window(self, key: RunKey, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the figures of a window.

        The step is the number of examples that the model had seen before the window, or the pass
        over a static set.
        """
        seen = self._seen.get(key, 0)
        first = rows[0]
        point: dict[str, Any] = {}
        if "pass" in first:
            point["pass"] = first["pass"]
        else:
            point["examples"] = seen
        point["window"] = first["window"]
        point["examples_per_s"] = first["examples_per_s"]
        for row in rows:
            point |= _figures(row)
        self._run(key).log(point)

        on_all_domains = [row for row in rows if row["domain"] == ALL_DOMAINS]
        overall = on_all_domains[0] if on_all_domains else first
        self._seen[key] = seen + overall["examples"]

    def _log_scored(self, span: Mapping[str, Any]) -> None:
        """Log a window that the DAS has scored, at the number of examples scored so far.

        freshness_lag is the number of windows from the last one that the snapshot has learned to
        this one.
        """
        key = RunKey("das", "das", self._config.fm.name)
        window = span["window"]
        snapshot = span["snapshot"]
        examples = span["examples"]
        waited_s = span["waited_s"]
        work_s = span["ended_s"] - span["started_s"] - waited_s
        self._seen[key] = self._seen.get(key, 0) + examples
        point = {
            "examples": self._seen[key],
            "window": window,
            "snapshot": snapshot,
            "freshness_lag": window - snapshot + 1,
            "examples_per_s": examples / work_s,
            "waited_s": waited_s,
        }
        self._run(key).log(point)

    def _run(self, key: RunKey) -> wandb.Run:
        """The run of a key, opened when it is first needed."""
        if key not in self._runs:
            config = self._config
            settings = config.model_dump(mode="json", exclude={"run", "wandb"})
            self._runs[key] = open_run(
                config,
                identity=short_hash([settings, *key]),
                name=str(key),
                group=config.name,
                job_type=key.role,
                settings={**settings, **key._asdict()},
                step="pass" if config.fm.static else "examples",
            )
        return self._runs[key]

    def _finish(
        self,
        key: RunKey,
        run: wandb.Run,
        summary: Mapping[str, Any],
    ) -> None:
        """Write a run's summary and a reference to its model."""
        for row in summary["figures"]:
            if _run_key(row) == key:
                run.summary.update(_overall_figures(row))
        run.summary.update({"peak_memory_bytes": summary["peak_memory_bytes"]})
        folder = self._model_folder(key)
        if folder:
            # Artifact names in wandb may not contain spaces or plus signs.
            run_name = str(key).replace(" ", "-").replace("+", ".")
            kind = "snapshot" if key.role == "fm" else "export"
            run.log_artifact(_reference(folder, f"{self._config.name}-{run_name}", kind))
        run.finish()

    def _model_folder(self, key: RunKey) -> AnyPath | None:
        """The folder of the current model: the FM's last snapshot, or the exported student."""
        if key.role != "fm":
            folder = self._config.folder / "exported" / f"{key.model}-{key.arm}"
            return folder if (folder / MODEL).exists() else None

        snapshots = self._config.stores / "snapshots" / key.model
        committed = [manifest.parent for manifest in snapshots.glob(f"version=*/{MODEL}")]
        return max(committed, key=_version, default=None)


def _complain(problem: str) -> None:
    print(f"wandb: {problem}. {RERUN_HINT}", file=sys.stderr)


def _version(snapshot: AnyPath) -> int:
    return int(snapshot.name.removeprefix("version="))


def _run_key(row: Mapping[str, Any]) -> RunKey:
    return RunKey(row["role"], row["model"], row["arm"])


def _window_of(row: Mapping[str, Any]) -> tuple[RunKey, int | None, int]:
    """The run, pass and window that a row of metrics.jsonl belongs to."""
    return _run_key(row), row.get("pass"), row["window"]


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """The defined figures of a row, by their name in a run."""
    figures = {}
    for figure in FIGURES:
        value = row[figure]
        if value is not None:
            name = figure_name(figure, row["task"], row["domain"])
            figures[name] = value
    return figures


def _overall_figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """The defined figures of a row of summary.json, by their name in a run."""
    figures = {}
    for figure in OVERALL:
        value = row.get(figure)
        if value is not None:
            name = overall_name(figure, row["task"], row["domain"])
            figures[name] = value
    return figures


def _reference(
    folder: AnyPath,
    name: str,
    kind: str,
) -> wandb.Artifact:
    """A stored model as an artifact: where its files are and their SHA-256, but not their bytes.

    wandb hashes the manifest alone, which changes with every file, because reading the tables
    again would take long. To look at remote files it would need libraries and credentials of its
    own, so for those the artifact holds a copy of the manifest and the folder's URL.
    """
    import wandb

    manifest = read_json(folder / MODEL)
    metadata = {
        "facts": manifest["facts"],
        "tasks": manifest["tasks"],
        "sha256": manifest["files"],
    }
    artifact = wandb.Artifact(name, kind, metadata=metadata)
    if isinstance(folder, RemotePath):
        artifact.metadata["folder"] = str(folder)
        with artifact.new_file(MODEL) as file:
            json.dump(manifest, file)
        return artifact
    artifact.add_reference((folder / MODEL).absolute().as_uri())
    for file in manifest["files"]:
        artifact.add_reference((folder / file).absolute().as_uri(), checksum=False)
    return artifact
