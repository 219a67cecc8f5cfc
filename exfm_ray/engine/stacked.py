"""K models of equal structure that are trained together in one process.

Their tables lie side by side, their dense parts run under `torch.func.vmap`. A step of a small
student is mostly the cost of calling operators, so K of them together cost little more than one.
Each model learns what it would learn alone, up to rounding. Shape suffixes as in `data.batch`; K:
models, P: dense weights of one model, U: table rows that a batch reads.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from exfm_ray.config.models import ModelConfig
from exfm_ray.config.trainer import TrainerConfig
from exfm_ray.data.batch import Batch
from exfm_ray.distillation.student import Logits, Student
from exfm_ray.engine.engine import Engine
from exfm_ray.engine.tables import ADAGRAD_EPS
from exfm_ray.engine.tensor_store import RowUpdate
from exfm_ray.models.embeddings import LocalTables, initial_table
from exfm_ray.schema import Schema

Rates = dict[str, float]
"""Options of a torch optimizer: lr, weight_decay."""


class StackedTables(nn.Module):
    """The tables of K models as one set, whose rows hold the K models' rows side by side.

    One lookup serves all models. The optimizer is row-wise Adagrad as in `ShardedTables`; it runs
    in the backward pass on the rows that the batch reads. A table with several embeddings per id
    has one momentum for all of them.
    """

    def __init__(
        self,
        schema: Schema,
        model: ModelConfig,
        seeds: Sequence[int],
        rates: Sequence[float],
    ) -> None:
        super().__init__()
        self.models = len(seeds)
        self.dim = model.dim
        self.rate_K = torch.tensor(rates)
        wide_model = model.model_copy(update={"dim": model.dim * self.models})
        self.wide = LocalTables(schema, wide_model, seed=None, sparse=True)
        # The hook refers weakly to this object: the garbage collector does not see torch's
        # reference to a hook, so a cycle would never be freed.
        update = weakref.WeakMethod(self._update)
        self.wide.weight.register_post_accumulate_grad_hook(lambda weight: update()(weight))  # type: ignore[no-untyped-call, misc]

        self.first_id: dict[str, int] = {}
        ids = []
        total = 0
        for table, rows in schema.tables.items():
            self.first_id[table] = total
            id_R = torch.arange(total, total + rows)
            ids.append(id_R.repeat_interleave(self.wide.embeddings[table]))
            total += rows
        self.id_X = torch.cat(ids)
        self.momentum_K = torch.zeros(total, self.models)
        for number, seed in enumerate(seeds):
            self._initialize(number, seed, model)

    def _initialize(
        self,
        number: int,
        seed: int,
        model: ModelConfig,
    ) -> None:
        weight_XKE = self.weight_XKE
        for name, rows in self.wide.rows.items():
            width = self.wide.embeddings[name] * model.dim
            initial_RW = initial_table(name, rows, width, seed, std=model.init_std)
            initial_XE = initial_RW.view(-1, model.dim)
            first = self.wide.first_row[name]
            end = first + len(initial_XE)
            weight_XKE[first:end, number] = initial_XE

    @property
    def weight_XKE(self) -> Tensor:
        """A view of the weights."""
        weight = self.wide.weight.detach()
        return weight.view(-1, self.models, self.dim)

    def forward(self, batch: Batch) -> Tensor:
        """Return embedded_KBRE, the embedding rows of all models."""
        wide_BRX: Tensor = self.wide(batch)
        B, R, _ = wide_BRX.shape
        embedded_BRKE = wide_BRX.view(B, R, self.models, self.dim)
        return embedded_BRKE.permute(2, 0, 1, 3)

    @torch.no_grad()
    def _update(self, weight: Tensor) -> None:
        """Do the optimizer's step on the rows that have a gradient."""
        assert weight.grad is not None
        gradient = weight.grad.coalesce()
        weight.grad = None
        row_U = gradient.indices()[0]
        gradient_UKE = gradient.values().view(-1, self.models, self.dim)
        square_UKE = gradient_UKE * gradient_UKE  # square() takes ten times as long
        square_UK = square_UKE.mean(2)

        id_U = self.id_X[row_U]
        several_embeddings = len(self.id_X) > len(self.momentum_K)
        if several_embeddings:
            square_UK = _mean_over_ids(square_UK, id_U)
        momentum_UK = self.momentum_K[id_U] + square_UK
        self.momentum_K[id_U] = momentum_UK
        step_UK = -self.rate_K / (momentum_UK.sqrt() + ADAGRAD_EPS)
        change_UKE = gradient_UKE * step_UK.unsqueeze(2)
        self.weight_XKE.index_add_(0, row_U, change_UKE)

    @torch.no_grad()
    def write_rows(self, rows: Mapping[str, RowUpdate], weight: float) -> None:
        """Move rows of all models towards given ones; see `ShardedTables.write_rows`."""
        for name, update in rows.items():
            embeddings = self.wide.embeddings[name]
            id_X = torch.from_numpy(update.id_X)
            first = self.wide.first_row[name]
            end = first + self.wide.rows[name] * embeddings
            table_XKE = self.weight_XKE[first:end]
            table_RYKE = table_XKE.view(-1, embeddings, self.models, self.dim)

            old_XYKE = table_RYKE[id_X]
            new_XY1E = update.row_XW.view(-1, embeddings, 1, self.dim)
            new_XYKE = new_XY1E.expand_as(old_XYKE)
            table_RYKE[id_X] = torch.lerp(old_XYKE, new_XYKE, weight)
            if update.momentum_X is not None:
                self.momentum_K[id_X + self.first_id[name]] = update.momentum_X.unsqueeze(1)

    def copy(self, source: int, target: int) -> None:
        """Copy one model's tables over another's, with the optimizer state."""
        weight_XKE = self.weight_XKE
        weight_XKE[:, target] = weight_XKE[:, source]
        self.momentum_K[:, target] = self.momentum_K[:, source]


def _mean_over_ids(value_UK: Tensor, id_U: Tensor) -> Tensor:
    """Replace each value by the mean over the rows of its id.

    The embeddings of one id are read together, and their rows are neighbors.
    """
    _, group_U = torch.unique_consecutive(id_U, return_inverse=True)
    mean_UK = torch.zeros_like(value_UK)
    mean_UK.index_reduce_(0, group_U, value_UK, "mean", include_self=False)
    return mean_UK[group_U]


class StackedModule:
    """K modules of equal structure as one function, with an optimizer that has a rate for each.

    The inputs have a leading axis K. All weights lie in one matrix with a row for each module (P
    numbers); torch's optimizer sees each row as a parameter group.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: type[torch.optim.Adam],
        rates: Sequence[Rates],
    ) -> None:
        parameters, _ = stack_module_state(list(modules))
        self._shapes = {name: stacked.shape for name, stacked in parameters.items()}
        flat = [stacked.detach().flatten(1) for stacked in parameters.values()]
        self._flat_KP = torch.cat(flat, dim=1).requires_grad_()
        self._flat_KP.grad = torch.zeros_like(self._flat_KP)
        self._structure = modules[0]

        groups: list[dict[str, Any]] = []
        for number, rate in enumerate(rates):
            weight_P = _row_parameter(self._flat_KP, number)
            groups.append({"params": [weight_P], **rate})
        self._optimizer = optimizer(groups, fused=True)

    def __call__(self, *inputs: Tensor, in_dims: tuple[int | None, ...] = (0,)) -> Any:
        """Return the outputs of all modules.

        Args:
            inputs: of the modules.
            in_dims: the axis K of each input, None if all modules share the input.
        """

        def call_one(parameters: dict[str, Tensor], *arguments: Tensor) -> Any:
            output = functional_call(self._structure, parameters, arguments)
            return self._tensors(output)

        sizes = [shape[1:].numel() for shape in self._shapes.values()]
        parts = torch.split(self._flat_KP, sizes, dim=1)
        parameters = {}
        for (name, shape), part in zip(self._shapes.items(), parts, strict=True):
            parameters[name] = part.view(shape)
        call_all = torch.func.vmap(call_one, in_dims=(0, *in_dims))
        return call_all(parameters, *inputs)

    def _tensors(self, output: Any) -> Any:
        """Return a module's output in a form that `vmap` accepts: a tensor or a tuple."""
        return output

    def step(self) -> None:
        """Do one step with the gradients of the last backward pass."""
        self._optimizer.step()
        assert self._flat_KP.grad is not None
        self._flat_KP.grad.zero_()

    def set_rates(self, number: int, rates: Rates) -> None:
        """Change the optimizer options of one module from now on."""
        group = self._optimizer.param_groups[number]
        group.update(rates)

    @torch.no_grad()
    def copy(self, source: int, target: int) -> None:
        """Copy one module over another, with its optimizer state but not its rates."""
        groups = self._optimizer.param_groups
        source_P = groups[source]["params"][0]
        target_P = groups[target]["params"][0]
        target_P.copy_(source_P)
        target_state = self._optimizer.state[target_P]
        for key, value in self._optimizer.state[source_P].items():
            target_state[key].copy_(value)


def _row_parameter(flat_KP: Tensor, number: int) -> Tensor:
    """Return one module's weights as a parameter.

    Its values and its gradient are views of the flat ones.
    """
    assert flat_KP.grad is not None
    weight_P = flat_KP.detach()[number].requires_grad_()
    weight_P.grad = flat_KP.grad[number]
    return weight_P


def dense_rates(config: TrainerConfig) -> Rates:
    """Return the options of the dense part's optimizer."""
    optimizer = config.optimizer
    return {
        "lr": optimizer.dense_lr,
        "weight_decay": optimizer.dense_weight_decay,
    }


class StackedStudents(StackedModule):
    """The dense parts of K students, each with its own beta.

    The interface is that of DeepSpeed's engine.
    """

    def __init__(self, students: Sequence[Student], configs: Sequence[TrainerConfig]) -> None:
        rates = [dense_rates(config) for config in configs]
        super().__init__(students, torch.optim.AdamW, rates)
        betas = [student.beta for student in students]
        self.beta_K = torch.stack(betas)

    def __call__(self, embedded_KBRE: Tensor, dense_BD: Tensor) -> Logits:  # type: ignore[override]
        """Return the logits of all students; they share the dense features."""
        heads: tuple[Tensor, ...] = super().__call__(
            embedded_KBRE, dense_BD, self.beta_K, in_dims=(0, None, 0)
        )
        missing = [None] * (3 - len(heads))
        return Logits(*heads, *missing)

    def _tensors(self, output: Logits) -> tuple[Tensor, ...]:
        # The heads that an arm does not have come last.
        return tuple(logits_BT for logits_BT in output if logits_BT is not None)

    def backward(self, loss: Tensor) -> None:
        """Add up the gradients of all models.

        Args:
            loss: sum of the models' losses; none of them depends on another model's weights.
        """
        loss.backward()  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> None:
        """Set training mode, as `nn.Module.train` does."""
        self._structure.train(mode)

    def eval(self) -> None:
        """Set evaluation mode, as `nn.Module.eval` does."""
        self._structure.eval()


class StackedEngine(Engine):
    """An engine for K models, whose logits have a leading axis K.

    Forward pass, prediction and update are those of `Engine`; it writes no checkpoints.
    """

    tables: Any
    dense: Any

    def __init__(
        self,
        schema: Schema,
        configs: Sequence[TrainerConfig],
        students: Sequence[Student],
        model: ModelConfig,
        seeds: Sequence[int],
    ) -> None:
        self.device = torch.device("cpu")
        rates = [config.optimizer.table_lr for config in configs]
        self.tables = StackedTables(schema, model, seeds, rates)
        torch.set_float32_matmul_precision(configs[0].matmul_precision)
        self.dense = StackedStudents(students, configs)
        self._decay = None
        self._average = None
        self._dtype = torch.float32

    def write_rows(self, rows: Mapping[str, RowUpdate], weight: float) -> None:
        """Move table rows of all models towards given ones."""
        self.tables.write_rows(rows, weight)
