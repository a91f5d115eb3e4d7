"""Threads that share work."""

import os
import threading

import pytest

from paramserver.team import Team


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_member_works_once_a_time_and_the_caller_is_the_first(size: int) -> None:
    team, seen = Team(size, "test"), []
    for _ in range(3):
        team.run(lambda thread: seen.append((thread, threading.get_ident())))
        assert sorted(thread for thread, _ in seen) == list(range(size))
        assert dict(seen)[0] == threading.get_ident()
        assert len({ident for _, ident in seen}) == size
        seen.clear()
    team.close()


@pytest.mark.parametrize("member", [0, 1])
def test_what_a_member_raises_comes_out_once_all_are_done(member: int) -> None:
    team, others = Team(3, "test"), []

    def work(thread: int) -> None:
        if thread == member:
            raise ValueError("a fault")
        others.append(thread)

    with pytest.raises(ValueError, match="a fault"):
        team.run(work)
    assert sorted(others) == sorted({0, 1, 2} - {member})
    team.run(others.append)
    assert sorted(others) == sorted([*({0, 1, 2} - {member}), 0, 1, 2]), "the team goes on"
    team.close()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_helpers_keep_off_the_callers_core() -> None:
    team, allowed = Team(2, "test"), {}
    mine = os.sched_getaffinity(0)
    core = min(mine)
    os.sched_setaffinity(0, {core})
    try:
        team.run(lambda thread: allowed.__setitem__(thread, os.sched_getaffinity(0)))
    finally:
        os.sched_setaffinity(0, mine)
    assert allowed == {0: {core}, 1: mine - {core}}
    team.close()


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    team = Team(3, "test")
    assert threading.active_count() == before + 2
    team.close()
    assert threading.active_count() == before
    team.close()
    alone: list[int] = []
    team.run(alone.append)
    assert alone == [0]
