"""The one config tree: typed, frozen, one YAML file with dotted overrides. Unknown keys are errors.

Keys read like the papers: w, alpha, beta (ExFM, arXiv 2502.17494), l, n_F, n_L, k (Wukong, arXiv 2403.02545).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from exfm_ray.arms import PLAIN, Arm
from exfm_ray.data_config import DataConfig, Folder
from exfm_ray.errors import UserError, nearest
from exfm_ray.model_config import MODEL_TYPES, MLPConfig, ModelConfig, Widths, WukongConfig
from exfm_ray.placement_config import PlacementConfig
from exfm_ray.places import stores
from exfm_ray.remote import Place, check_url, without_credentials
from exfm_ray.schema import Model, Name
from exfm_ray.tune_config import UNSEARCHABLE, TuneConfig, as_text


class OptimizerConfig(Model):
    """Row-wise Adagrad for the tables, Adam for the dense part."""

    table_lr: float = Field(0.05, gt=0)
    table_weight_decay: float = Field(0.0, ge=0, description="L2: this much of a row is added to its gradient, in steps that use the row")
    dense_lr: float = Field(1e-3, gt=0)
    dense_weight_decay: float = Field(0.0, ge=0)
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay per step of an exponential moving average of all weights, which is evaluated and published instead"
    )


WAYS = {"workers", "min_workers", "zero_stage", "sharding", "threads"}
"""Settings of a trainer that say how training is spread."""


class TrainerConfig(Model):
    """What FM and VM training have in common."""

    optimizer: OptimizerConfig = OptimizerConfig()
    batch_size: int = Field(1024, ge=1, description="global: the workers divide each batch among them")
    workers: int = Field(1, ge=1)
    min_workers: int | None = Field(
        None, ge=1, description="elastic: after the loss of workers the job goes on by itself, from its last checkpoint, with as many as there "
        "are, at least these; without it the loss of a worker ends the run, and the same command goes on"
    )  # fmt: skip
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest", description="torch.set_float32_matmul_precision: TF32 on a GPU and faster kernels on a CPU, where below highest"
    )
    compile: bool = Field(False, description="torch.compile the interaction model")
    zero_stage: int = Field(0, ge=0, le=3)
    sharding: Literal["row_wise", "table_wise"] = "row_wise"
    threads: int = Field(0, ge=0, description="torch threads of a CPU worker; 0 leaves torch's own choice")
    reset_unused: int | None = Field(
        None, ge=1, description="rows that no example of the last so many windows used are reset, with their optimizer state"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for setting, used in (("optimizer.ema", self.optimizer.ema > 0), ("compile", self.compile)):
            if used and self.zero_stage == 3:
                raise ValueError(f"{setting} is set with zero_stage 3, where no worker holds the weights whole; choose stage 0, 1 or 2")
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, above workers = {self.workers}")
        return self


class StaticConfig(Model):
    """A set without time: the windows before `validation_window` are learnt in several passes, until that window's figure stops improving."""

    passes: int = Field(50, ge=1)
    patience: int = Field(3, ge=1, description="passes without improvement after which training ends")
    monitor: Literal["auc", "log_loss"] = "auc"
    validation_window: int = Field(1, ge=1, description="later windows are tests: evaluated after each pass, never looked at by the choice")


class FMConfig(TrainerConfig):
    """The foundation model: one network, all domains, a head for every task."""

    name: Name = "fm"
    static: StaticConfig | None = Field(None, description="several passes over a static set instead of one over the stream")
    tasks: tuple[Name, ...] = Field((), description="tasks it learns; empty means all of the stream's")
    model: ModelConfig = WukongConfig()


class DASConfig(Model):
    """The Data Augmentation System: a pool of actors that write the FM's predictions into the training data."""

    min_actors: int = Field(1, ge=1)
    max_actors: int = Field(1, ge=1)
    fm_lag: int = Field(1, ge=1, description="window t is scored by the snapshot that has learned windows <= t - fm_lag")
    every: int = Field(1, ge=1, description="only every so many snapshots are scored with: versions 1, 1 + every, 1 + 2 every ...")
    pinned: int | None = Field(None, ge=1, description="score every window that may be with this version; earlier windows have no teacher")
    keep_snapshots: bool = Field(False, description="snapshots that no window of this run needs any more stay, for other runs to score with")
    rollover: int = Field(1, ge=1, description="how many actors may be loading a next snapshot at once, while the others score")
    shards: int = Field(1, ge=1, description="the teacher's tables are cut over so many processes for each actor; 1: the actor holds them")
    tries: int = Field(3, ge=1, description="after so many failures a fragment is parked and its window left out, until the DAS is asked again")
    ahead: int | None = Field(None, ge=1, description="most windows supervised ahead of the slowest vertical model; None: no bound")
    batch_size: int = Field(512, ge=1, description="on a CPU small: larger temporaries cost more in page faults than they save")
    threads: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max_actors < self.min_actors:
            raise ValueError(f"das.max_actors is {self.max_actors}, below das.min_actors = {self.min_actors}")
        if self.pinned and self.every > 1:
            raise ValueError(f"das.pinned is {self.pinned} and das.every is {self.every}: set one of them")
        return self


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _distinct(tasks: tuple[str, ...]) -> tuple[str, ...]:
    if not tasks:
        raise ValueError("names no task; give one, or a list of them")
    for task in tasks:
        if tasks.count(task) > 1:
            raise ValueError(f"names task '{task}' twice")
    return tasks


class StudentConfig(Model):
    """One vertical model: its domain, its task or list of tasks, its network (`vm.model` where it names none)."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Name
    domain: Name
    teacher: Name | None = Field(None, description="the teacher whose supervision it learns from: one of `teachers`; None: the FM")
    publishes: Arm | None = Field(None, description="its model of this arm publishes a snapshot after each window and so can be a teacher itself")
    tasks: Annotated[tuple[Name, ...], BeforeValidator(_listed), AfterValidator(_distinct)] = Field(alias="task")
    model: ModelConfig | None = None


class VMConfig(TrainerConfig):
    """The vertical models. With `share_pass` all of them learn in one worker group from one pass of the data."""

    models: tuple[StudentConfig, ...] = ()
    model: ModelConfig = MLPConfig()
    arms: tuple[Arm, ...] = Field(PLAIN, min_length=1)
    share_pass: bool = True

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [m.name for m in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two vertical models are named '{name}'")
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("an arm is named twice in vm.arms")
        return self


class KDConfig(Model):
    """Plain distillation: h(z, y) + w h(z, p_F) on one head."""

    w: float = Field(1.0, ge=0)


class AHConfig(Model):
    """The auxiliary head: h(z_S, y) + w h(z_D, min(1, alpha p_F)), its gradient into the backbone times beta."""

    w: float = Field(1.0, ge=0)
    alpha: float = Field(1.0, gt=0)
    beta: float = Field(4.0, ge=0)
    mlp: Widths | tuple[()] = ()


class SAConfig(Model):
    """The student adapter: a tiny MLP from the teacher's prediction, learnt on the label by an optimizer of its own."""

    w: float = Field(1.0, ge=0, description="weight of the adapter's term; alpha does not apply to it, beta does")
    mlp: Widths | tuple[()] = (16,)
    lr: float = Field(1e-3, gt=0)
    input: Literal["probability", "logit"] = "logit"
    own_head: bool = Field(True, description="a third head learns the adapter's target; otherwise the auxiliary head does")


class ShareConfig(Model):
    """Arms with +share: before each window is evaluated, the VM's tables are given the FM's rows of the ids that occur in it."""

    tables: tuple[Name, ...] = Field((), description="names of tables; none: all")
    mode: Literal["replace", "average", "unseen"] = Field("replace", description="unseen: only rows that few of the VM's examples have used")
    weight: float = Field(0.5, gt=0, le=1, description="share of the FM's row (mode: average)")
    unseen_below: int = Field(3, ge=1, description="uses, in the VM's examples so far, from which on a row is its own (mode: unseen)")
    optimizer: Literal["keep", "reset", "teacher"] = Field("keep", description="Adagrad state of a given row: the VM's, zero, or the FM's")
    projection: Literal["none", "principal"] = Field("none", description="how rows of another width become the VM's")
    table_lr: float = Field(0.005, gt=0, description="rate of such an arm's tables in place of vm.optimizer.table_lr: given rows are learnt already")


class HistoryConfig(Model):
    """Arms with +history: further dense inputs, made of the FM's representations of the same user's examples in earlier windows."""

    layer: str = Field("backbone", description="module of the FM's network whose output represents an example")
    key: Name | None = Field(None, description="single-valued feature whose examples belong together; none: the schema's group_by")
    dim: int = Field(16, ge=1, description="int8 numbers kept of an example, by a fixed random projection")
    last: int = Field(0, ge=0, description="so many last examples in order, newest first; 0: the mean of all")
    drift: Literal["pinned", "refreshed", "aligned"] = Field(
        "pinned", description="all by the first snapshot; each by the one that supervises it; so, and what is stored mapped into its space"
    )


class DistillationConfig(Model):
    """Settings of the arms."""

    kd: KDConfig = KDConfig()
    ah: AHConfig = AHConfig()
    sa: SAConfig = SAConfig()
    share: ShareConfig = ShareConfig()
    history: HistoryConfig = HistoryConfig()


class CheckpointConfig(Model):
    """Checkpoints of FM and VM training. There is one at the end of every window (of every pass, over a static set)."""

    every_examples: int | None = Field(None, ge=1, description="another one inside a window whenever a job has learnt so many examples")
    keep: int = Field(2, ge=1, description="the newest so many stay; more than one, lest a damaged file cost the whole run")


class TeacherConfig(Model):
    """A teacher beside the FM: its snapshots score the stream, too. It has to have been trained on windows of the same stream.

    `run`: the folder of the run whose FM it is (with das.keep_snapshots there), by its fm.name; None: it is a vertical model of this run
    that `publishes`.
    """

    name: Name
    run: Folder | None = None


class MetricsConfig(Model):
    """`warmup_windows`: how many windows at the start stay out of summary.json."""

    warmup_windows: int = Field(2, ge=0)


class RunConfig(Model):
    """Where runs go."""

    dir: Folder = Field(Path("runs"), validate_default=True)
    storage: Annotated[str, AfterValidator(check_url)] | None = Field(
        None, description="URL, such as s3://bucket/prefix, below which stream, snapshots and supervision lie instead of in the run's folder"
    )


class WandbConfig(Model):
    """Runs in wandb (Weights & Biases), under <run>/wandb. Its API key is no setting: wandb reads WANDB_API_KEY or .netrc."""

    mode: Literal["offline", "online", "disabled"] = Field("offline", description="offline: files that `wandb sync` sends later; disabled: none")
    project: Name = "exfm-ray"


class Config(Model):
    """A whole run."""

    name: Name = "run"
    seed: int = Field(0, ge=0)
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    fm: FMConfig = FMConfig()
    das: DASConfig = DASConfig()
    teachers: tuple[TeacherConfig, ...] = ()
    vm: VMConfig = VMConfig()
    distillation: DistillationConfig = DistillationConfig()
    metrics: MetricsConfig = MetricsConfig()
    placement: PlacementConfig = PlacementConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    wandb: WandbConfig = WandbConfig()
    tune: TuneConfig | None = Field(None, description="a sweep over the settings of the vertical models")

    @model_validator(mode="after")
    def _sweep(self) -> Self:
        if self.tune:
            _check_sweep(self, self.tune)
        return self

    @model_validator(mode="after")
    def _teachers(self) -> Self:
        names = [self.fm.name, *(teacher.name for teacher in self.teachers)]
        publishing = {student.name: student for student in self.vm.models if student.publishes}
        for teacher in self.teachers:
            if names.count(teacher.name) > 1:
                raise ValueError(f"two teachers are named '{teacher.name}' (the FM is '{self.fm.name}')")
            if teacher.run is None and teacher.name not in publishing:
                raise ValueError(f"teacher '{teacher.name}' has no `run`, and no vertical model of this name `publishes`")
        for student in self.vm.models:
            if student.teacher and student.teacher not in names:
                raise ValueError(f"vertical model '{student.name}': teacher '{student.teacher}' is none of {', '.join(names)}.")
            if student.publishes and student.publishes not in self.vm.arms:
                raise ValueError(f"vertical model '{student.name}' publishes arm '{student.publishes}', which is none of vm.arms")
            if student.publishes and student.publishes.remembers:
                raise ValueError(
                    f"vertical model '{student.name}' publishes arm '{student.publishes}', whose predictions need each user's history, which the "
                    "DAS does not look up when it scores; let it publish an arm without +history"
                )
            if student.publishes and student.name == self.fm.name:
                raise ValueError(f"vertical model '{student.name}' publishes under the FM's name; rename one of them")
            seen, above = [student.name], student.teacher
            while above in publishing and not any(t.name == above and t.run for t in self.teachers):
                if above in seen:
                    raise ValueError(f"vertical model '{student.name}' would learn from itself: {' <- '.join([*seen, above])}")
                seen.append(above)
                above = publishing[above].teacher
        return self

    @model_validator(mode="after")
    def _static(self) -> Self:
        if self.fm.static and self.vm.models:
            raise ValueError("fm.static is set: in a set without time no teacher is ignorant of its answers; remove vm.models, or fm.static")
        if self.fm.static and self.data.delayed:
            raise ValueError("fm.static is set: in a set without time no label comes late; remove data.attribution_s, or fm.static")
        return self

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All that the vertical models learn by, in a run or in its sweep."""
        return (*self.vm.arms, *(self.tune.arms if self.tune else ()))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.dir / self.name

    @property
    def stores(self) -> Place:
        """Where what the roles give each other lies: in the run's folder, or remote."""
        return stores(self.folder, self.name, self.run.storage)


def with_settings(config: Config, settings: Mapping[str, object]) -> Config:
    """The config with other values of dotted settings and without its `tune` section; ValidationError for values that do not fit."""
    tree = config.model_dump(mode="json", exclude={"tune"})
    for setting, value in settings.items():
        put(tree, setting, value)
    return Config.model_validate(tree)


def _check_sweep(config: Config, tune: TuneConfig) -> None:
    """ValueError for students and settings that are not there, and for values of a space that no config may have."""
    students = [student.name for student in config.vm.models]
    for name in tune.students:
        if name not in students:
            raise ValueError(f"tune.students names '{name}', which is none of vm.models.{nearest(name, students)}")
    known = [f"distillation.{part}.{key}" for part, section in config.distillation for key in type(section).model_fields]
    searchable = [setting for setting in known if not any(setting.startswith(beginning) for beginning in UNSEARCHABLE)]
    searchable += [f"vm.optimizer.{key}" for key in OptimizerConfig.model_fields] + ["vm.batch_size"]
    for setting, distribution in tune.space.items():
        why = next((why for beginning, why in UNSEARCHABLE.items() if setting.startswith(beginning)), None) if setting in known else None
        if why:
            raise ValueError(f"tune.space: '{setting}' cannot be searched: {why}")
        if setting not in searchable:
            told = nearest(setting, searchable) or f" A sweep may search {', '.join(searchable)}."
            raise ValueError(f"tune.space: unknown setting '{setting}'.{told}")
        for value in distribution.ends():
            try:
                with_settings(config, {setting: value})
            except ValidationError as error:
                raise ValueError("tune.space: " + "; ".join(_explain(e) for e in error.errors())) from None
    given = config.distillation.share.tables
    for tables in tune.space["distillation.share.tables"].choice if given and "distillation.share.tables" in tune.space else ():
        if not tables or not set(tables) <= set(given):  # type: ignore[arg-type]
            raise ValueError(
                f"tune.space: 'distillation.share.tables' asks for {as_text(tables)}, but before the sweep begins the DAS gives rows of "
                f"{as_text(given)} alone, as distillation.share.tables says; set that to [], all tables"
            )


def load_config(file: Path, overrides: Sequence[str] = (), name: str | None = None) -> Config:
    """Read a YAML config, apply `section.key=value` overrides (values are YAML), validate.

    The run's name is `name`, else the file's own `name`, else the file's stem. UserError names the setting at fault.
    """
    try:
        tree = yaml.safe_load(file.read_text())
        tree = {} if tree is None else tree
    except FileNotFoundError:
        raise UserError(f"{file}: no such config file; configs/ holds ready ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a config: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: a config is a mapping of sections, this is a {type(tree).__name__}")
    tree.setdefault("name", file.stem)
    for override in overrides:
        _apply(tree, override)
    if name:
        tree["name"] = name
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{file}: " + "; ".join(_explain(e) for e in error.errors())) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write it as section.key=value")
    try:
        put(tree, key, yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: '{value}' is not a YAML value ({error})") from None
    except ValueError as error:
        raise UserError(f"--set {override}: {error}") from None


def put(tree: dict[str, Any], key: str, value: object) -> None:
    """Set a dotted key of a tree; ValueError where a part of it is no section."""
    *path, last = key.split(".")
    for part in path:
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            raise ValueError(f"'{part}' is a value, not a section")
        tree = below
    tree[last] = value


def _explain(error: Any) -> str:
    """One validation error in a user's words: the setting, its value, the nearest known name."""
    place = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        return f"unknown setting '{place}'." + (nearest(str(error["loc"][-1]), known) or f" Known here: {', '.join(known)}.")
    if error["type"] == "union_tag_not_found":
        return f"setting '{place}': give it a 'type': {', '.join(MODEL_TYPES)}"
    message = error["msg"].removeprefix("Value error, ")
    told = without_credentials(error["input"]) if isinstance(error["input"], str) else error["input"]
    given = f" (given: {told!r})" if not isinstance(error["input"], dict | list | tuple | BaseModel) else ""
    return f"setting '{place}': {message}{given}"


def _known_keys(path: Sequence[str | int]) -> list[str]:
    """Names allowed below a path of the tree."""
    schema = TypeAdapter(Config).json_schema()
    node: dict[str, Any] = schema

    def resolve(n: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in n or {"type": "null"} in n.get("anyOf", []):
            n = schema["$defs"][n["$ref"].rpartition("/")[2]] if "$ref" in n else n["anyOf"][0]  # a section that may be left out
        return n

    for part in path:
        node = resolve(node)
        options = [resolve(o) for o in node.get("anyOf", []) + node.get("oneOf", [])]
        if isinstance(part, int):
            node = node.get("items", {})
        elif part in node.get("properties", {}):
            node = node["properties"][part]
        else:  # a tagged union: pydantic puts the tag into the path
            options += [resolve(o) for option in options for o in option.get("oneOf", [])]
            node = next((o for o in options if o.get("properties", {}).get("type", {}).get("const") == part), {})
    return list(resolve(node).get("properties", {}))


CHANGEABLE = {"fm": WAYS, "vm": WAYS, "checkpoint": True, "das": {"min_actors", "max_actors"}}
"""Settings with which a run that has begun may go on otherwise: how it is spread, not what it learns."""


def lineage(config: Config) -> str:
    """The settings that a run keeps from its beginning to its end, as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude=CHANGEABLE), sort_keys=False, allow_unicode=True)  # type: ignore[arg-type]


def stores_lineage(config: Config) -> str:
    """Those of them on which what lies in remote stores depends: not the folder, which may be another on each machine."""
    return lineage(config.model_copy(update={"run": config.run.model_copy(update={"dir": Path()})}))


def dump_config(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
