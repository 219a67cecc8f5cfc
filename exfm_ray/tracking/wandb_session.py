"""Runs in wandb (Weights & Biases), under <run>/wandb.

wandb takes its API key from its own places (WANDB_API_KEY, .netrc): no setting holds it, so no
config, log or run can show it.
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
"""Longest waits for a server when a run begins and when it ends; offline there is none."""


def open_run(
    config: Config,
    identity: str,
    name: str,
    group: str,
    job_type: str,
    settings: Mapping[str, Any],
    step: str,
) -> wandb.Run:
    """A new run, whose figures are logged against `step`. End it with `finish`; another process
    writes the file, which is whole a moment later, also where this process is killed meanwhile.

    `identity` is its id: a run of this id that a kill left unfinished is written anew. wandb's
    errors and OSError pass through.
    """
    os.environ.setdefault(
        "WANDB_ERROR_REPORTING", "false"
    )  # read on import; a run that is offline has nothing to say to a server
    import wandb  # takes most of a second

    folder = config.folder / "wandb"
    folder.mkdir(
        parents=True, exist_ok=True
    )  # where it cannot, wandb would write to a temporary folder without an error
    for left in folder.glob(f"*run-*-{identity}"):
        shutil.rmtree(left)
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
    """End the process that wandb keeps beside this one, once all files are whole and all data
    sent."""
    import wandb

    wandb.teardown()
