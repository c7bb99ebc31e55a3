"""The rivals: nginx and HAProxy from Debian's packages, configured as their manuals recommend.

Each runs as one worker in the first frontend's namespace, beside Prism's frontend and on ports of
its own, so all share the same links. Behind them are either nginx servers in the backends'
namespaces (``origin``) or the Prism stores themselves (``store``).
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prism.errors import PrismError
from prism.lab.netns import Namespace

__all__ = ["ORIGIN_PORT", "Process", "haproxy", "nginx", "origin"]

ORIGIN_PORT = 8090
_PATIENCE = 10.0

_HEAD = """\
worker_processes 1;
daemon off;
user root;
pid {dir}/nginx.pid;
error_log {dir}/error.log warn;
worker_rlimit_nofile 30000;
events {{ worker_connections 14000; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  tcp_nodelay on;
  keepalive_timeout 65;
  keepalive_requests 1000000;
  types {{ }}
  default_type application/octet-stream;
  open_file_cache max=10000 inactive=60s;
  client_max_body_size 0;
  client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi;
  scgi_temp_path {dir}/scgi;
"""

_ORIGIN = (
    _HEAD
    + """\
  server {{
    listen {address}:{port} backlog=4096;
    root {root};
    client_body_temp_path {root}/.body;
    location / {{ dav_methods PUT DELETE; create_full_put_path on; }}
  }}
}}
"""
)

# Buffering as recommended for large objects: nothing to disk, uploads streamed.
_RELAY = (
    _HEAD
    + """\
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  proxy_set_header Host $host;
  proxy_buffers 16 16k;
  proxy_max_temp_file_size 0;
  proxy_request_buffering off;
  ssl_protocols TLSv1.2 TLSv1.3;
  ssl_session_cache shared:tls:10m;
{upstreams}
  map $uri $place {{
    default any;
{places}
  }}
  server {{
    listen {address}:{http} backlog=4096;
    listen {address}:{https} ssl backlog=4096;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    location / {{ proxy_pass http://$place; }}
  }}
}}
"""
)

_HAPROXY = """\
global
  nbthread 1
  maxconn 4000
  tune.ssl.default-dh-param 2048
  ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  timeout http-keep-alive 60s
  option splice-auto
  http-reuse safe
frontend clients
  bind {address}:{http}
  bind {address}:{https} ssl crt {bundle} alpn http/1.1
  use_backend %[path,map({places},any)]
{backends}
"""


class Process:
    """A rival that runs.

    Attributes:
        session: the session id of its processes.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log
        self.session = process.pid

    def wait_ready(self, namespace: Namespace, address: str, port: int) -> None:
        """Until it accepts connections.

        Raises:
            PrismError: it ended, or does not.
        """
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise PrismError(f"a rival did not start:\n{self._log.read_text()[-1500:]}")
            with contextlib.closing(namespace.socket()) as sock, contextlib.suppress(OSError):
                sock.settimeout(1)
                sock.connect((address, port))
                return
            time.sleep(0.05)
        raise PrismError(f"nothing listens on {address}:{port} after {_PATIENCE:.0f} s")

    def stop(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)


def _start(namespace: Namespace, command: Sequence[str], directory: Path) -> Process:
    log = directory / "output.log"
    with log.open("wb") as out:
        try:
            process = namespace.popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
            )
        except FileNotFoundError:
            raise PrismError(f"{command[0]} is missing: scripts/bench installs it") from None
    return Process(process, log)


@contextlib.contextmanager
def _running(
    namespace: Namespace, command: Sequence[str], directory: Path, address: str, port: int
) -> Iterator[Process]:
    process = _start(namespace, command, directory)
    try:
        process.wait_ready(namespace, address, port)
        yield process
    finally:
        process.stop()


@contextlib.contextmanager
def origin(namespace: Namespace, address: str, root: Path, directory: Path) -> Iterator[Process]:
    """Run nginx as a file server on port 8090 of a backend; PUT stores below ``root``."""
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "nginx.conf"
    config.write_text(_ORIGIN.format(dir=directory, address=address, port=ORIGIN_PORT, root=root))
    command = ["nginx", "-c", str(config), "-p", str(directory)]
    with _running(namespace, command, directory, address, ORIGIN_PORT) as process:
        yield process


@contextlib.contextmanager
def nginx(
    namespace: Namespace,
    address: str,
    ports: tuple[int, int],
    servers: Mapping[str, str],
    places: Mapping[str, str],
    certificate: tuple[Path, Path],
    directory: Path,
) -> Iterator[Process]:
    """Run nginx as a relaying frontend.

    Args:
        namespace: where it runs.
        address: the service's.
        ports: for HTTP and HTTPS.
        servers: by name, ``host:port`` of each backend.
        places: by request target, the name of the backend to ask; all others: any, in turn.
        certificate: with its key, PEM files.
        directory: for its files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pools = {"any": list(servers.values())} | {name: [at] for name, at in servers.items()}
    upstreams = "\n".join(
        f"  upstream {name} {{ "
        + " ".join(f"server {server};" for server in addresses)
        + " keepalive 128; keepalive_requests 1000000; }"
        for name, addresses in pools.items()
    )
    config = directory / "nginx.conf"
    config.write_text(
        _RELAY.format(
            dir=directory,
            address=address,
            http=ports[0],
            https=ports[1],
            certificate=certificate[0],
            key=certificate[1],
            upstreams=upstreams,
            places="\n".join(f"    {path} {place};" for path, place in places.items()),
        )
    )
    command = ["nginx", "-c", str(config), "-p", str(directory)]
    with _running(namespace, command, directory, address, ports[0]) as process:
        yield process


@contextlib.contextmanager
def haproxy(
    namespace: Namespace,
    address: str,
    ports: tuple[int, int],
    servers: Mapping[str, str],
    places: Mapping[str, str],
    certificate: tuple[Path, Path],
    directory: Path,
) -> Iterator[Process]:
    """Run HAProxy as a relaying frontend, one thread; arguments as for :func:`nginx`."""
    directory.mkdir(parents=True, exist_ok=True)
    bundle = directory / "service.pem"
    bundle.touch(mode=0o600)
    bundle.write_bytes(certificate[0].read_bytes() + certificate[1].read_bytes())
    table = directory / "places.map"
    table.write_text("".join(f"{path} {place}\n" for path, place in places.items()))
    pools = {"any": servers} | {name: {name: at} for name, at in servers.items()}
    backends = "\n".join(
        f"backend {name}\n  balance roundrobin\n"
        + "\n".join(f"  server {server} {at}" for server, at in members.items())
        for name, members in pools.items()
    )
    config = directory / "haproxy.cfg"
    config.write_text(
        _HAPROXY.format(
            address=address,
            http=ports[0],
            https=ports[1],
            bundle=bundle,
            places=table,
            backends=backends,
        )
    )
    command = ["haproxy", "-db", "-f", str(config)]
    with _running(namespace, command, directory, address, ports[0]) as process:
        yield process
