# SPDX-License-Identifier: Apache-2.0
"""The agreed stop of several processes, with a stand-in for jax's coordination service: that one
names the largest step any process has asked about plus 1, and answers True for that step alone."""

import pytest

from flax_vlm.training import distributed


class Service:
    """Several processes that ask in turn; `notice` is the SIGTERM of any of them."""

    def __init__(self, count):
        self.asked, self.named = [0] * count, None

    def notice(self):
        self.named = max(self.asked) + 1

    def ask(self, process, step):
        self.asked[process] = step
        return step == self.named


@pytest.fixture
def service(monkeypatch):
    service = Service(2)
    monkeypatch.setattr(distributed.jax.distributed, "is_initialized", lambda: True)
    return service


def as_process(monkeypatch, service, index):
    ask = lambda step: service.ask(index, step)  # noqa: E731
    monkeypatch.setattr(distributed.multihost_utils, "reached_preemption_sync_point", ask)


def stops(monkeypatch, service, start, last, notice_after=None):
    """Runs two processes in step and returns where each stops."""
    stopped = [None, None]
    waiting = []
    for process in range(2):
        as_process(monkeypatch, service, process)
        waiting.append(distributed.Preemption(start).__enter__())
        if notice_after == "the first process has begun" and process == 0:
            service.notice()
    for step in range(start + 1, last):
        for process, preemption in enumerate(waiting):
            as_process(monkeypatch, service, process)
            if stopped[process] is None and preemption.reached(step):
                stopped[process] = step
        if notice_after == step:
            service.notice()
    return stopped


def test_a_notice_during_the_start_of_a_resumed_run_stops_it_after_one_step(monkeypatch, service):
    service.notice()
    assert stops(monkeypatch, service, start=7, last=30) == [8, 8]


def test_a_notice_when_only_one_process_has_begun_stops_both_at_one_step(monkeypatch, service):
    found = stops(monkeypatch, service, 7, 30, notice_after="the first process has begun")
    assert found == [8, 8]


def test_a_notice_in_the_middle_stops_all_at_the_step_that_the_service_names(monkeypatch, service):
    assert stops(monkeypatch, service, start=7, last=30, notice_after=12) == [13, 13]


def test_without_a_notice_nothing_stops(monkeypatch, service):
    assert stops(monkeypatch, service, start=7, last=30) == [None, None]
