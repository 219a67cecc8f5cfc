"""The DAS as a service: an actor that labels a stream's windows by one teacher for all clients.

It has a pool of scorer actors. Everything that must survive it is on disk: the supervision, the
list of what has failed, and that it follows the stream if it was asked to after its start. So the
service can be killed at any moment. A client starts it again, and it scores what is missing.
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

OWN_CLIENT = "own"
"""The client that stands for what a detached service does by itself."""
CLIENT_TIMEOUT_S = 600.0
"""A client asks for its progress ten times a second. After so long without, it was killed.

If it was only stopped, it asks for its windows again."""
FOLLOW_FILE = "follows.json"


class Service:
    """Scores what its clients ask for.

    A detached service scores all windows of the stream and stays when its clients have left. With
    `follow` it also scores the windows that appear later.
    """

    def __init__(
        self,
        spec: LabelingSpec,
        detached: bool = False,
        follow: bool = False,
    ) -> None:
        self._spec = spec
        self._detached = detached
        self._follow_flag = spec.failed_list.with_name(FOLLOW_FILE)
        self._follow = follow or self._followed_before()
        self._stream = EventStream.open(spec.stream_root)
        self._scheduler = Scheduler(spec, self._requested)
        # Client -> window -> when it asked, in seconds since the epoch.
        self._requests: dict[str, dict[int, float]] = {}
        # Client -> its last call, by the monotonic clock.
        self._last_calls: dict[str, float] = {}
        self._error = ""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if detached:
            self.ask(OWN_CLIENT, self._stream.windows())
        threading.Thread(target=self._run, daemon=True, name="das").start()

    def spec(self) -> tuple[LabelingSpec, bool]:
        """Return what the service labels, and whether it is detached."""
        return self._spec, self._detached

    def ask(self, client: str, windows: Iterable[int]) -> None:
        """Score these windows; what has failed of them is tried again."""
        with self._lock:
            self._check_alive()
            now = time.time()
            self._last_calls[client] = time.monotonic()
            requests = self._requests.setdefault(client, {})
            requests.update(dict.fromkeys(windows, now))
            self._scheduler.retry(windows)

    def follow(self, follow: bool) -> None:
        """Score all windows of the stream; what has failed is tried again.

        With `follow` the service also scores the windows that appear later. It writes this down,
        because Ray restarts an actor with the arguments of its first start.
        """
        if follow and not self._follow:
            write_json(self._follow_flag, {"actor": _actor_id()})
            self._follow = True
        self.ask(OWN_CLIENT, self._stream.windows())

    def leave(self, client: str) -> bool:
        """Forget a client's requests; return True if nobody needs the service any more."""
        with self._lock:
            self._forget(client)
            return not self._requests

    def progress(self, client: str) -> dict[str, Any] | None:
        """Return `Scheduler.progress`, whose rows are those scored by this process.

        None for an unknown client: this process may have been started after another was killed.
        """
        with self._lock:
            self._check_alive()
            if client not in self._requests:
                return None
            self._last_calls[client] = time.monotonic()
            return self._scheduler.progress()

    def state(self) -> dict[str, Any]:
        """Return everything that `das status` shows."""
        with self._lock:
            return {
                "name": self._spec.name,
                "teacher": self._spec.store.teacher,
                "store": str(self._spec.store.root),
                "clients": len(self._requests.keys() - {OWN_CLIENT}),
                "detached": self._detached,
                "follow": self._follow,
                "error": self._error,
                **self._scheduler.status(),
            }

    def close(self) -> None:
        """Stop working."""
        self._closed.set()

    def _check_alive(self) -> None:
        """Raise the error that has ended the service's work, if any."""
        if not self._error:
            return
        way_out = "; end it with `run.py das stop` and start it again" if self._detached else ""
        raise RuntimeError(f"the DAS has failed{way_out}:\n{self._error}")

    def _followed_before(self) -> bool:
        """Return True if `follow` was called before Ray restarted this actor."""
        actor = _actor_id()
        if actor is None or not self._follow_flag.exists():
            return False
        flag: dict[str, Any] = read_json(self._follow_flag)
        return flag == {"actor": actor}

    def _forget(self, client: str) -> None:
        """Score nothing more for a client."""
        self._requests.pop(client, None)
        self._last_calls.pop(client, None)
        if not self._follow:  # following scores all windows anyway
            self._scheduler.drop_unrequested()

    def _forget_silent(self) -> None:
        """Forget the clients that have not called for too long: they were killed."""
        oldest_s = time.monotonic() - CLIENT_TIMEOUT_S
        silent = [client for client, called_s in self._last_calls.items() if called_s < oldest_s]
        for client in silent:
            if client != OWN_CLIENT:
                self._forget(client)

    def _requested(self) -> dict[int, float]:
        """Return window -> since when it is requested; 0 for a window that is only followed."""
        requested = dict.fromkeys(self._stream.windows(), 0.0) if self._follow else {}
        for windows in self._requests.values():
            for window, asked_s in windows.items():
                earliest_s = requested.get(window) or asked_s
                requested[window] = min(asked_s, earliest_s)
        return requested

    def _run(self) -> None:
        """Work, in a thread of its own, until the service is closed or fails."""
        try:
            while not self._closed.is_set():
                with self._lock:
                    self._forget_silent()
                    self._scheduler.dispatch()
                refs = self._scheduler.wait()
                with self._lock:
                    self._scheduler.collect(refs)
        except BaseException:  # whatever it is, the clients must get it
            self._error = traceback.format_exc()


def _actor_id() -> str | None:
    """Return the id of this actor, which survives restarts; None outside an actor."""
    return ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None


ServiceActor = ray.remote(num_cpus=0, max_concurrency=16, max_restarts=-1)(Service)
