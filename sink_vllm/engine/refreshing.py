"""How a compacted stream reaches the workers: a part of the scheduler (engine core).

The way vLLM's streaming input sessions do: as ``NewRequestData`` for an id they already have.
"""

from copy import copy
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.request import Request

from sink_vllm.engine.admitting import AdmittingMixin
from sink_vllm.policy.plan import Refresh


class RefreshingMixin(AdmittingMixin):
    """Sends requests again of which the workers have an outdated copy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refreshed: list[NewRequestData] = []

    def _complete_new_requests(self, output: SchedulerOutput) -> None:
        """Add requests that are sent again to what vLLM sends of new ones."""
        output.scheduled_new_reqs.extend(self._refreshed)
        self._refreshed = []
        if self.use_v2_model_runner:
            for data in output.scheduled_new_reqs:
                params = data.sampling_params
                if (
                    data.req_id in self.recycler.to_refresh
                    and params is not None
                    and params.min_tokens
                ):
                    # That runner samples with stream positions, and compares them with prompt
                    # length plus min_tokens.
                    data.sampling_params = copy(params)
                    data.sampling_params.min_tokens += self.recycler.streams[data.req_id].evicted

    def _refresh_of(self, req_id: str) -> Refresh:
        stream = self.recycler.streams[req_id]
        return Refresh(
            rope_offset=self.recycler.tables.anchors.offset(stream.chain_evictions),
            evicted=stream.evicted,
            output_token_ids=list(self.requests[req_id]._output_token_ids),
        )

    def _make_cached_request_data(
        self,
        running_reqs: list[Request],
        resumed_reqs: list[Request],
        num_scheduled_tokens: dict[str, int],
        spec_decode_tokens: dict[str, list[int]],
        req_to_new_blocks: dict[str, KVCacheBlocks],
    ) -> CachedRequestData:
        """Divert requests the workers have an outdated copy of: they leave as new requests."""
        if self.num_spec_tokens != self._most_drafts:  # see `_without_padding`
            self.num_spec_tokens = self._most_drafts
            for request_id in [one for one, drafts in spec_decode_tokens.items() if not drafts]:
                del spec_decode_tokens[request_id]
        outdated = self.recycler.to_refresh
        if outdated:
            self._refreshed = [
                NewRequestData.from_request(
                    request,
                    self.kv_cache_manager.get_block_ids(request.request_id),
                    request._all_token_ids.copy() if self.use_v2_model_runner else None,
                )
                for request in (*running_reqs, *resumed_reqs)
                if request.request_id in outdated
            ]
            running_reqs = [r for r in running_reqs if r.request_id not in outdated]
            resumed_reqs = [r for r in resumed_reqs if r.request_id not in outdated]
        return super()._make_cached_request_data(
            running_reqs,
            resumed_reqs,
            num_scheduled_tokens,
            spec_decode_tokens,
            req_to_new_blocks,
        )
