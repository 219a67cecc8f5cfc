"""Runs in wandb (Weights & Biases), under <run>/wandb.

wandb reads its API key from its own places (WANDB_API_KEY, .netrc). No setting holds the key, so no
config, log or run can reveal it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exfm_ray.config.root import Config

if TYPE_CHECKING:
    import wandb

START_S = 30.0
FINISH_S = 60.0
"""Longest waits for a server at the start and at the end of a run; offline there is no wait."""


def open_run(
    config: Config,
    identity: str,
    name: str,
    group: str,
    job_type: str,
    settings: Mapping[str, Any],
    step: str,
) -> wandb.Run:
    """Open a new run; end it with `finish`.

    Another process writes the file. It is complete a moment later, even if this process is killed
    in the meantime.

    Args:
        identity: id of the run. A run of this id that a kill left unfinished is replaced.
        settings: shown as the run's config.
        step: name of the metric that is the x-axis of the others.

    Raises:
        OSError: the folder cannot be written.
        wandb.errors.Error: the server cannot be reached.
    """
    # wandb reads this on import: an offline run has nothing to report to a server.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # takes most of a second

    folder = config.folder / "wandb"
    # Without this folder, wandb would write to a temporary folder without an error.
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(f"*run-*-{identity}"):
        shutil.rmtree(unfinished)

    # The list of packages and the facts about the machine cost four times what the run itself does.
    quick = {
        "x_save_requirements": False,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_disable_stats": True,
    }
    run = wandb.init(
        settings=wandb.Settings(
            mode=config.wandb.mode,
            silent=True,
            console="off",
            symlink=False,
            disable_git=True,
            disable_code=True,
            init_timeout=START_S,
            finish_timeout=FINISH_S,
            finish_timeout_raises=True,
            **quick,
        ),
        dir=config.folder,
        project=config.wandb.project,
        id=identity,
        name=name,
        group=group,
        job_type=job_type,
        config=dict(settings),
        reinit="create_new",
    )
    run.define_metric(step)
    run.define_metric("*", step_metric=step)
    return run


def close_wandb() -> None:
    """End wandb's own process once all files are complete and all data are sent."""
    import wandb

    wandb.teardown()
