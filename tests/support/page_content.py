"""A worker without a model: which token every slot of every page stands for.

It learns of requests, block tables and page moves as the real model runners do, and writes token
ids where they write keys and values; a page with the state of recurrent layers holds a number made
of all tokens so far, evicted ones included. So a chunk that would be computed over anything but the
tokens before it is noticed, and so is a request whose tokens the scheduler counts differently.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from vllm.v1.core.sched.output import SchedulerOutput

from sink_vllm.policy.plan import StepPlan


@dataclass(slots=True)
class Row:
    """A request in the worker's batch."""

    tokens: list[int]
    computed: int
    tables: list[list[int]]
    """Pages by KV cache group."""
    evicted: int | None
    """Stream minus cache positions; ``None``: not told, and runner V1 does not need it."""
    drafts: list[int] = field(default_factory=list)
    """Tokens behind ``tokens`` that are verified in this step."""


@dataclass(slots=True)
class PageContent:
    """See above; ``windows`` has, per KV cache group, how many tokens a query sees (0: all), or
    that its layers are recurrent."""

    RECURRENT: ClassVar = -1

    block_size: int
    windows: Sequence[int]
    rows: dict[str, Row] = field(default_factory=dict)
    pages: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Token ids by group and page; -1 where nothing was written."""
    slots: dict[int, list[int]] = field(default_factory=dict)
    """The same of pages that are kept outside the pool."""
    states: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What the state of a request must be, and its last token; it begins anew where nothing is
    computed yet."""
    past: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    """What it was, by stream position, since it began anew."""
    prompts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """What clients sent first, by request: a state may begin as that after some of it."""
    copied: int = 0
    """Requests that began with a state of the prefix cache."""

    def execute(self, planned: SchedulerOutput) -> list[str]:
        """Run a step; returns the requests to sample for.

        Raises:
            AssertionError: a slot that is read holds another token.
        """
        for request_id in planned.finished_req_ids:
            self.rows.pop(request_id, None)
            self.states.pop(request_id, None)
            self.past.pop(request_id, None)
        plan = StepPlan.of(planned) or StepPlan()
        self._learn_new(planned, plan)
        self._learn_cached(planned)
        for copy in plan.stores:
            self.slots[copy.slot] = list(self._page(copy.group, copy.block))
        for copy in plan.loads:
            self.pages[copy.group, copy.block] = list(self.slots[copy.slot])
        read = [self._page(m.group, m.src)[m.begin : m.end] for m in plan.moves]
        for move, tokens in zip(plan.moves, read, strict=True):
            self._page(move.group, move.dst)[move.begin : move.end] = tokens
        # A layer writes the keys of all requests before it attends to any: what one computes,
        # another may find in the prefix cache in the same step.
        for request_id, chunk in planned.num_scheduled_tokens.items():
            row = self.rows[request_id]
            row.drafts = planned.scheduled_spec_decode_tokens.get(request_id, [])
            if self.RECURRENT in self.windows:
                self._run_states(request_id, chunk)
            self._write(row, chunk)
        for request_id, chunk in planned.num_scheduled_tokens.items():
            self._check(request_id, chunk)
        rows = self.rows
        return [r for r in planned.num_scheduled_tokens if rows[r].computed >= len(rows[r].tokens)]

    def sampled(self, request_id: str, tokens: Sequence[int]) -> None:
        """The worker appends what it sampled itself, and forgets what it computed in vain."""
        row = self.rows[request_id]
        row.tokens += tokens
        row.computed, row.drafts = len(row.tokens) - 1, []

    def _learn_new(self, planned: SchedulerOutput, plan: StepPlan) -> None:
        for data in planned.scheduled_new_reqs:
            refresh = plan.refreshes.get(data.req_id)
            tokens = data.prefill_token_ids
            unknown = None if tokens is None else 0  # runner V2 samples at stream positions
            if tokens is None:
                outputs = refresh.output_token_ids if refresh is not None else []
                tokens = [*(data.prompt_token_ids or ()), *outputs]
            self.rows[data.req_id] = Row(
                list(tokens),
                data.num_computed_tokens,
                [list(pages) for pages in data.block_ids],
                refresh.evicted if refresh is not None else unknown,
            )

    def _learn_cached(self, planned: SchedulerOutput) -> None:
        cached = planned.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            row = self.rows[request_id]
            resumed = request_id in cached.resumed_req_ids
            tokens = cached.all_token_ids.get(request_id)
            if tokens is not None and (resumed or len(tokens) > len(row.tokens)):
                row.tokens = list(tokens)
            row.computed = cached.num_computed_tokens[index]
            new = cached.new_block_ids[index]
            if resumed:
                assert new is not None
                row.tables = [list(pages) for pages in new]
            elif new is not None:
                for table, pages in zip(row.tables, new, strict=True):
                    table += pages

    def _run_states(self, request_id: str, chunk: int) -> None:
        """A state goes on from what is in its page, unless its request begins."""
        row = self.rows[request_id]
        if not row.computed:
            self.past[request_id] = {}
        past = self.past.setdefault(request_id, {})
        known, last = self._state_before(request_id) if row.computed else (0, None)
        for group, window in enumerate(self.windows):
            if window == self.RECURRENT and row.computed:
                found = self._page(group, row.tables[group][0])
                assert found == [known], f"{request_id}: the state of others, {found}, not {known}"
        if row.computed:
            wanted = row.tokens[row.computed - 1]
            assert last == wanted, f"{request_id}: its state is that after {last}, not {wanted}"
        position = (row.evicted or 0) + row.computed
        for number, token in enumerate(row.tokens[row.computed : row.computed + chunk], 1):
            known, last = hash((known, token)), token
            past[position + number] = known, last
        assert last is not None
        self.states[request_id] = known, last
        for group, window in enumerate(self.windows):
            if window == self.RECURRENT:
                self.pages[group, row.tables[group][0]] = [known]

    def _state_before(self, request_id: str) -> tuple[int, int]:
        """What the state of a request must be before a step: that after the step before, or after
        as many tokens of its own, evicted ones too, if it comes from the prefix cache."""
        row = self.rows[request_id]
        groups = [one for one, window in enumerate(self.windows) if window == self.RECURRENT]
        found = [self._page(one, row.tables[one][0]) for one in groups]
        latest = self.states.get(request_id)
        if latest is not None and found == [[latest[0]]] * len(groups):
            return latest
        self.copied += 1
        earlier = self.past[request_id].get((row.evicted or 0) + row.computed)
        if earlier is not None and found == [[earlier[0]]] * len(groups):
            return earlier
        known, last = 0, -1
        for token in self._tokens_before(request_id, row):
            known, last = hash((known, token)), token
        return known, last

    def _tokens_before(self, request_id: str, row: Row) -> Sequence[int]:
        if not row.evicted or request_id in self.states:
            return row.tokens[: row.computed]  # the survivors of which it was built anew
        return self.prompts[request_id][: row.evicted + row.computed]

    def _page(self, group: int, page: int) -> list[int]:
        return self.pages.setdefault((group, page), [-1] * self.block_size)

    def _check(self, request_id: str, chunk: int) -> None:
        """What the tokens of the chunk see, the first of them farthest back."""
        row, size = self.rows[request_id], self.block_size
        for group, window in enumerate(self.windows):
            table = row.tables[group]
            if window == self.RECURRENT:
                continue
            begin = max(row.computed - chunk + 1 - window, 0) if window else 0
            first, last = begin // size, -(-row.computed // size)
            held: list[int] = []
            for page in table[first:last]:
                held += self._page(group, page)
            skip = begin - first * size
            found = held[skip : skip + row.computed - begin]
            wanted = [*row.tokens, *row.drafts][begin : row.computed]
            assert found == wanted, (
                f"{request_id}, group {group}: its cache holds {found}, not {wanted}"
            )

    def _write(self, row: Row, chunk: int) -> None:
        size, end = self.block_size, row.computed + chunk
        tokens = [*row.tokens, *row.drafts] if row.drafts else row.tokens
        assert end <= len(tokens), f"{end} of {len(tokens)} tokens"
        for group, window in enumerate(self.windows):
            table = row.tables[group]
            if window == self.RECURRENT:
                assert len(table) == 1, f"{len(table)} pages of states"
                continue
            for position in range(row.computed, end):
                page = self._page(group, table[position // size])
                page[position % size] = tokens[position]
        row.computed = end
