"""What scripts/vm says when it cannot do its work, each with a status of its own.

The programs that it needs are stand-ins, so that every failure can be had without an emulator.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABI = "6.1.0-0-amd64"
TOOLS = ("dpkg-deb", "apt-get", "make", "gcc", "xz", "zstd", "qemu-system-x86_64")
COREUTILS = (
    "bash basename cat chmod cp date dirname find flock grep head id kill ls mkdir mkfifo mktemp "
    "mv od realpath rm sed sh sha256sum sleep sort stdbuf tail tee timeout touch tr true uname"
)
DEPENDS = f"""case $* in
*linux-image-amd64) echo '  Depends: linux-image-{ABI}' ;;
*linux-headers-{ABI}) echo '  Depends: linux-kbuild-6.1' ;;
esac"""
ANSWER = 'for m in "$@"; do [ -f "$m" ] && grep -a -o "PRISM-VM-EXIT-[0-9-]*" "$m"; done'

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="scripts/vm is for x86-64 only"
)


class Machine:
    """A PATH of stand-ins, and a cache as after an earlier run."""

    def __init__(self, at: Path) -> None:
        self.bin, self.home = at / "bin", at / "cache"
        self.bin.mkdir()
        for name in COREUTILS.split():
            for directory in ("/usr/bin", "/bin"):
                if (found := Path(directory, name)).exists():
                    (self.bin / name).symlink_to(found)
                    break
        for name in TOOLS:
            self.program(name, "exit 0")
        self.program("apt-cache", DEPENDS)

    def program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def fill_cache(self, layout: str | None = None) -> Path:
        cache = self.home / "prism-vm"
        kernel = cache / ABI
        (kernel / "tools/bin").mkdir(parents=True)
        (kernel / "module").mkdir()
        text = (ROOT / "scripts/vm").read_text()
        now = next(line for line in text.splitlines() if line.startswith("layout="))
        (kernel / "ready").write_text(layout or now.removeprefix("layout=").split()[0])
        (cache / "current-6.1").write_text(ABI)
        files = [*sorted(ROOT.glob("kmod/*.c")), *sorted(ROOT.glob("kmod/*.h"))]
        files += [ROOT / "kmod/Kbuild", ROOT / "kmod/Makefile"]
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        (kernel / "module/fingerprint").write_text(f"{digest}  -\n")
        (kernel / "initrd.cpio").write_bytes(b"")
        busybox = kernel / "tools/bin/busybox"
        busybox.write_text(
            "#!/bin/bash\ncat >/dev/null\ncat guest\n"
        )  # an "archive" that shows the marker
        busybox.chmod(0o755)
        return cache

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / "bash"), str(ROOT / "scripts/vm"), *(arguments or ("true",))],
            env={"PATH": str(self.bin), "HOME": str(self.home), "XDG_CACHE_HOME": str(self.home)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def expect(done: subprocess.CompletedProcess[str], status: int, *said: str) -> None:
    assert done.returncode == status, (done.stdout, done.stderr)
    for text in said:
        assert text in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kernel", "5.15"], "there is 6.1"),
        (["--kernel"], "wants 6.1 or newest"),
        (["--time-out", "soon"], "seconds, please"),
        (["--memory", "much"], "MiB, please"),
        (["--verbose"], "unknown option --verbose"),
    ],
)
def test_usage(machine: Machine, arguments: list[str], said: str) -> None:
    expect(machine.run(*arguments), 64, said)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_is_missing(machine: Machine, name: str) -> None:
    (machine.bin / name).unlink()
    expect(machine.run(), 69, f"{name} is missing", "scripts/setup")


@pytest.mark.parametrize(
    ("said", "status", "told"),
    [
        ("E: Could not resolve 'deb.example'", 74, "no network"),
        ("Err: Could not connect to deb.example:80", 74, "no network"),
        ("E: Failed to fetch x.deb  404  Not Found", 75, "has not got the packages"),
        ("E: Can't find a source to download version '6.1'", 75, "--fresh"),
        ("E: something else", 75, "apt-get failed: E: something else"),
    ],
)
def test_nothing_to_download(machine: Machine, said: str, status: int, told: str) -> None:
    machine.program("apt-get", f'echo "{said}" >&2\nexit 100')
    expect(machine.run(), status, told)
    assert not (machine.home / "prism-vm" / ABI).exists()


def test_apt_knows_no_kernel(machine: Machine) -> None:
    machine.program("apt-cache", "exit 0")
    expect(machine.run(), 75, "no linux-image-amd64")


def test_a_cache_of_another_layout_is_made_anew(machine: Machine) -> None:
    machine.fill_cache("1")
    machine.program("apt-get", "echo \"E: Could not resolve 'deb.example'\"\nexit 100")
    expect(machine.run(), 74, "downloading")


def test_the_module_does_not_build(machine: Machine) -> None:
    cache = machine.fill_cache()
    (cache / ABI / "module/fingerprint").unlink()
    machine.program("make", "echo 'prism_monitor.c:1: error: no'; exit 2")
    expect(machine.run(), 70, "prism_monitor.c:1: error: no", "does not build against")


@pytest.mark.parametrize(
    ("qemu", "status", "told"),
    [
        ("echo '[ 1.0] Kernel panic - not syncing: Fatal exception'", 72, "Fatal exception"),
        ("echo last words", 71, "last words"),
        ("echo 'no such machine' >&2; exit 1", 71, "QEMU ended with status 1: no such machine"),
        ("exec sleep 30", 124, "still busy after 1 s"),
    ],
)
def test_the_guest_does_not_say_how_it_went(
    machine: Machine, qemu: str, status: int, told: str
) -> None:
    machine.fill_cache()
    machine.program("qemu-system-x86_64", qemu)
    expect(machine.run("--time-out", "1", "true"), status, told)


@pytest.mark.parametrize("times", [1, 2])
def test_stale_code_in_the_emulator_is_tried_again_once(machine: Machine, times: int) -> None:
    machine.fill_cache()
    count = machine.home / "starts"
    oops = "echo '[ 21.9] Oops: int3: 0000'; echo 'Kernel panic - not syncing: Fatal exception'"
    done = "echo last words"
    script = f"echo x >>{count}; mapfile lines <{count}; "
    script += f"if [ ${{#lines[@]}} -le {times} ]; then {oops}; else {done}; fi"
    machine.program("qemu-system-x86_64", script)
    status, told = (71, "last words") if times == 1 else (72, "Fatal exception")
    expect(machine.run("true"), status, "once more", told)
    assert count.read_text().split() == ["x", "x"]


@pytest.mark.parametrize("status", [0, 7])
def test_the_status_is_that_of_the_command(machine: Machine, status: int) -> None:
    machine.fill_cache()
    machine.program("qemu-system-x86_64", f'echo hello; echo "$({ANSWER}) {status}"')
    done = machine.run()
    assert (done.returncode, done.stdout) == (status, "hello\n"), done.stderr


def test_nothing_is_left(machine: Machine) -> None:
    cache = machine.fill_cache()
    machine.program("qemu-system-x86_64", "exit 1")
    machine.run()
    assert list(cache.glob("run-*")) == []
