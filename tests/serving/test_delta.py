"""Deltas: the new tables bit for bit from the old ones and the changed rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exfm_ray.errors import UserError
from exfm_ray.serving.delta import apply, check_same_student, difference
from exfm_ray.serving.folder import ExportManifest

WIDTHS = {"user": 1, "ad": 3}
# Bit patterns, not numbers: 0 and -0 (sign bit alone), a subnormal, infinity, two NaNs, 1
BITS = st.sampled_from(
    [0x00000000, 0x80000000, 0x00000001, 0x7F800000, 0x7FC00000, 0xFFC00001, 0x3F800000]
)
ROWS = {
    name: st.lists(st.tuples(*[BITS] * width), min_size=2, max_size=6)
    for name, width in WIDTHS.items()
}


def bits(table: Tensor) -> np.ndarray:
    return table.numpy().view(np.uint32)


def tensor(rows: list[tuple[int, ...]]) -> Tensor:
    return torch.from_numpy(np.array(rows, np.uint32).view(np.float32).copy())


@given(data=st.data())
def test_the_new_tables_come_back_bit_for_bit(data: st.DataObject) -> None:
    """Wrong: a changed row is missing (-0 for 0, another NaN), a row goes to another place, or an
    unchanged one is carried along."""
    old = {}
    new = {}
    changed = {}
    for name, width in WIDTHS.items():
        rows = data.draw(ROWS[name])
        after = [data.draw(st.one_of(st.just(row), st.tuples(*[BITS] * width))) for row in rows]
        old[name], new[name] = tensor(rows), tensor(after)
        changed[name] = [
            i for i, (before, now) in enumerate(zip(rows, after, strict=True)) if before != now
        ]
    before = {name: bits(table).copy() for name, table in old.items()}
    delta = difference(old, new)
    result = apply(old, delta)
    for name in WIDTHS:
        assert np.array_equal(bits(result[name]), bits(new[name])) and np.array_equal(
            bits(old[name]), before[name]
        )
        assert delta.get(f"rows/{name}", torch.zeros(0)).tolist() == changed[name]


def test_other_tables_are_refused() -> None:
    """Wrong: tables of another size are compared row by row as far as they go."""
    with pytest.raises(ValueError, match="other names or shapes"):
        difference({"user": torch.zeros(3, 2)}, {"user": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match="other names or shapes"):
        difference({"user": torch.zeros(3, 2)}, {"ad": torch.zeros(3, 2)})


@pytest.mark.parametrize("lost", ["vm", "arm"])
def test_a_manifest_without_its_student_is_reported(lost: str) -> None:
    """Wrong: a served folder whose manifest has lost the student's name ends in a traceback."""
    student = {"vm": "feed", "arm": "labels"}
    whole = ExportManifest.model_construct(student=student)
    damaged = ExportManifest.model_construct(
        student={k: v for k, v in student.items() if k != lost}
    )
    for old, new in ((damaged, whole), (whole, damaged)):
        with pytest.raises(
            UserError,
            match="served/manifest.json, or the manifest to go with it: its `student` has no "
            f"'{lost}'; make a full export",
        ):
            check_same_student(Path("served"), old, new)
