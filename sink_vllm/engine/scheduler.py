"""The scheduler of the policy: requests as streams, and what the workers are told (engine core).

``StreamingLLMScheduler`` and ``StreamingLLMAsyncScheduler`` are vLLM's own two schedulers plus
one mixin. A stream that evicts (``admitting``) stays in ``running`` and is an ordinary request for
vLLM's loop. How its compacted state reaches the workers is in ``refreshing``.
"""

import itertools
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, StreamingUpdate

from sink_vllm.engine.admission import Standing
from sink_vllm.engine.input_thread import PREPARED
from sink_vllm.engine.ledger import IntegrityError
from sink_vllm.engine.output_tail import forget_evicted
from sink_vllm.engine.reasoning import decide_reasoning
from sink_vllm.engine.refreshing import RefreshingMixin
from sink_vllm.engine.sizing import Sizing
from sink_vllm.engine.states import StateCopies
from sink_vllm.engine.stream import Stream
from sink_vllm.gate.lengths import notes_of
from sink_vllm.policy.plan import PageMove, StepPlan
from sink_vllm.policy.report import with_account

# Below vLLM's own logger, whose handlers print it.
logger = init_logger(f"vllm.{__name__}")

_DISCARDED = 0
"""A token that vLLM drops unread."""


class StreamingLLMMixin(RefreshingMixin):
    """Streams long prompts in, sends what was compacted again, and has no length limit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps_stalled = 0
        self._states = StateCopies(self.recycler.tables)
        self._spoilt: list[Request] = []
        """Sessions of this step whose recurrent states have a token in them that is dropped."""
        self._log_start()

    def _log_start(self) -> None:
        sizing = Sizing.of(self.recycler.tables, self.kv_cache_config)
        logger.info("StreamingLLM: %s", sizing)
        states = len(self.recycler.tables.recurrent)
        if states:
            logger.info(
                "StreamingLLM: %d of these pages hold recurrent states, which run on when tokens "
                "are evicted. %s",
                states,
                "The prefix cache has copies of them after full pages: a conversation that is sent "
                "again goes on from the last one."
                if self.recycler.hasher is not None
                else "There is no prefix cache beside them: a conversation that is sent again is "
                "streamed in again.",
            )
        for note in notes_of(self.vllm_config.model_config, sizing.schedule.capacity):
            logger.info("StreamingLLM: %s.", note)

    # -- requests come and go ---------------------------------------------------------------

    def prepare(self, request: Request) -> Stream:
        """What has to be done with a whole prompt, before the engine sees the start of it only.

        vLLM's input thread does it for most requests (``input_thread``).
        """
        decide_reasoning(self.structured_output_manager, request)
        return self.recycler.prepare(request)

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            self.recycler.open(request, getattr(request, PREPARED, None) or self.prepare(request))
        super().add_request(request)

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """The next input of a session may be longer than its cache."""
        holds_none = self.admission.standing(session.request_id) is Standing.WAITING
        if holds_none:
            # It was parked: its tokens are those it had computed. vLLM discards what was sampled
            # behind them, found from the computed tokens on one line and from the end on another.
            session.num_computed_tokens = session.num_tokens
            session._all_token_ids.append(_DISCARDED)
        self._unpark(session)
        visible = self.recycler.extend(session, update.prompt_token_ids or [])
        super()._update_request_as_session(session, replace(update, prompt_token_ids=visible))
        if holds_none:
            session.num_computed_tokens = 0
        forget_evicted(session)

    def _handle_stopped_request(self, request: Request) -> bool:
        """A turn may end among draft tokens that were accepted. vLLM drops those behind its end,
        and goes on counting them as computed, which the next turn of a session would begin with.

        Asynchronous scheduling has computed the token that ends a turn before it is known to, and
        a session goes on without it. Its keys are overwritten, but recurrent states have it in
        them: they are computed again.
        """
        behind_last = request.num_tokens - 1 + request.num_output_placeholders
        request.num_computed_tokens = min(request.num_computed_tokens, behind_last)
        spoilt = bool(self.recycler.tables.recurrent and request.num_output_placeholders)
        finished = super()._handle_stopped_request(request)
        if spoilt and not finished:
            self._spoilt.append(request)
        return finished

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """End a request; the account of what was evicted leaves with its last output."""
        if self.hibernation is not None:
            self.hibernation.keep_turn(request)
        kv_params, ec_params = super()._free_request(request, delay_free_blocks)
        self._unpark(request)
        self.admission.forget(request.request_id)
        self.ledger.cancel(request.request_id)
        self._states.forget(request.request_id)
        report = self.recycler.close(request)
        if report is not None:
            kv_params = with_account(kv_params, report)
        if not self.requests:
            self._check_idle()
        return kv_params, ec_params

    def shutdown(self) -> None:
        super().shutdown()
        if self.hibernation is not None:
            self.hibernation.close()

    def _check_idle(self) -> None:
        try:
            self.ledger.check_idle()
        except IntegrityError:  # serving on is better than not serving
            logger.exception("StreamingLLM: the accounts of KV pages are wrong; please report it.")

    # -- one step ---------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._begin_step()
        if self._pause_state != PauseState.PAUSED_ALL:
            self._make_room()
        output = super().schedule(throttle_prefills)
        self._settle_admissions()
        self._complete_new_requests(output)
        stores, loads = ([], []) if self.hibernation is None else self.hibernation.take()
        plan = StepPlan(
            stores=stores,
            loads=loads,
            moves=self._take_moves(output),
            refreshes={
                data.req_id: self._refresh_of(data.req_id)
                for data in output.scheduled_new_reqs
                if data.req_id in self.recycler.to_refresh
            },
        )
        if plan:
            setattr(output, StepPlan.ATTRIBUTE, plan)
        self.recycler.to_refresh.difference_update(plan.refreshes)
        self.ledger.release()
        self._watch(output)
        return output

    def _take_moves(self, output: SchedulerOutput) -> list[PageMove]:
        moves = self.ledger.take_moves()
        if not self.recycler.tables.recurrent or self.recycler.hasher is None:
            return moves
        chunks = output.num_scheduled_tokens.items()
        scheduled = ((self.requests[request_id], chunk) for request_id, chunk in chunks)
        return moves + self._states.plan(
            ((request, request.num_computed_tokens - chunk) for request, chunk in scheduled), moves
        )

    def _watch(self, output: SchedulerOutput) -> None:
        """What an operator should see of this step, and a probe of many."""
        stats, (_, waiting) = self.recycler.account.stats, self.get_request_counts()
        waits = self._short_of_pages and self._pause_state == PauseState.UNPAUSED
        stats.waiting_for_pages = waiting - self.num_waiting_for_streaming_input if waits else 0
        stats.residents = self.admission.num_residents
        if self.hibernation is not None:
            self.hibernation.report(stats)
        is_idle = not self.running and not output.total_num_scheduled_tokens
        if is_idle and waiting and self._first_ready() is not None:
            self._steps_stalled += 1
        else:
            self._steps_stalled = 0
        stats.steps_stalled = self._steps_stalled

    # -- output -----------------------------------------------------------------------------

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self.recycler.account.take_stats().attach(stats)
        return stats

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Add the account of evictions to the first output after each of them.

        The front end may end a request by itself (stop strings), so waiting for the last output
        would lose it.
        """
        if self.hibernation is not None:
            self.hibernation.done(StepPlan.of(scheduler_output))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in self._spoilt:  # from 0.33 on vLLM lets them wait only now
            self._give_way(request)
        self._spoilt = []
        due = self.recycler.account.due
        if due:
            for output in itertools.chain(*(o.outputs for o in outputs.values())):
                if output.request_id in due:
                    due.discard(output.request_id)
                    request = self.requests[output.request_id]
                    report = self.recycler.streams[output.request_id].report(request)
                    output.kv_transfer_params = with_account(output.kv_transfer_params, report)
        return outputs


class StreamingLLMScheduler(StreamingLLMMixin):
    """vLLM's ``Scheduler`` under the policy."""


class StreamingLLMAsyncScheduler(StreamingLLMMixin, AsyncScheduler):
    """vLLM's ``AsyncScheduler`` under the policy."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """What ``--scheduler-cls`` names: the scheduler that fits the final configuration.

    vLLM decides about asynchronous scheduling after the class is named, so the choice is made
    here, when the engine core builds its scheduler.
    """
    cls = (
        StreamingLLMAsyncScheduler
        if vllm_config.scheduler_config.async_scheduling
        else StreamingLLMScheduler
    )
    return cls(vllm_config=vllm_config, **kwargs)
