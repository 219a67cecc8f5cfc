"""python -m studies.shared_tables [--data DIR] [--keep DIR] [--quick]: what the FM's rows bring.

What rows of the FM's tables and its representations bring to vertical models, on KuaiRand
(configs/kuairand.yaml, DIR/kuairand_pure; tabs 2, 4 and 6) and on the synthetic stream
(configs/demo.yaml), with an FM and students of their own for each of 5 seeds:
- every objective alone and with +share; what happens to a row's optimizer state; averages; rows
  that are rarely seen only;
- +history in its three embedding spaces, alone and beside other arms;
- controls: rows of an FM of the same size that was trained on shuffled labels, rows of other ids of
  the same table, the pasts of other users, and the labels arm under the settings that were chosen
  for arms with +share.

Each variant's learning rates (of tables and dense part, the same grid for all) are chosen on
windows 5 and 6, by the mean over seeds. Figures are of windows 7 to 11: NE gain over the labels arm
that was chosen in the same way, transfer ratio, calibration. The study measures the cost first: of
a window that refreshes a million rows (cost.py), in training and at serving (serving.py).

With --keep, finished parts are kept in that folder. After a kill, rerun the same command to train
only the missing ones.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import ray

from benchmarks.common import arguments, bar, report
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.storage.atomic import read_json, write_json
from studies.common import KUAIRAND, SYNTHETIC, Dataset, start_ray, uses_kuairand
from studies.parts import Part, Parts
from studies.shared_tables import serving
from studies.shared_tables.cost import cost
from studies.shared_tables.teachers import (
    WINDOWS,
    beside,
    fm_rows,
    study_config,
    teach,
    write_stream,
)
from studies.shared_tables.trainings import (
    GRID,
    HOLDOUT,
    VALIDATION,
    Rows,
    Variant,
    holdout_figures,
    train,
    variants,
)
from tuning.analysis import estimate
from tuning.rows import StudentRows

DESCRIPTION = (
    "Trains FMs, and students with their rows and representations, on two streams with 5 seeds: "
    "an hour on two cores (--quick: 5 min)."
)
KEEP_HELP = "folder of finished parts; after a kill, rerun the same command to resume"
SEEDS = (0, 1, 2, 3, 4)
SHORT = Dataset(
    "Synthetic stream, short",
    "demo",
    (7, 11),
    ("feed",),
    ("data.synthetic.windows=12", "data.synthetic.events_per_window=3000"),
)
Figures = Mapping[str, Mapping[str, Any]]
"""Student -> variant -> figures."""


class RowsCache:
    """A student's rows in Ray's object store, with the history that variants read.

    Holds the rows of one student at a time.
    """

    def __init__(self) -> None:
        self._student: tuple[str, str] | None = None
        self._references: dict[str, Any] = {}

    def reference(
        self,
        config: Config,
        student: StudentConfig,
        variant: Variant,
    ) -> Any:
        """Return the reference of the rows that a variant reads; read them on first use."""
        if (config.name, student.name) != self._student:
            self._student = (config.name, student.name)
            self._references = {}
        history = variant.rows if "history" in variant.arm else ""
        if history not in self._references:
            rows = StudentRows.read_from(beside(config, history), student, WINDOWS)
            self._references[history] = ray.put(rows)
        return self._references[history]


class Study:
    """The parts of one data set: its stream, an FM for each seed, the students' trainings."""

    def __init__(
        self,
        dataset: Dataset,
        parts: Parts,
        data: Path,
        seeds: Sequence[int],
        all_variants: Sequence[Variant],
    ) -> None:
        self._dataset = dataset
        self._parts = parts
        self._seeds = seeds
        self._variants = all_variants
        self._stream_config = study_config(dataset, parts.folder, data, None)
        self._configs = {seed: study_config(dataset, parts.folder, data, seed) for seed in seeds}
        self._rows = RowsCache()
        self._write_stream = ray.remote(num_cpus=1, max_calls=1)(write_stream)
        self._teach = ray.remote(num_cpus=1, max_calls=1)(teach)
        self._train = ray.remote(num_cpus=1)(train)

    def run(self) -> dict[str, dict[str, Any]]:
        """Run the missing parts; student -> variant -> figures. Needs a Ray session."""
        title = self._dataset.title
        self._parts.finish(f"{title}: stream", [self._stream_part()])
        fm_parts = [self._fm_part(seed) for seed in self._seeds]
        fms = self._parts.finish(f"{title}: FMs", fm_parts)
        seeds = [seed for seed in self._seeds if self._fm_part(seed).name in fms]
        students = self._stream_config.vm.models
        one_of_training = {variant.training: variant for variant in self._variants}

        training_parts = [
            self._training_part(seed, student, variant)
            for seed in seeds
            for student in students
            for variant in one_of_training.values()
        ]
        results = self._parts.finish(f"{title}: students", training_parts)
        figures = {}
        for student in students:
            trained = self._trained(student, seeds, one_of_training, results)
            fm = {}
            for seed in seeds:
                metrics = fms[self._fm_part(seed).name]
                fm[seed] = fm_rows(metrics, student.domain, student.tasks[0])
            figures[student.name] = holdout_figures(self._variants, trained, fm)
        return figures

    def _trained(
        self,
        student: StudentConfig,
        seeds: Sequence[int],
        one_of_training: Mapping[str, Variant],
        results: Mapping[str, list[Rows]],
    ) -> dict[str, dict[int, list[Rows]]]:
        """Training -> seed -> rows of each setting. Seeds without a labels arm are left out."""
        labels = self._variants[0]
        trained: dict[str, dict[int, list[Rows]]] = defaultdict(dict)
        for seed in seeds:
            if self._training_part(seed, student, labels).name not in results:
                continue
            for training, variant in one_of_training.items():
                name = self._training_part(seed, student, variant).name
                if name in results:
                    trained[training][seed] = results[name]
        return trained

    def _stream_part(self) -> Part:
        name = f"parts/{self._dataset.config}/stream"
        return Part(name, "stream", lambda: self._write_stream.remote(self._stream_config))

    def _fm_part(self, seed: int) -> Part:
        dataset = self._dataset.config
        config = self._configs[seed]
        stream = self._stream_config.folder / "stream"
        return Part(
            f"parts/{dataset}/fm-{seed}",
            f"{dataset} fm",
            lambda: self._teach.remote(config, stream),
        )

    def _training_part(
        self,
        seed: int,
        student: StudentConfig,
        variant: Variant,
    ) -> Part:
        dataset = self._dataset.config
        config = self._configs[seed]

        def start() -> Any:
            rows = self._rows.reference(config, student, variant)
            return self._train.remote(beside(config, variant.rows), student, variant, rows)

        name = f"parts/{dataset}/{student.name}-{seed}/{variant.training}"
        return Part(name, f"{dataset} {student.name}", start)


def mean_ratio(figures: Figures, variant: str) -> float | None:
    """Return the mean transfer ratio over students and seeds, or None where one is missing."""
    ratios = []
    for student in figures.values():
        ratios += [seed["transfer_ratio"] for seed in student[variant]["seeds"]]
    return None if None in ratios else float(np.mean(ratios))


def complete_variants(figures: Figures, all_variants: Sequence[Variant]) -> list[Variant]:
    """Return the variants that every student has."""
    return [
        variant
        for variant in all_variants
        if all(variant.name in student for student in figures.values())
    ]


def markdown(
    title: str,
    figures: Figures,
    all_variants: Sequence[Variant],
) -> str:
    """Format NE gain, transfer ratio and calibration, with half of their 95 % t interval."""
    headings = [f"{name}: NE gain % | TR | calibr. | table_lr, dense_lr" for name in figures]
    lines = [
        f"\n**{title}**\n",
        f"| variant | {' | '.join(headings)} | mean TR | serving |",
        "|---" * (3 + 4 * len(figures)) + "|",
    ]
    for variant in complete_variants(figures, all_variants):
        cells = [variant.name]
        for student in figures.values():
            cells += _student_cells(student[variant.name])
        ratio = mean_ratio(figures, variant.name)
        cells.append("" if ratio is None else f"{ratio:.2f}")
        cells.append(serving.needed_at_serving(variant.arm))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _student_cells(figures: Mapping[str, Any]) -> list[str]:
    seeds = figures["seeds"]
    settings = figures["settings"]
    return [
        _cell(seeds, "ne_gain", 100, 2),
        _cell(seeds, "transfer_ratio", 1, 2),
        _cell(seeds, "calibration", 1, 3),
        f"{settings['vm.optimizer.table_lr']}, {settings['vm.optimizer.dense_lr']}",
    ]


def _cell(
    seeds: Sequence[Mapping[str, Any]],
    key: str,
    scale: float,
    digits: int,
) -> str:
    interval = estimate([seed[key] for seed in seeds if seed[key] is not None])
    if interval is None:
        return ""
    mean = f"{interval.mean * scale:.{digits}f}"
    if interval.high is None:
        return mean
    half_width = (interval.high - interval.mean) * scale
    return f"{mean} ± {half_width:.{digits}f}"


def kuairand_bars(figures: Figures, all_variants: Sequence[Variant]) -> dict[str, Any]:
    """Return KuaiRand's bars.

    They are of the arm with the best mean transfer ratio, and of the arm that the validation
    windows choose.
    """
    ratios = {}
    mean_scores = {}
    for variant in complete_variants(figures, all_variants):
        name = variant.name
        if name != variant.arm or name == "labels":
            continue
        ratios[name] = mean_ratio(figures, name) or 0.0
        scores = [student[name]["score"] for student in figures.values()]
        mean_scores[name] = float(np.mean(scores))
    best = max(ratios, key=lambda name: ratios[name])
    chosen = min(mean_scores, key=lambda name: mean_scores[name])
    kd = ratios.get("kd")
    times_kd = ratios[best] / kd if kd else None
    error = worst_calibration_error(figures, best)

    prefix = "kuairand_mean_transfer_ratio"
    return {
        f"{prefix}_{best}": bar(ratios[best], 0.73),
        f"{prefix}_with_the_arm_chosen_too_{chosen}": bar(ratios[chosen], 0.73),
        "kuairand_times_kd": bar(times_kd, 2.0),
        "kuairand_calibration_error": bar(error, 0.05, at_least=False),
    }


def worst_calibration_error(figures: Figures, variant: str) -> float | None:
    """Return the largest error of a student's mean calibration, or None where one is missing."""
    errors = []
    for student in figures.values():
        calibrations = [seed["calibration"] for seed in student[variant]["seeds"]]
        if None in calibrations:
            return None
        errors.append(abs(float(np.mean(calibrations)) - 1))
    return max(errors)


@contextmanager
def parts_folder(folder: Path | None, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folder of the parts: `folder`, or a temporary one where it is None.

    Ends the program where `folder` holds parts of other settings.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.exists() and read_json(path) != settings:
        sys.exit(
            f"error: --keep {folder}: holds parts of other settings ({path}); name another folder"
        )
    write_json(path, settings)
    yield folder.absolute()


def main() -> None:
    options = arguments("studies.shared_tables", DESCRIPTION, {"--keep": KEEP_HELP})
    quick = options.quick
    seeds = SEEDS[:1] if quick else SEEDS
    all_variants = variants()
    datasets = {"synthetic": SHORT if quick else SYNTHETIC}
    if uses_kuairand(options):
        datasets = {"kuairand": KUAIRAND, **datasets}

    settings = {
        "quick": quick,
        "grid": list(GRID),
        "score": list(VALIDATION),
        "judge": list(HOLDOUT),
    }
    figures: dict[str, Any] = {}
    with parts_folder(options.keep, settings) as folder:
        parts = Parts(folder, len(os.sched_getaffinity(0)))
        figures["cost"] = parts.kept("parts/cost", lambda: cost(quick))
        figures["arms"] = parts.kept("parts/arms", lambda: serving.costs(quick))
        print(serving.markdown(figures["arms"]), flush=True)

        start_ray()
        for name, dataset in datasets.items():
            study = Study(dataset, parts, options.data, seeds, all_variants)
            figures[name] = study.run()
            print(markdown(dataset.title, figures[name], all_variants), flush=True)
        ray.shutdown()

    refresh = figures["cost"]["refresh_share_of_training"]
    bars = {"refresh_share_of_training": bar(refresh, 0.1, at_least=False)}
    if "kuairand" in figures:
        bars |= kuairand_bars(figures["kuairand"], all_variants)
    bars["failed_parts"] = bar(float(len(parts.failed)), 0.0, at_least=False)
    report("share", {**figures, "failed": parts.failed}, bars)
