"""Certificates, a server that does real handshakes, and clients of several makes."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from prism.config_tls import TlsConfig
from prism.flow import Flow
from prism.tls.context import TlsContexts
from prism.tls.established import Established
from prism.tls.server import TlsServer
from prism.tls.stream import TlsStream

DAY = datetime.timedelta(days=1)
KEYS: dict[str, Any] = {}


def private_key(kind: str) -> Any:
    """A key of a kind; RSA keys are made once, they take long."""
    if kind == "EC":
        return ec.generate_private_key(ec.SECP256R1())
    if kind == "Ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    bits = int(kind.removeprefix("RSA") or 2048)
    if kind not in KEYS:
        KEYS[kind] = rsa.generate_private_key(65537, bits)
    return KEYS[kind]


@dataclass
class Pki:
    """A CA in a directory, and what it issues."""

    directory: Path
    name: str = "ca"
    key: Any = field(default_factory=lambda: private_key("EC"))
    cert: x509.Certificate = field(init=False)

    def __post_init__(self) -> None:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"Test {self.name}")])
        now = datetime.datetime.now(datetime.UTC)
        self.cert = (
            x509.CertificateBuilder(subject, subject, self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(x509.BasicConstraints(True, None), True)
            .sign(self.key, hashes.SHA256())
        )
        self.file.write_bytes(self.cert.public_bytes(serialization.Encoding.PEM))

    @property
    def file(self) -> Path:
        return self.directory / f"{self.name}.pem"

    def issue(
        self, name: str, *sans: str, kind: str = "EC", days: float = 1, subject: str = ""
    ) -> dict[str, str]:
        """A certificate and its key, as a `certificates` entry."""
        key = private_key(kind)
        now = datetime.datetime.now(datetime.UTC)
        common = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject or name)])
        builder = (
            x509.CertificateBuilder(self.cert.subject, common, key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 3 * DAY)
            .not_valid_after(now + days * DAY)
        )
        if sans:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(list(map(general_name, sans))), False
            )
        cert = builder.sign(self.key, hashes.SHA256())
        paths = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        paths[0].write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        paths[1].touch(mode=0o600)
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return {"certificate": str(paths[0]), "key": str(paths[1])}


def general_name(text: str) -> x509.GeneralName:
    if "://" in text:
        return x509.UniformResourceIdentifier(text)
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


class Serving:
    """A TLS server on loopback: answers each request with a line about its connection."""

    def __init__(self, config: dict[str, Any], contexts: TlsContexts | None = None) -> None:
        self.config = TlsConfig(**config)
        self.server = TlsServer(self.config, contexts)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self.ended: list[Established | None] = []
        self.sockets: list[socket.socket] = []
        self.sequences: list[tuple[int, int]] = []  # of the next records to be read and written
        self.fragments: list[int] = []
        self.answering = True
        self.answer_size = 0
        self.send_buffer = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self.listener.fileno(), self._accept)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self.listener.fileno())
        self.listener.close()
        self.server.close()
        for task in self._tasks:
            task.cancel()
        for sock in self.sockets:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            if self.send_buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_buffer)
            self.server.accept(sock, Flow.of_socket(sock), self._done)

    def _done(self, sock: socket.socket, established: Established | None) -> None:
        self.ended.append(established)
        if established is None:
            return
        tls = established.tls
        self.sequences.append((tls.read_seq, tls.write_seq))
        self.fragments.append(tls.max_fragment)
        if self.answering:
            task = asyncio.get_running_loop().create_task(self._answer(sock, established))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            self.sockets.append(sock)

    async def _answer(self, sock: socket.socket, established: Established) -> None:
        stream = TlsStream(sock, established.tls)
        stream.watch()
        head = b""
        try:
            while b"\r\n\r\n" not in head:
                await stream.readable(5)
                try:
                    head = stream.peek()
                except BlockingIOError:
                    continue
                if not head:
                    return
                stream.await_more(len(head))
            stream.consume(len(head))
            body = f"{established.version} {established.suite} {established.server_name}".encode()
            body += b"." * self.answer_size
            length = b"%d" % len(body)
            stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: " + length + b"\r\n\r\n" + body)
        except OSError:
            pass
        finally:
            stream.close()

    @property
    def last(self) -> Established:
        established = self.ended[-1]
        assert established is not None
        return established

    async def until(self, count: int, seconds: float = 5) -> None:
        """Wait for that many handshakes to end."""
        async with asyncio.timeout(seconds):
            while len(self.ended) < count:
                await asyncio.sleep(0.005)

    # -- clients ---------------------------------------------------------------------------

    async def get(
        self,
        context: ssl.SSLContext,
        name: str | None = "a.test",
        session: ssl.SSLSession | None = None,
    ) -> Got:
        """One request with Python's ssl."""
        return await asyncio.to_thread(get, self.port, context, name, session)

    async def s_client(self, *arguments: str) -> str:
        """One request with ``openssl s_client``: all it says."""
        return await self.run(
            "openssl", "s_client", "-connect", f"127.0.0.1:{self.port}", "-ign_eof", *arguments
        )

    async def run(self, *command: str) -> str:
        """Run a client; what it says."""

        def work() -> str:
            done = subprocess.run(
                command,
                input=b"GET / HTTP/1.1\r\n\r\n",
                capture_output=True,
                timeout=10,
                check=False,
            )
            return (done.stdout + done.stderr).decode("latin-1")

        return await asyncio.to_thread(work)


@dataclass
class Got:
    """What a client of Python's ssl got."""

    body: bytes
    version: str | None
    suite: str
    resumed: bool | None
    session: ssl.SSLSession | None
    alpn: str | None
    certificate: bytes | None


def get(
    port: int,
    context: ssl.SSLContext,
    name: str | None = "a.test",
    session: ssl.SSLSession | None = None,
) -> Got:
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    with context.wrap_socket(sock, server_hostname=name, session=session) as tls:
        tls.sendall(b"GET / HTTP/1.1\r\n\r\n")
        data = b""
        while piece := tls.recv(65536):
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        return Got(
            body,
            tls.version(),
            (tls.cipher() or ("", "", 0))[0],
            tls.session_reused,
            tls.session,
            tls.selected_alpn_protocol(),
            tls.getpeercert(True),
        )


def client_context(
    ca: Path | None,
    version: str = "1.3",
    *,
    alpn: Sequence[str] = (),
    certificate: dict[str, str] | None = None,
) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if ca is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(ca)
    number = ssl.TLSVersion.TLSv1_3 if version == "1.3" else ssl.TLSVersion.TLSv1_2
    context.minimum_version = context.maximum_version = number
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if certificate:
        context.load_cert_chain(certificate["certificate"], certificate["key"])
    return context


class HandClient:
    """A client whose octets are sent by hand."""

    def __init__(
        self,
        port: int,
        context: ssl.SSLContext,
        session: ssl.SSLSession | None = None,
        receive_buffer: int = 0,
    ) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_hostname="a.test", session=session)

    def step(self) -> bytes:
        """Do what can be done; what is to be sent."""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        return self._out.read()

    def seal(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self._out.read()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> bytes:
        """Feed what the server sends next; empty at the end."""
        async with asyncio.timeout(5):
            data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        self._in.write(data)
        return data

    async def receive_flight(self) -> bytes:
        """Receive until there is an answer to send."""
        while not (answer := self.step()):
            assert await self.receive(), "closed"
        return answer

    async def end(self) -> bytes:
        """All that still comes until the server closes."""
        data = b""
        try:
            while piece := await self.receive():
                data += piece
        except ConnectionResetError:
            data += b" reset"
        self.sock.close()
        return data

    def read(self, size: int = 65536) -> bytes:
        return self.tls.read(size)
