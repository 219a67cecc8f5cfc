"""A pipeline's models and its DAS as runs in wandb, one group: job type fm, das or vm, figures over
the examples seen.

A thread follows the files that the run writes anyway, so nothing waits for wandb; what fails in it
ends the writing, not the run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
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
"""Longest wait at the end for what is left to be written."""
FIGURES = ("ne", "auc", "gauc", "calibration", "label_rate")
OVERALL = ("ne", "auc", "calibration", "ne_gain", "transfer_ratio")
MODEL = "model.json"
"""The manifest of a snapshot or an exported student, with its files' hashes."""


class RunKey(NamedTuple):
    """What has a run of its own."""

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
    """A figure of one window in a run."""
    return f"{figure}/{task}/{domain}"


def overall_name(
    figure: str,
    task: str,
    domain: str,
) -> str:
    """A figure over all windows after the warm-up in a run's summary."""
    return f"all_windows/{figure_name(figure, task, domain)}"


class PipelineRuns:
    """Writes the runs of a pipeline while it goes on. A pipeline that goes on after a kill writes
    its runs anew, from the first window.

    The file <run>/wandb/pipeline.json says how much of the run's files is written; where nothing
    was added, no run is opened.
    """

    def __init__(self, config: Config, summarise: Callable[[], Mapping[str, Any]]) -> None:
        """`summarise` is asked at the end for what `summary.json` holds."""
        self._config = config
        self._ledger = config.folder / "wandb" / "pipeline.json"
        self._runs: dict[RunKey, wandb.Run] = {}
        self._seen: dict[RunKey, int] = {}
        self._read = {"metrics": 0, "das": 0}
        self._over = Event()
        self._summarise = summarise
        self._thread = Thread(target=self._follow, daemon=True, name="wandb")
        if config.wandb.mode != "disabled":
            self._thread.start()

    def close(self) -> None:
        """Write what is left, the run's summary and references to its snapshots and exports; wait
        until all is written, `CLOSE_S` at most."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            told = f"wandb: the run waited {CLOSE_S:.0f} s for its last figures to be written and gave up"
            print(
                f"{told}. The same command, given again after more windows, writes it anew",
                file=sys.stderr,
            )

    def _follow(self) -> None:
        try:
            before = read_json(self._ledger) if self._ledger.exists() else self._read
            while not self._over.wait(POLL_S):
                self._log_new(before)
            self._log_new(before)
            if self._runs:
                summary = self._summarise()
                for learner, run in self._runs.items():
                    self._end(learner, run, summary)
                write_json(self._ledger, self._read)
                close_wandb()
        except Exception as error:
            told = f"wandb: {type(error).__name__}: {error}"
            print(
                f"{told}. The run goes on without wandb; the same command, given again after more windows, writes it anew",
                file=sys.stderr,
            )

    def _log_new(self, before: Mapping[str, int]) -> None:
        rows = read_metrics(self._config.folder / "metrics.jsonl")
        scored = [
            span for span in read_timeline(self._config.folder / TIMELINE) if span["role"] == "das"
        ]
        if not self._runs and (len(rows), len(scored)) <= (before["metrics"], before["das"]):
            return
        new = rows[self._read["metrics"] :]
        self._read["metrics"] = len(rows)
        for (learner, _, _), window in groupby(
            new, key=lambda row: (_learner(row), row.get("pass"), row["window"])
        ):
            self._log_window(learner, list(window))
        new = scored[self._read["das"] :]
        self._read["das"] = len(scored)
        for span in new:
            self._log_scored(span)

    def _log_window(self, learner: RunKey, rows: list[dict[str, Any]]) -> None:
        """A window's figures, at the number of examples that the model had seen before it (or after
        a pass over a static set)."""
        step = (
            {"pass": rows[0]["pass"]}
            if "pass" in rows[0]
            else {"examples": self._seen.get(learner, 0)}
        )
        told = {
            figure_name(key, row["task"], row["domain"]): row[key]
            for row in rows
            for key in FIGURES
            if row[key] is not None
        }
        self._run(learner).log(
            {
                **step,
                "window": rows[0]["window"],
                "examples_per_s": rows[0]["examples_per_s"],
                **told,
            }
        )
        own = [row for row in rows if row["domain"] == ALL_DOMAINS] or rows
        self._seen[learner] = self._seen.get(learner, 0) + own[0]["examples"]

    def _log_scored(self, span: Mapping[str, Any]) -> None:
        """A window that the DAS has scored, at the number of examples scored so far; freshness_lag:
        windows from the last one that the snapshot has learnt to this one."""
        learner = RunKey("das", "das", self._config.fm.name)
        self._seen[learner] = self._seen.get(learner, 0) + span["examples"]
        told = {
            "window": span["window"],
            "snapshot": span["snapshot"],
            "freshness_lag": span["window"] - span["snapshot"] + 1,
        }
        speed = span["examples"] / (span["ended_s"] - span["started_s"] - span["waited_s"])
        self._run(learner).log(
            {
                "examples": self._seen[learner],
                **told,
                "examples_per_s": speed,
                "waited_s": span["waited_s"],
            }
        )

    def _run(self, learner: RunKey) -> wandb.Run:
        if learner not in self._runs:
            config = self._config
            settings = config.model_dump(mode="json", exclude={"run", "wandb"})
            identity = short_hash([settings, *learner])
            step = "pass" if config.fm.static else "examples"
            self._runs[learner] = open_run(
                config,
                identity,
                str(learner),
                config.name,
                learner.role,
                {**settings, **learner._asdict()},
                step,
            )
        return self._runs[learner]

    def _end(
        self,
        learner: RunKey,
        run: wandb.Run,
        summary: Mapping[str, Any],
    ) -> None:
        for row in summary["figures"]:
            if _learner(row) == learner:
                told = {
                    overall_name(key, row["task"], row["domain"]): row.get(key) for key in OVERALL
                }
                run.summary.update({key: value for key, value in told.items() if value is not None})
        run.summary.update({"peak_memory_bytes": summary["peak_memory_bytes"]})
        folder = self._made(learner)
        if folder:
            # Wandb refuses others
            name = f"{self._config.name}-{str(learner).replace(' ', '-').replace('+', '.')}"
            run.log_artifact(
                _reference(folder, name, "snapshot" if learner.role == "fm" else "export")
            )
        run.finish()

    def _made(self, learner: RunKey) -> AnyPath | None:
        """The folder of the model as it stands, whole: the last snapshot, the exported student."""
        if learner.role == "fm":
            whole: Iterable[AnyPath] = (self._config.stores / "snapshots" / learner.model).glob(
                f"version=*/{MODEL}"
            )
            return max(
                (path.parent for path in whole),
                key=lambda path: int(path.name.removeprefix("version=")),
                default=None,
            )
        folder = self._config.folder / "exported" / f"{learner.model}-{learner.arm}"
        return folder if (folder / MODEL).exists() else None


def _learner(row: Mapping[str, Any]) -> RunKey:
    return RunKey(row["role"], row["model"], row["arm"])


def _reference(
    folder: AnyPath,
    name: str,
    kind: str,
) -> wandb.Artifact:
    """A stored model as an artifact that holds no bytes of it, only where its files lie and their
    SHA-256.

    wandb hashes the manifest alone, which changes with every file: reading tables again would take
    long. It would need libraries and credentials of its own to look at remote files; there the
    artifact holds the manifest, and says where it lies.
    """
    import wandb

    manifest = read_json(folder / MODEL)
    artifact = wandb.Artifact(
        name,
        kind,
        metadata={
            "facts": manifest["facts"],
            "tasks": manifest["tasks"],
            "sha256": manifest["files"],
        },
    )
    if isinstance(folder, RemotePath):
        artifact.metadata["folder"] = str(folder)
        with artifact.new_file(MODEL) as file:
            json.dump(manifest, file)
        return artifact
    artifact.add_reference((folder / MODEL).absolute().as_uri())
    for file in manifest["files"]:
        artifact.add_reference((folder / file).absolute().as_uri(), checksum=False)
    return artifact
