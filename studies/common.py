"""Shared by the studies: their data sets, and Ray on this machine."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ray

from exfm_ray.config.checks import with_settings
from exfm_ray.config.load import load_config
from exfm_ray.config.root import Config

ROOT = Path(__file__).parents[1]
KUAIRAND_FOLDER = "kuairand_pure"


class Dataset(NamedTuple):
    """A data set of a study.

    Attributes:
        title: name in the tables.
        config: name of a file in configs/.
        holdout: first and last window of the figures.
        students: names of the students; empty for all of the config's.
        overrides: settings over those of the config.
    """

    title: str
    config: str
    holdout: tuple[int, int]
    students: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


SYNTHETIC = Dataset("Synthetic stream", "demo", (4, 11))
KUAIRAND = Dataset("KuaiRand-Pure, is_click", "kuairand", (7, 11), ("tab2", "tab4", "tab6"))


def dataset_config(
    dataset: Dataset,
    folder: Path,
    data: Path,
    overrides: Sequence[str] = (),
    name: str | None = None,
) -> Config:
    """Load the data set's config with the study's students.

    Args:
        folder: folder of the runs.
        data: folder of the raw data sets.
        overrides: further settings.
        name: name of the run; None for the config's.
    """
    all_overrides = [f"run.dir={folder}", *dataset.overrides, *overrides]
    if dataset is KUAIRAND:
        all_overrides.append(f"data.root={data.absolute() / KUAIRAND_FOLDER}")
    config = load_config(ROOT / "configs" / f"{dataset.config}.yaml", all_overrides, name)
    students = [
        student.model_dump(mode="json")
        for student in config.vm.models
        if student.name in dataset.students or not dataset.students
    ]
    return with_settings(config, {"vm.models": students})


def uses_kuairand(options: argparse.Namespace) -> bool:
    """Whether KuaiRand is part of this run of a study. Prints the reason where it is not."""
    reason = None
    if options.quick:
        reason = "--quick"
    elif not (options.data / KUAIRAND_FOLDER).is_dir():
        reason = f"{options.data} has no folder {KUAIRAND_FOLDER}"
    if reason:
        print(f"KuaiRand is left out: {reason}")
    return reason is None


def start_ray() -> None:
    """Start Ray on this machine. Its workers can import the studies."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    ray.init(
        address="local",
        num_cpus=len(os.sched_getaffinity(0)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
