"""Loads the switch's classifier with libbpf and reads and writes its maps."""

class BpfError(OSError):
    """libbpf or the kernel refused; the message carries the verifier's last lines."""

class SwitchObject:
    """The classifier and its maps, loaded or found pinned.

    ``maps are pinned under ``pin_dir`` so that the data plane outlives this process.
    """
