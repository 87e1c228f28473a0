"""Where every rank is, and whether it still lives: what a collective that fails or times out does not say.

Every rank has a thread that says each second, in a store that all ranks share, what its rank is doing. The thread goes
on while the rank waits for others, but not when the process is stopped, dead or unreachable. A rank that fails leaves a
note there, and the others end when they read it.

It is also the hang watchdog: a rank that has made no progress for too long finds out who keeps it waiting and leaves
that as a note; every rank then writes the Python stacks of all its threads and ends, to be started again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tidar_mega.config import LostError

if TYPE_CHECKING:
    from torch.distributed import Store

PERIOD_SECONDS = 1.0  # between two words of a rank
SURVEY_SECONDS = 3.0  # a rank that says nothing for so long is missing
GRACE_SECONDS = 4.0  # for an answer of the store, and for a rank to end by itself once another has failed
_READS = 1 << 20  # bytes: more than what the words of other ranks have
_OWN_THREADS = ("roll call", "watchdog")


@dataclass(frozen=True)
class Place:
    """What a rank said last. All ranks come to the same places in turn, `count` is how many; `beat` grows as long as
    it lives, `work` with what it gets done."""

    step: int
    doing: str
    count: int = 0
    beat: int = 0
    work: int = 0

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}"


@dataclass(frozen=True)
class Note:
    """What the first rank to fail has left, and with which code it ended."""

    rank: int
    code: int
    text: str
    stacks: bool = False  # every rank is to say where in its code it is

    def consequence(self, rank: int) -> str:
        return f"[rank {rank}] ended because rank {self.rank} had failed: {self.text}"


@dataclass(frozen=True)
class Survey:
    """The last words of every rank, which of them say nothing more, and whether any got something done meanwhile."""

    places: dict[int, Place | None]
    silent: set[int]
    is_working: bool = False

    def blame(self) -> str | None:
        """Who keeps the others waiting, and where; None if all answer from the same place."""
        if self.silent:
            last = "; ".join(
                f"rank {r} was last heard of at {self.places[r] or 'no step'}" for r in sorted(self.silent)
            )
            return f"{_ranks(self.silent)} did not take part: stopped, dead or unreachable; {last}"
        far = {rank: (place.step, place.count) if place else (-1, -1) for rank, place in self.places.items()}
        behind = {rank: self.places[rank] for rank in far if far[rank] < max(far.values())}
        if behind:
            now = "; ".join(f"rank {rank} is still at {place}" for rank, place in sorted(behind.items()))
            return f"{_ranks(behind)} did not take part: {now}"
        return None


class NoRollCall:
    """In place of a `RollCall`, where no other process or watchdog asks."""

    place = Place(0, "starting")

    def at(self, step: int, doing: str) -> None: ...

    def progress(self) -> None: ...

    reading = staticmethod(contextlib.nullcontext)


class RollCall:
    """This rank's end of the shared store. One thread talks to the store, which may never answer; another one does not.

    A rank that is at one place for `hang_seconds`, which the setting `limit` says, ends the run (see `progress`),
    unless it waits for another that gets something done.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        connect: Callable[[], Store],
        hang_seconds: float = float("inf"),
        limit: str = "health.hang_minutes",
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.ending = False  # the main thread has met an error, and will end this process
        self._connect = connect
        self._hang_seconds, self._limit = hang_seconds, limit
        self._place, self._since = Place(0, "starting"), time.monotonic()
        self._beat = self._work = 0
        self._is_reading, self._bytes_read = False, 0
        self._note: Note | None = None  # the first that any rank has left, and when this one saw it
        self._noted_at = 0.0
        self._told_stacks = False
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_OWN_THREADS[0], daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name=_OWN_THREADS[1], daemon=True)
        self._thread.start()
        self._watchdog.start()

    @property
    def place(self) -> Place:
        return self._place

    def at(self, step: int, doing: str) -> None:
        """Called on all ranks in the same order, before whatever waits for other ranks; costs nothing."""
        self._place, self._since = Place(step, doing, self._place.count + 1), time.monotonic()

    def progress(self) -> None:
        """Called inside of what may take long at one place."""
        self._work += 1
        self._since = time.monotonic()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """What this process reads inside is its progress: a big checkpoint takes long, and a dead disk for ever."""
        self._is_reading = True
        try:
            yield
        finally:
            self._is_reading = False
            self.progress()

    def ask(self) -> Note | Survey | None:
        """The first note that a rank has left, else where all ranks are; None where the store does not answer."""
        return self._note or self._request(SURVEY_SECONDS + GRACE_SECONDS, self._survey_unless_noted)

    def leave(self, code: int, text: str) -> Note:
        """Leaves a note that this rank ends, and returns the first one that any rank has left."""
        note = Note(self.rank, code, text)
        return self._request(GRACE_SECONDS, lambda store: _leave(store, note)) or note

    def stop(self) -> None:
        self._requests.put(None)
        self._stopped.set()
        self._thread.join(GRACE_SECONDS)
        self._watchdog.join(GRACE_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def _request(self, seconds: float, action: Callable):
        request = _Request(action)
        self._requests.put(request)
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < deadline and not request.done.wait(0.1):
            pass
        return request.result

    def _run(self) -> None:
        with contextlib.suppress(Exception):  # a store that is gone is noticed by whoever needs it
            store = self._connect()
            while True:
                self._speak(store)
                if self._is_stuck():
                    self._blame(store)
                with contextlib.suppress(queue.Empty):
                    request = self._requests.get(timeout=PERIOD_SECONDS)
                    if request is None:
                        return
                    request.result = request.action(store)
                    request.done.set()

    def _watch(self) -> None:
        """The watchdog's own thread."""
        while True:
            if self._hang_seconds < float("inf"):
                # a rank that hangs in C code with Python's lock stops this thread, too: then C writes its stacks
                faulthandler.dump_traceback_later(self._hang_seconds, file=sys.__stderr__)
            if self._stopped.wait(PERIOD_SECONDS):
                return
            if self._is_reading and (now := _bytes_read()) > self._bytes_read + _READS:
                self._bytes_read = now
                self.progress()
            if self._is_stuck(SURVEY_SECONDS + 2 * GRACE_SECONDS):  # for the other thread, which has the store to ask
                self._blame(None)
            self._end_after_note()

    def _speak(self, store: Store) -> None:
        self._beat += 1
        words = replace(self._place, beat=self._beat, work=self._work)
        store.set(f"place {self.rank}", json.dumps(asdict(words)))
        if self._note is None:
            self._note, self._noted_at = _first_note(store), time.monotonic()

    def _end_after_note(self) -> None:
        """Once a rank has failed, the others may notice by themselves, or wait for it in vain."""
        note = self._note
        if note is None or self.ending:
            return
        if note.stacks and not self._told_stacks:
            self._told_stacks = True
            say(stacks(self.rank))
        grace = GRACE_SECONDS if self.rank else GRACE_SECONDS + 2 * PERIOD_SECONDS  # rank 0 may hold the store
        if time.monotonic() - self._noted_at > grace:
            if note.rank != self.rank:
                say(note.consequence(self.rank))
            os._exit(note.code)

    def _is_stuck(self, more_seconds: float = 0.0) -> bool:
        waited = time.monotonic() - self._since
        return waited > self._hang_seconds + more_seconds and self._note is None and not self.ending

    def _blame(self, store: Store | None) -> None:
        """Leaves a note of who keeps this rank waiting; where the store does not answer, rank 0 that holds it."""
        since = self._since
        blame = "rank 0 did not take part, and the store that it holds does not answer"
        if store:
            survey = self._survey(store)
            if survey.is_working and not survey.silent:
                self._since = time.monotonic()
            blame = survey.blame()
        if since != self._since or self._note is not None:
            return  # it, or the one that it waits for, went on meanwhile; or all has been said
        text = (
            f"no progress for {self._hang_seconds / 60:g} minutes ({self._limit}) at {self._place}: "
            f"{blame or 'all ranks answer, so look at the network and the disk'}; the stacks of all ranks are in their "
            "logs; the same command resumes from the newest checkpoint"
        )
        note = Note(self.rank, LostError.exit_code, text, stacks=True)
        self._note, self._noted_at = (_leave(store, note) if store else note), time.monotonic()
        if self._note.rank == self.rank:
            say(f"[rank {self.rank}] error: {text}")

    def _survey_unless_noted(self, store: Store) -> Note | Survey:
        return _first_note(store) or self._survey(store)

    def _survey(self, store: Store) -> Survey:
        before = self._places(store)
        deadline = time.monotonic() + SURVEY_SECONDS
        while time.monotonic() < deadline:
            time.sleep(PERIOD_SECONDS)
            self._speak(store)
        after = self._places(store)
        silent = {rank for rank, place in after.items() if place == before[rank]}
        is_working = any(before[rank] and place and place.work > before[rank].work for rank, place in after.items())
        return Survey(after, silent, is_working)

    def _places(self, store: Store) -> dict[int, Place | None]:
        keys = [f"place {rank}" for rank in range(self.world_size)]
        if store.check(keys):  # once all have started, one question: a thousand ranks may ask at the same time
            return {rank: Place(**json.loads(found)) for rank, found in enumerate(store.multi_get(keys))}
        return {r: Place(**json.loads(store.get(k))) if store.check([k]) else None for r, k in enumerate(keys)}


class _Request:
    """What the main thread wants of the other one."""

    def __init__(self, action: Callable) -> None:
        self.action = action
        self.result = None
        self.done = threading.Event()


def _bytes_read() -> int:
    """By this process so far, from the page cache or from a disk (proc_pid_io(5)); 0 where the system does not say."""
    with contextlib.suppress(OSError):
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(lines["rchar"]) + int(lines["read_bytes"])
    return 0


def stacks(rank: int) -> str:
    """Where every Python thread of this process is, the main one last, as it is what matters most."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {k: f for k, f in sys._current_frames().items() if names.get(k) not in _OWN_THREADS}
    order = sorted(frames, key=lambda k: k == threading.main_thread().ident)
    parts = [f"[rank {rank}] thread {names.get(k, k)}:\n{''.join(traceback.format_stack(frames[k]))}" for k in order]
    return f"[rank {rank}] the stacks of all threads, newest call last:\n" + "".join(parts)


def say(text: str) -> None:
    """In one piece, so that the words of several ranks do not mix."""
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


def _leave(store: Store, note: Note) -> Note:
    if store.add("notes", 1) == 1:
        store.set("first note", json.dumps(asdict(note)))
    return Note(**json.loads(store.get("first note")))


def _first_note(store: Store) -> Note | None:
    return Note(**json.loads(store.get("first note"))) if store.check(["first note"]) else None


def _ranks(ranks) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"
