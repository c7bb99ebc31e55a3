"""Who seals: what is decided on any kernel, and what happens on this one.

What the kernel then does is tested where there is one that can: tests/vm/test_kernel_tls.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from pathlib import Path

import pytest
from tls_pairs import ALL_SUITES, make, pair

from prism._ext.tls_record import Tls
from prism.errors import ConfigError
from prism.tls.kernel import SOL_TLS, record_message
from prism.tls.kernel_probe import Support, probe
from prism.tls.offload import KERNEL_FROM, RECEIVE_FROM, KernelTlsStream, check, stream
from prism.tls.stream import TlsStream

EVERYTHING = Support(frozenset({"AES-128-GCM", "AES-256-GCM", "CHACHA20-POLY1305"}), "")


def test_the_message_that_sets_a_records_type() -> None:
    """As in the kernel's Documentation/networking/tls.rst: one octet, at level SOL_TLS, type 1."""
    assert record_message(21) == [(282, 1, b"\x15")]
    assert record_message(22) == [(SOL_TLS, 1, b"\x16")]


def test_that_message_reaches_the_kernel_whole() -> None:
    """A UDP socket takes control messages of other levels, and looks at their lengths."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        assert sock.sendmsg([b"x"], record_message(21), 0, ("127.0.0.1", 9)) == 1


@pytest.mark.parametrize("suite", ALL_SUITES, ids=hex)
def test_what_the_kernel_covers(suite: int) -> None:
    tls = make(suite, True)
    assert EVERYTHING.covers(tls)
    assert not Support(frozenset(), "").covers(tls)


@pytest.mark.parametrize("suite", ALL_SUITES, ids=hex)
def test_what_the_kernel_receives(suite: int) -> None:
    """A KeyUpdate would cost the connection where the kernel cannot be given the next key."""
    tls = make(suite, True)
    rekeying = Support(EVERYTHING.ciphers, "", rekey=True)
    assert rekeying.receives(tls)
    assert EVERYTHING.receives(tls) == (tls.version == 0x0303)
    assert not Support(frozenset(), "", rekey=True).receives(tls)


def test_short_records_are_not_the_kernels() -> None:
    tls = Tls.from_traffic_secrets(0x1301, bytes(32), bytes(32), is_server=True, max_fragment=4096)
    assert not EVERYTHING.covers(tls)


def test_a_kernel_that_has_to_and_cannot() -> None:
    check("auto")
    check("user")
    if not probe().why:
        check("kernel")
        return
    with pytest.raises(ConfigError) as caught:
        check("kernel")
    text = str(caught.value)
    assert 'tls.offload = "kernel"' in text
    assert probe().why in text
    assert "modprobe tls" in text
    assert 'tls.offload = "auto"' in text


def test_one_cipher_short_is_short() -> None:
    lacking = Support(frozenset({"AES-128-GCM"}), "CHACHA20-POLY1305: No such file or directory")
    check("auto", lacking)
    with pytest.raises(ConfigError, match="CHACHA20-POLY1305: No such file"):
        check("kernel", lacking)
    check("kernel", EVERYTHING)


@pytest.mark.parametrize("mode", ["auto", "user"])
@pytest.mark.parametrize("suite", [0x1301, 0x1303, 0xC02B, 0xCCA9], ids=hex)
async def test_a_large_file_whoever_seals(tmp_path: Path, mode: str, suite: int) -> None:
    """``auto`` on a kernel that cannot is as good as ``user``."""
    content = hashlib.shake_128(b"file").digest(4 * KERNEL_FROM)
    (tmp_path / "file").write_bytes(content)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    client.settimeout(5)
    tls, other = pair(suite)
    sending = stream(mode, sock, tls)  # type: ignore[arg-type]
    raw = bytearray()
    thread = threading.Thread(target=drain, args=(client, raw))
    thread.start()
    try:
        sent = 0
        with (tmp_path / "file").open("rb") as file:
            async with asyncio.timeout(5):
                while sent < len(content):
                    try:
                        sent += sending.send_file(file.fileno(), sent, len(content) - sent)
                    except BlockingIOError:
                        await asyncio.sleep(0.001)
        assert getattr(sending, "in_kernel", False) == (mode == "auto" and not probe().why)
        if mode == "user" or probe().why:
            assert not sending.must_move(True)
            assert sending.movable
    finally:
        sending.close()
        await asyncio.to_thread(thread.join, 5)
        client.close()
    opened = other.open(bytes(raw))
    assert opened.data == content
    assert opened.alert == 0


def drain(sock: socket.socket, into: bytearray) -> None:
    while piece := sock.recv(65536):
        into += piece


async def test_a_kernel_that_cannot_open_is_not_asked_twice() -> None:
    """An upload goes on in the process, with what was peeked at before."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    tls, other = pair(0xC02B)
    receiving = stream("kernel", sock, tls)
    assert isinstance(receiving, KernelTlsStream)
    client.sendall(other.seal(b"head and body"))
    assert await readable(receiving) == b"head and body"
    receiving.consume(5)
    receiving.expect(RECEIVE_FROM - 1)
    assert receiving.receives
    receiving.expect(RECEIVE_FROM)
    assert receiving.opened_by_kernel == (not probe().why)
    assert receiving.receives == receiving.opened_by_kernel
    assert receiving.receive(100) == b"and body"
    client.sendall(other.seal(b"more"))
    assert await readable(receiving) == b"more"
    assert receiving.movable
    receiving.close()
    client.close()


async def readable(stream: TlsStream) -> bytes:
    async with asyncio.timeout(5):
        while True:
            try:
                return stream.peek()
            except BlockingIOError:
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("mode", ["auto", "user"])
async def test_only_who_must_receive_does(mode: str) -> None:
    left, right = socket.socketpair()
    with left, right:
        receiving = stream(mode, left, make(0xC02B, True))  # type: ignore[arg-type]
        assert not getattr(receiving, "receives", False)
        receiving.expect(1 << 40)
        assert not getattr(receiving, "opened_by_kernel", False)


async def test_which_class_a_mode_gives() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert type(stream("user", left, make(0x1301, True))) is TlsStream
        assert type(stream("kernel", right, make(0x1301, True))) is KernelTlsStream
