"""Where the streams of ``/v1/streams`` are remembered, and what is done for it before a start.

A database that cannot be used ends the start before an engine loads, with a sentence. It is opened
then, and kept: another server finds it in use from that moment on. With several API servers the
streams are remembered in the process that starts them, which tells them where to ask (``owner``).
"""

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sink_vllm.gate.refused import Refused, refusals
from sink_vllm.policy.config import SinkConfig
from sink_vllm.policy.options import SinkOptions
from sink_vllm.server.lengths import engine_view
from sink_vllm.server.streams.archive import Archive, ArchiveError
from sink_vllm.server.streams.interface import Streams
from sink_vllm.server.streams.owner import Owner
from sink_vllm.server.streams.remote import RemoteStore
from sink_vllm.server.streams.store import StreamStore

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PLUGIN = "sink_vllm"
ADDRESS = "SINK_VLLM_STREAMS"
"""Environment variable: the owner's socket, for the API servers that its process starts."""
_STARTER = -1  # vLLM's rank of a process that starts API servers and is none

_opened: dict[str, Archive] = {}
_owners: list[Owner] = []


def prepare(vllm_config: "VllmConfig") -> None:
    """Before an engine loads for a server with ``/v1/streams``.

    Raises:
        Refused: ``--sink-streams-db`` cannot be used.
    """
    from vllm import envs

    if PLUGIN not in (envs.VLLM_PLUGINS or ()):
        return
    parallel = vllm_config.parallel_config
    if parallel._api_process_count == 1:
        _archive_of(vllm_config)
    elif parallel._api_process_rank == _STARTER and not _owners:
        _owners.append(Owner(_own_store(vllm_config)))
        os.environ[ADDRESS] = _owners[0].address


def store_of(vllm_config: "VllmConfig") -> Streams:
    """The streams of an API server.

    Args:
        vllm_config: of either end; under the policy.

    Raises:
        Refused: ``--sink-streams-db`` cannot be used, or the streams of several API servers are
            remembered nowhere.
    """
    if vllm_config.parallel_config._api_process_count == 1:
        return _own_store(vllm_config)
    address = os.environ.get(ADDRESS)
    with refusals():
        if address is None:
            raise Refused(
                "/v1/streams of several API servers needs the process that starts them to be "
                "`vllm serve`, which remembers the streams; start them so, or only one."
            )
    return RemoteStore(address)


def _own_store(vllm_config: "VllmConfig") -> StreamStore:
    options = SinkOptions.parse(vllm_config.additional_config)
    assert options is not None
    archive = _archive_of(vllm_config)
    if archive is not None:
        del _opened[archive.path]
    return StreamStore(
        most_streams=options.sink_streams,
        most_tokens=options.sink_streams_tokens,
        idle_seconds=options.sink_streams_idle,
        archive=archive,
    )


def _archive_of(vllm_config: "VllmConfig") -> Archive | None:
    """The database, opened now or earlier."""
    options = SinkOptions.parse(vllm_config.additional_config)
    path = None if options is None else options.sink_streams_db
    if path is None:
        return None
    if path not in _opened:
        with refusals():
            try:
                _opened[path] = Archive(path, _made_by(vllm_config))
            except ArchiveError as error:
                raise Refused(str(error)) from error
    return _opened[path]


def _made_by(vllm_config: "VllmConfig") -> dict[str, Any]:
    """What the tokens of a stored stream, and its chain, mean something to."""
    policy = SinkConfig.of(engine_view(vllm_config))
    assert policy is not None
    schedule, model = policy.schedule, vllm_config.model_config
    return {
        "model": model.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "sink_tokens": schedule.sink_tokens,
        "sink_window": schedule.window,
        "sink_stride": schedule.stride,
        "sink_vllm": version("sink_vllm"),
    }
