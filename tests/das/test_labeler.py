"""The DAS of a run with another run's teacher, which is refused if it may know what it
supervises."""

from __future__ import annotations

from pathlib import Path

import pytest
from example import make_stream
from small_runs import small_config

from exfm_ray.das.labeler import Labeler
from exfm_ray.errors import UserError
from exfm_ray.storage.atomic import remove_tree


def test_another_runs_teacher_has_learned_the_same_windows(tmp_path: Path) -> None:
    """Wrong: another run's snapshot of windows 0 .. v-1, which end later than ours, supervises what
    it has learned (rule 2)."""
    config = small_config(
        tmp_path,
        "ours",
        fm={"name": "own"},
        teachers=[{"name": "fm", "run": tmp_path / "other_run"}],
    )
    stream = make_stream(config.stores / "stream", windows=4)
    das = Labeler(config, stream, config.teachers[0])
    make_stream(tmp_path / "other_run" / "stream", windows=3, rows=1500)
    for ask in (
        lambda: das.label_locally([0, 2]),
        lambda: das.run([0, 2], lambda window, rows: None, lambda: None),
    ):
        with pytest.raises(
            UserError,
            match=r"window 1 is from 1000 to 2000 ms in .*, but from 1500 to 3000 in "
            r".*other_run/stream, whose teacher 'fm'",
        ):
            ask()
    for same in (True, False):
        remove_tree(tmp_path / "other_run" / "stream")
        if same:
            make_stream(tmp_path / "other_run" / "stream", windows=3)
        with pytest.raises(UserError, match="snapshot 2 of teacher 'fm' is not published"):
            das.label_locally([0, 2])
