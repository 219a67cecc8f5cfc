"""python -m benchmarks.study [--data DIR] [--quick]: which part of the distillation helps, and
which does not.

On the synthetic stream (configs/demo.yaml) and on KuaiRand (configs/kuairand.yaml,
DIR/kuairand_pure; tabs 2, 4 and 6), one stream each, everything else drawn anew with each of 5
seeds:
- the arms as configured; a neutral auxiliary head (w, alpha and beta 1, linear) and each of its
  knobs alone;
- controls: a teacher whose predictions are permuted within a window, one that says the mean label
  of the windows before, the student's own network trained on all domains, and the labels themselves
  in place of a teacher (the same extra weights, no outside knowledge);
- the base FM at lag 1, 2, 4 and 8, and at lag 1 from the later window on from which that lag can
  supervise;
- a small and a large FM; an FM that has seen the student's domain only. Figures are of the judged
  windows together: NE gain over the labels arm of the same seed, transfer ratio, calibration, with
  95 % t intervals over seeds. KuaiRand's settings were chosen on windows 3 to 6. The drawing goes
  to docs/study.svg (not with --quick).
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

os.environ["OMP_NUM_THREADS"] = "1"

import ray

from benchmarks.common import arguments, bar, report
from benchmarks.study_figures import markdown, teacher_figures, variant_figures
from benchmarks.study_plot import draw
from benchmarks.study_teachers import SIZES, student_rows, teach, teacher_nes, teachers
from benchmarks.study_variants import LAGS, calls, train, variants
from exfm_ray.config.checks import with_settings
from exfm_ray.config.load import load_config
from exfm_ray.config.models import WukongConfig
from exfm_ray.config.root import Config
from exfm_ray.data.prepare.prepare import prepare
from exfm_ray.data.stream import EventStream
from exfm_ray.models.flops import forward_flops
from exfm_ray.models.layout import Layout
from tuning.trial import Figures

SAYS = "Trains teachers and students of the ablation study on two streams with five seeds: about 25 minutes on two cores (--quick: 2)."
ROOT = Path(__file__).parents[1]
DRAWING = ROOT / "docs" / "study.svg"
SEEDS = (0, 1, 2, 3, 4)
Key = TypeVar("Key", bound=Hashable)


class Dataset(NamedTuple):
    """A config, the windows that judge, and the students; no names: all of the config's."""

    title: str
    config: str
    judged: tuple[int, int]
    students: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


EMBEDDED = Dataset("Synthetic stream", "demo", (4, 11))
KUAIRAND = Dataset("KuaiRand-Pure, is_click", "kuairand", (7, 11), ("tab2", "tab4", "tab6"))
SHORT = Dataset(
    "Synthetic stream, short",
    "demo",
    (3, 5),
    (),
    ("data.synthetic.windows=6", "data.synthetic.events_per_window=8000"),
)


def configured(
    dataset: Dataset,
    folder: str,
    data: Path,
) -> Config:
    """The data set's config with the study's students, in `folder`."""
    overrides = [f"run.dir={folder}", *dataset.overrides] + (
        [f"data.root={data.absolute() / 'kuairand_pure'}"] if dataset is KUAIRAND else []
    )
    config = load_config(ROOT / "configs" / f"{dataset.config}.yaml", overrides)
    chosen = [
        student
        for student in config.vm.models
        if student.name in dataset.students or not dataset.students
    ]
    assert all(len(student.tasks) == 1 for student in chosen), (
        "the study's students have one task each"
    )
    return with_settings(
        config, {"vm.models": [student.model_dump(mode="json") for student in chosen]}
    )


def gathered(what: str, running: Mapping[Key, Any]) -> dict[Key, Any]:
    """Results of Ray's tasks by their keys; says each tenth time how far it is."""
    waiting = {ref: key for key, ref in running.items()}
    found = {}
    started = time.perf_counter()
    while waiting:
        (ref,), _ = ray.wait(list(waiting), num_returns=1)
        found[waiting.pop(ref)] = ray.get(ref)
        if len(found) % 10 == 0 or not waiting:
            print(
                f"{what}: {len(found)} of {len(running)} after {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return found


def study(
    dataset: Dataset,
    config: Config,
    seeds: tuple[int, ...],
) -> dict[str, Any]:
    """All trainings of one data set; its figures. Needs a Ray session."""
    prepare(config)
    windows = dataset.judged[1] + 1
    wanted = variants(windows)
    lags = tuple(lag for lag in LAGS if f"lag {lag}" in {variant.teacher for variant in wanted})
    teaching = ray.remote(num_cpus=1)(teach)
    asked = {
        (number, seed): teaching.remote(config, one, seed, windows)
        for number, one in enumerate(teachers(config, lags))
        for seed in seeds
    }
    said = gathered(f"{dataset.title}: teachers", asked)
    training = ray.remote(num_cpus=1)(train)
    running = {}
    known = {}
    for student in config.vm.models:
        mine = [
            (seed, column, p)
            for (_, seed), by in said.items()
            for (name, column), p in by.items()
            if name == student.name
        ]
        taught = {seed: {column: p for of, column, p in mine if of == seed} for seed in seeds}
        rows, columns = student_rows(config, student, windows, taught)
        first, last = dataset.judged
        late = range(max(first, lags[-1]), last + 1)
        known[student.name] = [
            teacher_nes(config, student, rows, columns, of) for of in (range(first, last + 1), late)
        ]
        kept = ray.put(rows)
        for call in calls(config, wanted, seeds):
            members = tuple((one.variant.name, one.seed) for one in call)
            running[student.name, members] = training.remote(
                config, student, call, kept, columns, dataset.judged
            )
    outcomes: dict[str, dict[tuple[str, int], Figures | str]] = {
        student.name: {} for student in config.vm.models
    }
    for (name, members), told in gathered(f"{dataset.title}: students", running).items():
        outcomes[name] |= dict(zip(members, told, strict=True))
    told = {}
    for name, found in outcomes.items():
        judged, late_nes = known[name]
        labels = {
            seed: one.ne
            for (variant, seed), one in found.items()
            if variant == "labels" and isinstance(one, Figures)
        }
        fm = {seed: ne for (seed, teacher), ne in judged.items() if teacher == "lag 1"}
        told[name] = {
            "variants": variant_figures(wanted, found, fm),
            "teachers": teacher_figures(judged, late_nes, labels),
        }
    return {
        "title": dataset.title,
        "judged_windows": dataset.judged,
        "late_windows": (late[0], late[-1]),
        "seeds": seeds,
        "lags": lags,
        "fm_flops": fm_flops(config),
        "students": told,
    }


def fm_flops(config: Config) -> dict[str, int]:
    """Forward FLOPs an example of the FM's three sizes."""
    schema = EventStream.open(config.folder / "stream").schema
    sizes = {
        "small": SIZES["small"],
        "config's": config.fm.model.model_dump(),
        "large": SIZES["large"],
    }
    models = {
        name: WukongConfig.model_validate({**size, "dim": config.fm.model.dim})
        for name, size in sizes.items()
    }
    return {
        name: forward_flops(model, Layout.from_config(model, schema).inputs(len(schema.dense)))
        for name, model in models.items()
    }


def main() -> None:
    options = arguments("study", SAYS)
    datasets = {"synthetic": SHORT if options.quick else EMBEDDED}
    if options.quick or not (options.data / "kuairand_pure").is_dir():
        print(
            f"KuaiRand is left out: {'--quick' if options.quick else f'{options.data} holds no kuairand_pure'}"
        )
    else:
        datasets["kuairand"] = KUAIRAND
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    ray.init(
        num_cpus=len(os.sched_getaffinity(0)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    with tempfile.TemporaryDirectory() as folder:
        told = {
            name: study(
                one, configured(one, folder, options.data), SEEDS[:2] if options.quick else SEEDS
            )
            for name, one in datasets.items()
        }
    ray.shutdown()
    for one in told.values():
        print(markdown(one))
    if not options.quick:
        draw(told, DRAWING)
    failed = sum(
        len(v["errors"])
        for one in told.values()
        for student in one["students"].values()
        for v in student["variants"].values()
    )
    report("study", told, {"failed_trainings": bar(float(failed), 0.0, at_least=False)})


if __name__ == "__main__":
    main()
