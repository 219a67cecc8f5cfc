"""What is refused before tables are shared, and how rows of another width are mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_config

from exfm_ray.data.prepare.prepare import source_schema
from exfm_ray.errors import UserError
from exfm_ray.pipeline.preflight import check_models
from exfm_ray.training.table_sharing import principal_map


def test_principal_map_to_greater_width_fills_up() -> None:
    """Wrong: rows are mixed although they fit."""
    rows = torch.randn(5, 3)
    assert torch.equal(rows @ principal_map(rows, 5), torch.nn.functional.pad(rows, (0, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"share": {"tables": ["usr"]}},
            "'distillation.share.tables': no table is named 'usr'. Did you mean 'user'",
        ),
        (
            {"vm": {"model": {"type": "mlp", "dim": 8, "mlp": [8]}}},
            "'feed' shares table 'user', whose rows have 4 numbers in the FM and 8 in the "
            "student; set distillation.share.projection=principal",
        ),
        (
            {"vm": {"model": {"type": "mlp", "dim": 4, "mlp": [8], "embeddings": {"ad": 2}}}},
            "'feed' shares table 'ad', whose rows have 4 .* and 8",
        ),
    ],
)
def test_tables_that_cannot_be_shared_are_reported_at_once(
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    """Wrong: the error is reported after hours, or never."""
    shared = {"distillation": {"share": changes.get("share", {})}}
    student = changes.get("vm", {})
    arms = {"arms": ["labels", "labels+share", "ah_sa+share"]}
    config = small_config(tmp_path, "wrong", vm=arms | student, **shared)
    schema = source_schema(config)
    with pytest.raises(UserError, match=message):
        check_models(config, schema)
    plain = small_config(tmp_path, "plain", vm=student | {"arms": ["labels"]}, **shared)
    check_models(plain, schema)
