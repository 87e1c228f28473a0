"""Where every rank is, and whether it still lives: what a collective that fails or times out does not say.

Every rank has a thread that says each second, in a store that all ranks share, what its rank is doing. The thread goes
on while the rank waits for others, but not when the process is stopped, dead or unreachable. A rank that fails leaves a
note there, and the others end when they read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

PERIOD_SECONDS = 1.0  # between two words of a rank
SURVEY_SECONDS = 3.0  # a rank that says nothing for so long is missing
GRACE_SECONDS = 4.0  # for an answer of the store, and for a rank to end by itself once another has failed


@dataclass(frozen=True)
class Place:
    """What a rank said last. `beat` grows as long as it lives."""

    step: int
    doing: str
    beat: int = 0

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}"


@dataclass(frozen=True)
class Note:
    """What the first rank to fail has left, and with which code it ended."""

    rank: int
    code: int
    text: str

    def consequence(self, rank: int) -> str:
        return f"[rank {rank}] ended because rank {self.rank} had failed: {self.text}"


@dataclass(frozen=True)
class Survey:
    """The last words of every rank, and which of them say nothing more."""

    places: dict[int, Place | None]
    silent: set[int]

    def blame(self, here: Place) -> str | None:
        """Who keeps the others waiting `here`, and where; None if all are where they should be."""
        if self.silent:
            last = "; ".join(
                f"rank {r} was last heard of at {self.places[r] or 'no step'}" for r in sorted(self.silent)
            )
            return f"{_ranks(self.silent)} did not take part: stopped, dead or unreachable; {last}"
        elsewhere = {rank: place for rank, place in self.places.items() if str(place) != str(here)}
        if elsewhere:
            now = "; ".join(f"rank {rank} is still at {place}" for rank, place in sorted(elsewhere.items()))
            return f"{_ranks(elsewhere)} did not take part: {now}"
        return None


class RollCall:
    """This rank's end of the shared store. Only its thread talks to the store, which may never answer.

    With `warn_seconds`, a rank that is so long at one place says who is missing, for a backend that will not raise.
    """

    def __init__(
        self, rank: int, world_size: int, connect: Callable[[], Store], warn_seconds: float = float("inf")
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.ending = False  # the main thread has met an error, and will end this process
        self._connect = connect
        self._warn_seconds = warn_seconds
        self._place, self._since, self._warned = Place(0, "starting"), time.monotonic(), False
        self._beat = 0
        self._note: Note | None = None  # the first that any rank has left, and when this one saw it
        self._noted_at = 0.0
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def place(self) -> Place:
        return self._place

    def at(self, step: int, doing: str) -> None:
        """Called before whatever waits for other ranks; costs nothing."""
        self._place, self._since, self._warned = Place(step, doing), time.monotonic(), False

    def ask(self) -> Note | Survey | None:
        """The first note that a rank has left, else where all ranks are; None where the store does not answer."""
        return self._note or self._request(SURVEY_SECONDS + GRACE_SECONDS, self._survey_unless_noted)

    def leave(self, code: int, text: str) -> Note:
        """Leaves a note that this rank ends, and returns the first one that any rank has left."""
        note = Note(self.rank, code, text)
        return self._request(GRACE_SECONDS, lambda store: _leave(store, note)) or note

    def stop(self) -> None:
        self._requests.put(None)
        self._thread.join(GRACE_SECONDS)

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
                self._end_after_another()
                self._warn_if_stuck(store)
                with contextlib.suppress(queue.Empty):
                    request = self._requests.get(timeout=PERIOD_SECONDS)
                    if request is None:
                        return
                    request.result = request.action(store)
                    request.done.set()

    def _speak(self, store: Store) -> None:
        self._beat += 1
        words = Place(self._place.step, self._place.doing, self._beat)
        store.set(f"place {self.rank}", json.dumps(asdict(words)))
        if self._note is None:
            self._note, self._noted_at = _first_note(store), time.monotonic()

    def _end_after_another(self) -> None:
        """Once another rank has failed, this one may notice by itself, or wait for it in vain."""
        note = self._note
        if note is None or note.rank == self.rank or self.ending:
            return
        if time.monotonic() - self._noted_at > GRACE_SECONDS:
            say(note.consequence(self.rank))
            os._exit(note.code)

    def _warn_if_stuck(self, store: Store) -> None:
        here = self._place
        if self._warned or time.monotonic() - self._since < self._warn_seconds:
            return
        self._warned = True
        blame = self._survey(store).blame(here)
        if blame and store.add(f"warned at {here}", 1) == 1:
            say(f"[rank {self.rank}] warning: waiting for {self._warn_seconds:.0f} s at {here}: {blame}")

    def _survey_unless_noted(self, store: Store) -> Note | Survey:
        return _first_note(store) or self._survey(store)

    def _survey(self, store: Store) -> Survey:
        before = self._places(store)
        deadline = time.monotonic() + SURVEY_SECONDS
        while time.monotonic() < deadline:
            time.sleep(PERIOD_SECONDS)
            self._speak(store)
        after = self._places(store)
        return Survey(after, {rank for rank, place in after.items() if place == before[rank]})

    def _places(self, store: Store) -> dict[int, Place | None]:
        keys = {rank: f"place {rank}" for rank in range(self.world_size)}
        return {rank: Place(**json.loads(store.get(k))) if store.check([k]) else None for rank, k in keys.items()}


class _Request:
    """What the main thread wants of the other one."""

    def __init__(self, action: Callable) -> None:
        self.action = action
        self.result = None
        self.done = threading.Event()


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
