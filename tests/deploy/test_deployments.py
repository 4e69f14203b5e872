"""Container and cluster files name what exists: flags, commands, files, the line of vLLM.

Images are not built here, nor is anything deployed. ``kubernetes-validate`` checks the
manifests against Kubernetes' own schemas, and ``hadolint`` the images, where they are installed.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from environments.lines import pick_line, read_lines
from sink_vllm.tools import main as command
from tests.support.paths import ROOT

KUBERNETES = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
DOCKER = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
FIRST = pick_line(read_lines(), None)


def manifests() -> list[dict[str, Any]]:
    return [one for file in KUBERNETES for one in yaml.safe_load_all(file.read_text())]


def container() -> dict[str, Any]:
    (deployment,) = (one for one in manifests() if one["kind"] == "Deployment")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = server
    return found


@pytest.mark.skipif(
    find_spec("kubernetes_validate") is None, reason="kubernetes-validate is not installed"
)
@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
def test_manifests_fit_the_schemas_of_kubernetes(file: Any) -> None:
    import kubernetes_validate

    for manifest in yaml.safe_load_all(file.read_text()):
        if manifest["apiVersion"].split("/")[0] != "monitoring.coreos.com":  # not in the schemas
            newest = kubernetes_validate.latest_version()
            kubernetes_validate.validate(manifest, newest, strict=True)


def test_what_belongs_together_has_one_name() -> None:
    labels = {"app.kubernetes.io/name": "sink-vllm"}
    by_kind = {one["kind"]: one for one in manifests()}

    assert by_kind.keys() == {"Deployment", "Service", "Ingress", "PodMonitor"}
    assert by_kind["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"] == labels
    assert by_kind["Service"]["spec"]["selector"] == labels
    assert by_kind["PodMonitor"]["spec"]["selector"]["matchLabels"] == labels
    (port,) = container()["ports"]
    assert by_kind["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"] == port["name"]
    assert by_kind["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]


def parsed(flags: list[str]) -> EngineArgs:
    """The engine of ``vllm serve`` with ``flags``; what the command does not know ends the test."""
    load_general_plugins()
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    given = parser.parse_args(["serve", *flags])
    given.model = str(ROOT / "examples" / "models" / "pystream-2.5m")  # one that is here
    return EngineArgs.from_cli_args(given)


def probe_answers(command_line: list[str]) -> None:
    """The command says no where no server is, and not because it does not know its words."""
    name, *words = command_line
    assert name == "sink-vllm"
    assert command.main([*words, "--url", "http://localhost:9"]) == 1


def test_vllm_knows_the_flags() -> None:
    """Also that there is time to drain before Kubernetes kills."""
    _, *flags = container()["args"]
    given = parsed(flags)

    assert given.additional_config["kv_policy"] == "sink"
    (deployment,) = (one for one in manifests() if one["kind"] == "Deployment")
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    wait = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert wait + given.shutdown_timeout < grace


def test_a_flag_that_vllm_does_not_know_would_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(["--kv-policy=sink", "--sink-widow=8"])
    assert "--sink-widow" in capsys.readouterr().err


def test_the_server_outlives_idle_connections_of_what_is_in_front_of_it() -> None:
    """nginx closes them after 60 s, aiohttp (the chart's router) after 15 s."""
    values = yaml.safe_load((ROOT / "deploy" / "helm" / "values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    assert "VLLM_HTTP_TIMEOUT_KEEP_ALIVE" in envs.environment_variables
    for env in (container()["env"], model["env"]):
        given = {one["name"]: one.get("value") for one in env}
        assert int(given["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 60


def test_the_liveness_probe_is_a_command_of_ours() -> None:
    probe = container()["livenessProbe"]
    words = probe["exec"]["command"]

    probe_answers(words)
    assert int(words[words.index("--timeout") + 1]) < probe["timeoutSeconds"]


def test_values_of_the_helm_chart() -> None:
    """What its template makes flags of, probes, and the header that the router hashes.

    The chart itself is not here: docs/deploying.md says what it made of these values.
    """
    values = yaml.safe_load((ROOT / "deploy" / "helm" / "values.yaml").read_text())
    spec = values["servingEngineSpec"]
    (model,) = spec["modelSpec"]
    flags = model["vllmConfig"]
    given = parsed(
        [*flags["extraArgs"], "--tensor-parallel-size", str(flags["tensorParallelSize"])]
    )

    assert given.additional_config["kv_policy"] == "sink"
    assert flags["enablePrefixCaching"] is True  # the chart turns it off where it is left out
    assert given.shutdown_timeout < 30  # of Kubernetes, which the chart does not change
    assert f"{model['repository']}:{model['tag']}" == container()["image"]
    probe_answers(spec["livenessProbe"]["exec"]["command"])
    ingress = (ROOT / "deploy" / "kubernetes" / "ingress.yaml").read_text()
    header = values["routerSpec"]["sessionKey"]
    assert f"$http_{header.replace('-', '_')}" in ingress


def test_ray_on_kubernetes_runs_the_application_of_the_example() -> None:
    """The same settings, replicas that fit the nodes, and time for streams to end."""
    service, monitor = yaml.safe_load_all((ROOT / "deploy" / "ray" / "service.yaml").read_text())
    applications = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    example = yaml.safe_load((ROOT / "examples" / "ray_serve" / "gpu.yaml").read_text())
    cluster = service["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    deployment = applications[0]["args"]["llm_configs"][0]["deployment_config"]
    scaling = deployment["autoscaling_config"]

    assert applications == example["applications"]
    assert workers["replicas"] == workers["minReplicas"] == scaling["min_replicas"]
    assert workers["maxReplicas"] == scaling["max_replicas"]
    pod = workers["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > deployment["graceful_shutdown_timeout_s"]
    names = [port["name"] for port in pod["containers"][0]["ports"]]
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in names


def test_the_image_for_ray_has_the_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    image = (ROOT / "deploy" / "docker" / "ray.Dockerfile").read_text()
    service = (ROOT / "deploy" / "ray" / "service.yaml").read_text()

    wanted = extras["optional-dependencies"]["ray"]
    assert re.findall(r"'([^']+)'", image) == wanted
    (line,) = re.findall(r"==(\d+\.\d+)\.\*", wanted[0])
    assert f'rayVersion: "{line}.' in service


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
@pytest.mark.parametrize("file", DOCKER, ids=lambda file: file.name)
def test_images_are_written_well(file: Any) -> None:
    ran = subprocess.run([str(HADOLINT), file], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("file", DOCKER, ids=lambda file: file.name)
def test_images_copy_what_there_is(file: Any) -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    for sources in re.findall(r"^COPY (.+) \S+$", file.read_text(), re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert source in let_in, source


def test_what_the_image_starts_with_are_flags() -> None:
    image = (ROOT / "deploy" / "docker" / "cpu.Dockerfile").read_text()
    (words,) = re.findall(r"^CMD (\[.+\])$", image, re.MULTILINE)
    _, *flags = json.loads(words)

    assert parsed(flags).additional_config["kv_policy"] == "sink"


def test_images_have_the_first_line_of_vllm() -> None:
    gpu = (ROOT / "deploy" / "docker" / "gpu.Dockerfile").read_text()

    assert f"FROM vllm/vllm-openai:v{FIRST.version}\n" in gpu


def test_the_probe_is_light() -> None:
    """It runs every half a minute beside a server: neither torch nor vLLM is imported."""
    code = (
        "import sys, json; from sink_vllm.tools.main import main; "
        "main(['probe', '--url', 'http://localhost:9']); "
        "print(json.dumps([name for name in ('torch', 'vllm') if name in sys.modules]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(ran.stdout) == []
