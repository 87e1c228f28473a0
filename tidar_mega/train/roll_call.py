"""Where every rank is, and whether it still lives: what a collective that fails or times out does not say.

Every rank has a thread that says each second, in a store that all ranks share, what its rank is doing. The thread goes
on while the rank waits for others, but not when the process is stopped, dead or unreachable. A rank that fails leaves a
note there, and the others end when they read it.
"""

from __future__ import annotations

import contextlib
import json
import os
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
    """This rank's end of the shared store, to which only threads talk, as it may never answer.

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
        self._note: Note | None = None  # of another rank
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)
        self._thread.start()

    @property
    def place(self) -> Place:
        return self._place

    def at(self, step: int, doing: str) -> None:
        """Called before whatever waits for other ranks; costs nothing."""
        self._place, self._since, self._warned = Place(step, doing), time.monotonic(), False

    def ask(self) -> Note | Survey | None:
        """The first note that a rank has left, else where all ranks are; None where the store does not answer."""
        return self._note or _within(SURVEY_SECONDS + GRACE_SECONDS, self._ask)

    def leave(self, code: int, text: str) -> Note:
        """Leaves a note that this rank ends, and returns the first one that any rank has left."""
        note = Note(self.rank, code, text)
        return _within(GRACE_SECONDS, lambda: _leave(self._connect(), note)) or note

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(GRACE_SECONDS)

    def _speak(self) -> None:
        with contextlib.suppress(Exception):  # whoever needs the store notices that it is gone
            store, beat = self._connect(), 0
            while True:
                beat += 1
                words = Place(self._place.step, self._place.doing, beat)
                store.set(f"place {self.rank}", json.dumps(asdict(words)))
                note = _first_note(store)
                if note is not None and note.rank != self.rank:
                    self._note = note
                    self._follow(note)
                if self._stop.wait(PERIOD_SECONDS):
                    return
                if not self._warned and time.monotonic() - self._since > self._warn_seconds:
                    self._warn(store)

    def _follow(self, note: Note) -> None:
        """Another rank has failed. This one may notice by itself, or wait for it in vain."""
        if not self._stop.wait(GRACE_SECONDS) and not self.ending:
            say(note.consequence(self.rank))
            os._exit(note.code)

    def _warn(self, store: Store) -> None:
        self._warned = True
        here = self._place
        threading.Thread(target=self._survey_aloud, args=(here,), daemon=True).start()  # this one must go on speaking

    def _survey_aloud(self, here: Place) -> None:
        with contextlib.suppress(Exception):
            store = self._connect()
            blame = self._survey(store).blame(here)
            if blame and store.add(f"warned at {here}", 1) == 1:
                say(f"[rank {self.rank}] warning: waiting for {self._warn_seconds:.0f} s at {here}; {blame}")

    def _ask(self) -> Note | Survey:
        store = self._connect()
        return _first_note(store) or self._survey(store)

    def _survey(self, store: Store) -> Survey:
        before = self._places(store)
        time.sleep(SURVEY_SECONDS)
        after = self._places(store)
        return Survey(after, {rank for rank, place in after.items() if place == before[rank]})

    def _places(self, store: Store) -> dict[int, Place | None]:
        keys = {rank: f"place {rank}" for rank in range(self.world_size)}
        return {rank: Place(**json.loads(store.get(k))) if store.check([k]) else None for rank, k in keys.items()}


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


def _within(seconds: float, action: Callable):
    """What `action` returns, or None if that takes longer or fails."""
    result = []

    def act() -> None:
        with contextlib.suppress(Exception):
            result.append(action())

    thread = threading.Thread(target=act, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no memory for a thread
        act()
    else:
        thread.join(seconds)
    return result[0] if result else None
