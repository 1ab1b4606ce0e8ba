# SPDX-License-Identifier: Apache-2.0
"""How the processes of a run find each other: process 0 waits, the others connect and say who they
are.

It comes before `jax.distributed`, on the same port. jax's own wait ends in an abort that says only
"deadline exceeded"; here the processes that did not come are named. The connections stay open:
peers.py watches them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import selectors
import socket
import sys
import time

# Greets and keeps strangers out: port scanners, the jax server of a run that is just ending.
_GREETING = "flax_vlm"
_RETRY_SECONDS = 0.2
_REPORT_SECONDS = 30.0
_GRACE_SECONDS = 5.0


class MissingProcessError(OSError):
    """A process of the run did not come in time; the message says which."""


@dataclasses.dataclass
class Link:
    """One TCP connection between process 0 and another, spoken over in lines.

    Attributes:
        socket: blocking; `receive` is only called when something has come.
        unread: the beginning of a line whose end has not come yet.
    """

    socket: socket.socket
    unread: bytes = b""

    def send(self, line: str) -> None:
        """Sends a line; that the other end is closed is for `receive` to find out."""
        with contextlib.suppress(OSError):
            self.socket.sendall(f"{line}\n".encode())

    def receive(self) -> list[str] | None:
        """Returns the lines that have come, None if the other end is closed."""
        try:
            received = self.socket.recv(2**16)
        except OSError:  # a killed process resets the connection
            return None
        *lines, self.unread = (self.unread + received).split(b"\n")
        return [line.decode(errors="replace") for line in lines] if received else None


def open_port(port: int = 0) -> socket.socket:
    """Returns a socket that listens on all interfaces; port 0 takes a free one.

    Raises:
        OSError: if the port is taken.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=4096, dualstack_ipv6=both)
    except OSError as error:
        raise OSError(
            f"process 0 must be able to listen on port {port}: {error.strerror}; end the process "
            f"that holds it or give another port in --coordinator"
        ) from error


def call_roll(server: socket.socket, count: int, timeout: float) -> tuple[list[str], dict]:
    """Waits in process 0 until all others have connected.

    Args:
        server: from `open_port`; closed on return.
        count: number of processes, this one included.
        timeout: seconds.

    Returns:
        The host names of processes 0 .. count - 1, and {process: Link} of all others.

    Raises:
        MissingProcessError: naming the processes that have not come.
    """
    deadline, report = time.monotonic() + timeout, time.monotonic() + _REPORT_SECONDS
    hosts, links = {0: socket.gethostname()}, {}
    with server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while len(hosts) < count:
            now = time.monotonic()
            missing = sorted(set(range(count)) - hosts.keys())
            what = f"{len(hosts)} of {count} processes are here, missing: {_numbers(missing)}"
            if now > deadline:
                what = f"after {timeout:g} s {what}; see why they did not start"
                for link in links.values():
                    link.send(f"missing {what}")
                raise MissingProcessError(what)
            if now > report:
                report = now + _REPORT_SECONDS
                print(f"{what}; waiting", file=sys.stderr, flush=True)
            for key, _ in selector.select(min(deadline, report) - now):
                if key.fileobj is server:
                    link = Link(server.accept()[0])
                    selector.register(link.socket, selectors.EVENT_READ, link)
                elif not _register(key.data, count, hosts, links):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
    names = [hosts[index] for index in range(count)]
    for link in links.values():
        link.send(f"roll {' '.join(names)}")
    return names, links


def _register(link: Link, count: int, hosts: dict[int, str], links: dict[int, Link]) -> bool:
    """Enters a caller; returns False if it is to be dropped."""
    lines = link.receive()
    if lines is None:  # one that was here may have died: it can come again
        for index in [index for index, known in links.items() if known is link]:
            del links[index], hosts[index]
        return False
    for line in lines:
        match line.split():
            case [greeting, index, theirs, host] if greeting == _GREETING and index.isdecimal():
                index = int(index)
                if theirs != str(count):
                    link.send(f"refused --num_processes is {theirs} here and {count} in process 0")
                elif index in hosts:
                    link.send(f"refused --process_id={index} is also that of a process on "
                              f"{hosts[index]}; each needs its own")  # fmt: skip
                else:
                    links[index], hosts[index] = link, host
                    continue
        return False
    return True


def answer_roll(
    address: tuple[str, int], index: int, count: int, timeout: float
) -> tuple[list[str], dict]:
    """Connects a process to process 0 and waits until all have.

    Args:
        address: host and port of process 0.
        index: this process, 1 .. count - 1.
        count: number of processes.
        timeout: seconds.

    Returns:
        The host names of processes 0 .. count - 1, and {0: Link}.

    Raises:
        MissingProcessError: if process 0 does not answer, or others are missing.
        ValueError: if process 0 refuses this one.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        link, line = _ask(address, index, count, deadline)
        word, _, rest = line.partition(" ")
        if word == "roll":
            return rest.split(" "), {0: link}
        if link:
            link.socket.close()
        if word == "missing":
            raise MissingProcessError(rest)
        if word == "refused":
            raise ValueError(rest)
        time.sleep(_RETRY_SECONDS)
    raise MissingProcessError(
        f"process 0 of {count} did not answer at {address[0]}:{address[1]} within {timeout:g} s; "
        f"see whether it runs, and whether --coordinator names its host"
    )


def _ask(
    address: tuple[str, int], index: int, count: int, deadline: float
) -> tuple[Link | None, str]:
    """Returns the connection to process 0 and its answer; None and "" while there is none."""
    try:
        connected = socket.create_connection(address, timeout=deadline - time.monotonic())
    except OSError:  # not up yet, or its name cannot be resolved yet
        return None, ""
    connected.settimeout(None)
    link = Link(connected)
    link.send(f"{_GREETING} {index} {count} {socket.gethostname()}")
    # process 0 may have begun to wait a little later, and says by itself when its time is up
    return link, _first_line(link, deadline + _GRACE_SECONDS)


def _first_line(link: Link, deadline: float) -> str:
    """Returns the next line, "" if none comes in time or the other end is closed."""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([link.socket], [], [], left)[0]:
            return ""
        lines = link.receive()
        if lines is None or lines:
            return lines[0] if lines else ""
    return ""


def _numbers(values: list[int]) -> str:
    """Returns "1, 3, 4" of at most 20 numbers."""
    shown = ", ".join(map(str, values[:20]))
    return shown if len(values) <= 20 else f"{shown} and {len(values) - 20} more"
