"""The peers of `benchmarks.peers`: DCNv2 of FuxiCTR and torch-rechub, and Wukong in plain torch.

    python peer_models.py FOLDER PEER

runs in the interpreter that has the peers and imports nothing of exfm_ray. FOLDER holds
settings.json and the training rows, as train.npz and train.parquet. Each line of the input names a
loader of the peer, or is `ready`: batches in memory. Then the peer trains one pass, and answers
with a line that holds the seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LEARNING_RATE = 1e-3
WORKERS = {"no worker": 0, "1 worker": 1, "3 workers": 3}
RAY = "parquet by Ray Data"
LOADERS = {
    "fuxictr": (*WORKERS, RAY),
    "torch_rechub": tuple(WORKERS),
    "plain_torch": tuple(WORKERS),
}
READY = "ready"


class Peer:
    """A model and its trainer.

    Args:
        folder: folder of the training rows.
        settings: tables (feature -> rows), dim, batch_size, threads, model (its sizes).
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self.tables: dict[str, int] = settings["tables"]
        self.dim = settings["dim"]
        self.batch_size = settings["batch_size"]
        self.sizes = settings["model"]
        with np.load(folder / "train.npz") as columns:
            self.ids = {name: columns[name].astype(np.int64) for name in self.tables}
            self.labels = columns["label"]

    def loader(self, name: str) -> Iterable[Any]:
        """Return batches by the peer's own loader."""
        raise NotImplementedError

    def train(self, batches: Iterable[Any]) -> None:
        """Train one pass by the peer's own trainer."""
        raise NotImplementedError


def fuxictr_dcnv2(
    feature_map: Any,
    dim: int,
    sizes: dict[str, Any],
    folder: Path,
) -> Any:
    """Build DCNv2 in its parallel form from FuxiCTR's own layers.

    FuxiCTR's wheel has the layers but not the model.
    """
    from fuxictr.pytorch.layers import CrossNetV2, FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    class DCNv2(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(
                feature_map,
                eval_steps=sys.maxsize,
                verbose=0,
                model_root=str(folder),
                metrics=["AUC"],
            )
            width = dim * len(feature_map.features)
            self.embedding_layer = FeatureEmbedding(feature_map, dim)
            self.crossnet = CrossNetV2(width, sizes["cross_layers"])
            self.parallel_dnn = MLP_Block(
                input_dim=width, hidden_units=list(sizes["mlp"]), hidden_activations="ReLU"
            )
            self.fc = nn.Linear(width + sizes["mlp"][-1], 1)
            self.compile("adam", "binary_crossentropy", LEARNING_RATE)
            self.reset_parameters()
            self.model_to_device()

        def forward(self, inputs: Any) -> dict[str, Tensor]:
            embedded = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
            crossed = self.crossnet(embedded)
            deep = self.parallel_dnn(embedded)
            logits = self.fc(torch.cat([crossed, deep], dim=-1))
            return {"y_pred": self.output_activation(logits)}

    return DCNv2()


class FuxiCTR(Peer):
    """Trains by FuxiCTR's `train_epoch`.

    Loads by its NpzDataLoader or, through Ray, its ParquetDataLoader.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(folder, settings)
        from fuxictr.features import FeatureMap

        self.feature_map = FeatureMap("peers", str(folder))
        self.feature_map.features = OrderedDict()
        for name, rows in self.tables.items():
            feature = {"type": "categorical", "source": "", "vocab_size": rows}
            self.feature_map.features[name] = feature
        self.feature_map.labels = ["label"]
        self.feature_map.set_column_index()
        self.model = fuxictr_dcnv2(self.feature_map, self.dim, self.sizes, folder)
        # As its `fit` sets them:
        self.model._max_gradient_norm = 10.0
        self.model._total_steps = 0
        self.model._stop_training = False

    def loader(self, name: str) -> Iterable[Any]:
        from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader
        from fuxictr.pytorch.dataloaders.parquet_dataloader import ParquetDataLoader

        if name == RAY:
            loader: Iterable[Any] = ParquetDataLoader(
                self.feature_map,
                str(self.folder / "train.parquet"),
                batch_size=self.batch_size,
                shuffle=True,
            )
            return loader
        path = str(self.folder / "train.npz")
        loader = NpzDataLoader(
            self.feature_map,
            path,
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=WORKERS[name],
        )
        return loader

    def train(self, batches: Iterable[Any]) -> None:
        self.model.train_epoch(batches)


class TorchRechub(Peer):
    """Trains by torch-rechub's CTRTrainer, loads by its DataGenerator."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(folder, settings)
        from torch_rechub.basic.features import SparseFeature
        from torch_rechub.models.ranking.dcn_v2 import DCNv2
        from torch_rechub.trainers import CTRTrainer

        features = [SparseFeature(name, rows, self.dim) for name, rows in self.tables.items()]
        model = DCNv2(
            features,
            self.sizes["cross_layers"],
            {"dims": list(self.sizes["mlp"])},
            use_low_rank_mixture=False,
        )
        self.trainer = CTRTrainer(model, optimizer_params={"lr": LEARNING_RATE})

    def loader(self, name: str) -> Iterable[Any]:
        from torch_rechub.utils.data import DataGenerator

        options: dict[str, Any] = {"batch_size": self.batch_size, "num_workers": WORKERS[name]}
        train, *_ = DataGenerator(self.ids, self.labels).generate_dataloader(
            x_val={}, y_val=[], x_test={}, y_test=[], **options
        )
        batches: Iterable[Any] = train
        return batches

    def train(self, batches: Iterable[Any]) -> None:
        self.trainer.train_one_epoch(batches)


def hidden_layers(widths: Sequence[int]) -> list[nn.Module]:
    """Return a linear layer and a ReLU for each pair of widths."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers


class PlainWukongLayer(nn.Module):
    """LN(concat(FMB(X), LCB(X)) + R(X)) as in Wukong (arXiv 2403.02545).

    Its factorization machine is X (X^T Y).
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        sizes: dict[str, Any],
    ) -> None:
        super().__init__()
        out = sizes["n_F"] + sizes["n_L"]
        self.project = nn.Parameter(torch.randn(rows, sizes["k"]) / rows**0.5)
        widths = (rows * sizes["k"], *sizes["fmb_mlp"])
        self.fmb = nn.Sequential(
            nn.LayerNorm(widths[0]),
            *hidden_layers(widths),
            nn.Linear(widths[-1], sizes["n_F"] * dim),
        )
        self.lcb = nn.Parameter(torch.randn(sizes["n_L"], rows) / rows**0.5)
        self.residual = None
        if rows != out:
            self.residual = nn.Parameter(torch.randn(out, rows) / rows**0.5)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        fm = x @ (x.transpose(1, 2) @ self.project)
        fmb = self.fmb(fm.flatten(1)).view(len(x), -1, x.shape[2])
        residual = x if self.residual is None else self.residual @ x
        y: Tensor = self.norm(torch.cat([fmb, self.lcb @ x], dim=1) + residual)
        return y


class PlainWukong(nn.Module):
    """An embedding for every feature, Wukong's layers, an MLP."""

    def __init__(
        self,
        tables: dict[str, int],
        dim: int,
        sizes: dict[str, Any],
    ) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(rows, dim) for rows in tables.values())
        for embedding in self.embeddings:
            nn.init.normal_(embedding.weight, std=0.05)  # type: ignore[arg-type]
        out = sizes["n_F"] + sizes["n_L"]
        inputs = [len(tables)] + [out] * (sizes["l"] - 1)
        self.layers = nn.Sequential(*(PlainWukongLayer(rows, dim, sizes) for rows in inputs))
        widths = (out * dim, *sizes["mlp"])
        self.mlp = nn.Sequential(*hidden_layers(widths), nn.Linear(widths[-1], 1))

    def forward(self, ids: Tensor) -> Tensor:
        embedded = [
            embedding(column)
            for embedding, column in zip(self.embeddings, ids.unbind(1), strict=True)
        ]
        x = torch.stack(embedded, dim=1)
        logits: Tensor = self.mlp(self.layers(x).flatten(1)).squeeze(1)
        return logits


class PlainTorch(Peer):
    """The plain Wukong, a plain training loop, a DataLoader, Adam over everything."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(folder, settings)
        self.model = PlainWukong(self.tables, self.dim, self.sizes)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.loss = nn.BCEWithLogitsLoss()

    def loader(self, name: str) -> Iterable[Any]:
        ids = torch.from_numpy(np.stack(list(self.ids.values()), axis=1))
        data = TensorDataset(ids, torch.from_numpy(self.labels))
        return DataLoader(data, batch_size=self.batch_size, shuffle=True, num_workers=WORKERS[name])

    def train(self, batches: Iterable[Any]) -> None:
        for ids, labels in batches:
            self.optimizer.zero_grad()
            self.loss(self.model(ids), labels).backward()
            self.optimizer.step()


PEERS: dict[str, type[Peer]] = {
    "fuxictr": FuxiCTR,
    "torch_rechub": TorchRechub,
    "plain_torch": PlainTorch,
}


def main() -> None:
    folder = Path(sys.argv[1])
    name = sys.argv[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the peers print, too
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    peer = PEERS[name](folder, settings)
    loaders: dict[str, Iterable[Any]] = {}
    for line in sys.stdin:
        way = line.strip()
        if way not in loaders:
            loaders[way] = list(peer.loader("no worker")) if way == READY else peer.loader(way)
        started = time.perf_counter()
        peer.train(loaders[way])
        print(time.perf_counter() - started, file=answers, flush=True)


if __name__ == "__main__":
    main()
