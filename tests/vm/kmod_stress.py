"""Does at random, for a time, whatever can be done to registered sockets.

kmod_stress.py ADDRESS:PORT SECONDS SEED. Fails if an event comes twice, or for an unknown socket,
or if one is missing that is not counted as lost.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kmod_device import Device

from prism.monitor.kmod import LOST


class Worker:
    def __init__(self, address: tuple[str, int], seed: int) -> None:
        self.address = address
        self.random = random.Random(seed)
        self.devices = [Device(), Device()]
        self.sockets: list[socket.socket] = []
        self.pending: list[dict[int, int]] = [{}, {}]  # by device: cookie -> the socket's cookie
        self.lost = [0, 0]  # by device: events
        self.number = 0

    def open(self) -> None:
        if len(self.sockets) < 40:
            with contextlib.suppress(OSError):
                self.sockets.append(socket.create_connection(self.address, 1.0))

    def any(self) -> socket.socket | None:
        return self.random.choice(self.sockets) if self.sockets else None

    def register(self) -> None:
        sock, which = self.any(), self.random.randrange(2)
        if sock is not None:
            self.number += 1
            with contextlib.suppress(OSError):
                self.pending[which][self.number] = self.devices[which].register(sock, self.number)

    def unregister(self) -> None:
        which = self.random.randrange(2)
        if self.pending[which]:
            cookie, own = self.random.choice(list(self.pending[which].items()))
            with contextlib.suppress(FileNotFoundError):
                self.devices[which].unregister(own)
                del self.pending[which][cookie]

    def close(self) -> None:
        sock = self.any()
        if sock is not None:
            self.sockets.remove(sock)
            if self.random.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

    def shut(self) -> None:
        sock = self.any()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)

    def write(self) -> None:
        sock = self.any()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.send(b"x")

    def read(self, which: int | None = None) -> None:
        if which is None:
            which = self.random.randrange(2)
        for event in self.devices[which].read(self.random.randrange(1, 20)):
            if event.reason == LOST:
                self.lost[which] += event.cookie
            else:
                assert self.pending[which].pop(event.cookie) == event.socket

    def reopen(self) -> None:
        if self.random.random() < 0.02:
            which = self.random.randrange(2)
            self.devices[which].close()
            self.pending[which].clear()
            self.lost[which] = 0
            self.devices[which] = Device()

    def account(self) -> None:
        """Each socket that was registered is so yet, or its event was told, or counted as lost."""
        for which, device in enumerate(self.devices):
            pending = self.pending[which]
            ended = [cookie for cookie, own in pending.items() if not device.registered(own)]
            while not device.silent(0.0):
                self.read(which)
            missing = pending.keys() & ended
            assert len(missing) <= self.lost[which], (missing, self.lost)

    def run(self, seconds: float) -> int:
        """How many steps it took."""
        steps = 0
        until = time.monotonic() + seconds
        what = [self.open, self.register, self.register, self.unregister, self.close]
        what += [self.shut, self.write, self.read, self.reopen, self.open]
        while time.monotonic() < until:
            self.random.choice(what)()
            steps += 1
        self.account()
        return steps


if __name__ == "__main__":
    host, port = sys.argv[1].split(":")
    print(Worker((host, int(port)), int(sys.argv[3])).run(float(sys.argv[2])), "steps")
