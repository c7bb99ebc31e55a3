"""The TLS record layer of a connection after its handshake, in C over libcrypto.

TLS 1.3 (RFC 8446) and TLS 1.2 (RFC 5246) with AES-GCM and ChaCha20-Poly1305. Sealing and opening
release the GIL. One thread at a time may read and one may write with the same object.

Reading has two steps, because input is peeked at before it is taken: ``peek`` decrypts a copy and
changes nothing, ``commit`` moves on over whole records. ``open`` does both. What the peer asks for
in between (its own KeyUpdate, an answer to it, a renegotiation of TLS 1.2, which is refused) is
dealt with: answers go out in front of whatever is sealed next, see ``Tls.owes``.
"""

from typing import TypeAlias, final

Buffer: TypeAlias = bytes | bytearray | memoryview

STATE_VERSION: int
STATE_SIZE: int
"""Octets of ``Tls.state()``."""
MAX_FRAGMENT: int
"""The most octets of plaintext in a record: 16384."""
TX: int
"""TLS_TX of linux/tls.h: the direction we write."""
RX: int
"""TLS_RX of linux/tls.h: the direction we read."""

class TlsError(ValueError):
    """A record, a message or a state that breaks the protocol, or a limit that is reached.

    Args:
        alert: the AlertDescription (RFC 8446, section 6) that is to be sent for it.
        text: what was wrong; never any octets of the connection.
    """

    alert: int

    def __init__(self, alert: int, text: str) -> None: ...

@final
class Opened:
    """What a buffer of records holds. Immutable; keeps no keys."""

    @property
    def data(self) -> bytes:
        """The application data, in one piece."""

    @property
    def records(self) -> int:
        """Whole records opened."""

    @property
    def consumed(self) -> int:
        """Their length in the buffer, in octets."""

    @property
    def wanted(self) -> int:
        """Octets behind ``consumed`` that make up the next record, as far as that is known.

        5 as long as its header is not there, 0 when nothing more is to come. A buffer of
        ``consumed + wanted`` octets lets ``peek`` get further.
        """

    @property
    def closed(self) -> bool:
        """close_notify or a fatal alert was among the records; what follows is ignored."""

    @property
    def alert(self) -> int | None:
        """The alert that closed the connection: 0 is close_notify. None: not closed."""

    @property
    def error(self) -> TlsError | None:
        """What is wrong with the record at ``consumed``; those before it are good and count."""

    @property
    def ends(self) -> list[tuple[int, int, int]]:
        """For each record its content type, and where its data and its ciphertext end."""

    def cut(self, octets: int) -> tuple[int, int, int]:
        """The fewest whole records that hold the first ``octets`` octets of ``data``.

        Returns:
            their number, their length in ciphertext, and their length in data, which is more than
            ``octets`` where the cut is inside a record.

        Raises:
            ValueError: there is not as much data.
        """

@final
class Tls:
    """One connection's record state in both directions. Wiped when dropped."""

    @staticmethod
    def from_traffic_secrets(
        suite: int,
        client_secret: Buffer,
        server_secret: Buffer,
        *,
        is_server: bool,
        read_seq: int = 0,
        write_seq: int = 0,
        max_fragment: int = 16384,
    ) -> Tls:
        """TLS 1.3: from the application traffic secrets (RFC 8446, 7.1), in force or updated.

        Args:
            suite: 0x1301, 0x1302 or 0x1303.
            client_secret: of what the client sends: CLIENT_TRAFFIC_SECRET_0 of a key log.
            server_secret: of what the server sends: SERVER_TRAFFIC_SECRET_0.
            is_server: which side this is.
            read_seq: records the peer has sent under this secret that were read by somebody else.
            write_seq: records sealed under this secret by somebody else (session tickets).
            max_fragment: the most plaintext to put into one record, 64 to 16384 octets, if the
                client negotiated max_fragment_length (RFC 6066) or record_size_limit (RFC 8449).

        Raises:
            ValueError: not a suite of TLS 1.3 known here, or a secret of another length.
        """

    @staticmethod
    def from_master_secret(
        suite: int,
        master: Buffer,
        client_random: Buffer,
        server_random: Buffer,
        *,
        is_server: bool,
        read_seq: int = 1,
        write_seq: int = 1,
        max_fragment: int = 16384,
    ) -> Tls:
        """TLS 1.2: from the master secret (48 octets) and both randoms (32) (RFC 5246, 6.3).

        Args:
            suite: 0xC02B, 0xC02C, 0xC02F, 0xC030, 0xCCA8 or 0xCCA9.
            master: the master secret, extended (RFC 7627) or not.
            client_random: of the ClientHello.
            server_random: of the ServerHello.
            is_server: which side this is.
            read_seq: records read since the peer's ChangeCipherSpec: its Finished is the first.
            write_seq: records sealed since ours.
            max_fragment: as above.

        Raises:
            ValueError: not a suite of TLS 1.2 known here, or an argument of another length.
        """

    @staticmethod
    def from_state(state: Buffer) -> Tls:
        """The connection that ``state`` told of. Any octets at all are safe to give.

        Raises:
            TlsError: truncated, of another version, or inconsistent (alert 80).
        """

    def state(self) -> bytes:
        """Everything, for another process to go on with; ``STATE_SIZE`` octets with the keys in.

        Only one of both may go on: sealing with both would use nonces twice. The layout is in
        src/tls_state.h.
        """

    @property
    def version(self) -> int:
        """0x0304 or 0x0303."""

    @property
    def suite(self) -> int:
        """The cipher suite's number in the IANA registry."""

    @property
    def is_server(self) -> bool:
        """Which side this is."""

    @property
    def max_fragment(self) -> int:
        """The most octets of plaintext that are put into one record."""

    @property
    def read_seq(self) -> int:
        """Sequence number of the next record to be committed; a KeyUpdate starts again at 0."""

    @property
    def write_seq(self) -> int:
        """Sequence number of the next record to be sealed."""

    @property
    def read_closed(self) -> bool:
        """close_notify or a fatal alert was committed."""

    @property
    def write_closed(self) -> bool:
        """close_notify or a fatal alert was sealed: nothing more can be."""

    @property
    def owes(self) -> bool:
        """The peer waits for an answer that goes in front of the next ``seal``.

        ``seal(b"")`` gives the answer alone.
        """

    @property
    def in_message(self) -> bool:
        """The last record that was committed ended inside a handshake message."""

    def peek(self, data: Buffer, after: Opened | None = None) -> Opened:
        """Decrypts the whole records at the beginning of ``data``; changes nothing.

        Args:
            data: ciphertext that starts where the last committed record ended.
            after: or where these ended, which were not committed yet.

        Returns:
            what is there; a bad record is told by ``Opened.error``, after the good ones.

        Raises:
            ValueError: wiped, or records behind ``after`` were committed.
            RuntimeError: another thread reads.
        """

    def commit(self, opened: Opened, records: int | None = None) -> int:
        """Takes records as read: all, or the first ``records`` of them, counted from the first.

        May be called again with a larger number.

        Returns:
            octets of ciphertext that were newly taken.

        Raises:
            ValueError: these records do not follow the ones committed last.
        """

    def open(self, data: Buffer) -> Opened:
        """``peek`` and ``commit`` of all records."""

    def seal(self, data: Buffer, content_type: int = 23, *, padding: int = 0) -> bytes:
        """Seals records of up to ``max_fragment`` octets each.

        A KeyUpdate goes in front where the peer asked for one or the key has sealed 2^23 records
        with AES-GCM (RFC 8446, 5.5), with a request for the peer's when it has.

        Args:
            data: up to 1 GiB; nothing gives what is owed, mostly nothing.
            content_type: others than 23 are for tests: nothing is done about what they say.
            padding: zeros to add to each record in TLS 1.3, as far as there is room.

        Raises:
            TlsError: closed for writing; or, in TLS 1.2, 2^24.5 records were sealed (alert 80).
            RuntimeError: another thread writes.
        """

    def sealed_size(self, length: int) -> int:
        """Octets that ``seal`` would give now for ``length`` octets; raises like it."""

    def seal_file(self, fd: int, offset: int, length: int) -> tuple[bytes, int]:
        """Seals up to ``length`` octets of a file, read with pread(2).

        Returns:
            the ciphertext, and how many octets of the file are in it: fewer at its end, or where
            reading failed (then the next call raises).

        Raises:
            OSError: nothing could be read.
            TlsError: as for ``seal``.
        """

    def key_update(self, request_update: bool = False) -> bytes:
        """Seals a KeyUpdate (RFC 8446, 4.6.3) and moves our key on.

        Raises:
            ValueError: TLS 1.2 has none.
            TlsError: as for ``seal``.
        """

    def alert(self, description: int, fatal: bool = True) -> bytes:
        """Seals an alert; a fatal one, and close_notify, is the last that is sealed.

        Raises:
            TlsError: as for ``seal``.
        """

    def close_notify(self) -> bytes:
        """Seals close_notify: nothing can be sealed after it; reading goes on."""

    def crypto_info(self, direction: int) -> bytes:
        """The struct tls12_crypto_info_* for setsockopt(SOL_TLS, TLS_TX or TLS_RX) (linux/tls.h).

        Args:
            direction: ``TX`` or ``RX``.
        """

    def sync(self, direction: int, info: Buffer) -> None:
        """Takes the sequence number over from the kernel: what getsockopt(SOL_TLS) gave.

        Raises:
            TlsError: of another key, or behind this state (alert 80).
        """

    def note(self, content_type: int, data: Buffer) -> None:
        """Takes in a record that the kernel has opened and that is no application data.

        Call it for each of them, after ``sync(RX, ...)`` with the sequence number behind it.

        Args:
            content_type: 21 (alert) or 22 (handshake); others break the protocol.
            data: the record's content.

        Raises:
            TlsError: what it says breaks the protocol.
        """

    def wipe(self) -> None:
        """Overwrites all keys; the object is of no more use. Idempotent."""

def hkdf_expand(hash_name: str, prk: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand (RFC 5869, 2.3) with "sha256" or "sha384"."""

def expand_label(hash_name: str, secret: bytes, label: str, length: int) -> bytes:
    """HKDF-Expand-Label (RFC 8446, 7.1) with an empty context."""

def prf(hash_name: str, secret: bytes, label: str, seed: bytes, length: int) -> bytes:
    """The PRF of TLS 1.2 (RFC 5246, section 5)."""

def flight(data: bytes, begun: bool, /) -> tuple[list[int], int, int]:
    """How to feed a handshake's records to a TLS library that must not see what follows them.

    A record is fed alone, but a ChangeCipherSpec is never the last one of a handshake, nor is,
    after the hello, one with a ChangeCipherSpec behind it: these go with what is behind them.

    Args:
        data: what was received and not fed, from a record's start on.
        begun: the hello was fed before.

    Returns:
        offsets up to which to feed in one go; how far ``data`` has to reach for one more record;
        where a header is that cannot be a record's (RFC 8446, 5.1 and 5.2), or -1.
    """
