"""KubeRay's resources: read by Ray's autoscaler, by Kubernetes' schemas, and field by field."""

from __future__ import annotations

import copy
import os
import shlex
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from archives import ROOT
from jsonschema import Draft7Validator
from pydantic import BaseModel, ConfigDict, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as autoscaling_config,
)
from ray.scripts.scripts import start as ray_start

from cuvis_dist.cli import _parser

FOLDER = ROOT / "cluster" / "kuberay"
#: The published CRDs of a KubeRay release (ray.io_rayclusters.yaml, ray.io_rayjobs.yaml).
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay"))


class Fields(BaseModel):
    """What the files use of ``ray.io/v1``, and nothing else; strings are strings there."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Auth(Fields):
    mode: Literal["token"]


class Autoscaler(Fields):
    idleTimeoutSeconds: int
    resources: dict[str, dict[str, str]]


class Head(Fields):
    serviceType: Literal["ClusterIP"]
    enableIngress: Literal[False]
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class Workers(Fields):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class ClusterSpec(Fields):
    rayVersion: str
    authOptions: Auth
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: Autoscaler
    headGroupSpec: Head
    workerGroupSpecs: list[Workers]


class JobSpec(Fields):
    entrypoint: str
    backoffLimit: int
    activeDeadlineSeconds: int
    shutdownAfterJobFinishes: Literal[True]
    ttlSecondsAfterFinished: int
    submissionMode: Literal["K8sJobMode"]
    submitterPodTemplate: dict[str, Any]
    rayClusterSpec: ClusterSpec


class Resource(Fields):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster", "RayJob"]
    metadata: dict[str, str]
    spec: ClusterSpec | JobSpec


def load(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture
def cluster():
    return load("raycluster.yaml")


@pytest.fixture
def job():
    return load("rayjob.yaml")


def templates(cluster, job) -> dict[str, dict]:
    """Return every pod template by what it is for."""
    spec = cluster["spec"]
    groups = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    submitter = job["spec"]["submitterPodTemplate"]
    return {"head": spec["headGroupSpec"]["template"], "submitter": submitter, **groups}


def test_fields(cluster, job):
    Resource.model_validate(cluster)
    Resource.model_validate(job)
    cluster["spec"]["authOption"] = cluster["spec"].pop("authOptions")
    with pytest.raises(ValidationError, match="authOption"):
        Resource.model_validate(cluster)


def test_the_job_has_the_same_cluster(cluster, job):
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_rays_autoscaler_reads_the_groups(cluster):
    cluster["metadata"]["namespace"] = "default"
    config = autoscaling_config(cluster)
    types = config["available_node_types"]
    assert set(types) == {"headgroup", "readers", "learners"}
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert "GPU" not in types["readers"]["resources"]
    assert types["learners"]["resources"]["GPU"] == 1
    for group in ("readers", "learners"):
        assert types[group]["min_workers"] == 0
        assert types[group]["max_workers"] > 0


def test_ray_start_takes_the_params(cluster):
    params = cluster["spec"]["headGroupSpec"]["rayStartParams"]
    options = ray_start.make_context(
        "start", ["--head", *(f"--{key}={value}" for key, value in params.items())]
    ).params
    assert options["num_cpus"] == 0


def test_the_entrypoint_is_a_command(job):
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "cuvis-dist"
    options = _parser().parse_args(arguments)
    assert options.trainrun.startswith("/results/")
    assert options.output_dir.startswith("/results/")


def test_kubernetes_schemas(cluster, job):
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="needs kubernetes-validate (extra dev)"
    )

    def validate(resource: dict) -> None:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)

    validate(load("network-policy.yaml"))
    for template in templates(cluster, job).values():
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        validate(pod)
        wrong = copy.deepcopy(pod)
        wrong["spec"]["containers"][0]["volumeMount"] = []
        with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
            validate(wrong)


def test_pods_are_unprivileged_known_to_the_policy_and_ask_for_the_token(cluster, job):
    policy = load("network-policy.yaml")["spec"]
    label = policy["podSelector"]["matchLabels"]
    assert policy["ingress"][0] == {"from": [{"podSelector": {"matchLabels": label}}]}
    (operator,) = policy["ingress"][1:]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    for name, template in templates(cluster, job).items():
        assert label.items() <= template["metadata"]["labels"].items()
        (container,) = template["spec"]["containers"]
        assert container["securityContext"]["runAsNonRoot"] is True, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        assert ports == ({"gcs-server": 6379, "dashboard": 8265} if name == "head" else {})


@pytest.mark.parametrize("kind", ["raycluster", "rayjob"])
@pytest.mark.skipif(not CRDS.is_dir(), reason=f"no KubeRay CRDs in {CRDS} (or KUBERAY_CRDS)")
def test_published_crds(kind):
    """Against a release's own schema, with fields that it does not know refused."""
    crd = yaml.load((CRDS / f"ray.io_{kind}s.yaml").read_text(), yaml.CSafeLoader)
    (schema,) = (
        v["schema"]["openAPIV3Schema"]
        for v in crd["spec"]["versions"]
        if v["served"] and v["name"] == "v1"
    )
    refuse_unknown(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    validator = Draft7Validator(schema)
    resource = load(f"{kind}.yaml")
    assert not [error.message for error in validator.iter_errors(resource)]
    resource["spec"]["shutdown"] = True
    assert list(validator.iter_errors(resource))


def refuse_unknown(schema: Any) -> None:
    """Make a CRD's schema as strict as `kubectl apply` is."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            refuse_unknown(value)
    elif isinstance(schema, list):
        for value in schema:
            refuse_unknown(value)
