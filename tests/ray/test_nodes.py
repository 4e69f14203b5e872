"""What happens on the nodes of a Ray cluster, with the plugin and without it."""

import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.ray_serve.local import local_cluster
from sink_vllm.compat.shipping import ShippedConfig

ray: Any = pytest.importorskip("ray", reason="Ray is not installed (pip install 'sink-vllm[ray]')")

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with local_cluster(nodes=1) as address:
        ray.init(address=address, log_to_driver=False)
        yield address
        ray.shutdown()


@contextmanager
def node_without_the_plugin(address: str, folder: Path) -> Iterator[None]:
    """A Ray node whose Python has everything but this project, with a resource named ``bare``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    # A folder that is named in a .pth file has its own .pth files ignored: no editable installs.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    command = [str(folder / "bin" / "python"), "-m", "ray.scripts.scripts", "start", "--block"]
    options = ["--num-cpus=1", '--resources={"bare": 1}', "--object-store-memory=100000000"]
    node = subprocess.Popen(
        [*command, f"--address={address}", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=folder,
    )
    try:
        yield
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(60)


def patches_in_effect(_config: dict[str, Any]) -> bool:
    """Runs in a Ray worker that was given a configuration and nothing else."""
    from sink_vllm.compat.changes import start_up_patches

    return all(patch.is_applied for patch in start_up_patches())


def test_a_shipped_configuration_loads_the_plugin_in_a_ray_worker(address: str) -> None:
    """A Ray Serve replica on GPUs gets its configuration this way and never loads plugins."""
    task = ray.remote(num_cpus=1)(patches_in_effect)

    assert ray.get(task.remote(ShippedConfig(kv_policy="sink")), timeout=120)


DRIVER = """
import pickle, sys, ray
from sink_vllm.compat.shipping import ShippedConfig

config = ShippedConfig(kv_policy="sink")
ray.init(address=sys.argv[1], log_to_driver=False)
on_the_bare_node = ray.remote(num_cpus=1, resources={"bare": 1})
for function, argument in (
    (lambda pickled: pickle.loads(pickled), pickle.dumps(config)),
    (lambda config: dict(config), config),
):
    try:
        print(ray.get(on_the_bare_node(function).remote(argument), timeout=120))
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_node_without_the_plugin_says_so(address: str, tmp_path: Path) -> None:
    """It cannot even read the configuration, so nothing ever runs there without the policy."""
    with node_without_the_plugin(address, tmp_path / "bare"):
        # In another folder: Ray gives its workers the paths of the program that asks them.
        driver = [sys.executable, "-c", DRIVER, address]
        said = subprocess.run(driver, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert said.stdout.count("No module named 'sink_vllm'") >= 2, said.stdout
    assert "{" not in said.stdout.splitlines()[0]
