"""Manifests: valid against their schemas, and every command, flag, port and label that they name is splitserve's."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from splitserve.cli.main import app
from splitserve.core.config import ClusterConfig, load_config
from splitserve.planner.traces import data_directory

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
GROUP = typer.main.get_command(app)
CRD = data_directory() / "kuberay" / "crd_rayclusters.yaml"
ROLES = ("prefill", "decode")


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def split_words(command: str) -> list[str]:
    """Words of a composed command, in which compose fills ${MODEL:?...} in first."""
    return shlex.split(re.sub(r"\$\{MODEL:[-?][^}]*\}", "smollm2-135m", command))


def check_command(words: list[str]) -> dict[str, str]:
    """The command and its flags exist; the flags' values."""
    assert words[0] == "splitserve"
    name, *rest = [word for word in words[1:] if word != "-v"]
    _, command, _ = GROUP.resolve_command(typer.Context(GROUP), [name, *rest])
    options = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    flags = {word for word in rest if word.startswith("--")}
    assert flags <= options, f"{name} has no {flags - options}"
    # Parse them too: a value of the wrong kind is an error.
    files = {index for index, word in enumerate(rest) if "--config" in (word, rest[index - 1])}
    command.make_context(name, [word for index, word in enumerate(rest) if index not in files])
    return dict(zip(rest[::2], rest[1::2], strict=False))


# --- ray up, and by hand ---


def test_ray_up_accepts_the_aws_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (document,) = documents(DEPLOY / "ray" / "aws.yaml")
    validate_config(prepare_config(document))
    kinds = document["available_node_types"]
    labels = {name: kind["labels"]["splitserve/role"] for name, kind in kinds.items()}
    assert labels == {"head": "head", "prefill": "prefill", "decode": "decode"}
    assert document["max_workers"] == sum(kinds[role]["max_workers"] for role in ROLES)
    del document["provider"]["type"]
    with pytest.raises(jsonschema.ValidationError):  # the check can fail
        validate_config(document)


def check_pools_fit(config: ClusterConfig, labels_of: dict[str, dict[str, str]], gpus_of: dict[str, int]) -> None:
    """Each pool asks for labels that one group of nodes has, and for no more GPUs than the group can have."""
    for role in ROLES:
        pool = config.pool(role)  # type: ignore[arg-type]
        groups = [name for name, labels in labels_of.items() if pool.labels.items() <= labels.items()]
        assert groups == [role]
        least, most = config.bounds(role)  # type: ignore[arg-type]
        assert 0 < least * pool.gpus <= most * pool.gpus == gpus_of[role]


def test_the_cluster_file_asks_for_nodes_that_the_aws_cluster_has() -> None:
    (document,) = documents(DEPLOY / "ray" / "aws.yaml")
    kinds = document["available_node_types"]
    check_pools_fit(
        load_config(DEPLOY / "ray" / "cluster.yaml", {}),
        {name: kind["labels"] for name, kind in kinds.items()},
        {name: kind["resources"].get("GPU", 0) * kind["max_workers"] for name, kind in kinds.items()},
    )


@pytest.mark.parametrize("script", ["start.sh", "on_premise.sh"])
def test_shell_scripts_run_commands_that_exist(script: str) -> None:
    path = DEPLOY / "ray" / script
    assert path.stat().st_mode & 0o111
    commands = re.findall(r"splitserve up .*", path.read_text())
    assert commands
    for command in commands:
        check_command(
            shlex.split(command.replace("${1:-/etc/splitserve/cluster.yaml}", "/etc/splitserve/cluster.yaml"))
        )


def test_by_hand_the_labels_are_those_that_the_cluster_file_asks_for() -> None:
    text = (DEPLOY / "ray" / "on_premise.sh").read_text()
    assert 'labels="splitserve/role=$role"' in text
    spec = importlib.util.find_spec("ray.scripts.scripts")  # read, not imported: that would import all of Ray Serve
    assert spec is not None
    assert spec.origin is not None
    known = set(re.findall(r'"(--[a-z-]+)"', Path(spec.origin).read_text()))
    for line in re.findall(r"ray start (.*)", text):
        assert {word.split("=")[0] for word in re.findall(r"--[a-z-]+", line)} <= known
    config = load_config(DEPLOY / "ray" / "cluster.yaml", {})
    assert [dict(config.pool(role).labels) for role in ROLES] == [{"splitserve/role": role} for role in ROLES]


def test_every_node_has_the_token_that_ray_asks_for() -> None:
    script = (DEPLOY / "ray" / "on_premise.sh").read_text()
    assert script.index("ray get-auth-token --generate") < script.index("exec ray start --head")
    (document,) = documents(DEPLOY / "ray" / "aws.yaml")
    assert document["file_mounts"]["/home/splitserve/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_MODE=token" in (DEPLOY / "ray" / "start.sh").read_text()


# --- KubeRay ---


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI schema of Kubernetes as JSON Schema that refuses unknown fields."""
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            out[key] = {name: strict(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            out[key] = strict(value)
        elif key in ("anyOf", "allOf", "oneOf"):
            out[key] = [strict(inner) for inner in value]
        elif not key.startswith("x-") and key not in ("format", "default"):
            out[key] = value
    if "properties" in out and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


@pytest.fixture(scope="module")
def ray_cluster_schema() -> dict[str, Any]:
    if not CRD.exists():
        pytest.skip(f"{CRD} is absent; set SPLITSERVE_DATA to a directory with kuberay/crd_rayclusters.yaml")
    definition = yaml.load(CRD.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return strict(version["schema"]["openAPIV3Schema"])


def kuberay(kind: str) -> dict[str, Any]:
    files = (DEPLOY / "kuberay" / "cluster.yaml", DEPLOY / "kuberay" / "job.yaml")
    (found,) = [document for path in files for document in documents(path) if document["kind"] == kind]
    return found


def test_the_ray_cluster_fits_the_schema_and_a_typo_does_not(ray_cluster_schema: dict[str, Any]) -> None:
    cluster = kuberay("RayCluster")
    validator = jsonschema.Draft202012Validator(ray_cluster_schema)
    assert [error.message for error in validator.iter_errors(cluster)] == []
    cluster["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    (error,) = validator.iter_errors(cluster)
    assert "minReplica" in error.message


def test_the_autoscaler_sees_two_groups_of_gpu_nodes() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = kuberay("RayCluster")
    cluster["metadata"]["namespace"] = "default"
    seen = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    gpus = {name: kind["resources"].get("GPU", 0) * kind["max_workers"] for name, kind in seen.items()}
    assert gpus == {"headgroup": 0, "prefill": 64, "decode": 32}
    groups = cluster["spec"]["workerGroupSpecs"]
    config = yaml.safe_load(kuberay("ConfigMap")["data"]["cluster.yaml"])
    check_pools_fit(
        ClusterConfig.model_validate(config), {group["groupName"]: group["labels"] for group in groups}, gpus
    )


def test_the_job_runs_on_that_cluster_with_its_configuration() -> None:
    job, cluster = kuberay("RayJob"), kuberay("RayCluster")
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    assert not job["spec"].get("backoffLimit")  # KubeRay refuses retries of a job on a cluster that was selected
    words = shlex.split(job["spec"]["entrypoint"])
    check_command(words)
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = head["containers"][0]["volumeMounts"]
    assert words[-1] == f"{mount['mountPath']}/cluster.yaml"
    config = ClusterConfig.model_validate(yaml.safe_load(kuberay("ConfigMap")["data"]["cluster.yaml"]))
    ports = {port["name"]: port["containerPort"] for port in head["containers"][0]["ports"]}
    assert (ports["grpc"], ports["http"]) == (config.router.port, config.router.http_port_of(0))
    assert config.ray.address == f"{cluster['metadata']['name']}-head-svc:{ports['gcs-server']}"


# --- containers ---


def test_the_images_install_extras_that_exist_and_run_commands_that_exist() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"/src\[([\w,]+)\]", text):
        assert set(names.split(",")) <= set(extras)
    for words in re.findall(r"^CMD \[(.*)\]$", text, re.M):
        check_command([word.strip(' "') for word in words.split(",")])
    (pinned,) = re.findall(r'whl/cpu "torch==\$\((sed .*) /src/constraints\.txt\)"', text)
    constraints = ROOT / "constraints.txt"
    found = subprocess.run([*shlex.split(pinned), str(constraints)], capture_output=True, text=True, check=True).stdout
    assert f"torch=={found}" in constraints.read_text().splitlines(keepends=True)
    assert re.findall(r"^FROM \S+ AS (\w+)$", text, re.M) == ["base", "cpu", "cuda"]
    config = ClusterConfig()
    assert f"EXPOSE {config.router.port} {config.router.http_port_of(0)} 9090" in text


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_composed_services_find_each_other(name: str) -> None:
    """Each worker listens where the router looks for it, and Prometheus where they serve metrics."""
    (plain,) = documents(DEPLOY / "docker" / "compose.yaml")
    (over,) = documents(DEPLOY / "docker" / name)
    services = {
        service: {**plain["services"][service], **over["services"].get(service, {})}
        for service in ("router", "prefill", "decode")
    }
    flags = {service: check_command(split_words(row["command"])) for service, row in services.items()}
    for role in ROLES:
        assert flags["router"][f"--{role}"] == f"{flags[role]['--host']}:{flags[role]['--port']}"
    assert all(row["--host"] == plain["services"][service]["hostname"] for service, row in flags.items())
    inner = {port.rpartition(":")[2] for port in plain["services"]["router"]["ports"]}
    assert inner == {flags["router"]["--port"], flags["router"]["--http-port"]}
    (prometheus,) = documents(DEPLOY / "monitoring" / "prometheus.yml")
    targets = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert set(targets) == {f"{row['--host']}:{row['--metrics-port']}" for row in flags.values()}
    targets = {row["build"]["target"] for row in services.values()}
    assert targets <= set(re.findall(r"AS (\w+)$", (DEPLOY / "docker" / "Dockerfile").read_text(), re.M))


def test_the_images_user_may_write_where_models_are_kept() -> None:
    """A volume is root's unless the image has its directory, or Kubernetes gives it to the user's group."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    (user_id,) = re.findall(r"useradd .*--uid (\d+) splitserve", text)
    (compose,) = documents(DEPLOY / "docker" / "compose.yaml")
    (mount,) = compose["x-worker"]["volumes"]
    assert f"install -d -o splitserve -g splitserve {mount.split(':')[1]}\n" in text
    for group in kuberay("RayCluster")["spec"]["workerGroupSpecs"]:
        assert group["template"]["spec"]["securityContext"]["fsGroup"] == int(user_id)


def test_mounted_files_exist() -> None:
    (compose,) = documents(DEPLOY / "docker" / "compose.yaml")
    mounts = [mount for service in compose["services"].values() for mount in service.get("volumes", [])]
    sources = [mount.split(":")[0] for mount in mounts]
    missing = [s for s in sources if s not in compose["volumes"] and not (DEPLOY / "docker" / s).exists()]
    assert missing == []
