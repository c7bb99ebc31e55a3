"""Merging the backends' listings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prism.apps.listing import merge


def page(keys: list[str], max_keys: int) -> dict[str, object]:
    """What one backend's store answers."""
    cut = keys[:max_keys]
    return {
        "keys": [{"key": key} for key in cut],
        "truncated": len(keys) > max_keys,
        "next_start_after": cut[-1] if len(keys) > max_keys and cut else None,
    }


@given(
    st.lists(st.sets(st.text(min_size=1, max_size=3), max_size=12), min_size=1, max_size=4),
    st.integers(1, 7),
)
def test_paging_through_merged_pages_gives_every_key_once(
    stores: list[set[str]], max_keys: int
) -> None:
    owned: list[set[str]] = []
    for store in stores:  # a key belongs to one backend
        owned.append(store - set().union(*owned))
    everything = sorted(set().union(*owned))
    after, seen = "", []
    for _ in range(len(everything) + 2):
        pages = [page(sorted(key for key in store if key > after), max_keys) for store in owned]
        merged = merge(pages, max_keys)
        seen += [entry["key"] for entry in merged["keys"]]
        if not merged["truncated"]:
            break
        after = merged["next_start_after"]
    assert seen == everything
