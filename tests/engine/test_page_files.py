"""Pages in files: whole and right, or not there."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from sink_vllm.compat.disk_folder import _claim
from sink_vllm.engine.hibernation.disk import Disk
from sink_vllm.engine.hibernation.files import PageFiles
from sink_vllm.gate.refused import Refused
from sink_vllm.policy.slots import Slots

KEYS = [bytes([number]) * 36 for number in range(1, 6)]
SIZE = 5000


def page(key: bytes) -> list[memoryview]:
    """What two workers have of a page."""
    return [memoryview(key * 70)[: SIZE // 2], memoryview(key[::-1] * 70)[: SIZE // 2]]


def room() -> list[memoryview]:
    return [memoryview(bytearray(SIZE // 2)), memoryview(bytearray(SIZE // 2))]


def write(files: PageFiles, key: bytes) -> bool:
    return files.write(key, page(key), files.generation)


def is_read(files: PageFiles, key: bytes) -> bool:
    """Whether the page is there; if it is, it is the right one."""
    parts = room()
    if not files.read(key, parts):
        assert key not in files
        return False
    assert parts == page(key)
    return True


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*/*")
    return path


def test_pages_outlive_the_process(tmp_path: Path) -> None:
    files = PageFiles(tmp_path, 1 << 20)
    assert all(write(files, key) for key in KEYS)
    again = PageFiles(tmp_path, 1 << 20)
    assert (len(again), again.nbytes) == (len(KEYS), files.nbytes)
    assert all(is_read(again, key) for key in KEYS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    ],
    ids=["short", "half a header", "empty", "page", "kind", "checksum"],
)
def test_a_damaged_page_is_not_there(damage: object, tmp_path: Path) -> None:
    files = PageFiles(tmp_path, 1 << 20)
    write(files, KEYS[0])
    path = only_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert not is_read(files, KEYS[0])
    assert not path.exists()
    assert files.nbytes == 0


def test_a_page_under_another_name_is_not_there(tmp_path: Path) -> None:
    """The checksum covers the hash, too."""
    files = PageFiles(tmp_path, 1 << 20)
    write(files, KEYS[0])
    write(files, KEYS[1])
    one, other = sorted(tmp_path.glob("*/*"))
    os.replace(one, other)
    assert not is_read(files, KEYS[0])
    assert not is_read(files, KEYS[1])


def test_the_least_recently_used_files_are_deleted(tmp_path: Path) -> None:
    files = PageFiles(tmp_path, 3 * (SIZE + 100))
    for key in KEYS[:3]:
        write(files, key)
    assert is_read(files, KEYS[0])
    write(files, KEYS[3])
    assert [key in files for key in KEYS[:4]] == [True, False, True, True]
    assert len(list(tmp_path.glob("*/*"))) == 3
    assert len(PageFiles(tmp_path, SIZE + 100)) == 1


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """As a full disk: the kernel refuses to let files grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither half a page nor a name for it; and it goes on when there is room again."""
    files = PageFiles(tmp_path, 1 << 20)
    with files_of_at_most(SIZE // 2):
        assert not write(files, KEYS[0])
        assert not write(files, KEYS[1])
    assert len(files) == 0
    assert not list(tmp_path.glob("*/*"))
    assert write(files, KEYS[0])
    assert is_read(files, KEYS[0])


def test_all_are_forgotten_at_once(tmp_path: Path) -> None:
    """Those that are being written, too: they are of weights that may have gone."""
    files = PageFiles(tmp_path, 1 << 20)
    write(files, KEYS[0])
    before = files.generation
    files.clear()
    assert not files.write(KEYS[1], page(KEYS[1]), before)
    assert not list(tmp_path.glob("*/*"))
    assert len(PageFiles(tmp_path, 1 << 20)) == 0


def test_pages_go_from_slots_to_files_and_back(tmp_path: Path) -> None:
    """Behind the copy of the workers, and not before; slots are held meanwhile."""
    slots = Slots(2)
    memory = bytearray(2 * SIZE)
    disk = Disk(tmp_path, 1 << 20, slots, [memoryview(memory)])
    slot = slots.take(KEYS[0])
    assert slot is not None
    disk.will_store(slot)
    disk.keep(KEYS[0])
    disk.wait()
    assert not list(tmp_path.glob("*/*"))
    memory[slot * SIZE : (slot + 1) * SIZE] = b"x" * SIZE
    disk.stored(slot)
    disk.wait()
    assert not slots._held
    slots.clear()
    memory[:] = bytes(2 * SIZE)
    assert disk.read(KEYS[0])
    slot = slots.slot_of[KEYS[0]]
    assert memory[slot * SIZE : (slot + 1) * SIZE] == b"x" * SIZE
    assert not disk.read(KEYS[1])
    slots.check()
    disk.close()


def test_a_folder_of_another_server_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pages-of.json"
    _claim(folder, {"model": "a", "dtype": "float32"}, "/pages")
    _claim(folder, {"model": "a", "dtype": "float32"}, "/pages")
    with pytest.raises(Refused, match="'/pages' has the pages of another server: model was 'a'"):
        _claim(folder, {"model": "b", "dtype": "float32"}, "/pages")
    folder.write_text("nonsense")
    with pytest.raises(Refused, match="cannot be used"):
        _claim(folder, {"model": "a"}, "/pages")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"cannot be used .*name a folder that this server may write"):
        _claim(tmp_path / "file" / "pages-of.json", {"model": "a"}, "/pages")


def test_guard_the_block_pool_registers_blocks_under_hashes() -> None:
    """A free block with a hash is found by it, is touched, and loses it when it is reused."""
    pool = BlockPool(4, enable_caching=True, hash_block_size=16)
    key = make_block_hash_with_group_id(BlockHash(KEYS[0]), 3)
    (block,) = pool.get_new_blocks(1)
    block.set_block_hash(key)
    pool.cached_block_hash_to_block.insert(key, block)
    pool.free_blocks([block])
    assert pool.get_cached_block(BlockHash(KEYS[0]), [3]) == [block]
    assert pool.cached_block_hash_to_block.get_one_block(key) is block
    assert pool.get_new_blocks(2)[0] is not block
    assert pool.get_new_blocks(1) == [block]
    assert block.block_hash is None
    assert pool.cached_block_hash_to_block.get_one_block(key) is None
