"""Trained students to served folders and deltas: what ONNX Runtime and torch.export predict, and
what is refused."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from local_runs import score, train
from safetensors.torch import load_file, save_file
from small_runs import small_config
from workers import Workers

from exfm_ray.cli.main import main
from exfm_ray.data.batch import to_batch
from exfm_ray.data.stream import EventStream
from exfm_ray.errors import UserError
from exfm_ray.models.serialization import load_model
from exfm_ray.pipeline.preflight import prepare_stream
from exfm_ray.pipeline.schedule import vm_jobs
from exfm_ray.serving import export
from exfm_ray.serving.delta import main as delta_main
from exfm_ray.serving.export import export_student
from exfm_ray.storage.atomic import read_json, write_json
from exfm_ray.training.job import Job

pytestmark = pytest.mark.heavy

OTHER = {"type": "mlp", "dim": 8, "mlp": [4]}  # every backbone is exported in test_graph.py
MODELS = [
    {"name": "feed", "domain": "feed", "task": ["click", "conversion"]},
    {"name": "stories", "domain": "stories", "task": "click", "model": OTHER},
]


@dataclass(frozen=True)
class Trained:
    """A run's folder, and where its students were exported and served a window earlier."""

    run: Path
    earlier: Path
    served: Path


@pytest.fixture(scope="module")
def trained(groups: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two students of two arms, served after three windows and after four."""
    config = small_config(
        tmp_path_factory.mktemp("serving"),
        "run",
        vm={"models": MODELS, "arms": ["labels", "ah_sa"]},
    )
    windows = prepare_stream(config).windows()
    groups[1].run(train, Job("fm", config), windows, None)
    groups[1].run(score, config)
    (job,) = vm_jobs(config)
    groups[1].run(train, job, windows[:3], None)
    earlier = export_student(config.folder, "feed", "ah_sa", config.folder / "earlier")
    groups[1].run(train, job, windows, None)
    return Trained(config.folder, earlier, export_student(config.folder, "feed", "ah_sa"))


@pytest.fixture(scope="module")
def delta(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What changed in the last window."""
    return export_student(
        trained.run,
        "feed",
        "ah_sa",
        tmp_path_factory.mktemp("delta") / "delta",
        since=trained.earlier,
    )


def rows(
    run: Path,
    window: int,
    count: int,
    empty: bool,
) -> dict[str, np.ndarray[Any, Any]]:
    """Rows of the stream as ONNX Runtime is fed them; `empty`: those in which a bag has no value
    come first."""
    stream = EventStream.open(run / "stream")
    table = stream.read(window, stream.window(window).fragments[1])
    lengths = table["keywords"].combine_chunks().value_lengths().to_numpy()
    if empty:
        lengths = np.minimum(
            lengths, table["clicked_ads"].combine_chunks().value_lengths().to_numpy()
        )
        assert (lengths == 0).sum() >= 3, "the stream has rows with empty bags"
        table = table.take(np.argsort(lengths, kind="stable"))
    batch = to_batch(table.slice(0, count), stream.schema)
    names = ("sparse_BS", "dense_BD", "bag_values_V", "bag_lengths_MB")
    return {name: getattr(batch, name).numpy() for name in names}


def trained_probabilities(
    run: Path,
    student: str,
    inputs: dict[str, np.ndarray[Any, Any]],
) -> np.ndarray[Any, Any]:
    """What the student that training exported predicts."""
    model, _ = load_model(run / "exported" / student)
    with torch.inference_mode():
        logits = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return 1 / (1 + np.exp(-logits.double().numpy()))


@pytest.mark.parametrize("student", ["feed-ah_sa", "stories-ah_sa"])
def test_served_predictions_are_the_trained_ones(
    trained: Trained,
    tmp_path: Path,
    student: str,
) -> None:
    """Wrong: what is served is not what was trained: for many rows, for few, for empty bags, in
    either format."""
    folder = trained.served
    if student != "feed-ah_sa":
        folder = export_student(
            trained.run, student.partition("-")[0], "ah_sa", tmp_path / "served"
        )
    program = torch.export.load(folder / "model.pt2").module()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for count, empty in ((200, False), (200, True), (3, True), (1, False), (1, True)):
        inputs = rows(trained.run, 1, count, empty)
        expected = trained_probabilities(trained.run, student, inputs)
        (onnx,) = session.run(None, inputs)
        found = program(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()
        assert onnx.dtype == np.float32
        np.testing.assert_allclose(onnx, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_the_manifest_says_what_is_there(trained: Trained) -> None:
    """Wrong: a server that reads the manifest feeds other inputs than the graph takes, or auxiliary
    parts are served."""
    manifest = read_json(trained.served / "manifest.json")
    assert (
        manifest["student"] == {"vm": "feed", "arm": "ah_sa", "windows": 4, "seed": 0}
        and manifest["run"] == "run"
    )
    assert manifest["tasks"] == ["click", "conversion"] and manifest["checked"]["rows"] == 250
    assert set(manifest["checked"]["largest_difference"]) == {"model.pt2", "model.onnx"}
    assert set(manifest["files"]) | {"manifest.json"} == {
        path.name for path in trained.served.iterdir()
    }
    session = onnxruntime.InferenceSession(trained.served / "model.onnx")
    dtypes = {"int64": "tensor(int64)", "float32": "tensor(float)"}
    for ports, found in (
        (manifest["inputs"], session.get_inputs()),
        ([manifest["output"]], session.get_outputs()),
    ):
        assert [(p["name"], p["shape"], dtypes[p["dtype"]]) for p in ports] == [
            (f.name, f.shape, f.type) for f in found
        ]
    text = (trained.served / "model.onnx").read_bytes()
    assert (
        b"auxiliary" not in text
        and b"adapter" not in text
        and str(Path(export.__file__).parent).encode() not in text
    )


def test_the_example_in_the_docs_runs(trained: Trained) -> None:
    """Wrong: the first thing that a user tries fails."""
    page = (
        (Path(__file__).parents[2] / "docs/serving.md")
        .read_text()
        .partition("## With ONNX Runtime")[2]
    )
    code = page.partition("```python\n")[2].partition("```")[0]
    assert code.count("runs/demo/serving/feed-ah_sa") == 1
    found: dict[str, Any] = {}
    exec(code.replace("runs/demo/serving/feed-ah_sa", str(trained.served)), found)
    assert (
        found["probabilities"].shape == (2, 2)
        and ((found["probabilities"] > 0) & (found["probabilities"] < 1)).all()
    )


def test_a_delta_leads_to_the_new_folder(
    trained: Trained,
    delta: Path,
    tmp_path: Path,
) -> None:
    """Wrong: a server that takes deltas predicts otherwise than one that takes full exports, or the
    delta holds everything."""
    assert {path.name for path in delta.iterdir()} == {
        "delta.safetensors",
        "model.onnx",
        "schema.json",
        "manifest.json",
    }
    assert not list(delta.parent.glob(".*")), "nothing unfinished is left"
    changed = read_json(delta / "manifest.json")["changed"]
    sizes = {
        name: len(table) for name, table in load_file(trained.served / "tables.safetensors").items()
    }
    assert 0 < changed["user"] < sizes["user"]
    assert delta_main([str(trained.earlier), str(delta), str(tmp_path / "now")]) == 0
    for file in ("tables.safetensors", "schema.json"):
        assert (tmp_path / "now" / file).read_bytes() == (trained.served / file).read_bytes()
    assert (trained.earlier / "tables.safetensors").read_bytes() != (
        trained.served / "tables.safetensors"
    ).read_bytes()
    inputs = rows(trained.run, 2, 200, False)
    (now,) = onnxruntime.InferenceSession(tmp_path / "now/model.onnx").run(None, inputs)
    np.testing.assert_allclose(
        now, trained_probabilities(trained.run, "feed-ah_sa", inputs), rtol=0, atol=1e-6
    )
    again = export_student(trained.run, "feed", "ah_sa", tmp_path / "none", since=tmp_path / "now")
    assert read_json(again / "manifest.json")["changed"] == {}, (
        "a folder made by a delta is one to start from"
    )


def other_schema(folder: Path) -> None:
    write_json(
        folder / "manifest.json", read_json(folder / "manifest.json") | {"schema_digest": "0"}
    )


def other_network(folder: Path) -> None:
    write_json(
        folder / "manifest.json",
        read_json(folder / "manifest.json") | {"network": {"type": "mlp", "dim": 8}},
    )


def other_tables(folder: Path) -> None:
    save_file(
        {name: table + 1 for name, table in load_file(folder / "tables.safetensors").items()},
        folder / "tables.safetensors",
    )


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def no_such_manifest(folder: Path) -> None:
    write_json(folder / "manifest.json", {"a": 1})


SPOILT = {
    other_schema: "another schema (0, now",
    other_network: "another network",
    other_tables: "tables.safetensors: missing or not the file that",
    no_manifest: "manifest.json: no such file",
    no_such_manifest: "not the manifest of a served student",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_delta_since_something_else_is_refused(
    trained: Trained,
    tmp_path: Path,
    spoil: Any,
) -> None:
    """Wrong: rows are put into tables that they do not belong to."""
    base = shutil.copytree(trained.earlier, tmp_path / "base")
    spoil(base)
    with pytest.raises(UserError) as error:
        export_student(trained.run, "feed", "ah_sa", tmp_path / "delta", since=base)
    assert SPOILT[spoil] in str(error.value) and [path.name for path in tmp_path.iterdir()] == [
        "base"
    ]


def test_a_delta_is_not_applied_to_something_else(
    trained: Trained,
    delta: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: a delta skipped, taken twice or damaged on its way goes unnoticed."""
    delta = shutil.copytree(delta, tmp_path / "delta")

    def refused(
        base: Path,
        delta: Path,
        to: Path,
    ) -> str:
        assert delta_main([str(base), str(delta), str(to)]) == 2
        return capsys.readouterr().err

    assert "starts from other tables" in refused(trained.served, delta, tmp_path / "now")
    assert "exists already" in refused(trained.earlier, delta, trained.earlier)
    assert "not the manifest of a delta" in refused(
        trained.earlier, trained.served, tmp_path / "now"
    )
    values = load_file(delta / "delta.safetensors")
    save_file(
        {key: tensor + (key == "values/user") for key, tensor in values.items()},
        delta / "delta.safetensors",
    )
    assert "delta.safetensors: missing or not the file" in refused(
        trained.earlier, delta, tmp_path / "now"
    )
    assert delta_main([]) == 2 and not (tmp_path / "now").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vm", "fed"], "no vertical model 'fed': there are feed, stories. Did you mean 'feed'?"),
        (["--vm", "feed", "--arm", "kd"], "'feed' has no arm 'kd': there are ah_sa, labels."),
        (
            ["--vm", "feed"],
            "serving/feed-ah_sa: exists already; remove it or choose another folder",
        ),
        (
            ["--vm", "feed", "--to", "x", "--since", "y", "--aot"],
            "--aot and --since do not go together",
        ),
        ([], "the following arguments are required: --vm"),
    ],
)
def test_mistakes_on_the_command_line(
    trained: Trained,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """Wrong: a mistake ends in a traceback, does not say what there is, or overwrites a folder that
    is being served."""
    before = {path: path.stat().st_mtime_ns for path in trained.run.rglob("*")}
    assert main(["export", str(trained.run), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in trained.run.rglob("*")} == before


def test_a_folder_without_students(tmp_path: Path) -> None:
    """Wrong: the message is about a missing file inside a folder that never was a run."""
    with pytest.raises(
        UserError, match="it has no exported vertical model; give the folder of a run"
    ):
        export_student(tmp_path, "feed", "ah_sa")


def test_a_damaged_student_is_refused(trained: Trained, tmp_path: Path) -> None:
    """Wrong: a student damaged on disk is served."""
    run = tmp_path / "run"
    shutil.copytree(trained.run / "exported", run / "exported")
    shutil.copytree(trained.run / "stream", run / "stream")
    path = run / "exported/feed-labels/dense.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"dense.safetensors: missing or not the file that model.json describes"
    ):
        export_student(run, "feed", "labels")
    assert not (run / "serving").exists()


def test_a_model_that_predicts_otherwise_is_refused(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: an exporter's fault reaches the servers, or half a folder stays."""

    def faulty(program: Any, *arguments: Any) -> export.Predict:
        predict = program.module()
        return lambda inputs: predict(**inputs) + 2e-5 * (len(inputs["sparse_BS"]) == 3)

    monkeypatch.setattr(export, "write_onnx", faulty)
    with pytest.raises(
        UserError,
        match=r"model.onnx: its probabilities differ .* by up to 2.0e-05 in a batch of 3, "
        "where 1e-05 is allowed",
    ):
        export_student(trained.run, "feed", "labels", tmp_path / "served")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_aot(trained: Trained, tmp_path: Path) -> None:
    """Wrong: the compiled library is not written, or reads its inputs' memory in another order than
    they have."""
    folder = export_student(trained.run, "feed", "ah_sa", tmp_path / "served", aot=True)
    checked = read_json(folder / "manifest.json")["checked"]["largest_difference"]
    assert checked["model.aot.pt2"] < 1e-5 and (folder / "model.aot.pt2").stat().st_size > 0


def test_aot_without_a_compiler(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: minutes of work end in the compiler driver's traceback."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError,
        match="there is no 'no-such-compiler' on this machine; install one, set CXX or leave "
        "--aot out",
    ):
        export_student(trained.run, "feed", "ah_sa", tmp_path / "served", aot=True)
