"""`run.py submit` against a real head with a token: exit codes, resuming, stopping, what listens
where."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
from ray.job_submission import JobStatus
from ray_head import REPOSITORY, WANDB_KEY, Head

from cluster.jobs import exit_code
from exfm_ray.cli.main import main
from exfm_ray.storage.atomic import read_json
from exfm_ray.tracking.recorder import read_metrics

SUBMIT_S = 180
ATTEMPTS = 3
KEYS = "from ray._raylet import GcsClient; print('read', GcsClient(address='127.0.0.1:{}').internal_kv_keys(b'', None, 5))"
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
TINY = [
    "data.synthetic={windows: 3, events_per_window: 600, users: 150, ads: 80, advertisers: 10}",
    "fm.model={type: wukong, dim: 4, l: 1, n_F: 2, n_L: 2, k: 2, fmb_mlp: [8], mlp: [8]}",
    "vm.models=[{name: feed, domain: feed, task: click, model: {type: mlp, dim: 4, mlp: [8]}}]",
    "vm.arms=[labels, ah_sa]",
    "fm.threads=1",
    "vm.threads=1",
    "das.threads=1",
    "wandb.mode=disabled",
]
PLACEMENT = (
    "{fm: {exfm-group: fm}, vm: {exfm-group: vm}, das: {exfm-group: das}, data: {exfm-group: fm}}"
)
PIPELINE = ["pipeline", "--config", "configs/demo.yaml", *(f"--set={setting}" for setting in TINY)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with 3 logical CPUs, labelled for the DAS."""
    head = Head(cpus=3, labels="exfm-group=das")
    yield head
    head.stop()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a submission."""
    out, errors = process.communicate(timeout=SUBMIT_S)
    return process.returncode, out, errors


def until_logged(process: subprocess.Popen[str], text: str) -> None:
    """Read a submission's stdout up to a line with `text`."""
    assert process.stdout is not None
    assert any(text in line for line in process.stdout), f"never printed: {text}"


def where(head: Head, labels: dict[str, str]) -> dict[str, set[str]]:
    """Labels (by the nodes' ids) of the nodes on which the workers of both jobs, the DAS, the feeds
    and Ray Data's read tasks ran."""
    ran = [(actor["class_name"], actor["node_id"]) for actor in head.told("actors")]
    ran += [(task["name"], task["node_id"]) for task in head.told("tasks")]
    roles = ("RayTrainWorker", "Scorer", "Feed", "ReadFragments")
    return {role: {labels[node] for name, node in ran if name == role} for role in roles}


@pytest.fixture(scope="module")
def undisturbed(head: Head) -> Path:
    """The folder of a run by three nodes, each with roles of its own."""
    found = dict.fromkeys(head.alive(), "das")
    nodes = []
    for label in ("fm", "vm"):
        nodes.append(head.join(2, f"exfm-group={label}"))
        found |= dict.fromkeys(head.alive() - found.keys(), label)
    assert len(found) == 3
    code, out, errors = ended(
        head.submit(
            "--id", "tiny", "--", *PIPELINE, "--name", "tiny", "--set", f"placement={PLACEMENT}"
        )
    )
    assert code == 0, out + errors
    run = head.home / "runs" / "tiny"
    assert "setting 'placement" not in out and f"this run: {run}" in out and "NE gain" in out
    assert where(head, found) == {
        "RayTrainWorker": {"fm", "vm"},
        "Scorer": {"das"},
        "Feed": {"fm"},
        "ReadFragments": {"fm"},
    }
    for node in nodes:
        head.kill(node)
    return run


def test_a_pipeline_ends_with_its_figures(undisturbed: Path) -> None:
    """Wrong: a cluster's run lacks figures, its folder is lost with the job, or a role runs on
    other nodes than the setting `placement` says."""
    summary = read_json(undisturbed / "summary.json")
    assert {(row["model"], row["arm"]) for row in summary["figures"]} == {
        ("fm", "fm"),
        ("feed", "labels"),
        ("feed", "ah_sa"),
    }
    assert summary["roles"]["fm"]["examples"] == 3 * 600
    assert (undisturbed / "report.html").stat().st_size > 1000


def test_no_file_of_a_run_holds_a_secret(head: Head, undisturbed: Path) -> None:
    """Wrong: wandb's key, which every process of the run has in its environment, or Ray's token
    reaches a log, the config, the report or a model of any role."""
    secrets = (WANDB_KEY.encode(), head.token.read_bytes())
    assert head.processes()[0].environ()["WANDB_API_KEY"] == WANDB_KEY
    files = {path for path in undisturbed.rglob("*") if path.is_file()}
    for expected in (
        "config.yaml",
        "report.html",
        "logs/driver.log",
        "logs/fm.rank0.log",
        "logs/vm.rank0.log",
    ):
        assert undisturbed / expected in files, expected
    for path in files:
        data = path.read_bytes()
        assert not any(secret in data for secret in secrets), path


def rows(run: Path) -> list[dict[str, object]]:
    """The run's rows without its speed, in one order."""
    found = [
        {key: value for key, value in row.items() if key != "examples_per_s"}
        for row in read_metrics(run / "metrics.jsonl")
    ]
    return sorted(found, key=lambda row: str(sorted(row.items())))


def test_a_run_survives_the_loss_of_a_node(head: Head, undisturbed: Path) -> None:
    """Wrong: after a node's death, with another in its place, a run on two nodes hangs, cannot go
    on, or has other figures; or Ray's own client, which uploads the working folder as it stands,
    cannot send it."""
    command = [*PIPELINE, "--name", "lost"]
    node = head.join(cpus=3)  # the run asks for 5 CPUs: the head alone does not do
    first = head.submit("--id", "lost", "--", *command)
    figures = head.home / "runs" / "lost" / "metrics.jsonl"
    while not (figures.exists() and figures.read_text()):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    head.kill(node)
    head.join(cpus=3)
    code, out, errors = ended(first)
    for _ in range(ATTEMPTS if code else 0):
        again = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "job",
            "submit",
            "--address",
            head.url,
            "--working-dir",
            ".",
            "--",
            "python",
            "run.py",
        ]
        process = subprocess.run(
            [*again, *command],
            cwd=REPOSITORY,
            env=head.environment,
            capture_output=True,
            text=True,
            timeout=SUBMIT_S,
        )
        code = process.returncode
        out = process.stdout
        errors = process.stderr
        if code == 0:
            break
    assert code == 0, out + errors
    assert rows(figures.parent) == rows(undisturbed)
    parts = [read_json(run / "summary.json")["figures"] for run in (figures.parent, undisturbed)]
    assert sorted(map(str, parts[0])) == sorted(map(str, parts[1]))


def test_a_mistake_in_the_config_is_one_line_and_exit_code_2(head: Head, tmp_path: Path) -> None:
    """Wrong: a failed job ends as if it had succeeded, or its error is not told; or a config of the
    user's own does not go up."""
    own = tmp_path / "own.yaml"
    own.write_text("fm: {batchsize: 3}\n")
    command = ["submit", "--address", head.url, "--", "pipeline", "--config", "own.yaml"]
    process = subprocess.run(
        [sys.executable, str(REPOSITORY / "run.py"), *command],
        cwd=tmp_path,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=SUBMIT_S,
    )
    assert process.returncode == 2, process.stdout + process.stderr
    told = [line for line in process.stdout.splitlines() if "error:" in line]
    assert told == ["error: own.yaml: unknown setting 'fm.batchsize'. Did you mean 'batch_size'?"]
    assert "Traceback" not in process.stdout


def waiting(name: str) -> list[str]:
    """A run whose FM asks for a node that never comes, and so waits for ever."""
    settings = [
        "data.synthetic={windows: 2, events_per_window: 600, users: 150, ads: 80, advertisers: 10}",
        "placement.fm={exfm-group: nowhere}",
    ]
    return [
        "train-fm",
        "--config",
        "configs/demo.yaml",
        "--name",
        name,
        *(f"--set={setting}" for setting in settings),
    ]


@pytest.mark.slow
def test_a_job_is_left_refused_stopped_and_resubmitted(head: Head) -> None:
    """Wrong: Ctrl-C ends the job, or does not say how to stop it; a run waits for a node without
    saying which; two jobs write one run; --stop leaves a job running; an id cannot be used again; a
    stopped job ends with 0."""
    first = head.submit("--id", "waiting", "--", *waiting("waiting"))
    until_logged(
        first,
        "setting 'placement.fm': no node has exfm-group=nowhere, 1 CPU is asked for; what is to run there waits until ",
    )
    code, out, errors = ended(head.submit("--id", "waiting", "--", *waiting("waiting")))
    assert (
        code == 2
        and out == ""
        and errors.startswith("error: job 'waiting' is running: ")
        and "run.py submit --stop waiting" in errors
    )

    first.send_signal(signal.SIGINT)
    code, out, errors = ended(first)
    assert code == 130, out + errors
    assert (
        "job waiting goes on; `ray job logs --follow waiting` follows it, `run.py submit --stop waiting` stops it\n"
        in errors
    )
    assert head.get("/api/jobs/waiting", head.token.read_text()).json()["status"] == "RUNNING"
    assert ended(head.submit("--stop", "waiting")) == (0, "job waiting: stopped\n", "")

    second = head.submit("--id", "waiting", "--", *waiting("waiting"))
    until_logged(second, "relative folders lie below")
    assert ended(head.submit("--stop", "waiting")) == (0, "job waiting.2: stopped\n", "")
    code, out, errors = ended(second)
    assert code == 130 and "job waiting.2: " in errors and "Running entrypoint" not in out, (
        "an attempt has a log of its own"
    )
    drivers = [
        process
        for process in head.processes()
        if process.is_running() and "train-fm" in process.cmdline()
    ]
    assert not drivers


def test_nobody_gets_in_without_the_token(head: Head) -> None:
    """Wrong: whoever reaches a port runs code on the cluster."""
    assert head.token.stat().st_mode & 0o777 == 0o600
    assert head.get("/api/jobs/", head.token.read_text()).status_code == 200
    assert head.get("/api/jobs/").status_code == 401
    assert head.get("/api/jobs/", "0" * 64).status_code == 403
    code, out, errors = ended(head.submit("--stop", "x", RAY_AUTH_MODE="disabled"))
    assert (
        code == 2
        and out == ""
        and errors.startswith(
            f"error: {head.url} refuses the token, or got none: set RAY_AUTH_MODE=token"
        )
    )
    assert errors.count("\n") == 1
    spied = subprocess.run(
        [sys.executable, "-c", KEYS.format(head.port)],
        env=head.environment | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
    )
    assert spied.returncode != 0 and "uthent" in spied.stderr and "read" not in spied.stdout, (
        spied.stderr
    )


def test_only_loopback_leads_to_the_job_server(head: Head) -> None:
    """Wrong: the job server listens beyond this machine, or another of Ray's ports takes jobs
    without the token."""
    listening = [
        (place.laddr.ip, place.laddr.port)
        for process in head.processes()
        for place in process.net_connections("tcp")
        if place.status == psutil.CONN_LISTEN
    ]
    assert {ip for ip, port in listening if port == head.dashboard_port} == {"127.0.0.1"}
    beyond = {port: ip for ip, port in listening if ip not in LOOPBACK}
    assert beyond, "Ray's own ports were not found"
    for port, ip in beyond.items():
        host = "127.0.0.1" if ip in ("0.0.0.0", "::") else ip.removeprefix("::ffff:")
        for path in ("/api/jobs/", "/api/job_agent/jobs/"):
            try:
                answer = requests.post(
                    f"http://{host}:{port}{path}", json={"entrypoint": "true"}, timeout=3
                )
            except requests.RequestException:
                continue  # gRPC, not HTTP
            assert answer.status_code in (401, 403, 404, 405), (port, path, answer.status_code)


def test_mistakes_before_anything_is_sent(head: Head) -> None:
    """Wrong: a mistake is found only by the cluster, or a wrong address ends in a traceback."""
    for arguments, told in [
        (["--id", "a/b", "--", *PIPELINE], "--id a/b: letters, digits"),
        (
            ["--", "pipeline", "--config", "../x.yaml"],
            "--config ../x.yaml: only a file below the working folder",
        ),
        (["--", "pipeline", "--config", "none.yaml"], "none.yaml: no such config file here"),
        (["--stop", "nobody"], "the cluster knows no job 'nobody'"),
        (
            ["--address", "http://127.0.0.1:1", "--stop", "x"],
            "no Ray job server answers at http://127.0.0.1:1",
        ),
    ]:
        code, out, errors = ended(head.submit(*arguments))
        assert (code, out, errors.count("\n")) == (2, "", 1) and errors.startswith(
            f"error: {told}"
        ), (arguments, errors)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--", "pipelin"], "unknown command 'pipelin'"),
        (["--", "submit", "--stop", "x"], "submit cannot submit itself"),
        ([], "submit takes a command of run.py after --, or --stop NAME"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: what is no command goes to a cluster."""
    assert main(["submit", "--address", "http://127.0.0.1:1", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("STOPPED", None, 130),
        ("FAILED", 2, 2),
        ("FAILED", None, 1),
        ("FAILED", -9, 137),
    ],
)
def test_exit_codes(
    status: str,
    driver: int | None,
    code: int,
) -> None:
    """Wrong: a job that was stopped, killed or never started looks like a success (Ray's own client
    says 0 for a stopped one)."""
    assert exit_code(SimpleNamespace(status=JobStatus(status), driver_exit_code=driver)) == code
