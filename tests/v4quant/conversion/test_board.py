"""The board: ranks meet, hear each other in order, and notice when one is gone."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from v4quant.conversion import board
from v4quant.conversion.board import Board, RankLost


def together(*actions: object) -> list[BaseException | None]:
    """Run each action on a thread; what each raised."""
    raised: list[BaseException | None] = [None] * len(actions)

    def run(index: int) -> None:
        try:
            actions[index]()  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001
            raised[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(t.is_alive() for t in threads)
    return raised


def test_ranks_meet_and_hear_everything_once_in_order() -> None:
    store = dist.HashStore()
    arrived: list[int] = []
    left: list[int] = []
    heard: list[tuple[int, str, str]] = []

    def rank(number: int) -> None:
        with Board(store, number, 3) as mine:
            if number == 2:
                mine.listen(lambda *what: heard.append(what))
            for turn in range(3):
                time.sleep(0.02 * number)
                if number == 0:
                    mine.tell("turn", str(turn))
                arrived.append(turn)
                mine.meet(lambda: None)
                assert arrived.count(turn) == 3, "nobody is through before all have come"
            assert mine.wait_told("turn") == "0"
            left.append(number)

    assert together(*(lambda n=n: rank(n) for n in range(3))) == [None] * 3
    assert sorted(left) == [0, 1, 2]
    assert heard == [(0, "turn", str(i)) for i in range(3)]


def test_a_rank_that_fails_ends_those_who_wait() -> None:
    store = dist.HashStore()

    def fails() -> None:
        with Board(store, 1, 2):
            raise ValueError

    def waits() -> None:
        with Board(store, 0, 2) as mine:
            mine.meet(lambda: None)

    first, second = together(waits, fails)
    assert isinstance(first, RankLost) and "process 1" in str(first)
    assert isinstance(second, ValueError)


def test_what_fails_here_ends_waiting() -> None:
    def check() -> None:
        raise KeyError

    with pytest.raises(KeyError), Board(dist.HashStore(), 0, 2) as mine:
        mine.meet(check)


def test_silence_and_a_lost_store_end_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "PATIENCE", 0.3)
    silent = pytest.raises(RankLost, match="process 1 of this run gave no sign")
    with silent, Board(dist.HashStore(), 0, 2) as mine:
        mine.meet(lambda: None)
    monkeypatch.undo()

    class Gone:
        """A store whose host is gone."""

        def set(self, key: str, value: str, /) -> None:
            raise ConnectionError("reset\nby peer")

        def check(self, keys: list[str], /) -> bool:
            raise AssertionError

        def multi_get(self, keys: list[str], /) -> list[bytes]:
            raise AssertionError

    lost = pytest.raises(RankLost, match=r"cannot reach each other \(reset\)")
    with lost, Board(Gone(), 0, 2) as mine:
        mine.meet(lambda: None)
