"""What ``pytest tests/e2e --brief`` runs: what ``scripts/test p4runtime`` asks of another switch.

Every file of tests of the handoff, but only one variant of a parametrised test, and without tests
that take long and have little to do with the switch. A new file is run, too, unless it says here
which of its tests are.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

ONLY = {
    "test_adaptive_handoff": (
        "test_a_connection_at_a_backend",
        "test_backends_tell_what_they_have_sent",
        "test_uploads_and_what_they_teach",
    ),
    "test_apps": (
        "test_nginx_answers_as_it_does_directly",
        "test_one_connection_is_served_by_several_backends",
        "test_websockets_through_handoff",
    ),
    "test_bodies": (
        "test_clients_that_disappear_in_mid_handoff",
        "test_half_close",
        "test_half_close_in_mid_request",
        "test_handoff_in_mid_body",
        "test_large_head",
        "test_one_octet_at_a_time",
        "test_pipelined_requests_for_different_owners",
        "test_slow_readers",
        "test_upload_of_256_mebibytes",
        "test_uploads",
    ),
    "test_crash": ("test_agent_dies", "test_kill_in_mid_handoff"),
    "test_drained_frontend": ("test_who_has_said_nothing_yet_is_handed_on",),
    "test_fallback": (
        "test_backend_that_cannot_import",
        "test_rule_table_full",
        "test_switch_that_does_not_answer",
    ),
    "test_fitness": ("test_where_new_connections_go",),
    "test_policy_reload": (
        "test_relaying_keeps_the_connection",
        "test_the_frontend_and_the_owners_say_the_same",
    ),
    "test_ports": (  # not the one that waits for the end of TIME_WAIT, a minute
        "test_forged_syn",
        "test_port_used_again_after_the_server_closed",
        "test_port_used_again_at_once",
    ),
    "test_replicated": (
        "test_conditions_ranges_and_deletion",
        "test_each_object_is_on_so_many_backends",
        "test_reads_are_spread_over_the_replicas",
    ),
    "test_tls_clients": (
        "test_boto3",
        "test_curl",
        "test_every_version_and_suite",
        "test_openssl_s_client",
        "test_requests",
    ),
    "test_tls_life": ("test_resumption", "test_uploads_over_tls_are_held"),
    "test_tls_same": (
        "test_clients_that_disappear_in_mid_handoff",
        "test_half_close",
        "test_handoff_in_mid_body",
        "test_pipelined_requests_for_different_owners",
        "test_put_get_head_list_range_delete",
        "test_two_thousand_requests_are_answered_by_their_owners",
        "test_uploads",
    ),
    # The lab, its commands and the examples bring up clusters of their own; failover and TLS are
    # of P4Runtime whatever the other tests are of.
    "test_demo": (),
    "test_examples": (),
    "test_lab": (),
    "test_p4runtime_failover": (),
    "test_p4runtime_tls_lab": (),
}

EVERY_VARIANT = {
    "test_bodies": ("test_clients_that_disappear_in_mid_handoff", "test_handoff_in_mid_body"),
    "test_basic": ("test_put_get_head_list_range_delete",),
    "test_ports": ("test_port_used_again_at_once",),
}


def brief(items: list[pytest.Item], *, whole: bool = True) -> Iterator[pytest.Item]:
    """Those that are to be run.

    Args:
        items: what was collected.
        whole: all tests of their files are among them, and not only those that failed last.

    Raises:
        pytest.UsageError: a name above is no test's.
    """
    seen: set[tuple[str, str]] = set()
    for item in items:
        file, name = item.path.stem, item.name.partition("[")[0]
        first = (file, name) not in seen
        seen.add((file, name))
        if name in ONLY.get(file, (name,)) and (first or name in EVERY_VARIANT.get(file, ())):
            yield item
    files = {file for file, _ in seen}
    for file, names in (*ONLY.items(), *EVERY_VARIANT.items()):
        unknown = [name for name in names if file in files and (file, name) not in seen]
        if unknown and whole:
            raise pytest.UsageError(f"e2e_selection.py: {file}.py has no {', '.join(unknown)}")
