"""Container and cluster files name what exists: flags, commands, files, the line of vLLM.

Images are not built here, nor is anything deployed. ``kubernetes-validate`` checks the
manifests against Kubernetes' own schemas, where it is installed.
"""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import yaml
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from environments.lines import pick_line, read_lines
from sink_vllm.tools import main as command
from tests.support.paths import ROOT

KUBERNETES = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
DOCKER = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))
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


def test_vllm_knows_the_flags() -> None:
    """Also that there is time to drain before Kubernetes kills."""
    load_general_plugins()
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    _, *flags = container()["args"]
    model = str(ROOT / "examples" / "models" / "pystream-2.5m")  # one that is here
    given = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *flags]))

    assert given.additional_config["kv_policy"] == "sink"
    (deployment,) = (one for one in manifests() if one["kind"] == "Deployment")
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    wait = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert wait + given.shutdown_timeout < grace


def test_the_liveness_probe_is_a_command_of_ours() -> None:
    """It says no where no server is, and not because it does not know its words."""
    probe = container()["livenessProbe"]
    name, *words = probe["exec"]["command"]

    assert name == "sink-vllm"
    assert command.main([*words, "--url", "http://localhost:9"]) == 1
    assert int(words[words.index("--timeout") + 1]) < probe["timeoutSeconds"]


@pytest.mark.parametrize("file", DOCKER, ids=lambda file: file.name)
def test_images_copy_what_there_is(file: Any) -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    for sources in re.findall(r"^COPY (.+) \S+$", file.read_text(), re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert source in let_in, source


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
