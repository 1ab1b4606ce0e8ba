# SPDX-License-Identifier: Apache-2.0
"""The other processes of a run: when one of them is gone, all end and say which it was.

Without this a lost process leaves the others hanging in a collective, or jax aborts them with a
text that names nobody. Every process holds the connection to process 0 from the roll call, and a
thread that listens there while the main thread computes:

- a process that ends, whatever ended it, closes its connection at once;
- a machine that vanishes falls silent: both ends speak now and then;
- process 0 tells the others who it was, and ends after them: jax's coordination service lives in
  it, without which they would be aborted before they could speak.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType

from flax_vlm.training.roll_call import Link

# The exit code of a run that was told to stop, saved its state and can be started again
# (EX_TEMPFAIL of sysexits.h): schedulers requeue on it.
EXIT_PREEMPTED = 75
# Of one that lost another process (EX_UNAVAILABLE): starting all of them again goes on from the
# last checkpoint.
EXIT_PEER_LOST = 69

# How long a process waits with an error of its own for the news that would explain it, and process
# 0 for the others to end.
_GRACE_SECONDS = 5.0

_REASONS = {
    "gone": "is gone: it was killed or crashed",
    "silent": "has not been heard from for {silence:g} s (--heartbeat_timeout): its machine or the "
    "network is down",
    "failed": "stopped with an error, which it has printed",
}


class Peers:
    """Watches the other processes; a context manager around what they do together.

    Args:
        index: of this process.
        hosts: host names of all processes.
        links: {process: Link}: of process 0 to all others, of the others to process 0.
        silence: seconds without a word after which a process counts as lost.
    """

    def __init__(
        self,
        index: int = 0,
        hosts: Sequence[str] = (),
        links: Mapping[int, Link] | None = None,
        silence: float = 100.0,
    ) -> None:
        self._index, self._hosts, self._silence = index, hosts, silence
        self._links = dict(links or {})
        self._done, self._leaving = False, threading.Event()
        self._ending = threading.Lock()  # taken once, by the main thread or the listening one
        self._thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        self._thread.start()

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._links:
            traceback.print_exception(error)
            self.leave(1)

    def leave(self, code: int) -> None:
        """Tells the others that this process is done; with an error code, ends it here.

        jax would make it wait for the others on its way out, and they for it.
        """
        self._leaving.set()
        if code in (0, EXIT_PREEMPTED):
            self._done = True
            for link in self._links.values():
                link.send("done")
        elif self._links:
            # the loss of another may be the cause: then the thread ends this process
            self._thread.join(_GRACE_SECONDS)
            self._ending.acquire()
            self._tell(self._index, "failed")
            sys.stdout.flush()
            os._exit(code)

    def _listen(self) -> None:
        every = self._silence / 10
        heard = dict.fromkeys(self._links, time.monotonic())
        spoke = -every
        with selectors.DefaultSelector() as selector:
            for index, link in self._links.items():
                selector.register(link.socket, selectors.EVENT_READ, index)
            while heard and not self._done:
                if time.monotonic() - spoke >= every:
                    spoke = time.monotonic()
                    for link in self._links.values():
                        link.send("alive")
                for key, _ in selector.select(every):
                    heard[key.data] = time.monotonic()
                    if self._is_done(key.data):
                        selector.unregister(key.fileobj)
                        del heard[key.data]
                for index, when in heard.items():
                    if time.monotonic() - when > self._silence:
                        self._lose(index, "silent")

    def _is_done(self, index: int) -> bool:
        """Returns whether to listen no longer to a process; ends this one if another is lost."""
        lines = self._links[index].receive()
        if lines is None:
            self._lose(index, "gone")
        for line in lines or ():
            match line.split():
                case ["done"]:
                    return True
                case ["lost", other, reason]:
                    self._lose(int(other), reason)
                    return True
        return False

    def _lose(self, index: int, reason: str) -> None:
        """Ends this process, unless it is about to end with an error of its own."""
        if self._done or (reason == "failed" and self._leaving.wait(1.0)):
            return
        self._ending.acquire()
        self._tell(index, reason)
        count = len(self._hosts)
        print(
            f"\nprocess {index} of {count} (host {self._hosts[index]}) "
            f"{_REASONS[reason].format(silence=self._silence)}. Process {self._index} ends too; "
            f"start all {count} again to go on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        # not by an exception: the main thread may hang in a collective for ever
        os._exit(1 if reason == "failed" else EXIT_PEER_LOST)

    def _tell(self, index: int, reason: str) -> None:
        """Tells the others which process is lost; in process 0, waits until they have ended."""
        others = [link for other, link in self._links.items() if other != index]
        for link in others:
            link.send(f"lost {index} {reason}")
        if self._index == 0:
            deadline = time.monotonic() + _GRACE_SECONDS
            with contextlib.suppress(OSError):
                for link in others:
                    link.socket.settimeout(max(0.1, deadline - time.monotonic()))
                    while link.receive() is not None:
                        pass
