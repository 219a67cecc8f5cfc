"""Folders as runs leave them, without a run.

They contain figures of random examples, a timeline and the manifests of a stream.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from small_runs import small_config

from exfm_ray.config.load import dump_config
from exfm_ray.config.root import Config
from exfm_ray.metrics.state import MetricState
from exfm_ray.storage.atomic import write_json

WINDOWS = 4
ARMS = ("labels", "kd", "ah", "ah_sa")
CURVES = {
    **{
        ("fm", "fm", "fm", domain, task): 0.3
        for domain in ("all", "feed", "stories")
        for task in ("click", "conversion")
    },
    **{("vm", "feed", arm, "feed", "click"): 0.8 + 0.1 * i for i, arm in enumerate(ARMS)},
    **{
        ("vm", "stories", arm, "stories", "conversion"): 0.9 - 0.1 * i for i, arm in enumerate(ARMS)
    },
}
"""(role, model, arm, domain, task) -> how far the model's logits are from the true ones."""
Examples = dict[tuple[str, ...], list[tuple[np.ndarray, np.ndarray]]]


def write_run(
    folder: Path,
    name: str,
    windows: int = WINDOWS,
    roles: tuple[str, ...] = ("fm", "vm"),
    **changes: Any,
) -> tuple[Config, Examples]:
    """Write a run that has finished `windows` of its 4 windows.

    Returns:
        Its config, and the logits and labels of each curve by window.
    """
    config = small_config(folder, name, **changes)
    config.folder.mkdir(parents=True)
    (config.folder / "config.yaml").write_text(
        f"{dump_config(config)}\n---\n# python 3.11\n# torch 2.13.0\n"
    )
    for window in range(WINDOWS):
        write_json(config.folder / "stream" / f"window={window:03d}" / "manifest.json", {})
    examples = defaultdict(list)
    rng = np.random.default_rng(windows)
    rows = []
    for window in range(windows):
        drawn: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        for key, noise in CURVES.items():
            if key[0] not in roles:
                continue
            truth_N = rng.normal(-1, 1, 200 + 10 * window)
            truth_N, labels_N = drawn.setdefault(
                key[3:],
                (
                    truth_N,
                    (rng.random(len(truth_N)) < 1 / (1 + np.exp(-truth_N))).astype(np.float32),
                ),
            )
            logits_N = (
                truth_N + noise * rng.normal(size=len(truth_N)) + (6.0 if window == 0 else 0.0)
            )
            examples[key].append((logits_N, labels_N))
            role, model, arm, domain, task = key
            identity = {
                "window": window,
                "role": role,
                "model": model,
                "arm": arm,
                "domain": domain,
                "task": task,
                "seed": 0,
                "snapshot": None,
            }
            rows.append(
                {
                    **identity,
                    **MetricState.from_logits(logits_N, labels_N).figures(),
                    "examples_per_s": 1000.0,
                }
            )
    (config.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spans = [
        span(role, window, phase, 100.0 + 3 * window + i)
        for window in range(windows)
        for role in roles
        for i, phase in PHASES.items()
    ]
    (config.folder / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spans))
    write_json(
        config.folder / "new_ids.json",
        [
            {"feature": feature, "window": window, "domain": domain, "share": share / window}
            for feature, share in NEW.items()
            for window in range(1, WINDOWS)
            for domain in ("all", "feed", "stories")
        ],
    )
    return config, dict(examples)


NEW = {"user": 0.5, "ad": 0.25}
"""Fraction of new ids in window 1."""
PHASES = {0: "evaluate", 1: "learn"}


def span(
    role: str,
    window: int,
    phase: str,
    started: float,
    took: float = 0.75,
    waited: float = 0.25,
) -> dict[str, Any]:
    return {
        "role": role,
        "window": window,
        "phase": phase,
        "started_s": started,
        "ended_s": started + took,
        "waited_s": waited,
        "examples": 10,
    }
