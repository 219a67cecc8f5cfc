"""K models of one structure that learn as one in this process: their tables side by side, their
dense parts under `torch.func.vmap`.

A step of a small student is mostly the cost of calling operators; K of them together cost little
more than one. Each model learns what it would alone, up to rounding. Shape suffixes as in
`data.batch`; K the models, P weights of one, U table rows that a batch reads.
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
    """K models' tables as one, whose rows hold the K models' rows side by side, so that one lookup
    serves all.

    Row-wise Adagrad, the same as `ShardedTables` has it: the optimizer runs in the backward pass,
    on the rows that the batch reads. A table with several embeddings for an id keeps one momentum
    for all of them.
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
        self.plain = LocalTables(
            schema,
            model.model_copy(update={"dim": model.dim * self.models}),
            seed=None,
            sparse=True,
        )
        update = weakref.WeakMethod(
            self._update
        )  # torch keeps the hook out of the garbage collector's sight: a cycle would live for ever
        self.plain.weight.register_post_accumulate_grad_hook(lambda weight: update()(weight))  # type: ignore[no-untyped-call, misc]
        self.rate_K = torch.tensor(rates)
        ids = [
            torch.arange(rows).repeat_interleave(self.plain.embeddings[table])
            for table, rows in schema.tables.items()
        ]
        first = torch.tensor([0, *schema.tables.values()]).cumsum(0)
        self.id_X = torch.cat(
            [numbers + start for numbers, start in zip(ids, first.tolist(), strict=False)]
        )
        self.first_id = dict(zip(schema.tables, first.tolist(), strict=False))
        self.momentum_K = torch.zeros(int(first[-1]), self.models)
        weight_XKE = self.weight_XKE
        for number, seed in enumerate(seeds):
            for name, rows in schema.tables.items():
                width = self.plain.embeddings[name] * model.dim
                fresh = initial_table(name, rows, width, seed, std=model.init_std).view(
                    -1, model.dim
                )
                weight_XKE[self.plain.first_row[name] :][: len(fresh), number] = fresh

    @property
    def weight_XKE(self) -> Tensor:
        """A view of the weights."""
        return self.plain.weight.detach().view(-1, self.models, self.dim)

    def forward(self, batch: Batch) -> Tensor:
        """embedded_KBRE of the models' rows."""
        wide_BRX: Tensor = self.plain(batch)
        return wide_BRX.view(*wide_BRX.shape[:2], self.models, self.dim).permute(2, 0, 1, 3)

    @torch.no_grad()
    def _update(self, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.coalesce()
        row_U = gradient.indices()[0]
        gradient_UKE = gradient.values().view(-1, self.models, self.dim)
        weight.grad = None
        squares_UK = (gradient_UKE * gradient_UKE).mean(2)  # square() costs ten times as much
        id_U = self.id_X[row_U]
        if len(self.id_X) > len(
            self.momentum_K
        ):  # the embeddings of one id are read together, and their rows are neighbours
            _, place_U = torch.unique_consecutive(id_U, return_inverse=True)
            squares_UK = torch.zeros_like(squares_UK).index_reduce_(
                0, place_U, squares_UK, "mean", include_self=False
            )[place_U]
        momentum_UK = self.momentum_K[id_U] + squares_UK
        self.momentum_K[id_U] = momentum_UK
        step_UK = -self.rate_K / (momentum_UK.sqrt() + ADAGRAD_EPS)
        self.weight_XKE.index_add_(0, row_U, gradient_UKE * step_UK.unsqueeze(2))

    @torch.no_grad()
    def write_rows(self, rows: Mapping[str, RowUpdate], weight: float) -> None:
        """Move rows of all models this far (`weight`) to those given by table; as
        `ShardedTables.give`."""
        for name, given in rows.items():
            embeddings = self.plain.embeddings[name]
            id_X = torch.from_numpy(given.id_X)
            first = self.plain.first_row[name]
            count = self.plain.rows[name] * embeddings
            table_RYKE = self.weight_XKE[first : first + count].view(
                -1, embeddings, self.models, self.dim
            )
            row_XY1E = given.row_XW.view(-1, embeddings, 1, self.dim)
            table_RYKE[id_X] = torch.lerp(
                table_RYKE[id_X], row_XY1E.expand_as(table_RYKE[id_X]), weight
            )
            if given.momentum_X is not None:
                self.momentum_K[id_X + self.first_id[name]] = given.momentum_X.unsqueeze(1)

    def copy(self, source: int, target: int) -> None:
        """Make one model's tables those of another, with their optimizer state."""
        self.weight_XKE[:, target] = self.weight_XKE[:, source]
        self.momentum_K[:, target] = self.momentum_K[:, source]


class StackedModule:
    """K modules of one structure as one function over inputs with a leading axis K, and an
    optimizer with rates of its own for each.

    All weights lie in one matrix, a row for each module (P numbers); torch's optimizer sees each
    row as a parameter group.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: type[torch.optim.Adam],
        rates: Sequence[Rates],
    ) -> None:
        parameters, _ = stack_module_state(list(modules))
        self._shapes = {name: stacked.shape for name, stacked in parameters.items()}
        self._flat_KP = torch.cat(
            [stacked.detach().flatten(1) for stacked in parameters.values()], dim=1
        ).requires_grad_()
        self._flat_KP.grad = torch.zeros_like(self._flat_KP)
        self._structure = modules[0]
        self._optimizer = optimizer(
            [
                {"params": [_row(self._flat_KP, number)], **rate}
                for number, rate in enumerate(rates)
            ],
            fused=True,
        )

    def __call__(self, *inputs: Tensor, in_dims: tuple[int | None, ...] = (0,)) -> Any:
        """What the modules say of their inputs; `in_dims`: the axis K of each input, None where all
        share it."""

        def one(parameters: dict[str, Tensor], *arguments: Tensor) -> Any:
            return self._tensors(functional_call(self._structure, parameters, arguments))

        parts = torch.split(
            self._flat_KP, [shape[1:].numel() for shape in self._shapes.values()], dim=1
        )
        parameters = {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        return torch.func.vmap(one, in_dims=(0, *in_dims))(parameters, *inputs)

    def _tensors(self, output: Any) -> Any:
        """The module's output as `vmap` takes it: a tensor, or a tuple of them."""
        return output

    def step(self) -> None:
        """One step on the gradients that the last backward pass left."""
        self._optimizer.step()
        assert self._flat_KP.grad is not None
        self._flat_KP.grad.zero_()

    def set_rates(self, number: int, rates: Rates) -> None:
        """From now on one module learns at these rates."""
        self._optimizer.param_groups[number].update(rates)

    @torch.no_grad()
    def copy(self, source: int, target: int) -> None:
        """Make one module what another is, with its optimizer state but its own rates."""
        (theirs,), (own,) = (
            self._optimizer.param_groups[number]["params"] for number in (source, target)
        )
        own.copy_(theirs)
        for key, value in self._optimizer.state[theirs].items():
            self._optimizer.state[own][key].copy_(value)


def _row(flat_KP: Tensor, number: int) -> Tensor:
    """One module's weights as a parameter whose values and gradient are views of the flat ones."""
    assert flat_KP.grad is not None
    own_P = flat_KP.detach()[number].requires_grad_()
    own_P.grad = flat_KP.grad[number]
    return own_P


def dense_rates(config: TrainerConfig) -> Rates:
    """The dense optimizer's."""
    return {"lr": config.optimizer.dense_lr, "weight_decay": config.optimizer.dense_weight_decay}


class StackedStudents(StackedModule):
    """K students' dense parts, with a beta for each; steps like a DeepSpeed engine."""

    def __init__(self, students: Sequence[Student], configs: Sequence[TrainerConfig]) -> None:
        super().__init__(students, torch.optim.AdamW, [dense_rates(config) for config in configs])
        self.beta_K = torch.stack([student.beta for student in students])

    def __call__(self, embedded_KBRE: Tensor, dense_BD: Tensor) -> Logits:  # type: ignore[override]
        heads: tuple[Tensor, ...] = super().__call__(
            embedded_KBRE, dense_BD, self.beta_K, in_dims=(0, None, 0)
        )
        serving_KBT, *others = heads
        auxiliary_KBT, adapter_KBT = (*others, None, None)[:2]
        return Logits(serving_KBT, auxiliary_KBT, adapter_KBT)

    def _tensors(self, output: Logits) -> tuple[Tensor, ...]:
        return tuple(
            logits_BT for logits_BT in output if logits_BT is not None
        )  # heads that an arm lacks come last

    def backward(self, loss: Tensor) -> None:
        """Gradients of all models: `loss` is the sum of theirs, and no model's loss depends on
        another's weights."""
        loss.backward()  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> None:
        """As `nn.Module.train`."""
        self._structure.train(mode)

    def eval(self) -> None:
        """As `nn.Module.eval`."""
        self._structure.eval()


class StackedEngine(Engine):
    """An engine whose logits have a leading axis K: forward, predict and update as in `Engine`; it
    writes no checkpoints."""

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
        self.tables = StackedTables(
            schema, model, seeds, [config.optimizer.table_lr for config in configs]
        )
        torch.set_float32_matmul_precision(configs[0].matmul_precision)
        self.dense = StackedStudents(students, configs)
        self._decay = self._average = None
        self._dtype = torch.float32

    def give_rows(self, rows: Mapping[str, RowUpdate], weight: float) -> None:
        self.tables.write_rows(rows, weight)
