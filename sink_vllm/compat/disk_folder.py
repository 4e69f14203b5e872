"""The folder of ``--sink-disk``: whose pages are in it, and that no two engines use it at once.

Pages are bytes as a KV cache has them, found by hashes of tokens. Of which model and layout they
are stands in a file beside them, because nothing in a page says it.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from vllm import __version__ as vllm_version
from vllm.config import VllmConfig

from sink_vllm.gate.refused import Refused
from sink_vllm.policy.config import SinkConfig

_OWNER = "pages-of.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def check_folder(config: SinkConfig, vllm_config: VllmConfig) -> None:
    """Make the folder if there is none, and see that its pages are those of this server.

    Raises:
        Refused: they are another's, or the folder cannot be written to.
    """
    if config.disk is not None:
        _claim(Path(config.disk) / _OWNER, identity(config, vllm_config), config.disk)


def engine_folder(config: SinkConfig, vllm_config: VllmConfig, layout: str) -> tuple[Path, IO[str]]:
    """The folder of one engine, and its lock: a file that stays open as long as it is used.

    Args:
        config: names a folder that has been checked.
        vllm_config: of the engine.
        layout: of its workers' pages.

    Raises:
        Refused: another engine uses it, or its pages are laid out otherwise.
    """
    assert config.disk is not None
    folder = Path(config.disk) / f"engine-{vllm_config.parallel_config.data_parallel_index}"
    _claim(folder / _OWNER, {"layout": layout}, config.disk)
    lock = open(folder / "lock", "w")  # noqa: SIM115 - it is closed with the engine
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise Refused(
            f"--sink-disk={config.disk!r} is in use by another server; name another folder, or "
            f"end that server."
        ) from error
    pages = folder / "pages"
    pages.mkdir(exist_ok=True)
    for unfinished in pages.glob("*/*.tmp"):
        unfinished.unlink(missing_ok=True)
    return pages, lock


def identity(config: SinkConfig, vllm_config: VllmConfig) -> dict[str, Any]:
    """All that the content of a page depends on beside its tokens, as far as it is known early."""
    from sink_vllm import __version__

    model, cache = vllm_config.model_config, vllm_config.cache_config
    schedule = config.schedule
    return {
        "sink_vllm": __version__,
        "vllm": vllm_version,
        "model": model.model,
        "revision": model.revision,
        "weights": _weights(model.model),
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "kv_cache_dtype": cache.cache_dtype,
        "hash": cache.prefix_caching_hash_algo,
        "sinks, window, stride": [schedule.sink_tokens, schedule.window, schedule.stride],
        "block_size": config.block_size,
        "tensor_parallel": vllm_config.parallel_config.tensor_parallel_size,
    }


def _weights(model: str) -> list[list[Any]]:
    """Names, sizes and times of the weights of a folder; none of a model on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    return [[path.name, (status := path.stat()).st_size, status.st_mtime_ns] for path in files]


def _claim(path: Path, wanted: Mapping[str, Any], folder: str) -> None:
    wanted = json.loads(json.dumps(wanted))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            found = json.loads(path.read_text())
            for key in wanted:
                if found.get(key) != wanted[key]:
                    raise Refused(
                        f"--sink-disk={folder!r} has the pages of another server: {key} was "
                        f"{found.get(key)!r} there, and is {wanted[key]!r}; name another folder, "
                        "or delete this one."
                    )
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(wanted, indent=1))
        os.replace(unfinished, path)
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise Refused(
            f"--sink-disk={folder!r} cannot be used ({error}); name a folder that this server may "
            "write to."
        ) from error
