"""Builds the C extensions and the eBPF object; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

EXT = Path("prism/_ext")
BPF_SOURCE = EXT / "bpf/prism_switch.bpf.c"
KMOD_FILES = ("Kbuild", "Makefile", "dkms.conf", "prism_monitor.c", "prism_monitor.h")
P4INFO = Path("p4/prism.p4info.txtpb")
C_FLAGS = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
HEADERS = ("src/*.h", "bpf/*.h", "*.pxd", "*.pxi")
SANITIZE = os.environ.get("PRISM_SANITIZE", "")  # for example "address,undefined"


def extension(name: str, *sources: str, libraries: tuple[str, ...] = ()) -> Extension:
    """One Cython module ``prism._ext.<name>`` and the C files behind it."""
    sanitize = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g"] if SANITIZE else []
    return Extension(
        f"prism._ext.{name}",
        [str(EXT / f"{name}.pyx"), *(str(EXT / "src" / source) for source in sources)],
        include_dirs=[str(EXT / "src"), str(EXT / "bpf")],
        depends=[str(path) for each in HEADERS for path in EXT.glob(each)],
        libraries=list(libraries),
        extra_compile_args=[*C_FLAGS, *sanitize],
        extra_link_args=sanitize,
    )


EXTENSIONS = [
    extension(
        "tcp_repair", "tcp_state.c", "tcp_repair.c", "tcp_import.c", "tcp_fin.c", "tcp_window.c"
    ),
    extension("control", "siphash.c"),
    extension("sockets"),
    extension("http_scan", "http_scan.c"),
    extension("bpf", "bpf_loader.c", libraries=("bpf",)),
    extension(
        "tls_record",
        *("tls_keys.c", "tls_message.c", "tls_open.c", "tls_seal.c", "tls_state.c"),
        libraries=("crypto",),
    ),
]


def compile_bpf(source: Path, target: Path) -> None:
    """Compile one classifier for the ``bpf`` target with clang, with BTF.

    Raises:
        SystemExit: clang is missing or refuses the source.
    """
    clang = os.environ.get("CLANG", "clang")
    if shutil.which(clang) is None:
        raise SystemExit(f"{clang} not found: install Debian's clang, or set CLANG (at build time)")
    arch = {"x86_64": "x86", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    multiarch = subprocess.run(
        ["gcc", "-print-multiarch"], capture_output=True, text=True, check=True
    ).stdout.strip()
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror"]
    flags += [f"-D__TARGET_ARCH_{arch}", f"-I/usr/include/{multiarch}"]
    # A failed build must not take away the classifier that is there, nor a running one half-read.
    fresh = target.with_suffix(".new")
    subprocess.run([clang, *flags, "-c", str(source), "-o", str(fresh)], check=True)
    fresh.replace(target)


class BuildExt(build_ext):
    """Builds the eBPF object beside the C extensions, and adds the kernel module's sources."""

    def run(self) -> None:
        """Build the C extensions, then the eBPF object; ``prism-proxy kmod`` builds the module."""
        super().run()
        root = Path() if self.inplace or self.editable_mode else Path(self.build_lib)
        compile_bpf(BPF_SOURCE, root / BPF_SOURCE.with_suffix(".o"))
        if root != Path():  # a checkout has the module's sources anyway
            (root / "prism/_kmod").mkdir(parents=True, exist_ok=True)
            for name in KMOD_FILES:
                shutil.copy(Path("kmod") / name, root / "prism/_kmod")
            (root / "prism/_p4").mkdir(parents=True, exist_ok=True)
            shutil.copy(P4INFO, root / "prism/_p4")


setup(
    ext_modules=cythonize(EXTENSIONS, compiler_directives={"language_level": "3"}),
    cmdclass={"build_ext": BuildExt},
)
