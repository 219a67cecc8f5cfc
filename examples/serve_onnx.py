"""Export a trained student and score a few rows with ONNX Runtime.

    python examples/serve_onnx.py RUN_FOLDER VM [ARM]

`RUN_FOLDER` is the folder of a run whose vertical models have been trained, for example the run of
examples/own_model.py: `python examples/serve_onnx.py runs/own_model feed ah`. The served folder is
RUN_FOLDER/serving/VM-ARM; an existing one is reused. Needs the extra `serving`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from exfm_ray.serving.export import export_student

ROWS = 4


def random_inputs(schema: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make valid inputs of the graph; a real server maps raw values as schema.json says."""
    tables = schema["tables"]
    columns = []
    for feature in schema["sparse_BS"]:
        if feature["name"] == "domain":
            columns.append(np.full(ROWS, next(iter(schema["domains"].values()))))
        else:
            columns.append(rng.integers(0, tables[feature["table"]]["rows"], ROWS))
    inputs: dict[str, np.ndarray] = {"sparse_BS": np.stack(columns, axis=1)}

    user_features = schema["history"]["inputs"] if "history" in schema else 0
    dense_features = len(schema["dense_BD"]) + user_features
    if dense_features:
        dense_BD = rng.normal(size=(ROWS, dense_features))
        inputs["dense_BD"] = dense_BD.astype(np.float32)

    if schema["bags"]:
        values = [rng.integers(0, tables[bag["table"]]["rows"], ROWS) for bag in schema["bags"]]
        inputs["bag_values_V"] = np.concatenate(values)
        inputs["bag_lengths_MB"] = np.ones((len(schema["bags"]), ROWS), np.int64)
    return inputs


def main(
    run: Path,
    vm: str,
    arm: str,
) -> None:
    """Export the student unless it is exported already, and print probabilities."""
    folder = run / "serving" / f"{vm}-{arm}"
    if not folder.exists():
        export_student(run, vm, arm)

    schema = json.loads((folder / "schema.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    inputs = random_inputs(schema, np.random.default_rng(0))
    (probabilities_BT,) = session.run(None, inputs)
    for task, probabilities in zip(manifest["tasks"], probabilities_BT.T, strict=True):
        print(f"{task}: {np.round(probabilities, 4).tolist()}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python examples/serve_onnx.py RUN_FOLDER VM [ARM]")
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "ah_sa")
