"""Interleaved timing: order, counts, and what is kept. No test reads a time."""

from __future__ import annotations

import gc

from sd_plugin.bench.timing import Clock


def test_columns_run_in_turns_that_begin_with_another_each_round() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name) or name) for name in "abc"}
    samples = Clock(repeats=3, warmup=1).interleave(runs)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: (len(s.ms), s.values) for name, s in samples.items()} == {name: (3, [name] * 3) for name in "abc"}
    assert all(ms >= 0 for s in samples.values() for ms in s.ms)


def test_short_runs_are_repeated_within_a_sample_and_their_results_not_kept() -> None:
    calls = {"a": 0, "b": 0}

    def run(name: str) -> None:
        calls[name] += 1

    runs = {name: (lambda name=name: run(name)) for name in calls}
    samples = Clock(repeats=2, warmup=1, shortest=0.0).loop(runs)
    # One call to learn how long it takes, then one in every round.
    assert calls == {"a": 4, "b": 4}
    assert {name: len(ms) for name, ms in samples.items()} == {"a": 2, "b": 2}
    Clock(repeats=1, warmup=0, shortest=0.1).loop(runs)
    assert calls["a"] > 6


def test_the_device_is_waited_for_around_every_run_and_rounds_are_told() -> None:
    log: list[str] = []
    clock = Clock(1, 1, synchronize=lambda: log.append("wait"), tick=lambda: log.append("tick"))
    clock.interleave({"a": lambda: log.append("run")})
    assert log == ["wait", "run", "wait", "tick"] * 2


def test_garbage_collection_is_as_before() -> None:
    assert gc.isenabled()
    inside: list[bool] = []
    Clock(1, 0).interleave({"a": lambda: inside.append(gc.isenabled())})
    assert inside == [False]
    assert gc.isenabled() and gc.get_freeze_count() == 0
