"""The barrier of a run's ranks: who waits for whom, and what becomes of the dead."""

from __future__ import annotations

import threading
import time

import pytest

from selector.commands import ranks
from selector.commands.ranks import Ranks
from selector.errors import UsageError
from selector.files import write_json

pytestmark = pytest.mark.slow  # what is waited for are seconds


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ranks, "BEAT", 0.02)


@pytest.fixture
def launch(tmp_path):
    """``launch(work, ...)`` runs one rank per function, each called with its `Ranks`; -> what each raised, or None."""

    def run(*works, timeout=1.5):
        raised: list[BaseException | None] = [None] * len(works)

        def one(rank, work):
            try:
                with Ranks(tmp_path, (rank, len(works)), timeout) as group:
                    work(group)
            except UsageError as error:
                raised[rank] = error

        threads = [threading.Thread(target=one, args=each) for each in enumerate(works) if each[1] is not None]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        return raised

    return run


def test_nobody_leaves_before_the_last_is_done(launch):
    left, done = {}, {}

    def work(seconds):
        def one(group):
            time.sleep(seconds)
            done[group.rank] = time.monotonic()
            group.wait()
            left[group.rank] = time.monotonic()

        return one

    # Longer than the patience of the others: a rank at work gives signs of life.
    assert launch(work(0), work(2.0), work(0.1)) == [None] * 3
    assert min(left.values()) >= max(done.values())


def test_rank_0_counts_for_all(launch):
    seen = []

    def leader(group):
        group.wait()
        seen.append(group.advance("toy"))

    def other(group):
        for _ in range(3):
            group.advance("toy")
        group.advance("other")
        group.wait()

    assert launch(leader, other, other) == [None] * 3
    assert seen == [1 + 3 + 3]


def test_a_rank_that_never_starts_is_named(launch):
    first, _, third = launch(Ranks.wait, None, Ranks.wait)
    assert "rank 1 of 3 has given no sign of life for 1.5 s" in str(first)
    assert "rank 0 of 3 failed: rank 1 of 3" in str(third)


def test_a_rank_that_dies_is_named(launch):
    def killed(group):
        group._stop.set()  # a killed process writes nothing any more
        group._thread.join()
        group._beat = lambda: None

    first, second = launch(Ranks.wait, killed)
    assert "rank 1 of 2 has given no sign of life" in str(first)
    assert second is None


def test_a_rank_that_fails_says_why_at_once(launch):
    def failing(group):
        time.sleep(0.1)
        raise UsageError("a sample\nthat cannot be measured")

    start = time.monotonic()
    first, second = launch(Ranks.wait, failing, timeout=15.0)
    assert str(first) == "rank 1 of 2 failed: a sample that cannot be measured"
    assert time.monotonic() - start < 5
    assert str(second) == "rank 1 of 2: a sample\nthat cannot be measured"


def test_a_failure_is_heard_while_others_are_waited_for(launch):
    ended = {}

    def leader(group):
        try:
            group.wait()
        finally:
            ended["leader"] = time.monotonic()

    def slow(group):
        time.sleep(2.0)
        ended["slow"] = time.monotonic()

    def failing(group):
        raise UsageError("no memory")

    assert str(launch(leader, slow, failing)[0]).startswith("rank 2 of 3 failed: no memory")
    assert ended["leader"] < ended["slow"] - 1


def test_the_others_hear_that_rank_0_failed(launch):
    def interrupted(group):
        time.sleep(0.1)
        group.stop("interrupted")

    assert str(launch(interrupted, Ranks.wait)[1]) == "rank 1 of 2: rank 0 of 2 failed: interrupted"


@pytest.mark.parametrize("state", ["done", "failed: long ago"])
def test_an_earlier_launch_does_not_count(launch, tmp_path, state):
    """Its files lie there, and look as if every rank were through."""
    for rank in (0, 1):
        about = {"process": "x", "beat": 7, "state": state, "steps": {"toy": 5}, "released": ["x"]}
        write_json(tmp_path / ranks.FOLDER / f"{rank}-of-2.json", about)
    steps = []

    def leader(group):
        steps.append(group.steps("toy"))
        group.wait()

    (first, _) = launch(leader, None)
    assert "rank 1 of 2 has given no sign of life" in str(first)
    assert steps == [0]
    assert launch(Ranks.wait, Ranks.wait) == [None, None]


def test_one_process_waits_for_nobody_and_writes_nothing(tmp_path):
    with Ranks(tmp_path, (0, 1), timeout=0.1) as group:
        assert group.advance("toy") == 1
        group.wait()
    assert not list(tmp_path.iterdir())
