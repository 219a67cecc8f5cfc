"""python -m benchmarks.share [--data DIR] [--keep DIR] [--quick]: what rows of the FM's tables and
its representations bring to vertical models.

On KuaiRand (configs/kuairand.yaml, DIR/kuairand_pure; tabs 2, 4 and 6) and on the synthetic stream
(configs/demo.yaml), with an FM and students of their own for each of 5 seeds:
- every objective alone and with +share; what becomes of a row's optimizer state; averages; rows
  hardly seen only;
- +history in its three ways with drift, alone and beside other arms;
- controls: rows of an FM of the same size that was trained on shuffled labels, rows of other ids of
  the same table, the pasts of other users, and the labels arm under the settings that were chosen
  for arms with +share. Each variant's learning rates (of tables and dense part, the same grid for
  all) are chosen on windows 5 and 6, by the mean over seeds, and its figures are of windows 7 to
  11: NE gain over the labels arm that was chosen likewise, transfer ratio, calibration. Before that
  the cost: of a window that refreshes a million rows (benchmarks/share_cost.py), in training and at
  serving (share_serving.py).

With --keep, finished parts are kept in that folder: the same command goes on after a kill with
those that are missing.
"""

from __future__ import annotations

import logging
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

from benchmarks import share_serving
from benchmarks.common import arguments, bar, report
from benchmarks.parts import Part, Parts
from benchmarks.share_cost import cost
from benchmarks.share_runs import GRID, JUDGED, SCORED, Rows, Variant, judge, train, variants
from benchmarks.share_teach import WINDOWS, beside, configured, fm_rows, teach, write_stream
from benchmarks.study import EMBEDDED, KUAIRAND, Dataset
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import StudentConfig
from exfm_ray.storage.atomic import read_json, write_json
from exfm_ray.tracking.plot_styles import at_serving
from tuning.analysis import estimate
from tuning.rows import StudentRows

SAYS = "Trains FMs, and students given rows and representations of theirs, on two streams with 5 seeds: an hour on two cores (--quick: 5 min)."
SEEDS = (0, 1, 2, 3, 4)
SHORT = Dataset(
    "Synthetic stream, short",
    "demo",
    (7, 11),
    ("feed",),
    ("data.synthetic.windows=12", "data.synthetic.events_per_window=3000"),
)


class RowsOf:
    """A student's rows, with the history that variants read, in Ray's object store; of one student
    at a time."""

    def __init__(self) -> None:
        self._of: tuple[str, str] | None = None
        self._references: dict[str, Any] = {}

    def reference(
        self,
        config: Config,
        student: StudentConfig,
        arm: str,
        rows: str,
    ) -> Any:
        """Read when they are first asked for."""
        if (config.name, student.name) != self._of:
            self._of = (config.name, student.name)
            self._references = {}
        rows = rows if "history" in arm else ""
        if rows not in self._references:
            self._references[rows] = ray.put(
                StudentRows.read_from(beside(config, rows), student, WINDOWS)
            )
        return self._references[rows]


def study(
    dataset: Dataset,
    parts: Parts,
    data: Path,
    seeds: Sequence[int],
    wanted: Sequence[Variant],
) -> dict[str, Any]:
    """student -> variant -> figures. Needs a Ray session."""
    folder = parts.folder
    name = dataset.config
    whole = configured(dataset, folder, data, None)
    configs = {seed: configured(dataset, folder, data, seed) for seed in seeds}
    alone = ray.remote(num_cpus=1, max_calls=1)
    writing = alone(write_stream)
    teaching = alone(teach)
    training = ray.remote(num_cpus=1)(train)
    rows = RowsOf()
    parts.finish(
        f"{dataset.title}: stream",
        [Part(f"parts/{name}/stream", "stream", lambda: writing.remote(whole))],
    )

    def taught(seed: int) -> Part:
        config = configs[seed]
        root = whole.folder / "stream"
        return Part(f"parts/{name}/fm-{seed}", f"{name} fm", lambda: teaching.remote(config, root))

    def trained(
        seed: int,
        student: StudentConfig,
        variant: Variant,
    ) -> Part:
        config = configs[seed]

        def start() -> Any:
            return training.remote(
                beside(config, variant.rows),
                student,
                variant,
                rows.reference(config, student, variant.arm, variant.rows),
            )

        return Part(
            f"parts/{name}/{student.name}-{seed}/{variant.training}",
            f"{name} {student.name}",
            start,
        )

    fms = parts.finish(f"{dataset.title}: FMs", [taught(seed) for seed in seeds])
    there = [seed for seed in seeds if taught(seed).name in fms]
    students = whole.vm.models
    each = {variant.training: variant for variant in wanted}.values()
    found = parts.finish(
        f"{dataset.title}: students",
        [trained(seed, s, variant) for seed in there for s in students for variant in each],
    )
    told = {}
    for student in students:
        known: dict[str, dict[int, list[Rows]]] = defaultdict(dict)
        for seed in there:
            for variant in each:
                own = trained(seed, student, variant).name
                if own in found and trained(seed, student, wanted[0]).name in found:
                    known[variant.training][seed] = found[own]
        fm = {
            seed: fm_rows(fms[taught(seed).name], student.domain, student.tasks[0])
            for seed in there
        }
        told[student.name] = judge(wanted, known, fm)
    return told


def mean_ratio(told: Mapping[str, Mapping[str, Any]], variant: str) -> float | None:
    """Mean transfer ratio over students and seeds."""
    ratios = [
        one["transfer_ratio"] for student in told.values() for one in student[variant]["seeds"]
    ]
    return None if None in ratios else float(np.mean(ratios))


def markdown(
    title: str,
    told: Mapping[str, Mapping[str, Any]],
    wanted: Sequence[Variant],
) -> str:
    """A table: for each student NE gain, transfer ratio and calibration with half of their 95 % t
    intervals."""

    def cell(
        seeds: Sequence[Mapping[str, Any]],
        key: str,
        scale: float,
        digits: int,
    ) -> str:
        found = estimate([one[key] for one in seeds if one[key] is not None])
        if found is None:
            return ""
        return f"{found.mean * scale:.{digits}f}" + (
            f" ± {(found.high - found.mean) * scale:.{digits}f}" if found.high is not None else ""
        )

    heads = "".join(f" {name}: NE gain % | TR | calibr. | table_lr, dense_lr |" for name in told)
    lines = [
        f"\n**{title}**\n",
        f"| variant |{heads} mean TR | serving |",
        "|---|" + "---|---|---|---|" * len(told) + "---|---|",
    ]
    for variant in (
        variant for variant in wanted if all(variant.name in student for student in told.values())
    ):
        cells = ""
        for student in told.values():
            seeds = student[variant.name]["seeds"]
            settings = student[variant.name]["settings"]
            rates = f"{settings['vm.optimizer.table_lr']}, {settings['vm.optimizer.dense_lr']}"
            cells += f" {cell(seeds, 'ne_gain', 100, 2)} | {cell(seeds, 'transfer_ratio', 1, 2)} | {cell(seeds, 'calibration', 1, 3)} | {rates} |"
        ratio = mean_ratio(told, variant.name)
        more = "nothing more" if at_serving(variant.arm) == "nothing" else at_serving(variant.arm)
        lines.append(
            f"| {variant.name} |{cells} {'' if ratio is None else f'{ratio:.2f}'} | {more} |"
        )
    return "\n".join(lines)


def bars_of(told: Mapping[str, Mapping[str, Any]], wanted: Sequence[Variant]) -> dict[str, Any]:
    """KuaiRand's, of the best arm, whose settings were chosen on earlier windows, and of the arm
    that these windows, too, would choose."""
    whole = [
        variant for variant in wanted if all(variant.name in student for student in told.values())
    ]
    ratios = {
        variant.name: mean_ratio(told, variant.name) or 0.0
        for variant in whole
        if variant.arm == variant.name and variant.name != "labels"
    }
    best = max(ratios, key=lambda name: ratios[name])
    kd = ratios.get("kd")
    chosen = min(
        ratios,
        key=lambda name: float(np.mean([student[name]["score"] for student in told.values()])),
    )  # as the settings are chosen
    calibrations = [
        [one["calibration"] for one in student[best]["seeds"]] for student in told.values()
    ]
    worst = (
        None
        if any(None in each for each in calibrations)
        else max(abs(float(np.mean(each)) - 1) for each in calibrations)
    )
    return {
        f"kuairand_mean_transfer_ratio_{best}": bar(ratios[best], 0.73),
        f"kuairand_mean_transfer_ratio_with_the_arm_chosen_too_{chosen}": bar(ratios[chosen], 0.73),
        "kuairand_times_kd": bar(ratios[best] / kd if kd else None, 2.0),
        "kuairand_calibration_error": bar(worst, 0.05, at_least=False),
    }


@contextmanager
def kept_in(folder: Path | None, settings: Mapping[str, Any]) -> Iterator[Path]:
    """The folder for parts: the one that is given, which must hold parts of the same settings, or
    one for this time only."""
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
    options = arguments(
        "share",
        SAYS,
        {"--keep": "folder for finished parts: the same command goes on with it after a kill"},
    )
    seeds = SEEDS[:1] if options.quick else SEEDS
    wanted = variants()
    datasets = {"synthetic": SHORT if options.quick else EMBEDDED}
    if options.quick or not (options.data / "kuairand_pure").is_dir():
        print(
            f"KuaiRand is left out: {'--quick' if options.quick else f'{options.data} holds no kuairand_pure'}"
        )
    else:
        datasets = {"kuairand": KUAIRAND, **datasets}
    ran = {"quick": options.quick, "grid": list(GRID), "score": list(SCORED), "judge": list(JUDGED)}
    figures: dict[str, Any] = {}
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    with kept_in(options.keep, ran) as folder:
        cpus = len(os.sched_getaffinity(0))
        parts = Parts(folder, cpus)
        figures["cost"] = parts.kept("parts/cost", lambda: cost(quick=options.quick))
        figures["arms"] = parts.kept("parts/arms", lambda: share_serving.costs(quick=options.quick))
        print(share_serving.markdown(figures["arms"]), flush=True)
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        for name, dataset in datasets.items():
            figures[name] = study(dataset, parts, options.data, seeds, wanted)
            print(markdown(dataset.title, figures[name], wanted), flush=True)
        ray.shutdown()
    bars = {
        "refresh_share_of_training": bar(
            figures["cost"]["refresh_share_of_training"], 0.1, at_least=False
        )
    }
    bars |= bars_of(figures["kuairand"], wanted) if "kuairand" in figures else {}
    bars["failed_parts"] = bar(float(len(parts.failed)), 0.0, at_least=False)
    report("share", {**figures, "failed": parts.failed}, bars)


if __name__ == "__main__":
    main()
