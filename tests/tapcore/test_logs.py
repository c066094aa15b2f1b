"""Messages of a daemon are written by a thread, in order, and nobody waits for it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from tapcore import logs


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("x", logging.WARNING, "x", 1, text, None, None)


def test_who_does_not_read_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING", 50)
    read_fd, write_fd = os.pipe()
    writer = logs.Writer(write_fd)
    for number in range(1000):
        writer.handle(record(f"{number} " + "x" * 1000))
    numbers: list[int] = []
    left_out = 0
    with os.fdopen(read_fd) as reader:
        while len(numbers) + left_out < 1000:
            line = reader.readline()
            if "left out" in line:
                left_out += int(line[1:].split()[0])
            else:
                numbers.append(int(line.split()[0]))
        writer.end()
        os.close(write_fd)
    assert numbers == sorted(numbers) and left_out > 0


def test_the_last_words_of_a_process_are_heard() -> None:
    run = ("import logging; from tapcore import logs; logs.begin('me: %(message)s', verbose=False); "
           "logging.info('no'); logging.warning('one'); logging.error('two\\udcff')")
    result = subprocess.run([sys.executable, "-c", run], capture_output=True, check=True)
    assert result.stderr == b"me: one\nme: two?\n"
