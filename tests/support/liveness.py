"""Random episodes on the scheduler without a model: does everybody get on, whatever happens?

    python -m tests.support.liveness 17            one episode, step by step
    python -m tests.support.liveness 0:2000        many; one line per kind of failure

An episode is a function of its seed. What must hold is in ``Watch``; what happens is in
``Episode``.
"""

import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import Request, RequestStatus

from sink_vllm.policy.report import KEY
from sink_vllm.policy.schedule import Schedule, cdiv
from tests.support.kept_pages import watch_pages
from tests.support.preemptions import watch_preemptions
from tests.support.scheduler_only import Core, Settings, check_integrity, leftovers

IDLE_STEPS = 3
"""Steps in a row that may schedule nothing although a request could run: a preempted request comes
back in the next step, not in the same."""
WASTE = 4
"""Tokens scheduled ÷ tokens that requests consist of: more is a livelock."""
PATIENCE = 20
"""Steps per token still to come after which a request that has not ended is starved."""


class Unfair(AssertionError):
    """A property of liveness does not hold; ``kind`` says which."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(slots=True)
class Client:
    """One request or session, as its client sees it."""

    name: str
    schedule: Schedule
    tokens: list[int]
    """What has been sent and received so far."""
    wanted: int
    """Output tokens still to come."""
    keys: dict[str, Any]
    """Options of ``Core.send`` that a resend repeats."""
    session: bool = False
    patient: bool = False
    """A session that holds still for as long as anybody else wants something."""
    received: int = 0
    blurred: bool = False
    """Inputs were sent before the answer to the one before: ``tokens`` are in another order."""
    closing: bool = False
    """No input will follow the ones that have been sent."""
    ended: bool = False
    cached: int = 0
    report: dict[str, int] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """A session that waits for its client."""
        return self.session and not self.ended and not self.closing and not self.wanted


class Watch:
    """Drives a core and checks, after every step, what must always hold."""

    def __init__(self, settings: Settings) -> None:
        self.core = Core(settings)
        self.clients: dict[str, Client] = {}
        self.reach: Counter[str] = Counter()
        self.needed = 0
        self.scheduled = 0
        self.steps = 0
        self._idle = 0
        self._planned = 0
        self._aborted: list[str] = []
        self.core.model.observe = self._observe
        evict = self.core.scheduler.recycler.evict

        def counted_evict(request: Request) -> bool:
            pending = bool(settings.drafts and request.spec_token_ids)
            is_composed = request.request_id in self.core.scheduler.ledger.ahead
            evicted: bool = evict(request)
            self.reach["evictions with drafts"] += evicted and pending
            self.reach["evictions composed ahead"] += evicted and is_composed
            return evicted

        watch_preemptions(self.core.scheduler, before=lambda _: self.reach.update(("preemptions",)))
        self.core.scheduler.recycler.evict = counted_evict
        self._count_found(self.core.scheduler.recycler)
        self._count_ahead(self.core.scheduler.recycler)
        self._kept = watch_pages(self.core) if settings.slots else None

    def _count_found(self, recycler: Any) -> None:
        started = recycler.started

        def counted(request: Request, *, resumed: bool) -> None:
            is_lost = recycler.streams[request.request_id].is_lost
            self.reach["rebuilds"] += is_lost and not resumed
            self.reach["found again"] += is_lost and resumed
            started(request, resumed=resumed)

        recycler.started = counted

    def _count_ahead(self, recycler: Any) -> None:
        give_back = recycler.give_back_ahead

        def counted() -> None:
            self.reach["heads given back"] += len(self.core.scheduler.ledger.ahead)
            give_back()

        recycler.give_back_ahead = counted

    def send(
        self,
        name: str,
        tokens: Sequence[int],
        wanted: int,
        *,
        session: bool = False,
        **keys: Any,
    ) -> Client:
        """A new request, or a new session with its first input."""
        client = Client(
            name,
            self.core.schedule_of(keys.get("options")),
            list(tokens),
            wanted,
            keys,
            session=session,
        )
        self.clients[name] = client
        self.needed += len(tokens) + wanted
        self.core.send(name, tokens, wanted, resumable=session, **keys)
        return client

    def extend(self, client: Client, tokens: Sequence[int], wanted: int) -> None:
        """The next input of a session."""
        client.blurred |= not client.idle
        client.wanted += wanted
        self.needed += len(tokens) + wanted
        self.core.send(client.name, tokens, wanted, resumable=True, **client.keys)
        # What it has been told last is no part of the stream; exactly known only when it is idle.
        client.tokens = [*client.tokens[:-1], *tokens]
        self.reach["sessions extended"] += 1

    def close(self, client: Client) -> None:
        """The client of a session says that no input follows."""
        client.ended, client.closing = client.idle, True
        self.core.send(client.name, [0], 1)

    def abort(self, client: Client, *, in_step: bool = False) -> None:
        """The client hangs up: before the next step, or while the model runs."""
        client.ended = True
        if in_step:
            self.core.aborts_queue.put([client.name])
            self._aborted.append(client.name)  # vLLM puts it into both of its queues
        else:
            self.core.abort_requests([client.name])
        self.reach["aborts"] += 1

    def reset(self, *, running: bool) -> None:
        """Empty the prefix cache; with those that run, whoever holds pages is computed again."""
        scheduler = self.core.scheduler
        if running:
            self.needed += sum(
                min(request.num_tokens, self.clients[request.request_id].schedule.capacity)
                for request in (*scheduler.running, *scheduler.kv_holding_waiting)
            )
        emptied = self.core.reset_prefix_cache(reset_running_requests=running)
        if running and not emptied:
            raise Unfair("reset", "pages are held although everybody was preempted")
        self.reach["resets"] += 1

    def step(self) -> list[EngineCoreOutput]:
        """One step of vLLM, with everything checked."""
        core = self.core
        busy = core.in_flight
        ready = core.scheduler.pause_state == PauseState.UNPAUSED and core.could_run()
        self._planned = 0
        aborted, self._aborted = self._aborted, []
        outputs = core.outputs()
        for name in aborted:
            core.abort_requests([name])
        self.steps += 1
        self._idle = self._idle + 1 if ready and not busy and not self._planned else 0
        if self._idle > IDLE_STEPS:
            names = [one.request_id for one in core.could_run()]
            raise self._stuck("hang", f"{self._idle} steps without a token for {names}")
        check_integrity(core)
        if self._kept is not None:
            self._kept.check()
        for output in outputs:
            self._hear(output)
        self._check_streams()
        if self.scheduled > WASTE * self.needed:
            raise self._stuck("livelock", f"{self.scheduled} tokens scheduled for {self.needed}")
        return outputs

    def _stuck(self, kind: str, text: str) -> Unfair:
        behind = any(client.idle for client in self.clients.values())
        return Unfair(f"{kind} behind idle sessions" if behind else kind, text)

    def _observe(self, planned: SchedulerOutput) -> None:
        self._planned = planned.total_num_scheduled_tokens
        drafts = sum(map(len, planned.scheduled_spec_decode_tokens.values()))
        self.scheduled += self._planned - drafts
        scheduler = self.core.scheduler
        for request_id, chunk in planned.num_scheduled_tokens.items():
            capacity = self.clients[request_id].schedule.capacity
            end = scheduler.requests[request_id].num_computed_tokens
            if chunk < 1 or end > capacity:
                raise Unfair("chunk", f"{request_id}: {chunk} tokens up to {end} of {capacity}")
        for request in scheduler.deferred_waiting:
            if request.lora_request is not None and request.status == RequestStatus.WAITING:
                self.reach["LoRA skips"] += 1

    def _hear(self, output: EngineCoreOutput) -> None:
        client = self.clients[output.request_id]
        new = output.new_token_ids
        client.tokens += new
        client.received += len(new)
        client.wanted -= len(new)
        if output.prefill_stats is not None:
            client.cached = output.prefill_stats.num_cached_tokens
            if client.cached > client.schedule.capacity:
                self.reach["resumptions"] += 1
        report = (output.kv_transfer_params or {}).get(KEY)
        if report is not None:
            for name, key in (("evictions", "evictions"), ("reanchorings", "rope_reanchorings")):
                self.reach[name] += report[key] - client.report.get(key, 0)
            client.report = report
        if output.finish_reason is None or client.ended:
            return
        if output.finish_reason != FinishReason.LENGTH:
            raise Unfair("ended", f"{client.name}: {output.finish_reason.name}")
        if client.wanted < 0 or (client.wanted and not client.session):
            raise Unfair("ended", f"{client.name}: {client.wanted} tokens still wanted")
        client.ended = not client.wanted and (client.closing or not client.session)
        if client.report and not client.session:
            self._check_account(client)

    def _check_streams(self) -> None:
        """The workers compute sinks and window of what the client sent and got, nothing else."""
        if self.core.settings.truncate:
            return  # what was cut is not told to the workers
        for request_id, row in self.core.model.content.rows.items():
            client = self.clients[request_id]
            if client.blurred or client.ended or (row.evicted is None and client.report):
                continue
            request = self.core.scheduler.requests.get(request_id)
            if request is None or request.status != RequestStatus.RUNNING:
                continue  # what a session goes on with is sent when it does
            sinks, tokens = client.schedule.sink_tokens, client.tokens
            known = [*tokens[:sinks], *tokens[sinks + (row.evicted or 0) :]][: len(row.tokens)]
            if row.tokens[: len(known)] != known or len(row.tokens) - len(known) > 2:
                raise Unfair("stream", f"{request_id} without {row.evicted}: {row.tokens}")

    def _check_account(self, client: Client) -> None:
        """Evictions depend on the length of the stream alone, whatever happened to it."""
        length, schedule = len(client.tokens), client.schedule
        wanted = (length, schedule.evictions(length - 1))
        found = (client.report["stream_position"], client.report["evictions"])
        if found != wanted:
            raise Unfair("account", f"{client.name}: {found} (position, evictions), not {wanted}")

    def run(self, done: Callable[[], bool]) -> None:
        """Step until ``done``, but not for ever."""
        owed = sum(c.wanted + cdiv(len(c.tokens), 8) for c in self.clients.values() if not c.ended)
        limit = self.steps + 30 + PATIENCE * owed
        while not done():
            if self.steps > limit:
                raise self._stuck("starved", f"after {self.steps} steps")
            self.step()

    @property
    def all_served(self) -> bool:
        """Nobody waits for an answer."""
        return all(client.ended or client.idle for client in self.clients.values())

    def finish(self) -> None:
        """Everybody gets an answer; then all hang up, and nothing may be left of them."""
        self.run(lambda: self.all_served)
        for client in self.clients.values():
            if not client.ended:
                self.abort(client)
        for _ in range(4):
            self.step()
        check_integrity(self.core)
        free = self.core.pool.get_num_free_blocks()
        if free != self.core.num_pages:
            raise Unfair("leak", f"{free} of {self.core.num_pages} pages are free")
        if self._kept is not None:
            self._kept.check_idle()
            self.reach["pages brought back"] += self._kept.brought_back
        if self.core.scheduler.requests:
            raise Unfair("leak", f"requests {list(self.core.scheduler.requests)}")
        left = leftovers(self.core, set(self.clients))
        if left:
            raise Unfair("leak", f"state of requests that ended: {left}")


def draw_settings(rng: random.Random) -> Settings:
    """An engine of any shape, its pool biased to tight."""
    block = rng.choice((4, 4, 8, 8, 16))
    aligned = rng.random() < 0.5
    stride = block * rng.choice((1, 1, 1, 2))
    if aligned:
        sinks, window = block * rng.choice((0, 1, 1, 2)), block * rng.choice((1, 2, 3))
    else:
        sinks, window = rng.randint(0, 2 * block + 1), rng.randint(1, 3 * block)
    schedule = Schedule(sink_tokens=sinks, window=window, stride=stride)
    per_stream = cdiv(schedule.capacity, block) + cdiv(sinks, block)
    share = rng.choice((0, 0, 0, 0, 0.34, 0.34, 1, 1, 2, 3))
    max_seqs = rng.choice((1, 2, 2, 3, 4, 8))
    hybrid = rng.random() < 0.2
    return Settings(
        schedule=schedule,
        block_size=block,
        spare_pages=round(share * per_stream) + rng.choice((0, 0, 0, 1, 2)),
        caching=rng.random() < 0.85,
        max_seqs=max_seqs,
        budget=rng.choice((max_seqs + rng.randint(0, 2 * block), schedule.capacity, 512, 512)),
        long_prefill=rng.choice((0, 0, 0, block, block + 1)),
        policy=rng.choice(("fcfs", "fcfs", "priority")),
        asynchronous=rng.random() < 0.5,
        v2=rng.random() < 0.5,
        truncate=rng.random() < 0.2,
        reserve_full=rng.random() < 0.75,
        max_loras=int(rng.random() < 0.2),
        rope_rows=rng.choice((None, schedule.capacity + stride * rng.randint(0, 4))),
        native_window=rng.randint(1, window) if hybrid else 0,
        windowed_first=rng.random() < 0.5,
        log_stats=rng.random() < 0.1,
    )


def _draw_slots(seed: int, settings: Settings) -> int:
    """Pages that are kept outside the pool: none, hardly those of one stream, or many."""
    rng = random.Random(f"{seed} slots")
    full = cdiv(settings.schedule.capacity, settings.block_size)
    full += cdiv(settings.schedule.sink_tokens, settings.block_size)
    return rng.choice((0, 2 * full + rng.randint(2, 9), 300)) if rng.random() < 0.7 else 0


class Episode:
    """What random clients do to a random engine."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.settings = draw_settings(rng)
        if not self.settings.asynchronous:  # vLLM makes these drafts between two steps
            # Drawn beside the others, which an episode is known by.
            drafts = random.Random(f"{seed} drafts").choice((0, 1, 3, 7))
            # vLLM itself waits for ever if one request with its drafts is more than a step.
            budget = max(self.settings.budget, 1 + drafts)
            self.settings = replace(self.settings, drafts=drafts, budget=budget)
        states = random.Random(f"{seed} states").choice((0, 0, 0, 0, 0, 0, 1, 3))
        if states:
            self.settings = replace(self.settings, recurrent=states, drafts=0)
        if self.settings.caching and not self.settings.recurrent:
            self.settings = replace(self.settings, slots=_draw_slots(seed, self.settings))
        self.watch = Watch(self.settings)
        self.arrivals = rng.randint(2, 6)
        self.eager = rng.choice((0.1, 0.3, 1.0))
        self.talk = rng.random() < 0.5
        """Conversations of several turns, of which the next often begins when nobody else asks."""
        self.sessions = rng.random() < 0.25 and self.settings.max_seqs > 1
        self.grammars = rng.random() < 0.3
        self.options = rng.random() < 0.3
        self.trouble = rng.choice((0.0, 0.02, 0.06))
        self.beginnings = [self._tokens(rng.randint(1, 40)) for _ in range(2)]
        self.unpause_at = 0

    def run(self) -> Counter[str]:
        """Reach of the episode.

        Raises:
            AssertionError: a property does not hold.
        """
        watch, rng = self.watch, self.rng
        while self.arrivals:
            if rng.random() < self.eager or (self.talk and watch.all_served):
                self._arrive()
            self._act()
            watch.step()
        self._unpause()
        while not watch.all_served and rng.random() < 0.9:
            self._act(settled=True)
            watch.step()
        self._unpause()
        self._last_words()
        watch.finish()
        reach = watch.reach
        reach["episodes"] += 1
        reach["steps"] += watch.steps
        for name in ("asynchronous", "v2", "truncate", "caching"):
            reach[name] += getattr(self.settings, name)
        reach["windowed"] += self.settings.native_window > 0
        reach["recurrent"] += self.settings.recurrent > 0
        reach["states found"] += watch.core.model.content.copied
        reach["drafts accepted"] += watch.core.model.accepted
        return reach

    # -- clients ----------------------------------------------------------------------------

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randint(0, 500) for _ in range(count)]

    def _length(self, schedule: Schedule) -> int:
        capacity, stride = schedule.capacity, schedule.stride
        kind = self.rng.random() + self.talk * 0.3
        if kind < 0.3:
            return self.rng.randint(1, capacity)
        if kind < 0.6:
            return max(1, capacity + self.rng.choice((-1, 0, 1, 2, stride, stride + 1)))
        return self.rng.randint(capacity, 3 * capacity)

    def _wanted(self, schedule: Schedule) -> int:
        stride = schedule.stride
        return self.rng.choice((1, 1, 2, self.rng.randint(1, stride), stride + 2))

    def _arrive(self) -> None:
        self.arrivals -= 1
        rng, watch = self.rng, self.watch
        name = f"r{self.arrivals}"
        earlier = [one for one in watch.clients.values() if one.received]
        keys: dict[str, Any] = {}
        if earlier and rng.random() < (0.8 if self.talk else 0.4):
            before = max(rng.choices(earlier, k=2), key=lambda one: len(one.tokens))
            tokens = before.tokens + self._tokens(rng.randint(1, 2 * before.schedule.stride))
            if rng.random() < 0.8:
                keys = {key: before.keys[key] for key in ("options", "lora") if key in before.keys}
            watch.reach["resends"] += 1
        else:
            length = self._length(self.settings.schedule)
            shared = rng.choice((*self.beginnings, []))
            tokens = (shared + self._tokens(length))[: max(length, 1)]
        session = (
            self.sessions
            and rng.random() < 0.5
            and sum(c.session and not c.ended for c in watch.clients.values())
            < self.settings.max_seqs - 1
        )
        if self.options and "options" not in keys:
            keys["options"] = self._own_options()
        if self.settings.max_loras and "lora" not in keys:
            keys["lora"] = rng.choice((0, 1, 2))
        if self.settings.policy == "priority":
            keys["priority"] = rng.randint(0, 2)
        if self.grammars and not session and rng.random() < 0.5:
            keys["grammar"] = rng.choice((0, 1, 2, 5, 12))
            watch.reach["grammars"] += 1
        schedule = watch.core.schedule_of(keys.get("options"))
        wanted = self._wanted(schedule)
        if (keys.get("options") or {}).get("kv_policy") == "full":
            session = False
            tokens = tokens[: schedule.capacity - 1]
            wanted = min(wanted, schedule.capacity - len(tokens))
        client = watch.send(name, tokens, wanted, session=session, **keys)
        client.patient = session and rng.random() < 0.5

    def _own_options(self) -> dict[str, Any] | None:
        """Options of a request, such as the front end lets pass."""
        rng, schedule = self.rng, self.settings.schedule
        most = schedule.sink_tokens + schedule.window
        options = rng.choice(
            (
                None,
                {"kv_policy": "full"},
                {"sink_tokens": rng.randint(0, most)},
                {"sink_window": rng.randint(1, schedule.window)},
                {"sink_tokens": rng.randint(0, most), "sink_window": rng.randint(1, most)},
            )
        )
        try:
            self.watch.core.schedule_of(options)
        except ValueError:
            return None
        return options

    def _act(self, settled: bool = False) -> None:
        """What clients and operators do between two steps."""
        rng, watch = self.rng, self.watch
        scheduler = watch.core.scheduler
        for client in list(watch.clients.values()):
            if client.ended:
                continue
            if rng.random() < self.trouble / 3:
                watch.abort(client, in_step=rng.random() < 0.5)
            elif client.session and not settled:
                if client.idle and not client.patient and rng.random() < 0.3:
                    self._go_on(client)
                elif not client.idle and not client.closing and rng.random() < 0.02:
                    self._go_on(client)  # without waiting for the answer
        if self.unpause_at and watch.steps >= self.unpause_at:
            self._unpause()
        if rng.random() < self.trouble:
            watch.reset(running=rng.random() < 0.7)
        elif not settled and not self.unpause_at and rng.random() < self.trouble / 3:
            scheduler.set_pause_state(rng.choice((PauseState.PAUSED_NEW, PauseState.PAUSED_ALL)))
            self.unpause_at = watch.steps + rng.randint(1, 6)
            watch.reach["pauses"] += 1

    def _unpause(self) -> None:
        self.unpause_at = 0
        self.watch.core.scheduler.set_pause_state(PauseState.UNPAUSED)

    def _go_on(self, client: Client) -> None:
        kind = self.rng.random()
        if kind < 0.8:
            tokens = self._tokens(max(1, self._length(client.schedule) // 2))
            self.watch.extend(client, tokens, self._wanted(client.schedule))
        elif kind < 0.9:
            self.watch.close(client)
        else:
            self.watch.abort(client)

    def _last_words(self) -> None:
        """Patient sessions move when everybody else has been served."""
        watch = self.watch
        watch.run(lambda: watch.all_served)
        for client in list(watch.clients.values()):
            if client.idle and self.rng.random() < 0.7:
                self._go_on(client)


@dataclass(frozen=True, slots=True)
class Failure:
    """How an episode failed."""

    seed: int
    kind: str
    text: str


def run_one(seed: int) -> tuple[Counter[str], Failure | None]:
    """One episode: what it reached, or how it failed."""
    episode = Episode(seed)
    try:
        return episode.run(), None
    except Exception as error:  # noqa: BLE001 - whatever vLLM raises is a finding
        kind = getattr(error, "kind", None) or _kind(error)
        text = "".join(traceback.format_exception(error)[-6:])
        dump = episode.watch.core.dump()
        return Counter(), Failure(seed, kind, f"{text}\nseed {seed}\n{dump}")


def _kind(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.name}: {str(error)[:60]}"


def run_many(seeds: Sequence[int]) -> tuple[Counter[str], list[Failure]]:
    """All episodes of ``seeds``."""
    reach: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        reached, failure = run_one(seed)
        reach += reached
        if failure is not None:
            failures.append(failure)
    return reach, failures


def seeds_of(text: str) -> range:
    """``"17"`` or ``"0:2000"``."""
    first, _, end = text.partition(":")
    return range(int(first), int(end) if end else int(first) + 1)


def main() -> int:
    """0 when all episodes went well."""
    seeds = seeds_of(sys.argv[1] if len(sys.argv) > 1 else "0:1000")
    run_one(0)  # start-up
    began, used = time.perf_counter(), time.process_time()
    reach, failures = run_many(seeds)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    kinds: dict[str, list[Failure]] = {}
    for failure in failures:
        kinds.setdefault(failure.kind, []).append(failure)
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(found):>6}  {kind}: seeds {[one.seed for one in found[:8]]}")
    if len(seeds) == 1 and failures:
        print(failures[0].text)
    print(dict(reach))
    print(
        f"{len(failures)} of {len(seeds)} failed; {1e3 * seconds / len(seeds):.1f} ms each, "
        f"{1e3 * used / len(seeds):.1f} ms of them of this process"
    )
    return bool(failures)


if __name__ == "__main__":
    import tests.conftest  # noqa: F401 - the environment, as for tests

    sys.exit(main())
