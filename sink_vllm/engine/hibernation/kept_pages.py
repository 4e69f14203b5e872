"""Pages that are kept outside the block pool: how they go out, and what a step copies."""

from collections import Counter
from collections.abc import Iterable

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    get_group_id,
    make_block_hash_with_group_id,
)
from vllm.v1.request import Request

from sink_vllm.engine.hibernation.disk import Disk
from sink_vllm.engine.managers.streaming import StreamingLLMManager
from sink_vllm.engine.managers.windowed import StreamingLLMWindowManager
from sink_vllm.engine.tables import PageTables
from sink_vllm.policy.plan import PageCopy, StepPlan
from sink_vllm.policy.slots import Slots
from sink_vllm.policy.stats import StreamingLLMStats

Manager = StreamingLLMManager | StreamingLLMWindowManager


class KeptPages:
    """All pages of an engine core that are kept in host memory; ``kept`` brings them back."""

    def __init__(
        self,
        tables: PageTables,
        slots: Slots,
        page_bytes: int,
        most_loads: int,
        disk: Disk | None = None,
    ) -> None:
        """
        Args:
            tables: whose pages are kept.
            slots: of host memory, one page each.
            page_bytes: of a page of all workers.
            most_loads: pages after which a step brings no further request's pages back.
            disk: where they are kept, too.
        """
        self._tables, self._ledger, self._pool = tables, tables.ledger, tables.ledger.pool
        self.slots, self.disk = slots, disk
        self._page_bytes, self._most_loads = page_bytes, most_loads
        self._stores: list[PageCopy] = []
        self._loads: dict[int, PageCopy] = {}
        self._planning = False
        self.copied: Counter[str] = Counter()
        """Pages that went ``"out"``, came ``"back"``, or were ``"read"`` from disk before."""
        self._reported: Counter[str] = Counter()
        self._ledger.before_rewriting = self._keep_passing

    # -- out --------------------------------------------------------------------------------

    def keep_turn(self, request: Request) -> None:
        """A request ends, or might: keep what it could be resumed from."""
        hashes = request.block_hashes
        # An adapter may be another one under the same name when the server starts again.
        durable = request.lora_request is None
        for manager in self._managers:
            group = manager.kv_cache_group_id
            table = manager.req_to_blocks.get(request.request_id, ())
            for block, block_hash in zip(table, hashes, strict=False):
                if not block.is_null:
                    self._keep_hash(make_block_hash_with_group_id(block_hash, group), durable)
            for block in self._ledger.pinned(group, request.request_id) or ():
                if block.block_hash is not None:
                    self._keep_hash(block.block_hash, durable)

    def keep_checkpoint(self, request: Request) -> None:
        """A long request goes on: keep what it could be resumed from if the server is killed."""
        if self.disk is not None:
            self.keep_turn(request)

    def keep_first(self, request: Request, hashes: Iterable[BlockHash]) -> None:
        """A stream evicts for the first time, pages with these hashes among others.

        Until it is a page longer than its capacity, it is resumed as any prompt is: from its first
        token on.
        """
        durable = request.lora_request is None
        for manager in self._managers:
            for key in keys_of(manager, hashes):
                self._keep_hash(key, durable)

    def _keep_hash(self, key: BlockHashWithGroupId, durable: bool) -> None:
        if key in self.slots:
            self.slots.touch(key)
        elif (block := self._pool.cached_block_hash_to_block.get_one_block(key)) is not None:
            self._keep(key, block, passing=False)
        if self.disk is not None and durable and key in self.slots:
            self.disk.keep(key)

    def _keep_passing(self, block: KVCacheBlock) -> None:
        """A stream changes a page that it would have to start from, should it end now."""
        if block.block_hash is not None and block.block_hash not in self.slots:
            self._keep(block.block_hash, block, passing=True)

    def _keep(self, key: BlockHashWithGroupId, block: KVCacheBlock, *, passing: bool) -> None:
        if self._planning and block.block_id in self._ledger.fresh:
            return  # its content is computed behind the copies of this step
        slot = self.slots.take(key, passing=passing)
        if slot is None:
            return
        self.slots.hold(slot)
        if self.disk is not None:
            self.disk.will_store(slot)
        self._stores.append(PageCopy(block.block_id, slot, get_group_id(key)))
        self.copied["out"] += 1

    def pass_by(self, hashes: Iterable[BlockHash]) -> None:
        """A stream has evicted pages with these hashes."""
        for block_hash in hashes:
            for group in self._groups:
                self.slots.pass_by(make_block_hash_with_group_id(block_hash, group))

    # -- steps ------------------------------------------------------------------------------

    def begin(self) -> None:
        """A step begins to be planned."""
        self._planning = True
        if self.disk is not None:
            self.disk.flush()

    def take(self) -> tuple[list[PageCopy], list[PageCopy]]:
        """What the step that has been planned copies out, and back."""
        self._planning = False
        stores, loads = self._stores, list(self._loads.values())
        self._stores, self._loads = [], {}
        return stores, loads

    def done(self, plan: StepPlan | None) -> None:
        """The copies of a step have been made."""
        if plan is not None:
            for copy in (*plan.stores, *plan.loads):
                self.slots.release(copy.slot)
            if self.disk is not None:
                for copy in plan.stores:
                    self.disk.stored(copy.slot)
        if self.disk is not None:
            self.disk.flush()

    def report(self, stats: StreamingLLMStats) -> None:
        """Count what has been copied since the last report, and what is kept."""
        counts = Counter(self.copied)
        stats.pages_kept += counts["out"] - self._reported["out"]
        stats.pages_back += counts["back"] - self._reported["back"]
        stats.pages_read += counts["read"] - self._reported["read"]
        self._reported = counts
        stats.host_bytes = len(self.slots) * self._page_bytes
        stats.disk_bytes = 0 if self.disk is None else self.disk.files.nbytes

    def close(self) -> None:
        """The engine ends: what goes to disk is written, and the folder may be another's."""
        if self.disk is not None:
            self.disk.close()

    def clear(self) -> None:
        """Forget all pages: the weights may be others, or an operator wants them gone."""
        self.slots.clear()
        if self.disk is not None:
            self.disk.clear()

    def _cached(self, key: BlockHashWithGroupId) -> KVCacheBlock | None:
        return self._pool.cached_block_hash_to_block.get_one_block(key)

    @property
    def _managers(self) -> list[Manager]:
        return [*self._tables.full, *self._tables.windowed]

    @property
    def _groups(self) -> list[int]:
        return [one.kv_cache_group_id for one in self._managers]


def keys_of(manager: Manager, hashes: Iterable[BlockHash]) -> list[BlockHashWithGroupId]:
    group = manager.kv_cache_group_id
    return [make_block_hash_with_group_id(one, group) for one in hashes]
