"""One process in the place of each stage of a model that is split over several workers."""

from vllm.config import ParallelConfig
from vllm.distributed.parallel_state import GroupCoordinator, get_pp_group, get_tp_group


def take_seat(parallel_config: ParallelConfig, stage: int) -> None:
    """Let layers that are made next be those of a stage's first worker.

    Layers ask vLLM's groups who they are for. The groups are this process's own, of one, and go
    when it has made its layers; nobody else is there, so nothing may be computed or sent meanwhile.
    All workers of a stage have layers of the same shape.

    Args:
        parallel_config: how many workers there are.
        stage: of the pipeline.
    """
    parallel_config.rank = stage * parallel_config.tensor_parallel_size
    _sit(get_tp_group(), 0, parallel_config.tensor_parallel_size)
    _sit(get_pp_group(), stage, parallel_config.pipeline_parallel_size)


def _sit(group: GroupCoordinator, place: int, size: int) -> None:
    group.ranks = list(range(size))
    group.rank = group.rank_in_group = place
    group.world_size = size
