"""The launcher's files fit Ray's schema, and the Kubernetes files fit KubeRay's fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from exfm_ray.config.root import Config

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
LAUNCHER = ["aws.yaml", "gcp.yaml"]
RAY = ["raycluster.yaml", "rayjob.yaml"]
TOKEN = "/home/ray/.ray/auth_token"


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def cluster_of(name: str) -> Any:
    """Return the RayCluster's spec in a Kubernetes file."""
    spec = read(name)["spec"]
    return spec["rayClusterSpec"] if name == "rayjob.yaml" else spec


def pods(name: str) -> Iterator[Any]:
    """Yield all pod templates of a Kubernetes file."""
    cluster = cluster_of(name)
    yield cluster["headGroupSpec"]["template"]
    yield from (group["template"] for group in cluster["workerGroupSpecs"])
    if name == "rayjob.yaml":
        yield read(name)["spec"]["submitterPodTemplate"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_files_fit_rays_schema(name: str) -> None:
    """Wrong: `ray up` refuses the file."""
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = read(name)
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    broken = config | {"max_worker": 1}
    with pytest.raises(jsonschema.ValidationError):  # the schema does refuse something
        jsonschema.validate(broken, schema)


@pytest.mark.parametrize("name", LAUNCHER)
def test_launched_clusters_require_the_token_and_show_no_dashboard(name: str) -> None:
    """Wrong: anyone who reaches the head can run code on it, or others on a machine can read the
    token."""
    config = read(name)
    assert config["file_mounts"] == {TOKEN: "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert commands[0] == "chmod 600 ~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "0.0.0.0" not in (CLUSTER / name).read_text()


@pytest.mark.parametrize("name", LAUNCHER)
def test_launched_clusters_have_bounds_a_shared_folder_and_a_gpu_group(name: str) -> None:
    """Wrong: the cluster grows without limit, its nodes do not see the run's folder, or the FM
    finds no GPU or not its group."""
    config = read(name)
    types = config["available_node_types"]
    workers = {key: value for key, value in types.items() if key != config["head_node_type"]}
    assert sum(value["max_workers"] for value in workers.values()) <= config["max_workers"]
    assert all(value["min_workers"] <= value["max_workers"] for value in workers.values())
    assert {name: type_["labels"] for name, type_ in workers.items()} == {
        name: {"exfm-group": name} for name in ("cpu", "fm")
    }
    assert (
        types["fm"]["resources"]["GPU"] == 1
        and "GPU" not in types["cpu"]["resources"]
        and types["head"]["resources"] == {"CPU": 0}
    )
    assert {"--env EXFM_HOME=/mnt/exfm", "--volume /mnt/exfm:/mnt/exfm"} <= set(
        config["docker"]["run_options"]
    )
    assert any(
        "mount -t nfs" in command and command.endswith(" /mnt/exfm")
        for command in config["initialization_commands"]
    )


@pytest.mark.parametrize("name", RAY)
def test_kubernetes_files_fit_kuberays_fields(name: str) -> None:
    """Wrong: KubeRay refuses the file, or silently drops a misspelled field."""
    schemas = yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text())
    document = read(name)
    assert document["apiVersion"] == "ray.io/v1"
    jsonschema.validate(document["spec"], schemas | schemas[document["kind"]])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            document["spec"] | {"rayversion": "2"}, schemas | schemas[document["kind"]]
        )


@pytest.mark.parametrize("name", RAY)
def test_kubernetes_clusters_require_the_token_and_open_no_port(name: str) -> None:
    """Wrong: a cluster has no authentication, a port that is open to the outside, or pods outside
    the NetworkPolicy."""
    cluster = cluster_of(name)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "exfm-ray-token"}
    assert (
        tuple(int(part) for part in cluster["rayVersion"].split(".")) >= (2, 52)
        and cluster["rayVersion"] == ray.__version__
    )
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    text = (CLUSTER / name).read_text()
    assert not re.search(
        r"hostPort|hostNetwork|NodePort|LoadBalancer|[iI]ngress|RAY_AUTH_TOKEN|privileged: true",
        text,
    )
    policy, volume_claim = yaml.safe_load_all((CLUSTER / "base.yaml").read_text())
    label = policy["spec"]["podSelector"]["matchLabels"]
    assert policy["spec"]["policyTypes"] == ["Ingress"] and label
    members, operator = policy["spec"]["ingress"]
    assert members == {"from": [{"podSelector": {"matchLabels": label}}]}
    assert (
        operator["ports"] == [{"protocol": "TCP", "port": 8265}]
        and {"namespaceSelector", "podSelector"} == operator["from"][0].keys()
    )
    for pod in pods(name):
        assert label.items() <= pod["metadata"]["labels"].items()
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert all(
            container["securityContext"]["allowPrivilegeEscalation"] is False
            for container in pod["spec"]["containers"]
        )
        for volume in pod["spec"].get("volumes", []):
            assert volume["persistentVolumeClaim"]["claimName"] == volume_claim["metadata"]["name"]
    assert volume_claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("name", RAY)
def test_kubernetes_clusters_have_bounds_resources_and_a_gpu_group(name: str) -> None:
    """Wrong: the cluster grows without limit, a pod's Ray counts more than its limits, or the FM
    finds no GPU."""
    cluster = cluster_of(name)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2", "the first version ignores labels"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "fm"}
    for group in groups.values():
        assert group["labels"] == {"exfm-group": group["groupName"]}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] <= 10
    for pod in pods(name):
        (container,) = pod["spec"]["containers"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container[
            "resources"
        ]["requests"].keys()
        gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"] == f"FILL_IN_REGISTRY/exfm-ray:{'cuda' if gpu else 'cpu'}"
        mounted = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        assert mounted == ([] if container["name"] == "ray-job-submitter" else ["/mnt/exfm"])
    assert (
        groups["fm"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        == "1"
    )
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_the_image_has_all_code_and_no_root() -> None:
    """Wrong: a package is missing in the image, a virtual environment is sent to docker, or the
    image runs as root or without authentication."""
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    packages -= {"benchmarks", "studies"}
    assert copied == packages | {"configs", "pyproject.toml", "README.md", "run.py"}
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*" and {line[1:] for line in ignored if line.startswith("!")} == copied
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER 1000"] and any(
        "RAY_AUTH_MODE=token EXFM_HOME=/mnt/exfm" in line for line in lines
    )
    assert "ARG EXTRA=cpu" in lines and "FROM python:3.11-slim-bookworm" in lines


def test_placeholders_are_no_valid_names() -> None:
    """Wrong: a placeholder that was not replaced is a valid name."""
    for name in [*LAUNCHER, *RAY, "base.yaml"]:
        text = (CLUSTER / name).read_text()
        assert (
            "FILL_IN_" in text
            and "TODO" not in text
            and not re.search(r"<[a-z-]+>|ami-|example\.com", text)
        )


def test_the_docs_place_roles_on_existing_groups() -> None:
    """Wrong: a run with the placement in docs/cluster.md waits for a label that no group has."""
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    settings = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    placement = Config.model_validate(settings).placement
    groups = [{"exfm-group": name} for name in ("cpu", "fm")]
    assert {role: groups.index(labels) for role, labels in placement} == {
        "fm": 1,
        "vm": 0,
        "das": 0,
        "data": 0,
    }
