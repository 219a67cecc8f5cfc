"""Following a job without a cluster: lost connections are opened again, and each character of the
log is printed once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from cluster import jobs
from exfm_ray.errors import UserError

pytestmark = pytest.mark.heavy

LOG = "".join(f"line {i}\n" for i in range(50))


class Server:
    """A job server that closes the connection after so many characters of the log, and ends the job
    when the log has been read to its end once."""

    def __init__(self, drops: list[int]) -> None:
        self.drops = drops
        self.status = "RUNNING"
        self.ended = False

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(
            status=JobStatus("SUCCEEDED" if self.ended else "RUNNING"), driver_exit_code=0
        )

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        drop = self.drops.pop(0) if self.drops else len(LOG)
        for start in range(0, drop, 7):
            yield LOG[start : min(start + 7, drop)]
        if drop < len(LOG):
            raise RuntimeError("WebSocket connection closed unexpectedly")
        self.ended = True


def test_each_character_is_printed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: after a lost connection the log starts again or has a gap, or the client gives up."""
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    server = Server([100, 20, 0, 203])
    details = jobs.follow(server, "x")
    assert capsys.readouterr().out == LOG
    assert details.status == JobStatus.SUCCEEDED and server.drops == []


def test_gives_up_when_the_head_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: a client waits for ever for a cluster that is gone, or gives up on a job whose log was
    silent for a long time."""
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head")
    now = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])

    class Gone(Server):
        """A server that is away for a moment, then silent for long, then away for good.

        `calls` has the seconds and whether it answers, call by call.
        """

        calls = iter([(1, True), (1, False), (1, True), (10_000, False)])

        def answer(self) -> None:
            seconds, answers = next(self.calls, (50, False))
            now[0] += seconds
            if not answers:
                raise ConnectionError("refused")

        def get_job_info(self, job: str) -> SimpleNamespace:
            self.answer()
            return super().get_job_info(job)

        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            self.answer()
            yield "never"

    with pytest.raises(
        UserError, match="lost the connection to http://head \\(refused\\); job x may be running"
    ):
        jobs.follow(Gone([]), "x")
    assert 10_000 + jobs.LOST_S < now[0] < 10_000 + jobs.LOST_S + 100
