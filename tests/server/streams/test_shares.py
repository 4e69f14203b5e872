"""Clients share what a server remembers: nobody pushes out those who hold their share or less."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from sink_vllm.server.streams.clients import client_name
from sink_vllm.server.streams.store import NoRoom, StreamStore
from sink_vllm.server.streams.stored import StoredStream

EPISODES = 120
STEPS = 250


def _store(streams: int, tokens: int = 10**9) -> StreamStore:
    return StreamStore(most_streams=streams, most_tokens=tokens, idle_seconds=60)


def _create(store: StreamStore, client: str, tokens: int = 0) -> StoredStream:
    return store.create(client, "m", None, {}, tokens=[1] * tokens)


def _held(store: StreamStore) -> Counter[str]:
    return Counter(stream.client for stream in store._streams.values())


# -- by example -----------------------------------------------------------------------------------


def test_one_client_alone_may_use_everything() -> None:
    store = _store(256)
    streams = [_create(store, "a") for _ in range(256)]

    for stream in streams:
        store.acquire(stream.id)

    assert store.in_use == 256


def test_a_client_that_creates_without_end_forgets_its_own_streams() -> None:
    """One client's 256 creations used to forget everybody's."""
    store = _store(256)
    others = [_create(store, f"client {n}") for n in range(3) for _ in range(64)]

    for _ in range(1000):
        _create(store, "greedy")

    assert all(stream.id in store._streams for stream in others)
    assert _held(store)["greedy"] == 64


def test_the_client_that_holds_most_makes_room() -> None:
    store = _store(256)
    greedy = [_create(store, "greedy") for _ in range(256)]

    for _ in range(200):
        _create(store, "late")

    assert _held(store) == {"greedy": 128, "late": 128}
    assert [s.id in store._streams for s in greedy] == [False] * 128 + [True] * 128


def test_streams_in_use_of_one_client_do_not_lock_out_the_others() -> None:
    """256 open appends used to be 429 for all; now for the one who has them."""
    store = _store(256)
    greedy = [_create(store, "greedy") for _ in range(256)]
    for stream in greedy:
        store.acquire(stream.id)

    with pytest.raises(NoRoom):
        _create(store, "greedy")
    late = [_create(store, "late") for _ in range(128)]
    for stream in late:
        store.acquire(stream.id)
    with pytest.raises(NoRoom):
        _create(store, "late")

    store.release(greedy[0])
    with pytest.raises(NoRoom):
        store.acquire(greedy[0].id)  # there are too many streams, and they are this client's
    for stream in greedy[1:]:  # the turns end: what was too much goes
        store.release(stream)
    assert _held(store) == {"greedy": 128, "late": 128}
    store.acquire(greedy[-1].id)


def test_tokens_are_shared_in_the_same_way() -> None:
    store = _store(256, tokens=1000)
    small = [_create(store, "small", 50) for _ in range(5)]

    for _ in range(20):
        _create(store, "greedy", 400)

    assert all(stream.id in store._streams for stream in small)
    assert _held(store)["greedy"] == 1
    assert store.tokens == 650


def test_more_clients_than_streams_take_turns() -> None:
    """No share is left for everybody: the least recently used stream goes, as for one client."""
    store = _store(4)
    streams = [_create(store, f"client {n}") for n in range(10)]

    assert [s.id in store._streams for s in streams] == [False] * 6 + [True] * 4


# -- as a rule ------------------------------------------------------------------------------------


@dataclass
class _Episode:
    """Random clients at a random store, and what must hold after every step."""

    seed: int
    forgotten: int = 0
    refused: int = 0

    def run(self) -> None:
        self.rng = rng = random.Random(self.seed)
        self.limits = {"streams": rng.randint(1, 20), "tokens": rng.choice([50, 200, 1000])}
        self.now = 0.0
        self.store = StreamStore(
            most_streams=self.limits["streams"],
            most_tokens=self.limits["tokens"],
            idle_seconds=200,
            clock=lambda: self.now,
        )
        self.clients = [f"client {n}" for n in range(rng.randint(1, 8))]
        self.greed = [rng.choice([1, 1, 20]) for _ in self.clients]
        for _ in range(STEPS):
            self.step()

    def step(self) -> None:
        self.now += self.rng.random()
        self.store.forget_idle()
        (client,) = self.rng.choices(self.clients, self.greed)
        before = list(self.store._streams.values())
        busy = {s.id for s in before if s.busy}
        held = {c: self.held(c) for c in self.clients}
        asked = self.rng.choice(["create", "create", "acquire", "acquire", "release", "remove"])
        new = {"streams": 0, "tokens": 0}
        if asked == "create":
            new = {"streams": 1, "tokens": self.tokens(self.limits["tokens"] - 1)}
        refused, removed = None, None
        try:
            removed = self.act(client, asked, new["tokens"])
        except NoRoom as error:
            refused = error.resource
            self.refused += 1
        gone = [s for s in before if s.id not in self.store._streams and s is not removed]
        self.forgotten += len(gone)
        assert not {s.id for s in gone} & busy
        self.check_shares(client, asked, new, held, gone, refused)
        self.check_sums()

    def act(self, client: str, asked: str, tokens: int) -> StoredStream | None:
        """Do something that the client may do; a stream that was removed is returned."""
        if asked == "create":
            _create(self.store, client, tokens)
            return None
        in_use = asked == "release"
        own = [s for s in self.store._streams.values() if (s.client, s.busy) == (client, in_use)]
        if not own:
            return None
        stream = self.rng.choice(own)
        if asked == "acquire":
            self.store.acquire(stream.id)
        elif asked == "release":
            stream.tokens.extend([1] * self.tokens(self.limits["tokens"] - len(stream.tokens)))
            self.store.release(stream)
        else:
            self.store.remove(stream.id)
            return stream
        return None

    def tokens(self, most: int) -> int:
        """Few, or anything up to ``most``."""
        return self.rng.randint(0, self.rng.choice([min(5, most), most]))

    def held(self, client: str) -> dict[str, int]:
        mine = [s for s in self.store._streams.values() if s.client == client]
        return {"streams": len(mine), "tokens": sum(s.counted for s in mine)}

    def check_shares(
        self,
        client: str,
        asked: str,
        new: dict[str, int],
        held: dict[str, dict[str, int]],
        gone: list[StoredStream],
        refused: str | None,
    ) -> None:
        """The rules, with shares as they were when the client asked.

        1. Nobody loses a stream to another client without having held more than the share.
        2. A client over its share takes nothing from those who hold less, except at the end of
           a turn, which cannot be refused.
        3. Only a client over its share is refused, unless the limit is exceeded twice.
        """
        clients = {c for c in self.clients if held[c]["streams"]} | {client}
        share = {r: limit // len(clients) for r, limit in self.limits.items()}
        left = {c for c in clients if self.held(c)["streams"]} | {client}
        wide = {r: max(limit // len(left), 1) for r, limit in self.limits.items()}
        mine = self.held(client)
        if refused:
            mine = {r: mine[r] + new[r] for r in mine}
        for stream in gone:
            theirs = held[stream.client]
            if stream.client != client:
                over = [r for r in share if theirs[r] > share[r]]
                assert over
                assert asked == "release" or any(
                    mine[r] <= wide[r] or theirs[r] > mine[r] for r in over
                )
        if refused:
            total = sum(each[refused] for each in held.values()) + new[refused]
            assert total > self.limits[refused]
            wanted = held[client][refused] + new[refused]
            assert wanted > share[refused] or total > 2 * self.limits[refused]

    def check_sums(self) -> None:
        streams = self.store._streams.values()
        assert self.store.tokens == sum(s.counted for s in streams)
        assert self.store.in_use == sum(s.busy for s in streams)
        assert {s.id for s in streams if not s.busy} == set(self.store._idle)
        assert len(self.store) <= 2 * self.limits["streams"]
        if not any(s.busy for s in streams):
            assert len(self.store) <= self.limits["streams"]
            last = max((s.counted for s in streams), default=0)
            assert self.store.tokens <= self.limits["tokens"] + last
        assert self.store.tokens <= 3 * self.limits["tokens"]


def test_no_client_pushes_out_those_inside_their_share() -> None:
    """Random clients, some of them greedy, at random limits of both kinds."""
    episodes = [_Episode(seed) for seed in range(EPISODES)]
    for episode in episodes:
        episode.run()

    assert sum(episode.forgotten for episode in episodes) > EPISODES
    assert sum(episode.refused for episode in episodes) > EPISODES


# -- who is a client ------------------------------------------------------------------------------


def test_a_key_is_a_client_wherever_it_comes_from() -> None:
    one = client_name("Bearer k", "1.2.3.4", keys_checked=True)

    assert one == client_name("bearer k", "5.6.7.8", keys_checked=True)
    assert one != client_name("Bearer l", "1.2.3.4", keys_checked=True)
    assert "k" not in one.split()  # nor can it be read from here


def test_a_key_that_nobody_checks_is_no_client() -> None:
    """A client could make up one for each stream."""
    names = {client_name(f"Bearer {n}", "1.2.3.4", keys_checked=False) for n in range(9)}

    assert names == {client_name(None, "1.2.3.4", keys_checked=False)}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1.2.3.4", "1.2.3.5", False),
        ("1.2.3.4", "::ffff:1.2.3.4", True),
        ("2001:db8:1:2::3", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::3", "2001:db8:1:3::3", False),
        ("fe80::1%eth0", "fe80::2", True),
        (None, "1.2.3.4", False),
        (None, None, True),
    ],
)
def test_an_address_is_a_client(one: str | None, other: str | None, same: bool) -> None:
    names = {client_name(None, host, keys_checked=False) for host in (one, other)}

    assert len(names) == (1 if same else 2)
