"""Every patch has a record, every record a patch, and the records say what they must."""

import ast
import functools
import inspect
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from vllm import SamplingParams
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import parallel_state
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.models.utils import make_layers
from vllm.renderers.base import BaseRenderer
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from sink_vllm.compat.changes import OBJECT_CHANGES, ObjectChange, declared_patches
from sink_vllm.compat.patching import Patch
from sink_vllm.compat.versions import supported_versions
from sink_vllm.policy.plan import StepPlan
from tests.support.paths import ROOT

RECORDS = sorted((ROOT / "patches").glob("[0-9]*.md"))
ROWS = (
    "Process",
    "vLLM versions",
    "How",
    "Upstream PR",
    "Remove when",
    "Guarded by",
)


def _rows(record: Path) -> dict[str, str]:
    """The table at the top of a record."""
    return dict(re.findall(r"^\| (\w[^|]*?) \| (.*?) \|$", record.read_text(), flags=re.M))


def _names(patches: tuple[Patch, ...]) -> list[str]:
    return [patch.record for patch in patches]


def test_records_are_the_declared_patches() -> None:
    declared = {*_names(declared_patches()), *(change.record for change in OBJECT_CHANGES)}

    assert sorted(path.stem for path in RECORDS) == sorted(declared)


def test_numbers_of_records_are_unique() -> None:
    numbers = [path.stem[:4] for path in RECORDS]

    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("patch", declared_patches(), ids=lambda p: p.target)
def test_record_names_the_target(patch: Patch) -> None:
    """A record may describe several patches that only make sense together."""
    record = ROOT / "patches" / f"{patch.record}.md"

    assert f"`{patch.target}`" in _rows(record)["Target"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_record_is_complete(record: Path) -> None:
    rows, text = _rows(record), record.read_text()

    assert [name for name in ROWS if not rows.get(name)] == []
    assert rows.get("Target") or rows.get("Changes")
    assert "**Why.**" in text
    assert "**Why not a seam.**" in text
    low, high = rows["vLLM versions"].removeprefix("all but ").split(",")
    assert {low, high} == set(supported_versions().split(","))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_guard_named_by_the_record_exists(record: Path) -> None:
    guards = re.findall(r"`(tests/\S+?\.py)::(\w+)`", _rows(record)["Guarded by"])

    assert guards
    for path, name in guards:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), flags=re.M), name


def test_index_lists_every_record() -> None:
    index = (ROOT / "patches" / "README.md").read_text()

    assert [path.name for path in RECORDS if f"({path.name})" not in index] == []


def test_index_counts_what_is_replaced() -> None:
    """And so does the account of what stands in the way of fewer."""
    index, way = (ROOT / "patches" / "README.md").read_text().split("What vLLM lacks")
    counts = {
        number: (int(names or 0), int(swaps or 0))
        for number, names, swaps in re.findall(
            r"^\| \[(\d{4})\].*?\| (\d*) ?\| (\d*) ?\|[^|]*\|$", index, flags=re.M
        )
    }
    patches, swaps = declared_patches(), [one for one in _assigned() if "__class__" in one.what]
    elsewhere = [patch for patch in patches if patch.record.startswith("0040")]
    in_the_way = re.findall(r"^\| .*? \| (\d+) \| [\d, ]+ \|$", way, flags=re.M)

    assert sorted(counts) == [record.stem[:4] for record in RECORDS]
    for number, (names, _) in counts.items():
        assert names == sum(patch.record.startswith(number) for patch in patches), number
    assert sum(swap for _, swap in counts.values()) == len(swaps)
    assert sum(map(int, in_the_way)) == len(patches) - len(elsewhere)
    assert f"In all {len(patches)} names and {len(swaps)} swaps; on 0.33 " in index


# Objects of ours, by the names the code gives them; what else is assigned to is vLLM's.
OURS = {
    "sink_vllm.worker.self_test": {"step.scheduled_cached_reqs"},
    "sink_vllm.engine": {
        "stream",
        "stats",
        "self.stats",
        "self.account.stats",
        "ahead",
        "ledger",
        "self.ledger",
        "holder",
        "first",
        "full",
        "self.account",
        "self.recycler",
    },
    "sink_vllm.engine.hibernation": {"self._ledger"},
    "sink_vllm.server.streams": {
        "stream",
        "self._stream",
        "self._streams[stream_id]",
        "self._clients[client]",
        "held",
        "state",  # Starlette's, made for such things
        "raw_request.state",
        "service",
    },
    "sink_vllm.server.streams.opening": {"os"},  # the environment of child processes
    "sink_vllm.server.response_state": {"self._shared"},
    "sink_vllm.worker": {"layer", "step", "finish"},  # the steps of the self-test, made by it
    "sink_vllm.worker.moves": {"of_kind[-1]"},
    # What vLLM sets on a model state reaches it through the object of ours around it.
    "sink_vllm.worker.runner_v2": {"self._wrapped_state"},
    "sink_vllm.gate.refused": {"sys", "os"},  # record 0001 tells of it
    "sink_vllm.plugin": {"os"},  # the environment of child processes
    "sink_vllm.tools.main": {"os"},  # the log level, of a process that is not a server
    "sink_vllm.server.front_end": {"call"},  # arguments, bound by ``inspect``
}


# Methods that change what they are called on: lists, dictionaries, sets, tensors, generators.
MUTATORS = {
    *("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"),
    *("popitem", "setdefault", "update", "move_to_end"),
    *("add", "discard", "difference_update", "intersection_update"),
    *("appendleft", "extendleft", "popleft", "rotate"),
    *("copy_", "fill_", "register_buffer", "set_state", "zero_"),
}


class Assigned(NamedTuple):
    """An assignment to something that is no attribute of ``self``, or a call that changes it."""

    module: str
    base: str
    """The object, as the code spells it."""
    what: str


def assigned_in(module: str, source: str) -> list[Assigned]:
    """What the code of a module changes of objects other than ``self``.

    That is what it assigns to, deletes, or calls one of ``MUTATORS`` of. An object behind a local
    name is not followed: ``tokens = request.tokens; tokens.clear()`` is not seen.
    """
    tree = ast.parse(source)
    of_vllm = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "setattr",
            "delattr",
            "__setattr__",
        ):
            base, name = node.args[:2]
            given = ast.unparse(name)
            spelled = given.strip("'") if isinstance(name, ast.Constant) else f"<{given}>"
            found.append(Assigned(module, ast.unparse(base), f"{ast.unparse(base)}.{spelled}"))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in MUTATORS
        ):
            found += _called(module, node.func, of_vllm)
        while targets:
            target = targets.pop()
            if isinstance(target, ast.Tuple | ast.List):
                targets += target.elts
                continue
            inner = target.value if isinstance(target, ast.Subscript) else target
            if isinstance(inner, ast.Attribute):
                base = inner.value
                own = isinstance(base, ast.Name) and base.id in ("self", "cls")
                if own and inner.attr != "__class__":
                    continue
                found.append(Assigned(module, ast.unparse(base), ast.unparse(target)))
            elif isinstance(inner, ast.Name) and inner is not target and inner.id in of_vllm:
                found.append(Assigned(module, inner.id, ast.unparse(target)))
    return found


def _called(module: str, method: ast.Attribute, of_vllm: set[str]) -> list[Assigned]:
    """A call of a method that changes an attribute, an item of one, or the names of an object."""
    changed = method.value
    while isinstance(changed, ast.Subscript):
        changed = changed.value
    base: ast.expr
    if isinstance(changed, ast.Attribute):
        base = changed.value
    elif isinstance(changed, ast.Call) and ast.unparse(changed.func) == "vars":
        base = changed.args[0]
    elif isinstance(changed, ast.Name) and changed.id in of_vllm:
        base = changed
    else:
        return []
    if isinstance(base, ast.Name) and base.id in ("self", "cls"):
        return []
    return [Assigned(module, ast.unparse(base), ast.unparse(method))]


def _within(module: str, where: str) -> bool:
    return module == where or module.startswith(f"{where}.")


def _is_ours(one: Assigned) -> bool:
    return "__class__" not in one.what and any(
        _within(one.module, where) and one.base in bases for where, bases in OURS.items()
    )


def _declares(change: ObjectChange, one: Assigned) -> bool:
    # Brackets are brackets here, not sets of characters.
    pattern = re.escape(change.what).replace(r"\*", ".*")
    return _within(one.module, change.where) and re.fullmatch(pattern, one.what) is not None


@functools.cache
def _assigned() -> list[Assigned]:
    paths = sorted((ROOT / "sink_vllm").rglob("*.py"))
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [
        one
        for module, path in zip(modules, paths, strict=True)
        for one in assigned_in(module, path.read_text())
    ]


def test_changes_of_vllm_s_objects_are_declared() -> None:
    """A new class swap, or an attribute set on an object of vLLM, needs a record."""
    undeclared = [
        one
        for one in _assigned()
        if not _is_ours(one) and not any(_declares(change, one) for change in OBJECT_CHANGES)
    ]

    assert undeclared == [], "declare it in OBJECT_CHANGES, with a record, or in OURS"


def test_declared_changes_are_made() -> None:
    gone = [
        change for change in OBJECT_CHANGES if not any(_declares(change, o) for o in _assigned())
    ]

    assert gone == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("runner.__class__ = Ours", "runner.__class__"),
        ("self.__class__ = Ours", "self.__class__"),
        ("a, engine.limit = 1, 2", "engine.limit"),
        ("setattr(engine, name, 1)", "engine.<name>"),
        ("object.__setattr__(engine, 'limit', 1)", "engine.limit"),
        ("del engine.known[key]", "engine.known[key]"),
        ("engine.count += 1", "engine.count"),
        ("from vllm.x import TABLE\nTABLE[key] = 1", "TABLE[key]"),
        ("from vllm.x import TABLE\nTABLE.update(ours)", "TABLE.update"),
        ("engine.known.clear()", "engine.known.clear"),
        ("engine.known[0].append(1)", "engine.known[0].append"),
        ("self.engine.known.pop(key)", "self.engine.known.pop"),
        ("vars(engine).update(ours)", "vars(engine).update"),
    ],
)
def test_a_change_is_found_however_it_is_written(source: str, what: str) -> None:
    assert [one.what for one in assigned_in("sink_vllm.worker.new", source)] == [what]
    harmless = "self.a = 1\nb = 2\nc[0] = 3\nself.d.clear()\ne.append(4)\nf.g.count(5)"
    assert assigned_in("m", harmless) == []


def test_guard_cpu_worker_makes_its_runner_without_a_factory() -> None:
    """With the factory of the GPU worker ``StreamingLLMCPUWorker.init_device`` could go."""
    source = inspect.getsource(CPUWorker.init_device)

    assert "self.model_runner = CPUModelRunner(" in source
    assert "CPUModelRunnerV2(" in source
    assert "_make_model_runner" not in source
    assert hasattr(Worker, "_make_model_runner")


def test_guard_generators_of_discarded_rows_are_set_back() -> None:
    """By a method that torch has for CUDA only."""
    source = inspect.getsource(GPUModelRunner._bookkeeping_sync)

    assert "gen.set_offset(gen.get_offset() - 4)" in source
    with pytest.raises(RuntimeError):
        torch.Generator().get_offset()


def test_guard_inputs_of_the_model_state_override_those_of_the_runner() -> None:
    step = inspect.getsource(GPUModelRunnerV2.execute_model)
    captured = inspect.getsource(cudagraph_utils)

    assert "**self.model_state.prepare_inputs(input_batch, self.req_states)" in step
    assert "**model_state.prepare_dummy_inputs(num_reqs, num_tokens)" in captured


def test_guard_rotary_modules_read_one_table() -> None:
    """A second table would end where the model's did; the other one is for ROCm's kernels."""
    made = inspect.getsource(RotaryEmbeddingBase.__init__)
    tables = set(re.findall(r'register_buffer\(\s*"(\w+)"', made))

    assert tables == {"cos_sin_cache", "cos_sin_cache_bf16"}
    assert "if self.use_aiter and cache.dtype" in made
    assert "return _ROPE_DICT[key]" in inspect.getsource(rotary_embedding.get_rope)


def test_guard_layers_ask_groups_who_they_are_for() -> None:
    """Heads by the size of one group, layers by the place in the other; plain attributes."""
    group = parallel_state.GroupCoordinator
    placed = inspect.getsource(group.__init__)

    for name in ("ranks", "rank", "rank_in_group", "world_size"):
        assert f"self.{name}" in placed
        assert not hasattr(group, name)  # a property could not be assigned to
    size = inspect.getsource(parallel_state.get_tensor_model_parallel_world_size)
    assert "return get_tp_group().world_size" in size
    made = inspect.getsource(make_layers)
    assert "get_pp_group().rank_in_group, get_pp_group().world_size" in made


def test_guard_longrope_reads_what_is_written() -> None:
    """One buffer with the short table first, and one decision, read at every step."""
    module = rotary_embedding.Phi3LongRoPEScaledRotaryEmbedding
    made, step = inspect.getsource(module.__init__), inspect.getsource(module.forward)

    assert set(re.findall(r'register_buffer\(\s*"(\w+)"', made)) == {"long_short_cos_sin_cache"}
    assert "torch.cat([short_cache, long_cache], dim=0)" in made
    assert "self.use_long_rope = max_model_len > original_max_position_embeddings" in made
    assert "if self.use_long_rope:" in step
    assert "k = self.original_max_position_embeddings" in step
    assert "self.long_short_cos_sin_cache, 0, idx" in step


def test_guard_attributes_survive_on_their_objects() -> None:
    """No slots, and steps keep them when they are sent to workers."""
    step = SchedulerOutput.make_empty()
    setattr(step, StepPlan.ATTRIBUTE, StepPlan(refreshes={}))

    assert StepPlan.of(pickle.loads(pickle.dumps(step))) == StepPlan()
    for cls in (SchedulerOutput, VllmConfig, ModelConfig, BaseRenderer):
        assert not any("__slots__" in vars(one) and vars(one)["__slots__"] for one in cls.__mro__)


def test_guard_requests_have_the_values_that_are_set() -> None:
    request = Request("a", [1, 2], SamplingParams(max_tokens=3, min_tokens=1), None)
    written = {one.what for one in _assigned() if one.base == "request"}
    names = {re.split(r"[.\[]", what)[1] for what in written if what.startswith("request.")}

    assert names >= {"prompt_token_ids", "num_computed_tokens", "block_hashes"}
    assert [name for name in names if not hasattr(request, name)] == []
