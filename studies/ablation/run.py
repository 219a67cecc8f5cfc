"""python -m studies.ablation [--data DIR] [--quick]: which part of the distillation helps.

On the synthetic stream (configs/demo.yaml) and on KuaiRand (configs/kuairand.yaml,
DIR/kuairand_pure; tabs 2, 4 and 6). One stream each; everything else is drawn again with each of 5
seeds. The study trains
- the arms as configured; a neutral auxiliary head (w, alpha and beta 1, linear) and each of its
  knobs alone;
- controls: a teacher whose predictions are permuted within a window, one that predicts the mean
  label of the windows before, the student's own network trained on all domains, and the labels
  themselves in place of a teacher (the same extra weights, no outside knowledge);
- the base FM at lag 1, 2, 4 and 8, and at lag 1 from the later window on from which that lag can
  supervise;
- a small and a large FM; an FM that has seen the student's domain only.

Figures are of the holdout windows together: NE gain over the labels arm of the same seed, transfer
ratio, calibration, with 95 % t intervals over seeds. KuaiRand's settings were chosen on windows 3
to 6. The drawing is written to docs/study.svg (not with --quick).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

os.environ["OMP_NUM_THREADS"] = "1"

import ray

from benchmarks.common import arguments, bar, report
from exfm_ray.config.models import WukongConfig
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream
from exfm_ray.models.flops import forward_flops
from exfm_ray.models.layout import Layout
from studies.ablation.figures import Outcomes, teacher_figures, variant_figures
from studies.ablation.plot import draw
from studies.ablation.tables import markdown
from studies.ablation.teachers import (
    SIZES,
    Column,
    WindowPredictions,
    student_rows,
    teach,
    teacher_nes,
    teachers,
)
from studies.ablation.variants import LAGS, Variant, calls, train, variants
from studies.common import (
    KUAIRAND,
    ROOT,
    SYNTHETIC,
    Dataset,
    dataset_config,
    start_ray,
    uses_kuairand,
)
from tuning.trial import Figures

DESCRIPTION = (
    "Trains teachers and students of the ablation study on two streams with five seeds: "
    "about 25 minutes on two cores (--quick: 2)."
)
DRAWING = ROOT / "docs" / "study.svg"
SEEDS = (0, 1, 2, 3, 4)
SHORT = Dataset(
    "Synthetic stream, short",
    "demo",
    (3, 5),
    (),
    ("data.synthetic.windows=6", "data.synthetic.events_per_window=8000"),
)
Key = TypeVar("Key", bound=Hashable)
Predictions = dict[tuple[str, str], WindowPredictions]
"""(student, name of a teacher's column) -> predictions."""


def collect(title: str, running: Mapping[Key, Any]) -> dict[Key, Any]:
    """Wait for Ray tasks and return their results by key. Prints the progress."""
    waiting = {ref: key for key, ref in running.items()}
    results = {}
    started = time.perf_counter()
    while waiting:
        (ref,), _ = ray.wait(list(waiting), num_returns=1)
        results[waiting.pop(ref)] = ray.get(ref)
        if len(results) % 10 == 0 or not waiting:
            seconds = time.perf_counter() - started
            print(f"{title}: {len(results)} of {len(running)} after {seconds:.0f} s", flush=True)
    return results


def study(
    dataset: Dataset,
    config: Config,
    seeds: tuple[int, ...],
) -> dict[str, Any]:
    """Train everything on one data set and return its figures. Needs a Ray session."""
    for student in config.vm.models:
        assert len(student.tasks) == 1, "the study's students have one task each"
    prepare(config)
    first, last = dataset.holdout
    windows = last + 1
    all_variants = variants(windows)
    teacher_names = {variant.teacher for variant in all_variants}
    lags = tuple(lag for lag in LAGS if f"lag {lag}" in teacher_names)
    late_windows = range(max(first, lags[-1]), last + 1)

    predictions = _teach_all(dataset, config, lags, seeds)
    training = ray.remote(num_cpus=1)(train)
    running = {}
    holdout_nes = {}
    late_nes = {}
    for student in config.vm.models:
        by_seed = _by_seed(predictions, student.name, seeds)
        rows, columns = student_rows(config, student, windows, by_seed)
        holdout_nes[student.name] = teacher_nes(
            config, student, rows, columns, range(first, last + 1)
        )
        late_nes[student.name] = teacher_nes(config, student, rows, columns, late_windows)

        rows_reference = ray.put(rows)
        for call in calls(config, all_variants, seeds):
            members = tuple((one.variant.name, one.seed) for one in call)
            running[student.name, members] = training.remote(
                config, student, call, rows_reference, columns, dataset.holdout
            )

    outcomes: dict[str, dict[tuple[str, int], Figures | str]]
    outcomes = {student.name: {} for student in config.vm.models}
    for (name, members), results in collect(f"{dataset.title}: students", running).items():
        outcomes[name] |= dict(zip(members, results, strict=True))
    students = {
        name: _student_figures(all_variants, outcomes[name], holdout_nes[name], late_nes[name])
        for name in outcomes
    }
    return {
        "title": dataset.title,
        "judged_windows": dataset.holdout,
        "late_windows": (late_windows[0], late_windows[-1]),
        "seeds": seeds,
        "lags": lags,
        "fm_flops": fm_flops(config),
        "students": students,
    }


def _teach_all(
    dataset: Dataset,
    config: Config,
    lags: tuple[int, ...],
    seeds: Sequence[int],
) -> dict[tuple[int, int], Predictions]:
    """(number of the teacher, seed) -> its predictions."""
    windows = dataset.holdout[1] + 1
    teaching = ray.remote(num_cpus=1)(teach)
    running = {}
    for number, teacher in enumerate(teachers(config, lags)):
        for seed in seeds:
            running[number, seed] = teaching.remote(config, teacher, seed, windows)
    return collect(f"{dataset.title}: teachers", running)


def _by_seed(
    predictions: Mapping[tuple[int, int], Predictions],
    student: str,
    seeds: Sequence[int],
) -> dict[int, dict[str, WindowPredictions]]:
    """Seed -> column -> predictions for one student, of all teachers."""
    by_seed: dict[int, dict[str, WindowPredictions]] = {seed: {} for seed in seeds}
    for (_, seed), by_column in predictions.items():
        for (name, column), window_predictions in by_column.items():
            if name == student:
                by_seed[seed][column] = window_predictions
    return by_seed


def _student_figures(
    all_variants: Sequence[Variant],
    outcomes: Outcomes,
    holdout_nes: Mapping[Column, float],
    late_nes: Mapping[Column, float],
) -> dict[str, Any]:
    """Figures of one student's variants and teachers."""
    labels_nes = {}
    for (variant, seed), outcome in outcomes.items():
        if variant == "labels" and isinstance(outcome, Figures):
            labels_nes[seed] = outcome.ne
    fm_nes = {seed: ne for (seed, teacher), ne in holdout_nes.items() if teacher == "lag 1"}
    return {
        "variants": variant_figures(all_variants, outcomes, fm_nes),
        "teachers": teacher_figures(holdout_nes, late_nes, labels_nes),
    }


def fm_flops(config: Config) -> dict[str, int]:
    """Return the forward FLOPs per example of the FM's three sizes."""
    schema = EventStream.open(config.folder / "stream").schema
    sizes = {
        "small": SIZES["small"],
        "config's": config.fm.model.model_dump(),
        "large": SIZES["large"],
    }
    flops = {}
    for name, size in sizes.items():
        model = WukongConfig.model_validate({**size, "dim": config.fm.model.dim})
        inputs = Layout.from_config(model, schema).inputs(len(schema.dense))
        flops[name] = forward_flops(model, inputs)
    return flops


def failed_trainings(figures: Mapping[str, Any]) -> int:
    """Count the trainings of all data sets that ended with an error."""
    count = 0
    for dataset_figures in figures.values():
        for student in dataset_figures["students"].values():
            for variant in student["variants"].values():
                count += len(variant["errors"])
    return count


def main() -> None:
    options = arguments("studies.ablation", DESCRIPTION)
    datasets = {"synthetic": SHORT if options.quick else SYNTHETIC}
    if uses_kuairand(options):
        datasets["kuairand"] = KUAIRAND
    seeds = SEEDS[:2] if options.quick else SEEDS

    start_ray()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, dataset in datasets.items():
            config = dataset_config(dataset, Path(folder), options.data)
            figures[name] = study(dataset, config, seeds)
    ray.shutdown()

    for dataset_figures in figures.values():
        print(markdown(dataset_figures))
    if not options.quick:
        draw(figures, DRAWING)
    failed = float(failed_trainings(figures))
    report("study", figures, {"failed_trainings": bar(failed, 0.0, at_least=False)})
