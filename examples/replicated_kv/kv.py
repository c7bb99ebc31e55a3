"""A replicated key-value store: JSON values on Prism's replicated object store, with counters.

The values are objects, each on several backends; what was answered is not lost with one of them.
An entity tag stands for a value, so ``If-Match`` makes a change depend on what was read: counters
are exact however many clients count. Bring a cluster up, and use it::

    sudo prism-proxy lab up --backends 3 --placement replicated --replicas 3 --detach
    sudo ip netns exec prism-client python kv.py http://10.77.0.80 set colour '"green"'
    sudo ip netns exec prism-client python kv.py http://10.77.0.80 add visits 1
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.parse
import urllib.request


class Changed(Exception):
    """Somebody else has changed the value meanwhile."""


class Store:
    """The values below a prefix of the service at ``url``."""

    def __init__(self, url: str, prefix: str = "kv/") -> None:
        self.url, self.prefix = url, prefix

    def get(self, key: str) -> tuple[object, str | None]:
        """A value and its version; ``None, None`` if there is none."""
        try:
            with self._ask("GET", key) as answer:
                return json.load(answer), answer.headers["ETag"]
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None, None
            raise

    def set(self, key: str, value: object, *, version: str | None = "any") -> None:
        """Set a value, if it still has ``version`` (``None``: if there is none)."""
        condition = {"If-Match": str(version)} if version else {"If-None-Match": "*"}
        try:
            self._ask("PUT", key, json.dumps(value), {} if version == "any" else condition).close()
        except urllib.error.HTTPError as error:
            raise Changed if error.code == 412 else error from None

    def delete(self, key: str) -> None:
        """Delete a value."""
        self._ask("DELETE", key).close()

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; exact, whoever else does."""
        while True:
            value, version = self.get(key)
            try:
                self.set(key, (value or 0) + amount, version=version)
                return (value or 0) + amount
            except Changed:
                continue

    def keys(self) -> list[str]:
        """All keys, in order."""
        found, after = [], ""
        while after is not None:
            query = urllib.parse.urlencode({"prefix": self.prefix, "start-after": after})
            with urllib.request.urlopen(f"{self.url}/?{query}", timeout=30) as answer:
                page = json.load(answer)
            found += [entry["key"].removeprefix(self.prefix) for entry in page["keys"]]
            after = page["next_start_after"]
        return found

    def _ask(self, method: str, key: str, body: str | None = None, headers: dict | None = None):
        url = f"{self.url}/{self.prefix}{urllib.parse.quote(key)}"
        data = None if body is None else body.encode()
        request = urllib.request.Request(url, data, headers or {}, method=method)
        return urllib.request.urlopen(request, timeout=30)


if __name__ == "__main__":
    store, (command, *words) = Store(sys.argv[1]), sys.argv[2:]
    if command == "get":
        print(json.dumps(store.get(words[0])[0]))
    elif command == "set":
        store.set(words[0], json.loads(words[1]))
    elif command == "add":
        print(store.add(words[0], int(words[1])))
    elif command == "del":
        store.delete(words[0])
    elif command == "keys":
        print("\n".join(store.keys()))
    else:
        sys.exit("kv.py URL get KEY | set KEY JSON | add KEY NUMBER | del KEY | keys")
