"""The handoff machine, event by event: these tests read like the protocol."""

from __future__ import annotations

import pytest

from prism.errors import ProtocolError
from prism.handoff.diagram import PAGE, rewrite
from prism.handoff.machine import (
    SOURCE_ATTEMPTS,
    SOURCE_TABLE,
    SWITCH_EVENTS,
    TARGET_ATTEMPTS,
    TARGET_TABLE,
    Command,
    Event,
    Machine,
    Source,
    SourceState,
    Target,
    TargetState,
)
from prism.handoff.runner import Runner
from prism.switch.control import Status

INTERNAL = {Event.GAVE_UP, Event.EXISTS_AGAIN, Event.TIDY, Event.KEEP}
TABLES = [(Source, SourceState, SOURCE_TABLE), (Target, TargetState, TARGET_TABLE)]


def play(machine: Machine, *playbook: str) -> Machine:
    """Each line: an event, an arrow, the commands that must follow."""
    for line in playbook:
        event, _, commands = line.partition("->")
        wanted = [Command[name] for name in commands.split()]
        assert list(machine.feed(Event[event.strip()])) == wanted, line
    return machine


# The source


def test_a_new_connection_is_handed_over():
    machine = play(
        Source(),
        "START_NEW -> SWITCH_ADD",
        "OK        -> FREEZE_EXPORT",
        "EXPORTED  -> SEND_OFFER",
        "TAKEN     -> CLOSE_QUIETLY DONE",
    )
    assert machine.state is SourceState.GONE
    assert machine.done
    assert machine.why is None


def test_a_connection_with_a_rule_is_handed_on():
    machine = play(
        Source(),
        "START_RULE -> SWITCH_LOCK",
        "OK         -> FREEZE_EXPORT",
        "EXPORTED   -> SEND_OFFER",
        "TAKEN      -> CLOSE_QUIETLY DONE",
    )
    assert machine.state is SourceState.GONE


@pytest.mark.parametrize("answer", ["EXISTS", "FULL", "DENIED"])
def test_a_switch_that_does_not_add_leaves_the_connection_where_it_is(answer):
    machine = play(Source(), "START_NEW -> SWITCH_ADD", f"{answer} -> SERVE_HERE DONE")
    assert (machine.state, machine.why) == (SourceState.KEPT, Event[answer])


def test_a_rule_that_is_gone_leaves_the_connection_without_a_rule():
    machine = play(Source(), "START_RULE -> SWITCH_LOCK", "NOENT -> SERVE_HERE DONE")
    assert (machine.state, machine.why) == (SourceState.KEPT, Event.NOENT)


@pytest.mark.parametrize("answer", ["STALE", "DENIED"])
def test_a_rule_that_is_not_this_nodes_is_looked_into(answer):
    machine = play(Source(), "START_RULE -> SWITCH_LOCK", f"{answer} -> SERVE_HERE RECONCILE DONE")
    assert machine.state is SourceState.KEPT_UNSURE


def test_a_lock_without_an_answer_is_undone_while_the_connection_is_served():
    machine = play(
        Source(),
        "START_RULE -> SWITCH_LOCK",
        "NO_ANSWER  -> SERVE_HERE ARM_RETRY",
        "RETRY_DUE  -> SWITCH_CHOWN",
        "NO_ANSWER  -> ARM_RETRY",
        "RETRY_DUE  -> SWITCH_CHOWN",
        "OK         -> DONE",
    )
    assert machine.state is SourceState.KEPT_WITH_RULE


def test_an_add_without_an_answer_is_found_out_and_removed_while_the_connection_is_served():
    machine = play(
        Source(),
        "START_NEW -> SWITCH_ADD",
        "NO_ANSWER -> SERVE_HERE ARM_RETRY",
        "RETRY_DUE -> SWITCH_ADD",
        "OK        -> SWITCH_DELETE",
        "NO_ANSWER -> ARM_RETRY",
        "RETRY_DUE -> SWITCH_DELETE",
        "NOENT     -> DONE",
    )
    assert machine.state is SourceState.KEPT


def test_what_cannot_be_exported_is_resumed_at_once():
    machine = play(
        Source(),
        "START_NEW     -> SWITCH_ADD",
        "OK            -> FREEZE_EXPORT",
        "EXPORT_FAILED -> SWITCH_CHOWN RESUME SERVE_HERE",
        "OK            -> SWITCH_DELETE",
        "OK            -> DONE",
    )
    assert (machine.state, machine.why) == (SourceState.KEPT, Event.EXPORT_FAILED)


def offered(start: str = "START_NEW") -> Source:
    machine = Source()
    for event in (Event[start], Event.OK, Event.EXPORTED):
        machine.feed(event)
    return machine


def test_a_refused_connection_is_served_here_and_its_rule_removed():
    machine = play(
        offered(),
        "REFUSED -> SWITCH_CHOWN RESUME SERVE_HERE",
        "OK      -> SWITCH_DELETE",
        "OK      -> DONE",
    )
    assert machine.state is SourceState.KEPT


def test_a_refused_connection_keeps_the_rule_it_had():
    machine = play(offered("START_RULE"), "REFUSED -> SWITCH_CHOWN RESUME SERVE_HERE", "OK -> DONE")
    assert machine.state is SourceState.KEPT_WITH_RULE


def test_a_refusal_from_who_has_taken_it_after_all_ends_with_one_owner():
    machine = play(offered(), "REFUSED -> SWITCH_CHOWN RESUME SERVE_HERE", "STALE -> ABORT DONE")
    assert machine.state is SourceState.LOST


@pytest.mark.parametrize("silence", ["TIMED_OUT", "LINK_LOST"])
def test_silence_is_answered_by_taking_back(silence):
    machine = play(
        offered(),
        f"{silence} -> SWITCH_CHOWN",
        "OK         -> RESUME SERVE_HERE SWITCH_DELETE",
        "OK         -> DONE",
        "REFUSED    ->",  # B has found out too
    )
    assert (machine.state, machine.why) == (SourceState.KEPT, Event[silence])


def test_a_backend_that_takes_back_keeps_the_rule():
    machine = play(
        offered("START_RULE"), "TIMED_OUT -> SWITCH_CHOWN", "OK -> RESUME SERVE_HERE DONE"
    )
    assert machine.done
    assert machine.state is SourceState.KEPT_WITH_RULE


@pytest.mark.parametrize("answer", ["STALE", "NOENT"])
def test_taking_back_what_is_taken_is_given_up_without_a_packet(answer):
    machine = play(
        offered(),
        "TIMED_OUT -> SWITCH_CHOWN",
        f"{answer} -> CLOSE_QUIETLY DONE",
        "TAKEN     ->",
    )
    assert machine.state is SourceState.GONE


def test_a_late_taken_settles_it_before_the_switch_does():
    machine = play(
        offered(),
        "TIMED_OUT -> SWITCH_CHOWN",
        "TAKEN     -> CLOSE_QUIETLY DONE",
        "STALE     ->",
    )
    assert machine.state is SourceState.GONE


def test_a_late_refusal_settles_it_before_the_switch_does():
    play(
        offered(),
        "TIMED_OUT -> SWITCH_CHOWN",
        "NO_ANSWER -> ARM_RETRY",
        "REFUSED   -> RESUME SERVE_HERE",
        "RETRY_DUE -> SWITCH_CHOWN",
        "OK        -> SWITCH_DELETE",
        "OK        -> DONE",
    )


@pytest.mark.parametrize("before", [(), ("TIMED_OUT -> SWITCH_CHOWN",)])
def test_what_the_target_has_lost_is_aborted(before):
    machine = play(offered(), *before, "DROPPED -> ABORT DONE")
    assert machine.state is SourceState.LOST


@pytest.mark.parametrize("answer", ["NO_ANSWER", "DENIED", "EXISTS", "FULL"])
def test_taking_back_is_bounded_and_ends_in_an_abort(answer):
    machine = play(offered(), "LINK_LOST -> SWITCH_CHOWN")
    delays = []
    for _ in range(SOURCE_ATTEMPTS):
        play(machine, f"{answer} -> ARM_RETRY")
        delays.append(machine.retry_delay)
        play(machine, "RETRY_DUE -> SWITCH_CHOWN")
    assert delays == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0]
    play(machine, f"{answer} -> ABORT RECONCILE DONE")
    assert machine.done
    assert machine.state is SourceState.LOST


def test_unlocking_is_bounded_and_ends_in_serving_on():
    machine = play(offered(), "REFUSED -> SWITCH_CHOWN RESUME SERVE_HERE")
    for _ in range(SOURCE_ATTEMPTS):
        play(machine, "NO_ANSWER -> ARM_RETRY", "RETRY_DUE -> SWITCH_CHOWN")
    play(machine, "NO_ANSWER -> RECONCILE DONE")
    assert machine.state is SourceState.KEPT_UNSURE


# The target


def test_an_offer_is_taken():
    machine = play(
        Target(),
        "OFFER     -> IMPORT",
        "IMPORTED  -> SWITCH_CHOWN",
        "OK        -> ACTIVATE",
        "ACTIVATED -> SERVE SEND_TAKEN DONE",
    )
    assert machine.state is TargetState.SERVING
    assert machine.done


def test_what_cannot_be_imported_is_refused():
    machine = play(Target(), "OFFER -> IMPORT", "IMPORT_FAILED -> SEND_REFUSED DONE")
    assert (machine.state, machine.why) == (TargetState.DISCARDED, Event.IMPORT_FAILED)


def committing() -> Target:
    machine = Target()
    machine.feed(Event.OFFER)
    machine.feed(Event.IMPORTED)
    return machine


@pytest.mark.parametrize("answer", ["STALE", "NOENT", "FULL", "DENIED"])
def test_without_the_switchs_consent_the_copy_is_dropped(answer):
    machine = play(committing(), f"{answer} -> DISCARD SEND_REFUSED DONE")
    assert machine.state is TargetState.DISCARDED


def test_a_port_in_use_is_changed_once():
    play(
        committing(),
        "EXISTS   -> IMPORT_ELSEWHERE",
        "IMPORTED -> SWITCH_CHOWN",
        "OK       -> ACTIVATE",
    )
    machine = play(
        committing(),
        "EXISTS   -> IMPORT_ELSEWHERE",
        "IMPORTED -> SWITCH_CHOWN",
        "EXISTS   -> DISCARD SEND_REFUSED DONE",
    )
    assert machine.done
    play(committing(), "EXISTS -> IMPORT_ELSEWHERE", "IMPORT_FAILED -> SEND_REFUSED DONE")


def test_an_unanswered_commit_is_asked_again():
    play(
        committing(),
        "NO_ANSWER -> ARM_RETRY",
        "RETRY_DUE -> SWITCH_CHOWN",
        "OK        -> ACTIVATE",
        "ACTIVATED -> SERVE SEND_TAKEN DONE",
    )


@pytest.mark.parametrize("answer", ["STALE", "NOENT"])
def test_whoever_is_unsure_does_not_call_it_a_refusal(answer):
    play(
        committing(),
        "NO_ANSWER -> ARM_RETRY",
        "RETRY_DUE -> SWITCH_CHOWN",
        f"{answer}  -> DISCARD DONE",
    )


def test_the_target_asks_longer_than_the_source_and_then_leaves_quietly():
    assert TARGET_ATTEMPTS > SOURCE_ATTEMPTS
    machine = committing()
    for _ in range(TARGET_ATTEMPTS):
        play(machine, "NO_ANSWER -> ARM_RETRY", "RETRY_DUE -> SWITCH_CHOWN")
    play(machine, "NO_ANSWER -> DISCARD RECONCILE DONE")
    assert machine.state is TargetState.DISCARDED


def test_a_committed_connection_that_cannot_live_is_reported_dropped():
    machine = play(
        committing(),
        "OK              -> ACTIVATE",
        "ACTIVATE_FAILED -> SWITCH_DELETE",
        "NO_ANSWER       -> ARM_RETRY",
        "RETRY_DUE       -> SWITCH_DELETE",
        "OK              -> SEND_DROPPED DONE",
    )
    assert machine.why is Event.ACTIVATE_FAILED


# All pairs


def reach(kind: type[Machine], state: object) -> Machine:
    """A machine in that state, put there by the shortest history of events from outside."""
    histories: list[tuple[Event, ...]] = [()]
    for history in histories:
        machine = kind()
        for event in history:
            machine.feed(event)
        if machine.state is state:
            return machine
        if len(history) < 7:
            histories += [
                (*history, event)
                for at, event in kind.TABLE
                if at is machine.state and event not in INTERNAL
            ]
    raise AssertionError(f"{state} cannot be reached")


PAIRS = [
    pytest.param(kind, state, event, id=f"{kind.__name__}-{state.name}-{event.name}")
    for kind, states, _ in TABLES
    for state in states
    if state is not SourceState.RETURNED
    for event in Event
]


@pytest.mark.parametrize(("kind", "state", "event"), PAIRS)
def test_every_pair_is_in_the_table_or_refused_by_name(kind, state, event):
    machine = reach(kind, state)
    row = kind.TABLE.get((state, event))
    if row is None or event in INTERNAL:
        before = (machine.state, machine.done, machine.why)
        with pytest.raises(ProtocolError, match=f"{state.name} cannot take {event.name}"):
            machine.feed(event)
        assert (machine.state, machine.done, machine.why) == before
    else:
        commands = machine.feed(event)
        assert commands[: len(row.commands)] == row.commands
        assert machine.done == (machine.state in ends(kind))


def ends(kind: type[Machine]) -> set:
    return {row.state for row in kind.TABLE.values() if row.commands[-1:] == (Command.DONE,)}


@pytest.mark.parametrize(("kind", "states", "table"), TABLES)
def test_the_table_is_sound(kind, states, table):
    answers = set(list(Event)[:7])
    for state in states:
        rows = {event: row for (at, event), row in table.items() if at is state}
        entering = [row.commands for row in table.values() if row.state is state]
        asks = any(any(c.name.startswith("SWITCH_") for c in commands) for commands in entering)
        if asks:
            assert answers <= set(rows), f"{state.name} asks the switch and misses an answer"
        if any(
            row.commands[-1:] == (Command.ARM_RETRY,) and at is state and row.state is state
            for (at, _), row in table.items()
        ):
            assert Event.GAVE_UP in rows, f"{state.name} retries without end"
        if state in ends(kind):
            assert all(row.state is state and not row.commands for row in rows.values())
    for row in table.values():
        assert Command.DONE not in row.commands[:-1]


def test_the_switchs_statuses_are_its_events():
    assert [SWITCH_EVENTS[status].name for status in Status] == [
        "OK", "EXISTS", "NOENT", "STALE", "FULL", "DENIED", "DENIED",
    ]  # fmt: skip


def test_the_page_shows_the_tables():
    text = PAGE.read_text()
    assert rewrite(text) == text, "run 'python -m prism.handoff.diagram'"


def test_a_page_without_markers_is_refused():
    with pytest.raises(ProtocolError, match="source machine: begin"):
        rewrite("# The protocols")


# The runner


class Listing(Runner[Source]):
    """Writes down what it is told; CHOWN is answered at once."""

    def __init__(self, machine: Source) -> None:
        super().__init__(machine)
        self.done: list[str] = []
        self.errors: list[ProtocolError] = []

    def execute(self, command: Command) -> None:
        if command is Command.SWITCH_CHOWN:
            self.post(Event.OK)
        self.done.append(command.name)

    def violation(self, error: ProtocolError) -> None:
        self.errors.append(error)


def test_a_command_that_answers_at_once_does_not_overtake_the_commands_before_it():
    machine = offered("START_RULE")
    runner = Listing(machine)
    runner.post(Event.REFUSED)
    assert not runner.errors
    assert runner.done == ["SWITCH_CHOWN", "RESUME", "SERVE_HERE", "DONE"]
    assert machine.state is SourceState.KEPT_WITH_RULE


def test_an_event_out_of_place_is_reported_and_changes_nothing():
    runner = Listing(Source())
    runner.post(Event.TAKEN)
    assert not runner.done
    assert str(runner.errors[0]) == "a handoff source in state IDLE cannot take TAKEN"
    assert runner.machine.state is SourceState.IDLE
