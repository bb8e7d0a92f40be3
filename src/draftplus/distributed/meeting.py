"""Where the processes of a run meet before they communicate, so that none is left waiting in a collective.

A collective of NCCL cannot be left, nor does gloo's say who is missing. So every process first says in a store that it
has come, and waits there, in Python, for a verdict, which is one for all: go, once all have come; stop, where one was
asked to; or why it makes no sense to go on. A thread of each process shows in the store that it lives and gets on, and
looks for those who do not.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from typing import Literal, Protocol

from torch.distributed.distributed_c10d import PrefixStore, Store

from draftplus.distributed.joining import agreed_name, in_minutes
from draftplus.errors import Interrupted, Stalled, printable
from draftplus.progress import PULSE, beat

GO, STOP = "go", "stop"
BETWEEN_LOOKS = 0.5  # seconds
GONE = 60.0  # seconds without a sign of life after which a process counts as gone
LONGEST_NAP = 0.05  # seconds
KEPT = 100  # meetings that the store remembers, so that nobody asks for one that it has just forgotten
GOES_ON = "what was saved is intact; the same command continues the run"

Phase = Literal["works", "waits", "communicates"]


class Stoppable(Protocol):
    """Whether this process was asked to stop, and whether what it is at may be thrown away."""

    asked: bool
    may_leave: bool


@dataclass(frozen=True)
class At:
    """Where a process is: before, at or in its meeting of this number. what: that is about."""

    number: int = 0
    phase: Phase = "works"
    what: str = ""

    def before(self, other: At) -> bool:
        """Whether it has yet to come to the meeting that another is at."""
        return self.number < other.number or (self.number == other.number and self.phase == "works")


@dataclass
class Watched:
    """Another process: its latest sign, and for how many seconds it has shown no progress, and no life."""

    sign: str = ""
    host: str = "an unknown host"
    doing: str = "starting"
    beats: int = -1
    at: At = At()
    quiet: float = 0.0
    silent: float = 0.0

    def look(self, sign: str, passed: float) -> None:
        """Takes note of what it shows now. passed: seconds since the last look."""
        self.silent += passed
        self.quiet += passed
        if sign == self.sign:
            return
        self.sign, self.silent, before = sign, 0.0, self.beats
        _, self.host, self.doing, self.beats, at = json.loads(sign)
        self.at = At(*at)
        if self.beats != before:
            self.quiet = 0.0


class Meeting:
    """The meetings of a run, which all its processes hold in the same order.

    connect: a new connection to the store. patience: seconds without progress after which a process that others wait
    for ends them all. stoppable: set by whoever listens for signals. inseparable: whether the processes communicate in
    what they compute, too, so that none may break it off alone.
    """

    def __init__(self, connect: Callable[[], Store], rank: int, size: int, patience: float) -> None:
        self.rank, self.size, self.patience = rank, size, patience
        self.stoppable: Stoppable | None = None
        self.inseparable = False
        self._lock = threading.Lock()
        with _store_errors("cannot be reached"):
            store, other = connect(), connect()
            name = agreed_name(store, rank, size, max(patience, GONE))
        self.store = PrefixStore(f"{name}/group", store)  # for the backend
        self._store, watched = (PrefixStore(f"{name}/meeting", one) for one in (store, other))
        self._at, self._left, self._failed, self._looks = At(), False, False, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(watched,), daemon=True)
        self._thread.start()

    @property
    def holds(self) -> bool:
        """Whether this process waits for the others or communicates, which must not be broken off."""
        return self.inseparable or self._at.phase != "works"

    @contextmanager
    def of_all(self, what: str, commits: bool = False) -> Iterator[None]:
        """Around communication, which begins once all processes have come.

        commits: what was begun is completed from here on, also where a stop is asked for. Raises Interrupted where one
        of the processes was asked to stop, and Stalled where they cannot go on.
        """
        if self._failed:
            raise Stalled("after an error the processes do not meet any more")
        number, what = self._at.number, f"{what} of '{PULSE.doing}'"
        self._at = At(number, "waits", what)
        try:
            with _store_errors():
                verdict = self._verdict(number)
            self._left, self._failed = verdict != GO, verdict not in (GO, STOP)
            if verdict == STOP:
                raise Interrupted
            if self._failed:
                raise Stalled(json.loads(verdict)[1])
            if commits and self.stoppable is not None:
                self.stoppable.may_leave = False
            self._at = At(number, "communicates", what)
            try:
                yield
            except RuntimeError as error:  # the backends' own exceptions are many
                raise Stalled(f"the {what} broke off, as a process or the network did ({_line(error)})") from None
        finally:
            beat()
            self._at = At(number + 1)

    def _verdict(self, number: int) -> str:
        key, began = f"verdict/{number}", time.monotonic()
        if self._store.add(f"came/{number}", 1) == self.size:
            self._store.compare_set(key, "", GO)
        while not self._store.check([key]):
            if self.stoppable is not None and self.stoppable.asked and self.stoppable.may_leave:
                self._store.compare_set(key, "", STOP)
            time.sleep(min(LONGEST_NAP, (time.monotonic() - began) / 20))  # what is soon over is not slowed down
        verdict = self._store.get(key).decode()
        if self.rank == 0 and number >= KEPT:
            for old in (f"verdict/{number - KEPT}", f"came/{number - KEPT}"):
                self._store.delete_key(old)
        return verdict

    def leave(self, error: BaseException | None = None) -> None:
        """Tells the others that this process will not come to the next meeting: all stop, or fail with its error."""
        if (error is None and self._left) or isinstance(error, Stalled):
            return  # they know
        self._left, self._failed = True, error is not None
        why = f"rank {self.rank} on {socket.gethostname()} ended: {_line(error)}" if error is not None else ""
        number = self._at.number
        with suppress(RuntimeError):
            self._store.compare_set(f"verdict/{number}", "", json.dumps([self.rank, why]) if why else STOP)
        self._at = At(number + 1)

    def close(self) -> None:
        """Ends the thread."""
        if self._left and self.rank == 0:
            time.sleep(2 * BETWEEN_LOOKS)  # the store may be this process's, and the others have yet to look
        self._over.set()
        self._thread.join(10 * BETWEEN_LOOKS)

    def listen(self, stoppable: Stoppable | None) -> None:
        """Who is told of a stop. None: nobody any more."""
        with self._lock:
            self.stoppable = stoppable

    def _watch(self, store: Store) -> None:
        seen, beats, others, quiet, last = At(-1), 0, dict[int, Watched](), 0.0, time.monotonic()
        while not self._over.wait(BETWEEN_LOOKS):
            # a machine that was suspended meanwhile has not waited
            passed, last = min(time.monotonic() - last, 2 * BETWEEN_LOOKS), time.monotonic()
            at, lost = self._at, False
            if at != seen:
                others = {rank: Watched() for rank in range(self.size) if rank != self.rank}
            quiet = quiet + passed if (at, PULSE.beats) == (seen, beats) else 0.0
            seen, beats = at, PULSE.beats
            try:
                self._show(store, at)
                why = self._verdict_on_this(store, at) if at.phase == "works" else None
                if why is None and (at.phase != "works" or self.inseparable):
                    why = self._hindrance(store, at, others, passed) or self._standstill(at, others, quiet)
            except RuntimeError as error:  # the store is gone; the main thread will find that out, unless it hangs
                if self._over.wait(self.patience):
                    return
                why, at, lost = _lost(error), self._at, True
            if why is not None and (at.phase != "waits" or lost) and at == self._at:
                print(f"draftplus: {printable(why)}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread cannot be reached

    def _show(self, store: Store, at: At) -> None:
        self._looks += 1
        sign = [self._looks, socket.gethostname(), PULSE.doing, PULSE.beats, astuple(at)]
        store.set(f"sign/{self.rank}", json.dumps(sign))

    def _verdict_on_this(self, store: Store, at: At) -> str | None:
        """Why this process has to end, while its main thread works. Where only a stop is asked for, passes that on."""
        key = f"verdict/{at.number}"
        verdict = store.get(key).decode() if store.check([key]) else GO
        if verdict == STOP:
            with self._lock:  # the signal finds its handler
                if self.stoppable is not None and (main := threading.main_thread().ident) is not None:
                    signal.pthread_kill(main, signal.SIGTERM)
        elif verdict != GO:
            rank, why = json.loads(verdict)
            return str(why) if rank == self.rank else None
        return None

    def _hindrance(self, store: Store, at: At, others: Mapping[int, Watched], passed: float) -> str | None:
        """Why this process should not wait any longer, which is also told to all who come to this meeting."""
        for rank, other in others.items():
            key = f"sign/{rank}"
            other.look(store.get(key).decode() if store.check([key]) else other.sign, passed)
            if other.silent > (limit := min(GONE, self.patience)):
                what = f"has given no sign of life for {in_minutes(limit)}: it has died, stopped or lost its network"
            elif at.phase == "waits" and other.quiet > self.patience and other.at.before(at):
                what = f"has shown no progress for {in_minutes(self.patience)} (parallel.timeout)"
            else:
                continue
            why = f"rank {rank} on {other.host} {what}, at '{other.doing}', and holds up the {at.what}; {GOES_ON}"
            store.compare_set(f"verdict/{at.number}", "", json.dumps([rank, why]))
            return why
        return None

    def _standstill(self, at: At, others: Mapping[int, Watched], quiet: float) -> str | None:
        """Why to end where the backend itself may be waiting, which does not say for whom."""
        if at.phase == "waits" or quiet <= self.patience:
            return None
        if at.phase == "communicates":
            return f"the {at.what} has not ended in {in_minutes(self.patience)}, though all processes came; {GOES_ON}"
        if any(other.quiet <= self.patience for other in others.values()):
            return None
        where = [f"rank {rank} at '{other.doing}'" for rank, other in others.items()]
        return (
            f"no process has shown progress for {in_minutes(self.patience)} (parallel.timeout): rank {self.rank} at "
            f"'{PULSE.doing}', {', '.join(where)}; {GOES_ON}"
        )


@contextmanager
def _store_errors(what: str = "has gone") -> Iterator[None]:
    try:
        yield
    except Stalled:
        raise
    except RuntimeError as error:
        raise Stalled(_lost(error, what)) from None


def _lost(error: BaseException, what: str = "has gone") -> str:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"the processes' store at {where} {what} ({_line(error)}); torchrun, rank 0 or the network may have ended; "
        f"{GOES_ON}"
    )


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
