"""Programs a P4Runtime switch: bmv2, a Tofino or the soft switch, it does not matter which.

Several drivers may want the same switch; the one with the highest election id is its primary and
writes, the others wait. Whoever becomes the primary reads every entry back: what is in the switch
is what holds. After an error that leaves open what was written, the connection is made anew, with
a new election id so that a write still on its way is refused, and everything is read again.

Calls of the switch block a thread, never the event loop. Changes that come while a batch is under
way go together in the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from google.rpc import code_pb2 as codes

from prism.errors import ConfigError, SwitchError
from prism.switch.base import Change, Rule
from prism.switch.control import Status
from prism.switch.p4runtime_messages import p4
from prism.switch.p4runtime_pipeline import Pipeline
from prism.switch.p4runtime_rules import LINGER, OURS, Codec, Key, Value, difference
from prism.switch.p4runtime_session import NotPrimaryError, Session, SessionSettings

__all__ = ["DriverCounters", "P4Driver"]

_log = logging.getLogger(__name__)
_BACK_OFF: Final = (0.05, 2.0)
_BATCH: Final = 512  # updates of one write
_SWEEP: Final = 0.5  # seconds between two deletions of lingering entries
_UNKNOWN: Final = Value(0)


class _Update(NamedTuple):
    kind: int
    key: Key
    value: Value | None


@dataclass(slots=True)
class DriverCounters:
    """What a driver has done since it was made."""

    sessions: int = 0
    take_overs: int = 0
    pipelines_set: int = 0
    writes: int = 0
    updates: int = 0
    refused: int = 0
    repairs: int = 0
    lost: int = 0


class P4Driver:
    """A ``DataPlane`` over P4Runtime.

    Args:
        settings: where the switch is. The low half of the election id is replaced: it is random,
            and grows with each connection.
        pipeline: the program.
        adopt: called when this driver has become the primary, with the rules in the switch and
            their incarnation (0: none known), or ``None`` when the switch had lost its program
            and all entries; returns the rules that shall hold.
        stand_by: called when it is not the primary any more; the argument says whether
            another one is.
        on_packet: takes the packets that the switch gives to its CPU port.
        incarnation: the number to store with each rule.

    Raises:
        ConfigError: files for TLS cannot be used.
    """

    def __init__(
        self,
        settings: SessionSettings,
        pipeline: Pipeline,
        *,
        adopt: Callable[[Sequence[Rule] | None, int], Iterable[Rule]],
        stand_by: Callable[[bool], None],
        on_packet: Callable[[bytes], None],
        incarnation: Callable[[], int],
    ) -> None:
        self.counters = DriverCounters()
        self.ready = False
        settings.tls.controller()  # what is wrong with it is told at once, not when it is needed
        self._settings = settings
        self._pipeline = pipeline
        self._codec = Codec(pipeline)
        self._adopt = adopt
        self._stand_by = stand_by
        self._on_packet = on_packet
        self._incarnation = incarnation
        self._number = secrets.randbits(48)
        self._known: dict[Key, Value] = {}
        self._linger: dict[Key, float] = {}
        self._session: Session | None = None
        self._busy = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "p4runtime")
        self._messages: asyncio.Queue[Any | None] = asyncio.Queue()

    # Life

    async def run(self) -> None:
        """Stay connected until cancelled."""
        sweeper = asyncio.create_task(self._sweep())
        pause = _BACK_OFF[0]
        told = False
        try:
            while True:
                try:
                    await self._one_session()
                    pause, told = _BACK_OFF[0], False
                except (SwitchError, ConfigError) as error:
                    if not told:
                        _log.warning("%s; trying again", error)
                    told = True
                finally:
                    await self._drop_session()
                await asyncio.sleep(pause)
                pause = min(2 * pause, _BACK_OFF[1])
        finally:
            sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeper
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _one_session(self) -> None:
        loop = asyncio.get_running_loop()
        self._number += 1
        high = self._settings.election_id[0]
        settings = dataclasses.replace(self._settings, election_id=(high, self._number))
        messages: asyncio.Queue[Any | None] = asyncio.Queue()
        self._messages = messages

        def on_stream(message: Any | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(messages.put_nowait, message)

        session = self._session = Session(settings, on_stream)
        await self._call(session.open)
        self.counters.sessions += 1
        patience: float | None = settings.timeout  # for the election; then news come when they come
        while True:
            try:
                async with asyncio.timeout(patience):
                    message = await messages.get()
            except TimeoutError:
                raise SwitchError(
                    f"the P4Runtime switch at {settings.address} does not say who is its primary"
                ) from None
            if message is None:
                break
            patience = None
            kind = message.WhichOneof("update")
            if kind == "packet" and self.ready:
                self._on_packet(message.packet.payload)
            elif kind == "arbitration":
                primary = message.arbitration.status.code == codes.OK
                if primary and not self.ready:
                    await self._take_over(session)
                elif not primary:
                    self.ready = False
                    self._stand_by(True)
        self.counters.lost += 1

    async def _drop_session(self) -> None:
        session, self._session = self._session, None
        was_ready, self.ready = self.ready, False
        if was_ready:
            self._stand_by(False)
        if session is not None:
            await asyncio.to_thread(session.close)

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, function, *arguments)

    def send_packet(self, payload: bytes) -> None:
        """Put a frame into the switch, as if it came in by a port."""
        if self._session is not None and self.ready:
            fields = self._pipeline.packet_out or ()
            self._session.send_packet(payload, [(field.id, b"\0") for field in fields])

    # Taking over

    async def _take_over(self, session: Session) -> None:
        async with self._busy:
            fresh = await self._call(session.pipeline_cookie) != self._pipeline.cookie
            if fresh:
                await self._call(session.set_pipeline, self._pipeline)
                self.counters.pipelines_set += 1
            await self._call(self._have_syns_asked_about, session)
            self._known = await self._call(self._read_all, session)
            told = self._told()
            rules = [rule for rule, _ in told]
            incarnation = max((number for _, number in told), default=0)
            wanted: dict[Key, Value] = {}
            for rule in self._adopt(None if fresh else rules, incarnation):
                wanted |= self._codec.entries(rule, self._incarnation())
            await self._repair(session, wanted)
            self.counters.take_overs += 1
            self.ready = True
        _log.info("primary of the P4Runtime switch, %d entries", len(self._known))

    def _have_syns_asked_about(self, session: Session) -> None:
        """Bare SYNs on flows with a rule shall come here, not go to the frontend (the default)."""
        if self._pipeline.bare_syn is None:
            return
        table, action = self._pipeline.bare_syn
        update = p4.Update(type=p4.Update.MODIFY)
        entry = update.entity.table_entry
        entry.table_id, entry.is_default_action = table, True
        entry.action.action.action_id = action
        ((code, text),) = session.write([lambda empty: empty.CopyFrom(update)])
        if code not in (codes.OK, codes.UNIMPLEMENTED):  # the soft switch asks anyway
            _log.warning("bare SYNs go to the frontends: the switch refused to send them: %s", text)

    def _told(self) -> list[tuple[Rule, int]]:
        """The rules that the entries tell."""
        found = (
            self._codec.rule_of(key, value)
            for key, value in self._known.items()
            if self._codec.is_rule(key)
        )
        return [told for told in found if told is not None]

    def _read_all(self, session: Session) -> dict[Key, Value]:
        entries = (
            self._codec.parse(entry) for entry in session.read(list(self._codec.rule_tables))
        )
        return dict(entries)

    async def _repair(self, session: Session, wanted: Mapping[Key, Value]) -> None:
        """Write what is missing; what is too much of ours goes after a moment."""
        updates = [_Update(*change) for change in difference(self._known, wanted)]
        self.counters.repairs += len(updates)
        for start in range(0, len(updates), _BATCH):
            results = await self._write(session, updates[start : start + _BATCH])
            bad = next((text for code, text in results if code != codes.OK), None)
            if bad is not None:
                raise SwitchError(f"the switch's entries cannot be repaired: {bad}")
        now = asyncio.get_running_loop().time()
        self._linger = {
            key: now + LINGER
            for key, value in self._known.items()
            if key not in wanted and value.metadata == OURS
        }

    # Changes

    async def apply(self, changes: Sequence[Change]) -> Sequence[Status]:
        """See ``DataPlane``."""
        async with self._busy:
            session = self._session
            if session is None or not self.ready:
                raise SwitchError("not the primary of the P4Runtime switch")
            try:
                return await self._apply(session, changes)
            except SwitchError as error:
                self.ready = False
                self._stand_by(isinstance(error, NotPrimaryError))
                self._messages.put_nowait(None)  # what holds now is read from a new session
                raise

    async def _apply(self, session: Session, changes: Sequence[Change]) -> list[Status]:
        plans = [self._plan(change) for change in changes]
        results = await self._run(session, plans)
        # What the switch knows better than we do: once more, with what it said.
        again = [i for i, status in enumerate(results) if status is None]
        if again:
            second = await self._run(session, [self._plan(changes[i]) for i in again])
            for i, status in zip(again, second, strict=True):
                results[i] = Status.INVALID if status is None else status
        bad = [change for change, status in zip(changes, results, strict=True) if status]
        if bad:
            self.counters.refused += len(bad)
            undo = [self._plan(Change(c.flow, c.after, c.before)) for c in bad]
            if any(status != Status.OK for status in await self._run(session, undo)):
                raise SwitchError("half a rule is in the switch, and cannot be undone")
        return [status or Status.OK for status in results]

    def _plan(self, change: Change) -> list[_Update]:
        """The updates of one change: who may speak first, the rule last; deletions after."""
        wanted = (
            {} if change.after is None else self._codec.entries(change.after, self._incarnation())
        )
        updates: list[_Update] = []
        gone: list[_Update] = []
        if change.before is not None:
            *speaker, guard, rule = self._codec.entries(change.before)
            for key in speaker:
                there = self._known.get(key)
                if there is None or key in wanted:
                    continue
                lock = Value(self._codec.rule_tables[key.table][0].lock, b"", OURS)
                if there != lock:
                    updates.append(_Update(p4.Update.MODIFY, key, lock))
                self._linger[key] = asyncio.get_running_loop().time() + LINGER
            if change.after is None:
                gone = [_Update(p4.Update.DELETE, key, None) for key in (rule, guard)]
        for kind, key, value in difference(self._known, wanted):
            updates.append(_Update(kind, key, value))
        for key in wanted:
            self._linger.pop(key, None)
        return updates + gone

    async def _run(self, session: Session, plans: Sequence[list[_Update]]) -> list[Status | None]:
        """Write plans together; what became of each, ``None``: try it once more."""
        updates = [update for plan in plans for update in plan]
        told = iter(await self._write(session, updates)) if updates else iter(())
        results: list[Status | None] = []
        for plan in plans:
            worst: Status | None = Status.OK
            for update in plan:
                code, text = next(told)
                status = _status(code, update.kind)
                if status not in (Status.OK, None):
                    _log.warning("the switch refuses an entry: %s", text)
                    worst = status
                elif status is None and worst == Status.OK:
                    worst = None
            results.append(worst)
        return results

    async def _write(self, session: Session, updates: Sequence[_Update]) -> list[tuple[int, str]]:
        """Write, and note what the switch has then."""
        results: list[tuple[int, str]] = await self._call(self._write_now, session, updates)
        self.counters.writes += 1
        self.counters.updates += len(updates)
        for (kind, key, value), (code, _) in zip(updates, results, strict=True):
            if code == codes.OK and value is not None:
                self._known[key] = value
            elif code == codes.ALREADY_EXISTS:
                self._known[key] = _UNKNOWN
            elif code == codes.NOT_FOUND or (code == codes.OK and kind == p4.Update.DELETE):
                self._known.pop(key, None)
        return results

    def _write_now(self, session: Session, updates: Sequence[_Update]) -> list[tuple[int, str]]:
        return session.write([partial(self._codec.fill, *update) for update in updates])

    async def _sweep(self) -> None:
        """Delete the entries of former owners when their time is over."""
        while True:
            await asyncio.sleep(_SWEEP)
            if not self.ready:
                continue
            async with self._busy:
                now = asyncio.get_running_loop().time()
                over = [key for key, until in self._linger.items() if until <= now][:_BATCH]
                session = self._session
                if not over or session is None or not self.ready:
                    continue
                for key in over:
                    del self._linger[key]
                with contextlib.suppress(SwitchError):  # the next session finds them again
                    await self._write(
                        session, [_Update(p4.Update.DELETE, key, None) for key in over]
                    )


def _status(code: int, kind: int) -> Status | None:
    """Our status of an update's code; ``None``: the switch has another entry than we thought."""
    if code == codes.OK or (code == codes.NOT_FOUND and kind == p4.Update.DELETE):
        return Status.OK
    if code in (codes.ALREADY_EXISTS, codes.NOT_FOUND):
        return None
    return Status.FULL if code == codes.RESOURCE_EXHAUSTED else Status.INVALID
