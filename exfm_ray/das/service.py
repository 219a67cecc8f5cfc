"""The DAS as a service: an actor that labels a stream's windows by one teacher for all who ask,
with a pool of scorer actors.

Everything that lasts lies on disk: the supervision, the list of what is parked, and that a service
which did not follow the stream at its start does now. So the service can be killed at any moment;
whoever asks starts it again, and it scores what is missing.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterable
from typing import Any

import ray

from exfm_ray.das.scheduler import Scheduler
from exfm_ray.das.spec import LabelingSpec
from exfm_ray.data.stream import EventStream
from exfm_ray.storage.atomic import read_json, write_json

OWN = "own"
"""The client that stands for what a lasting service does by itself."""
SILENT_S = 600.0
"""A client asks for its progress ten times a second; one that has not for so long was killed. If it
was only stopped, it asks anew."""


class Service:
    """Scores what its clients ask for. A `detached` one scores all windows of the stream and stays
    when its clients have left; with `follow` those that appear later, too."""

    def __init__(
        self,
        order: LabelingSpec,
        detached: bool = False,
        follow: bool = False,
    ) -> None:
        self._order = order
        self._lasting = detached
        self._told = order.failed_list.with_name("follows.json")
        self._follow = follow or self._was_told()
        self._stream = EventStream.open(order.stream_root)
        self._scheduler = Scheduler(order, self._wanted)
        self._asked: dict[str, dict[int, float]] = {}
        self._heard: dict[str, float] = {}
        self._error = ""
        self._lock = threading.Lock()
        self._over = threading.Event()
        if detached:
            self.ask(OWN, self._stream.windows())
        threading.Thread(target=self._run, daemon=True, name="das").start()

    def order(self) -> tuple[LabelingSpec, bool]:
        """What it carries out, and whether it is lasting."""
        return self._order, self._lasting

    def ask(self, client: str, windows: Iterable[int]) -> None:
        """Score these windows; what of them is parked is tried again."""
        with self._lock:
            self._check()
            now = time.time()
            self._heard[client] = time.monotonic()
            self._asked.setdefault(client, {}).update(dict.fromkeys(windows, now))
            self._scheduler.retry(windows)

    def follow(self, follow: bool) -> None:
        """Score all windows that are there; what is parked is tried again. With `follow` later
        ones, too, also when Ray has started this actor again, which it does with the arguments of
        its first start."""
        if follow and not self._follow:
            write_json(self._told, {"actor": _me()})
            self._follow = True
        self.ask(OWN, self._stream.windows())

    def leave(self, client: str) -> bool:
        """A client wants nothing more; True when the service is needed no longer."""
        with self._lock:
            self._forget(client)
            return not self._asked

    def progress(self, client: str) -> dict[str, Any] | None:
        """See `Scheduler.progress`; rows are those of this process. None for a client that has not
        asked: this process may have been started after another one was killed."""
        with self._lock:
            self._check()
            if client not in self._asked:
                return None
            self._heard[client] = time.monotonic()
            return self._scheduler.progress()

    def state(self) -> dict[str, Any]:
        """All that `das status` shows."""
        with self._lock:
            return {
                "name": self._order.name,
                "teacher": self._order.store.teacher,
                "store": str(self._order.store.root),
                "clients": len(self._asked.keys() - {OWN}),
                "lasting": self._lasting,
                "follow": self._follow,
                "error": self._error,
                **self._scheduler.status(),
            }

    def close(self) -> None:
        """Do nothing more."""
        self._over.set()

    def _check(self) -> None:
        """The error that has ended the work, for all who ask for more."""
        if self._error:
            way_out = "; end it with `run.py das stop` and start it again" if self._lasting else ""
            raise RuntimeError(f"the DAS has failed{way_out}:\n{self._error}")

    def _was_told(self) -> bool:
        """True when `follow` was called before this actor was started again."""
        me = _me()
        return me is not None and self._told.exists() and read_json(self._told) == {"actor": me}

    def _forget(self, client: str) -> None:
        """Score no more for a client."""
        self._asked.pop(client, None)
        self._heard.pop(client, None)
        if not self._follow:  # which wants all that is there
            self._scheduler.drop_unwanted()

    def _wanted(self) -> dict[int, float]:
        """Window -> since when it is asked for; 0 for those that a service that follows scores of
        itself."""
        wanted = dict.fromkeys(self._stream.windows(), 0.0) if self._follow else {}
        for windows in self._asked.values():
            for window, asked_s in windows.items():
                wanted[window] = min(asked_s, wanted.get(window) or asked_s)
        return wanted

    def _run(self) -> None:
        """The one thread that works."""
        try:
            while not self._over.is_set():
                with self._lock:
                    for client in [
                        c
                        for c, heard_s in self._heard.items()
                        if c != OWN and heard_s < time.monotonic() - SILENT_S
                    ]:
                        self._forget(client)
                    self._scheduler.dispatch()
                refs = self._scheduler.wait()
                with self._lock:
                    self._scheduler.collect(refs)
        except BaseException:  # a thread's error must reach the clients, whatever it is
            self._error = traceback.format_exc()


def _me() -> str | None:
    """The number of this actor, which it keeps when it is started again; None outside of one."""
    return ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None


ServiceActor = ray.remote(num_cpus=0, max_concurrency=16, max_restarts=-1)(Service)
