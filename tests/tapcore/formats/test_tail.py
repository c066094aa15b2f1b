"""Space at the end of a file."""

from __future__ import annotations

from pathlib import Path

from tapcore.driver import OpenFlag
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.tail import Tail


def test_space_is_taken_behind_the_end_and_given_out_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 8000)
    file = ImageFile.open(str(path), OpenFlag.NONE)
    tail = Tail(file, 512)
    assert tail.take(4096) == (8192, True)
    assert tail.take(100) == (12288, True)
    assert tail.take(4096) == (12800, True)
    file.store(8192, b"y" * 4096, "data")
    for work in tail.release([(8192, 4096)]):
        work()
    assert tail.take(100) == (16896, True)
    assert tail.take(4096) == (8192, False), "the same length is found again"
    assert file.load(8192, 4096, "data") == bytes(4096)
    assert tail.take(4096) == (17408, True)
    for work in tail.release([(8192, 4096), (12800, 4096)]):
        work()
    assert [tail.take(4096)[0] for _ in range(2)] == [8192, 12800], "in their order, so that they may lie together"
    tail.fill()
    assert path.stat().st_size == 17408 + 4096
    file.close()
