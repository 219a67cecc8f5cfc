"""Memory plans equal what a real training holds, and sums by hand where none can run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from plan_measures import measure
from small_runs import SETTINGS, merged
from workers import Workers

from exfm_ray.cli.main import main
from exfm_ray.config.models import MLPConfig, WukongConfig
from exfm_ray.config.root import Config
from exfm_ray.config.trainer import FMConfig
from exfm_ray.planner.dense_state import REDUCE_BUCKET
from exfm_ray.planner.memory import plan_fm
from exfm_ray.schema import DenseFeature, Kind, Schema, SparseFeature

BIG = Schema(
    features=(
        SparseFeature(name="user", rows=200_003),
        SparseFeature(name="ad", rows=90_001),
        SparseFeature(name="maker", rows=60_000),
        SparseFeature(name="hour", rows=25),
        SparseFeature(name="keywords", kind=Kind.MULTI, rows=50_000, max_length=3),
        SparseFeature(
            name="clicked_ads", kind=Kind.SEQUENCE, rows=90_001, table="ad", max_length=5
        ),
    ),
    dense=(DenseFeature(name="age"), DenseFeature(name="price", transform="log1p")),
    tasks=("click", "conversion"),
    domains=("feed", "search", "stories"),
)
MODEL = WukongConfig(dim=16, embeddings={"ad": 2}, k=4, fmb_mlp=(256,), mlp=(256, 128))
CASES: dict[str, dict[str, Any]] = {
    "row-wise": {"sharding": "row_wise"},
    "table-wise": {"sharding": "table_wise", "optimizer": {"ema": 0.99}},
    "row-wise, stage 1, bf16": {"sharding": "row_wise", "zero_stage": 1, "precision": "bf16"},
    "table-wise, stage 2": {"sharding": "table_wise", "zero_stage": 2},
    "row-wise, stage 2, bf16": {"sharding": "row_wise", "zero_stage": 2, "precision": "bf16"},
    "table-wise, bf16": {"sharding": "table_wise", "precision": "bf16"},
    "row-wise, stage 3": {"sharding": "row_wise", "zero_stage": 3},
}
RESIDENT = ("dense weights", "float32 masters", "Adam", "moving average")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_plan_equals_what_a_training_holds(
    groups: dict[int, Workers],
    case: str,
    world: int,
) -> None:
    """Wrong: a run that should fit according to its plan does not, or the plan places the tables
    on other workers than the engine does."""
    fm = FMConfig(model=MODEL, workers=world, batch_size=512, **CASES[case])
    plan = plan_fm(Config(fm=fm), BIG)
    assert plan.table_parameters * 4 > 25 * 2**20
    for rank, measured in enumerate(groups[world].run(measure, fm, BIG)):
        planned = plan.parts(rank)
        planned_rows = {
            shard.name: int(shard.rows_W[rank]) for shard in plan.shards if shard.rows_W[rank]
        }
        assert planned_rows == measured["rows"]
        for name in ("tables", "row-wise Adagrad"):
            assert planned[name] == measured[name]
        # Adam also holds a step for each parameter, and stage 3 keeps small parameters whole: less
        # than 1 %.
        assert {name: planned[name] for name in RESIDENT} == pytest.approx(
            {name: measured[name] for name in RESIDENT}, rel=0.01
        )
        if fm.zero_stage < 3:  # stage 3 gathers the weights while it computes
            assert planned["activations"] == pytest.approx(measured["activations"], rel=0.1)
        if fm.zero_stage == 0 and fm.precision == "fp32" and world == 1:
            assert planned["gradients and reduce buffers"] == measured["gradients"]


TRILLION = Schema(
    features=tuple(SparseFeature(name=f"t{i}", rows=2_000_000_000) for i in range(8)),
    tasks=("click",),
)
DENSE = (9 * 64 * 1024 + 1024) + (1024 * 512 + 512) + (512 + 1)


def trillion(**settings: Any) -> Config:
    return Config(
        fm=FMConfig(
            model=MLPConfig(dim=64, mlp=(1024, 512)),
            **{"device": "cuda", "batch_size": 65_536, **settings},
        )
    )


def test_a_trillion_parameters_by_hand() -> None:
    """Wrong: a sum overflows, a worker's part has the wrong size, or a part is missing."""
    plan = plan_fm(trillion(workers=64), TRILLION)
    assert plan.parameters == 8 * 2_000_000_000 * 64 + 2 * 64 + DENSE
    assert plan.replica_bytes == 4 * plan.parameters
    part = 8 * 31_250_000
    assert plan.parts(1) == {
        "tables": (part + 1) * 64 * 4,  # row 1 of the domain's two rows
        "row-wise Adagrad": (part + 1) * 4,
        "dense weights": 4 * DENSE,
        "float32 masters": 0,
        "Adam": 8 * DENSE,
        "moving average": 0,
        "last use of rows": 0,
        "gradients and reduce buffers": 8 * DENSE,
        "gathered weights": 0,
        # inputs of the three products; a ReLU saves its result, which is the next one's input
        "activations": 4 * 1024 * (9 * 64 + 1024 + 512),
        "looked-up rows": 4 * 64 * (2 * 1024 * 9 + 65_536 * 9),
    }
    assert plan.resident_bytes_W[2] == part * 65 * 4 + 12 * DENSE
    assert plan.training_flops == 3 * 2 * (9 * 64 * 1024 + 1024 * 512 + 512)
    assert plan.examples_per_s(1000.0) == pytest.approx(64 * 1e15 * 0.3 / plan.training_flops)
    assert plan.violations(80 * 2**30) == []


@pytest.mark.parametrize(
    ("stage", "weights", "masters", "adam", "gradients"),
    [
        (0, 2 * DENSE, 4 * DENSE, 8 * DENSE, 6 * DENSE),
        (2, 2 * (DENSE + 15), (DENSE + 15) // 2, DENSE + 15, (DENSE + 15) // 4 + 2 * REDUCE_BUCKET),
    ],
)
def test_dense_state_by_hand(
    stage: int,
    weights: int,
    masters: int,
    adam: int,
    gradients: int,
) -> None:
    """Wrong: bf16 has no float32 masters, a stage divides what every worker holds whole, or the
    reduce bucket is missing."""
    assert DENSE % 16 == 1  # padded to a multiple of two numbers for each of 8 workers
    dense = plan_fm(trillion(workers=8, precision="bf16", zero_stage=stage), TRILLION).dense
    assert (dense.weights, dense.masters, dense.adam, dense.gradients) == (
        weights,
        masters,
        adam,
        gradients,
    )


def test_violations_name_what_does_not_fit() -> None:
    """Wrong: a plan that cannot run passes, or the user has to search for the table."""
    rows = plan_fm(trillion(workers=8), TRILLION).violations(80 * 2**30)
    assert rows[0].startswith("8 of 8 worker(s) need more than 80.0 GiB, worker 0 most: 48")
    assert rows[1:] == ["most of worker 0: tables, 476.8 GiB"]
    tables = plan_fm(trillion(workers=9, sharding="table_wise"), TRILLION).violations(80 * 2**30)
    assert tables[0].startswith("8 of 9 worker(s)")
    assert (
        tables[1]
        == "table 't0' (table_wise) alone takes 484.3 GiB of a worker, its Adagrad state included"
        and len(tables) == 1 + 8 + 1
    )
    (machine,) = plan_fm(trillion(workers=2, device="cpu"), TRILLION).violations(2**40)
    assert (
        machine.startswith("all 2 worker(s) together need 3,8")
        and "of the machine's 1,024.0 GiB; most of it: tables, 1,907.3 GiB" in machine
    )


def test_a_trillion_rows_are_planned_within_seconds() -> None:
    """Wrong: the plan allocates something of a table's size, or loops over its rows."""
    many = Schema(
        features=tuple(SparseFeature(name=f"t{i}", rows=2_147_483_647) for i in range(500)),
        tasks=("click",),
    )
    began = time.process_time()
    plan = plan_fm(
        Config(
            fm=FMConfig(
                model=WukongConfig(dim=128, l=8, n_F=64, n_L=64, k=64), workers=1024, device="cuda"
            )
        ),
        many,
    )
    assert plan.table_parameters > 130e12 and plan.violations(80 * 2**30)
    assert time.process_time() - began < 10


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(merged(SETTINGS, {"run": {"dir": str(tmp_path / "runs")}})))
    return path


def test_the_command_plans_from_a_config_alone(
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: a plan needs the data, writes something, loses an option, or ends with success
    although something does not fit."""
    command = [
        "plan",
        "--config",
        str(file),
        "--gpus",
        "3",
        "--tflops",
        "100",
        "--set",
        "fm.zero_stage=2",
    ]
    assert main(command) == 0 and "It fits into the 80.0 GiB of a GPU." in capsys.readouterr().out
    assert main([*command, "--gpu-gib", "1"]) == 2
    out = capsys.readouterr().out
    assert (
        "fm: 3 worker(s), cuda, ZeRO stage 2, fp32" in out
        and "row_wise" in out
        and "used to 30% (assumed)" in out
    )
    assert (
        "Does not fit: 3 of 3 worker(s) need more than 1.0 GiB" in out
        and "gradients and reduce buffers, 1.9 GiB" in out
    )
    assert list(tmp_path.iterdir()) == [file]


def test_a_table_source_is_planned_from_its_schema_file_alone(
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: trillions of rows must be on the disk before they can be planned, or the plan ignores
    `data.table_rows`."""
    declared = {
        "format": "csv",
        "files": "no.csv",
        "schema": {"features": [{"name": "user", "rows": 1_000}], "tasks": ["click"]},
    }
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(declared))
    table = [
        "data.source=table",
        f"data.schema_file={tmp_path / 'schema.yaml'}",
        "data.table_rows.user=1000000000",
        "vm.models=[]",
    ]
    arguments = [
        "plan",
        "--config",
        str(file),
        "--workers",
        "2",
        *(part for setting in table for part in ("--set", setting)),
    ]
    assert main(arguments) == 0
    assert "500,000,000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--set", "data.source=frappe", "--set", "data.root=/nowhere"],
            "or run `run.py prepare` with this config",
        ),
        (["--set", "fm.tasks=[clik]"], "setting 'fm.tasks': unknown task 'clik'"),
        (["--set", "fm.model.k=99"], "setting 'fm.model': model.k is 99"),
        (
            ["--set", "fm.model.dim=6"],
            "setting 'fm.model.dim' is 6: fbgemm's tables take multiples of 4; set it to 8",
        ),
        (
            ["--set", "vm.models=[{name: a, domain: nowhere, task: click}]"],
            "setting 'vm.models.0.domain': unknown domain 'nowhere'",
        ),
        (["--gpus", "0"], "setting 'fm.workers'"),
        (["--gpus", "2", "--workers", "2"], "not allowed with argument"),
    ],
)
def test_mistakes_are_reported(
    file: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: a mistake ends in a traceback or in a plan."""
    assert main(["plan", "--config", str(file), *arguments]) == 2
    assert message in capsys.readouterr().err
