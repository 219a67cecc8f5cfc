"""python -m benchmarks.share [--data DIR] [--quick]: what rows of the FM's tables bring to vertical models, and what they cost.

On KuaiRand (configs/kuairand.yaml, DIR/kuairand_pure; tabs 2, 4 and 6) and on the embedded stream (configs/demo.yaml), with an FM and
students of their own for each of 5 seeds:
- every objective alone and with +share; what becomes of a row's optimizer state; averages; rows hardly seen only;
- +history in its three ways with drift, alone and beside other arms;
- controls: rows of an FM of the same size that was trained on shuffled labels, rows of other ids of the same table, and the labels arm
  under the settings that were chosen for labels+share.
Each variant's learning rates (of tables and dense part, the same grid for all) are chosen on windows 5 and 6, by the mean over seeds, and
its figures are of windows 7 to 11: NE gain over the labels arm that was chosen likewise, transfer ratio, calibration.
Then the cost at one million rows: see benchmarks/share_cost.py.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
import ray
import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import arguments, bar, report
from benchmarks.share_cost import cost
from benchmarks.share_runs import DRIFTS, JUDGED, Rows, Variant, judge, train, variants
from benchmarks.study import EMBEDDED, KUAIRAND, Dataset, gathered
from exfm_ray.config import Config, dump_config, load_config, with_settings
from exfm_ray.das.gifts import Gifts
from exfm_ray.das.shared import SharedStore
from exfm_ray.das.snapshots import SnapshotStore
from exfm_ray.data.stream import EventStream, StreamWriter, list_values, window_name
from exfm_ray.files import read_json, sha256, write_json
from exfm_ray.tracking.recorder import read_metrics
from tuning.analysis import estimate
from tuning.rows import StudentRows

SAYS = "Trains FMs, and students with and without rows of their tables, on two streams with 5 seeds: about an hour on two cores (--quick: 5 min)."
ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2, 3, 4)


def command(config: Config, name: str) -> None:
    """One command of run.py with this config, in a process of its own."""
    path = config.run.dir / f"{config.name}.yaml"
    path.write_text(dump_config(config))
    subprocess.run([sys.executable, "run.py", name, "--config", str(path)], check=True, cwd=ROOT, capture_output=True)


def configured(dataset: Dataset, folder: str, data: Path, seed: int) -> Config:
    """The data set's config with the students that are judged, and arms that need all that the variants read."""
    overrides = [f"run.dir={folder}", f"seed={seed}", "wandb.mode=disabled", *dataset.overrides]
    overrides += [f"data.root={data.absolute() / 'kuairand_pure'}"] if dataset is KUAIRAND else []
    overrides += ["vm.arms=[labels,kd,labels+share]"]
    config = load_config(ROOT / "configs" / f"{dataset.config}.yaml", overrides, f"{dataset.config}-{seed}")
    chosen = [student.model_dump(mode="json") for student in config.vm.models if student.name in dataset.students or not dataset.students]
    return with_settings(config, {"vm.models": chosen})


def teach(config: Config) -> None:
    """The FM with its supervision and rows; beside them those of the controls."""
    command(config, "train-fm")
    stream = EventStream.open(config.folder / "stream")
    shuffled = beside(config, "shuffled")
    permute_labels(stream, shuffled.folder / "stream", config.seed)
    command(shuffled, "train-fm")
    snapshots = SnapshotStore(shuffled.folder / "snapshots", config.fm.name)
    for window in range(config.das.fm_lag, JUDGED.stop):
        Gifts.of(shuffled).publish(stream, snapshots, stream.window(window), window - config.das.fm_lag + 1)
    for drift in DRIFTS:
        remembered = beside(config, drift)
        remembered.folder.mkdir()
        for part in ("stream", "supervision", "shared"):
            (remembered.folder / part).symlink_to(config.folder / part)
        for window in range(config.das.fm_lag, JUDGED.stop):
            own = SnapshotStore(config.folder / "snapshots", config.fm.name)
            Gifts.of(remembered).publish(stream, own, stream.window(window), window - config.das.fm_lag + 1)
    command(config, "das")
    permute_rows(config, beside(config, "permuted").folder)


def beside(config: Config, rows: str) -> Config:
    """The config of the folder beside the run's that holds a control's rows, or a history."""
    if rows not in DRIFTS:
        return with_settings(config, {"name": f"{config.name}-{rows}"} if rows else {})
    arms = [*config.vm.arms, "labels+history"]
    return with_settings(config, {"name": f"{config.name}-{rows}", "distillation.history.drift": rows, "vm.arms": arms})


def permute_labels(stream: EventStream, folder: Path, seed: int) -> None:
    """The stream with the labels of each fragment in another order."""
    shutil.copytree(stream.root, folder)
    copy = EventStream.open(folder)
    windows = {number: copy.window(number) for number in stream.windows()}
    for number in windows:
        (folder / window_name(number) / "manifest.json").unlink()  # the writer leaves committed windows as they are
    writer = StreamWriter(folder, stream.schema, read_json(folder / "settings.json"), 2**31)
    rng = np.random.default_rng(seed)
    for number, window in windows.items():
        tables = []
        for fragment in window.fragments:
            table = copy.read(number, fragment)
            labels_NT = rng.permutation(list_values(table["labels"], len(stream.schema.tasks)))
            place = table.column_names.index("labels")
            tables.append(table.set_column(place, "labels", pa.FixedSizeListArray.from_arrays(labels_NT.ravel(), labels_NT.shape[1])))
        writer.write_window(number, window.start_ms, window.end_ms, window.duplicates, tables)


def permute_rows(config: Config, folder: Path) -> None:
    """The run's rows with the ids of every table mixed up: the same rows, on each id another's."""
    store = SharedStore(folder / "shared", config.fm.name)
    shutil.copytree(config.folder / "stream", folder / "stream")
    shutil.copytree(config.folder / "shared", store.root)
    rng = np.random.default_rng(config.seed)
    for window in range(config.das.fm_lag, JUDGED.stop):
        manifest = store.manifest(window)
        for domain, part in manifest.domains.items():
            path = store.folder(window) / part.file
            tensors = load_file(path)
            for name in [name for name in tensors if name.startswith("rows/")]:
                tensors[name] = tensors[name][torch.from_numpy(rng.permutation(len(tensors[name])))].contiguous()
            save_file(tensors, path)
            manifest.domains[domain] = part.model_copy(update={"sha256": sha256(path)})
        write_json(store.folder(window) / "manifest.json", manifest.model_dump(mode="json"))


def study(dataset: Dataset, folder: str, data: Path, seeds: Sequence[int], wanted: Sequence[Variant]) -> dict[str, Any]:
    """student -> variant -> figures. Needs a Ray session."""
    configs = {seed: configured(dataset, folder, data, seed) for seed in seeds}
    for seed, config in configs.items():
        teach(config)
        print(f"{dataset.title}: FMs of seed {seed} are trained", flush=True)
    training, running = ray.remote(num_cpus=1)(train), {}
    for seed, config in configs.items():
        for student in config.vm.models:
            read = {d: ray.put(StudentRows.read_from(beside(config, d), student, range(JUDGED.stop))) for d in ("", *DRIFTS)}
            for variant in wanted:
                rows = read[variant.rows if variant.rows in DRIFTS else ""]
                running[student.name, variant.name, seed] = training.remote(beside(config, variant.rows), student, variant, rows)
    found = gathered(f"{dataset.title}: students", running)
    told = {}
    for student in configs[seeds[0]].vm.models:
        trained: dict[str, dict[int, list[Rows]]] = defaultdict(dict)
        for (name, told_of, seed), each in found.items():
            if name == student.name:
                trained[told_of][seed] = each
        fm = {seed: fm_rows(config, student.domain, student.tasks[0]) for seed, config in configs.items()}
        told[student.name] = judge(wanted, trained, fm)
    return told


def fm_rows(config: Config, domain: str, task: str) -> Rows:
    """The FM's rows of metrics.jsonl on a student's examples."""
    return [row for row in read_metrics(config.folder / "metrics.jsonl") if (row["domain"], row["task"]) == (domain, task)]


def mean_ratio(told: Mapping[str, Mapping[str, Any]], variant: str) -> float | None:
    """Mean transfer ratio over students and seeds."""
    ratios = [one["transfer_ratio"] for student in told.values() for one in student[variant]["seeds"]]
    return None if None in ratios else float(np.mean(ratios))


def markdown(title: str, told: Mapping[str, Mapping[str, Any]], wanted: Sequence[Variant]) -> str:
    """A table: for each student NE gain, transfer ratio and calibration with half of their 95 % t intervals."""

    def cell(seeds: Sequence[Mapping[str, Any]], key: str, scale: float, digits: int) -> str:
        found = estimate([one[key] for one in seeds if one[key] is not None])
        if found is None:
            return ""
        return f"{found.mean * scale:.{digits}f}" + (f" ± {(found.high - found.mean) * scale:.{digits}f}" if found.high is not None else "")

    heads = "".join(f" {name}: NE gain % | TR | calibr. | table_lr, dense_lr |" for name in told)
    lines = [f"\n**{title}**\n", f"| variant |{heads} mean TR |", "|---|" + "---|---|---|---|" * len(told) + "---|"]
    for variant in wanted:
        cells = ""
        for student in told.values():
            seeds, settings = student[variant.name]["seeds"], student[variant.name]["settings"]
            rates = f"{settings['vm.optimizer.table_lr']}, {settings['vm.optimizer.dense_lr']}"
            cells += f" {cell(seeds, 'ne_gain', 100, 2)} | {cell(seeds, 'transfer_ratio', 1, 2)} | {cell(seeds, 'calibration', 1, 3)} | {rates} |"
        ratio = mean_ratio(told, variant.name)
        lines.append(f"| {variant.name} |{cells} {'' if ratio is None else f'{ratio:.2f}'} |")
    return "\n".join(lines)


def main() -> None:
    options = arguments("share", SAYS)
    seeds, wanted = (SEEDS[:1] if options.quick else SEEDS), variants()
    datasets = {} if options.quick else {"embedded": EMBEDDED}
    if (options.data / "kuairand_pure").is_dir():
        datasets["kuairand"] = KUAIRAND
    figures: dict[str, Any] = {"cost": cost(quick=options.quick)}
    bars = {"refresh_share_of_training": bar(figures["cost"]["refresh_share_of_training"], 0.1, at_least=False)}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ray.init(num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        for name, dataset in datasets.items():
            figures[name] = study(dataset, folder, options.data, seeds, wanted)
            print(markdown(dataset.title, figures[name], wanted), flush=True)
    ray.shutdown()
    if told := figures.get("kuairand"):
        ratios = {variant.name: mean_ratio(told, variant.name) for variant in wanted if variant.arm == variant.name and variant.name != "labels"}
        best = min(ratios, key=lambda name: float(np.mean([student[name]["score"] for student in told.values()])))  # as the settings are chosen
        worst = max(abs(float(np.mean([one["calibration"] for one in student[best]["seeds"]])) - 1) for student in told.values())
        bars |= {
            f"kuairand_mean_transfer_ratio_{best}": bar(ratios[best], 0.73),
            "kuairand_times_kd": bar((ratios[best] or 0.0) / ratios["kd"] if ratios["kd"] else None, 2.0),
            "kuairand_calibration_error": bar(worst, 0.05, at_least=False),
        }
    report("share", figures, bars)


if __name__ == "__main__":
    main()
