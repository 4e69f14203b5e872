"""A worker without a model: which token every slot of every page stands for.

It learns of requests, block tables and page moves as the real model runners do, and writes token
ids where they write keys and values. So a chunk that would be computed over anything but the
tokens before it is noticed, and so is a request whose tokens the scheduler counts differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    """See above; ``windows`` has, per KV cache group, how many tokens a query sees (0: all)."""

    block_size: int
    windows: Sequence[int]
    rows: dict[str, Row] = field(default_factory=dict)
    pages: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Token ids by group and page; -1 where nothing was written."""

    def execute(self, planned: SchedulerOutput) -> list[str]:
        """Run a step; returns the requests to sample for.

        Raises:
            AssertionError: a slot that is read holds another token.
        """
        for request_id in planned.finished_req_ids:
            self.rows.pop(request_id, None)
        plan = StepPlan.of(planned) or StepPlan()
        self._learn_new(planned, plan)
        self._learn_cached(planned)
        read = [self._page(m.group, m.src)[m.begin : m.end] for m in plan.moves]
        for move, tokens in zip(plan.moves, read, strict=True):
            self._page(move.group, move.dst)[move.begin : move.end] = tokens
        # A layer writes the keys of all requests before it attends to any: what one computes,
        # another may find in the prefix cache in the same step.
        for request_id, chunk in planned.num_scheduled_tokens.items():
            row = self.rows[request_id]
            row.drafts = planned.scheduled_spec_decode_tokens.get(request_id, [])
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

    def _page(self, group: int, page: int) -> list[int]:
        return self.pages.setdefault((group, page), [-1] * self.block_size)

    def _check(self, request_id: str, chunk: int) -> None:
        """What the tokens of the chunk see, the first of them farthest back."""
        row, size = self.rows[request_id], self.block_size
        for group, window in enumerate(self.windows):
            table = row.tables[group]
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
        for group in range(len(self.windows)):
            table = row.tables[group]
            for position in range(row.computed, end):
                page = self._page(group, table[position // size])
                page[position % size] = tokens[position]
        row.computed = end
