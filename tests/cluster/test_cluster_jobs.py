"""`run.py submit` against a real head with a token.

The tests cover exit codes, resuming, stopping, and which ports listen where.
"""

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

pytestmark = pytest.mark.heavy

SUBMIT_S = 180
ATTEMPTS = 3
READ_KEYS = """
from ray._raylet import GcsClient
client = GcsClient(address='127.0.0.1:{}')
print('read', client.internal_kv_keys(b'', None, 5))
"""
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
    """A head with 3 logical CPUs, labeled for the DAS."""
    head = Head(cpus=3, labels="exfm-group=das")
    yield head
    head.stop()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a submission; return its exit code, stdout and stderr."""
    out, errors = process.communicate(timeout=SUBMIT_S)
    return process.returncode, out, errors


def until_logged(process: subprocess.Popen[str], text: str) -> None:
    """Read a submission's stdout up to a line that contains `text`."""
    assert process.stdout is not None
    assert any(text in line for line in process.stdout), f"never printed: {text}"


def where(head: Head, labels: dict[str, str]) -> dict[str, set[str]]:
    """Return the labels of the nodes on which each kind of actor and task ran.

    Args:
        labels: label of each node, by the node's id.
    """
    ran = [(actor["class_name"], actor["node_id"]) for actor in head.list_all("actors")]
    ran += [(task["name"], task["node_id"]) for task in head.list_all("tasks")]
    roles = ("RayTrainWorker", "Scorer", "Feed", "ReadFragments")
    return {role: {labels[node] for name, node in ran if name == role} for role in roles}


@pytest.fixture(scope="module")
def undisturbed(head: Head) -> Path:
    """The folder of a run on three nodes, each with its own roles."""
    labels = dict.fromkeys(head.alive(), "das")
    nodes = []
    for label in ("fm", "vm"):
        nodes.append(head.join(2, f"exfm-group={label}"))
        labels |= dict.fromkeys(head.alive() - labels.keys(), label)
    assert len(labels) == 3
    code, out, errors = ended(
        head.submit(
            "--id", "tiny", "--", *PIPELINE, "--name", "tiny", "--set", f"placement={PLACEMENT}"
        )
    )
    assert code == 0, out + errors
    run = head.home / "runs" / "tiny"
    assert "setting 'placement" not in out and f"this run: {run}" in out and "NE gain" in out
    assert where(head, labels) == {
        "RayTrainWorker": {"fm", "vm"},
        "Scorer": {"das"},
        "Feed": {"fm"},
        "ReadFragments": {"fm"},
    }
    for node in nodes:
        head.kill(node)
    return run


def test_a_pipeline_ends_with_its_figures(undisturbed: Path) -> None:
    """Wrong: figures of a run on a cluster are missing, its folder is lost with the job, or a role
    runs on other nodes than the setting `placement` names."""
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
    """The rows of a run's metrics without its speed, sorted."""
    rows = read_metrics(run / "metrics.jsonl")
    for row in rows:
        row.pop("examples_per_s", None)
    return sorted(rows, key=lambda row: str(sorted(row.items())))


def test_a_run_survives_the_loss_of_a_node(head: Head, undisturbed: Path) -> None:
    """Wrong: after a node was replaced by another one, a run on two nodes hangs, cannot be resumed,
    or has other figures; or Ray's own client, which uploads the whole working folder, cannot send
    it."""
    command = [*PIPELINE, "--name", "lost"]
    node = head.join(cpus=3)  # the run asks for 5 CPUs, more than the head has
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
    """Wrong: a failed job looks like a success, its error is not printed, or a user's config is not
    uploaded."""
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
    messages = [line for line in process.stdout.splitlines() if "error:" in line]
    assert messages == [
        "error: own.yaml: unknown setting 'fm.batchsize'. Did you mean 'batch_size'?"
    ]
    assert "Traceback" not in process.stdout


def waiting(name: str) -> list[str]:
    """The command of a run whose FM waits for ever, for a node that never comes."""
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
    """Wrong: Ctrl-C ends the job, or does not print how to stop it; a run waits for a node without
    naming it; two jobs write one run; --stop leaves a job running; an id cannot be used a second
    time; a stopped job ends with 0."""
    first = head.submit("--id", "waiting", "--", *waiting("waiting"))
    until_logged(
        first,
        "setting 'placement.fm': no node has exfm-group=nowhere, 1 CPU is asked for; "
        "what is to run there waits until ",
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
        "job waiting continues; `ray job logs --follow waiting` follows it, "
        "`run.py submit --stop waiting` stops it\n" in errors
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
    """Wrong: anyone who reaches a port can run code on the cluster."""
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
    intruder = subprocess.run(
        [sys.executable, "-c", READ_KEYS.format(head.port)],
        env=head.environment | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
    )
    assert intruder.returncode != 0, intruder.stdout
    assert "uthent" in intruder.stderr and "read" not in intruder.stdout, intruder.stderr


def test_only_loopback_leads_to_the_job_server(head: Head) -> None:
    """Wrong: the job server can be reached from other machines, or another port of Ray accepts jobs
    without the token."""
    listening = []
    for process in head.processes():
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                listening.append((connection.laddr.ip, connection.laddr.port))
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
    for arguments, message in [
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
            f"error: {message}"
        ), (arguments, errors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "pipelin"], "unknown command 'pipelin'"),
        (["--", "submit", "--stop", "x"], "submit cannot submit itself"),
        ([], "submit takes a command of run.py after --, or --stop NAME"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong: a word that is not a command is sent to a cluster."""
    assert main(["submit", "--address", "http://127.0.0.1:1", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


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
