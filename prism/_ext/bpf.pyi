"""Loads the switch's classifier with libbpf and reads and writes its maps.

Every call into the kernel releases the GIL.
"""

from os import PathLike

STAT_COUNT: int
EVENT_SIZE: int

class BpfError(OSError):
    """libbpf or the kernel refused; the message carries the verifier's last lines."""

class Map:
    """One map of the classifier, valid while its ``SwitchObject`` is open.

    Keys and values are octets laid out as in ``prism_abi.h``. Values that have a lock are read
    and written under it. All methods raise ``BpfError`` where the kernel refuses, and
    ``ValueError`` for a key or value of the wrong size, or after ``SwitchObject.close``.
    """

    @property
    def name(self) -> str: ...
    @property
    def fd(self) -> int: ...
    @property
    def max_entries(self) -> int: ...
    def get(self, key: bytes) -> bytes | None:
        """The value, or ``None`` where there is none."""

    def put(self, key: bytes, value: bytes) -> None:
        """Write one value, whether there was one or not."""

    def remove(self, key: bytes) -> bool:
        """Delete one value; whether there was one."""

    def batch(
        self, cursor: bytes | None = None, limit: int = 1024
    ) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
        """Up to ``limit`` entries, and the cursor of the next call (``None``: that was all).

        What changes during an iteration may be seen or missed; nothing else is, and nothing twice.
        """

class PinnedMap(Map):
    """A pinned map by itself, to read only; what it belongs to is left alone.

    Args:
        path: where it is pinned.
        locked: whether its values have a lock.

    Raises:
        BpfError: there is none, or it may not be read.
    """

    def __init__(self, path: str | PathLike[str], *, locked: bool = False) -> None: ...
    @property
    def value_size(self) -> int:
        """Octets of a value."""

    def close(self) -> None:
        """Let go of it. Idempotent."""

class SwitchObject:
    """The classifier and its maps, loaded or found pinned.

    Maps and programs are pinned under ``pin_dir`` so that the data plane outlives this process.
    Where complete tables are pinned already they are adopted with the sizes they have; the
    programs are always loaded anew.

    Args:
        object_path: the compiled ``prism_switch.bpf.o``.
        pin_dir: an existing directory on a bpffs.
        max_rules: size of new tables.
        max_nodes: nodes that may be known at once.
        events_size: octets of the event buffer, a power of two, a page at least.
        fresh: throw away what is pinned.

    Raises:
        BpfError: libbpf or the kernel refused. ``errno.EPROTO``: tables of another version are
            pinned there.
    """

    def __init__(
        self,
        object_path: str | PathLike[str],
        pin_dir: str | PathLike[str],
        *,
        max_rules: int = 1_000_000,
        max_nodes: int = 4096,
        events_size: int = 262144,
        fresh: bool = False,
    ) -> None: ...
    @property
    def adopted(self) -> bool:
        """Whether the tables were there before."""

    def program_fd(self, name: str) -> int:
        """Descriptor of a loaded program, to attach; it stays this object's."""

    def map(self, name: str) -> Map:
        """One of the maps of ``switch_maps.h``."""

    def stats(self) -> list[int]:
        """The counters, summed over the CPUs, in the order of ``enum prism_stat``."""

    def run(self, program_fd: int, data: bytes, flags: int = 0) -> tuple[int, bytes]:
        """Run a program on one packet: its verdict, and the packet then.

        ``flags`` are those of BPF_PROG_TEST_RUN (linux/bpf.h).
        """

    @property
    def events_fd(self) -> int:
        """Polls readable when there are events; it stays this object's."""

    def events(self) -> list[bytes]:
        """Up to 256 waiting events (``struct prism_event``); never blocks."""

    def close(self) -> None:
        """Let go of everything; what is pinned or attached stays. Idempotent."""
