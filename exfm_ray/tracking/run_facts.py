"""The facts at the top of a run's report: what was run, on which data, with which settings."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from exfm_ray.tracking.plot_styles import at_serving
from exfm_ray.tracking.run_files import RunFiles


def run_facts(run: RunFiles) -> dict[str, str]:
    """Heading -> text, without empty ones."""
    facts = {
        "state": _state(run),
        "run": _dates(run),
        "data": _data(run),
        "FM": _foundation_model(run),
        **_student_facts(run),
        "peak memory": _peak_memory(run),
        "seed": f"{run.setting('seed', 0)}",
        "versions": ", ".join(run.versions),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _student_facts(run: RunFiles) -> dict[str, str]:
    """The facts about vertical models; none for a run of the FM alone."""
    vm = run.setting("vm", {})
    if not vm.get("models"):
        return {}
    arms = vm.get("arms", ())
    lag = run.setting("das.fm_lag", 1)
    return {
        "supervision": f"by the snapshot that has learned up to {lag} window(s) before",
        "vertical models": f"{_students(vm)}; {_training(vm)}",
        "arms": ", ".join(arms),
        "shared rows": _shared_rows(run) if _any_has_option(arms, "share") else "",
        "histories": _histories(run) if _any_has_option(arms, "history") else "",
        "further cost at serving": _serving_costs(arms),
        "weights": _weights(run),
    }


def _any_has_option(arms: Sequence[str], option: str) -> bool:
    return any(option in arm.split("+") for arm in arms)


def _state(run: RunFiles) -> str:
    unit = "passes" if run.static else f"of {run.windows} windows"
    done = ", ".join(f"{name} {done} {unit}" for name, done in run.done.items())
    return f"{run.state}: {done}"


def _dates(run: RunFiles) -> str:
    """When the first role started and the last one ended."""
    if not run.spans:
        return ""
    first = min(span["started_s"] for span in run.spans)
    last = max(span["ended_s"] for span in run.spans)
    return f"{_date(first)} to {_date(last)}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _data(run: RunFiles) -> str:
    source = run.setting("data.source")
    roles = _role_of_windows(run)
    return f"{source}, {run.windows} windows; {roles}"


def _foundation_model(run: RunFiles) -> str:
    fm = run.setting("fm", {})
    model = _model(fm.get("model", {}))
    training = _training(fm)
    return f"{model}; {training}"


def _role_of_windows(run: RunFiles) -> str:
    if run.static:
        validation = run.setting("fm.static.validation_window")
        return (
            f"a static set: those before window {validation} are learned in passes, which that "
            "one stops"
        )
    warmup = run.setting("metrics.warmup_windows", 0)
    return f"the first {warmup} are warm-up: in no average"


def _model(model: Mapping[str, Any]) -> str:
    """A network and its sizes, without those that are zero or off."""
    sizes = []
    for name, value in model.items():
        is_off = value in ({}, [], 0, 0.0, None, False)
        if name != "type" and not is_off:
            sizes.append(f"{name} {value}")
    return f"{model.get('type')} ({', '.join(sizes)})"


def _training(trainer: Mapping[str, Any]) -> str:
    batch_size = trainer.get("batch_size")
    rates = trainer.get("optimizer", {})
    table_lr = rates.get("table_lr")
    dense_lr = rates.get("dense_lr")
    workers = trainer.get("workers")
    device = trainer.get("device")
    precision = trainer.get("precision")
    return (
        f"batch {batch_size}, rates {table_lr} (tables) and {dense_lr} (dense), "
        f"{workers} worker(s), {device}, {precision}"
    )


def _students(vm: Mapping[str, Any]) -> str:
    descriptions = []
    for student in vm["models"]:
        name = student["name"]
        domain = student["domain"]
        tasks = student.get("task", student.get("tasks", ()))
        if isinstance(tasks, str):
            tasks = [tasks]
        all_tasks = " and ".join(tasks)
        model = student.get("model") or vm["model"]
        network = model["type"]
        descriptions.append(f"{name} ({domain}, {all_tasks}, {network})")
    return ", ".join(descriptions)


def _serving_costs(arms: Sequence[str]) -> str:
    """Which arms cost what at serving beyond the labels arm, in the order of the arms."""
    parts = []
    for cost in ("nothing", "a feature store"):
        matches = [arm for arm in arms if at_serving(arm) == cost]
        names = ", ".join(matches)
        if names:
            parts.append(f"{cost}: {names}")
    return "; ".join(parts)


def _weights(run: RunFiles) -> str:
    kd_w = run.setting("distillation.kd.w")
    sa_w = run.setting("distillation.sa.w")
    ah_w = run.setting("distillation.ah.w")
    alpha = run.setting("distillation.ah.alpha")
    beta = run.setting("distillation.ah.beta")
    return f"kd: w {kd_w}; ah: w {ah_w}, alpha {alpha}, beta {beta}; sa: w {sa_w}"


def _shared_rows(run: RunFiles) -> str:
    """How arms with +share use the teacher's rows, without settings that their mode ignores."""
    share = run.setting("distillation.share", {})
    mode = share.get("mode")
    settings = ["mode"]
    if mode == "average":
        settings.append("weight")
    if mode == "unseen":
        settings.append("min_uses" if "min_uses" in share else "unseen_below")
    settings += ["optimizer", "projection"]

    rate = share.get("table_lr")
    tables = ", ".join(share.get("tables", ())) or "all"
    details = ", ".join(f"{name} {share.get(name)}" for name in settings)
    return f"rate {rate} (tables), of tables {tables}, {details}"


def _histories(run: RunFiles) -> str:
    """What arms with +history receive."""
    history = run.setting("distillation.history", {})
    last_k = history.get("last_k", history.get("last"))
    embedding_space = history.get("embedding_space", history.get("drift"))
    content = f"the last {last_k} in order" if last_k else "the mean"
    key = history.get("key") or "the schema's group_by"
    layer = history.get("layer")
    dim = history.get("dim")
    return (
        f"layer {layer}, by {key}, {dim} numbers per example, "
        f"{content}, embedding space {embedding_space}"
    )


def _peak_memory(run: RunFiles) -> str:
    if not run.summary:
        return ""
    return f"{run.summary['peak_memory_bytes'] / 2**30:.1f} GiB"
