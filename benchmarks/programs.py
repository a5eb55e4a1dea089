"""Whole programs with packages from PyPI, unchanged, with and without vaefast: the same losses, and the time of each.

``python -m benchmarks.programs``, in the environment that ``make test-pypi`` makes. Each is trained by turns with its
integration off and on, from the same weights and, by ``noise="torch"``, the same noise; networks, data loading and
optimizer are in the time, as they are in its users'.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vaefast
from benchmarks import facts, run

Trained = list[float]


def digits() -> Tensor:
    """scikit-learn's digits as MNIST has them, [1797, 784] on [0, 1]."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    return F.interpolate(images, size=28, mode="bilinear").flatten(1).clamp(0, 1)


class ExamplesVAE(nn.Module):
    """The network of pytorch/examples, vae/main.py."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.fc3, self.fc4 = nn.Linear(20, 400), nn.Linear(400, 784)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.fc1(x))
        return self.fc21(h), self.fc22(h)

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))


def examples(fused: bool) -> Callable[[], Trained]:
    """pytorch/examples: the one program that is no library's, so its two functions are exchanged."""
    torch.manual_seed(1)
    model, batches = ExamplesVAE(), digits().split(128)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def reparameterize(mu: Tensor, logvar: Tensor) -> Tensor:
        if fused:
            return vaefast.reparameterize(mu, logvar, noise="torch")
        std = torch.exp(0.5 * logvar)
        return mu + torch.randn_like(std) * std

    def loss_function(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        if fused:
            return vaefast.elbo_loss(recon_x, x, mu, logvar, preset="pytorch_examples")
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return F.binary_cross_entropy(recon_x, x, reduction="sum") + kld

    def train() -> Trained:
        losses = []
        for _ in range(5):
            for x in batches:
                optimizer.zero_grad()
                mu, logvar = model.encode(x)
                loss = loss_function(model.decode(reparameterize(mu, logvar)), x, mu, logvar)
                loss.backward()
                losses.append(loss.item() / len(x))
                optimizer.step()
        return losses

    return train


def pyro(fused: bool) -> Callable[[], Trained]:
    """Pyro's VAE tutorial under TraceMeanField_ELBO."""
    import pyro as library
    from pyro import distributions as dist

    torch.manual_seed(1)
    library.clear_param_store()
    encoder = nn.Sequential(nn.Linear(784, 400), nn.Softplus(), nn.Linear(400, 100))
    decoder = nn.Sequential(nn.Linear(50, 400), nn.Softplus(), nn.Linear(400, 784))
    batches = digits().round().split(256)

    def model(x: Tensor) -> None:
        library.module("decoder", decoder)
        with library.plate("data", len(x)):
            z = library.sample("latent", dist.Normal(x.new_zeros(len(x), 50), x.new_ones(len(x), 50)).to_event(1))
            library.sample("obs", dist.Bernoulli(logits=decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        library.module("encoder", encoder)
        with library.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, 1)
            library.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    svi = library.infer.SVI(model, guide, library.optim.Adam({"lr": 1e-3}), library.infer.TraceMeanField_ELBO())
    return lambda: [svi.step(x) / len(x) for _ in range(5) for x in batches]


def diffusers(fused: bool) -> Callable[[], Trained]:
    """An AutoencoderKL of diffusers with random weights: its own two levels, 64x64 pictures."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    model = AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train() -> Trained:
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            posterior = model.encode(x).latent_dist
            recon = model.decode(posterior.sample()).sample
            loss = F.mse_loss(recon, x) + 1e-6 * posterior.kl().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        return losses

    return train


def scvi_tools() -> Any:
    """The library, with a seed for each model's weights."""
    import warnings

    import scvi as library

    warnings.filterwarnings("ignore")
    library.settings.seed = 1
    library.settings.verbosity = 40
    return library


def scvi_training(model: Any, **options: Any) -> Callable[[], Trained]:
    def train() -> Trained:
        model.train(
            max_epochs=3, accelerator="cpu", devices=1, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, **{"train_size": 1.0, **options},
        )  # fmt: skip
        return [float(elbo) for elbo in model.history["elbo_train"].iloc[:, 0]]

    return train


def scvi(fused: bool) -> Callable[[], Trained]:
    """An SCVI of scvi-tools on synthetic counts of 5,000 genes, some epochs."""
    import anndata

    library = scvi_tools()
    rates = torch.rand(5000, generator=torch.Generator().manual_seed(1)).log().mul(-1).expand(1024, -1)
    adata = anndata.AnnData(torch.poisson(rates, generator=torch.Generator().manual_seed(2)).numpy())
    library.model.SCVI.setup_anndata(adata)
    return scvi_training(library.model.SCVI(adata))


def totalvi(fused: bool) -> Callable[[], Trained]:
    """Counts of 2,000 genes and 50 proteins, the latter mixtures of background and foreground."""
    library = scvi_tools()
    adata = library.data.synthetic_iid(512, n_genes=2000, n_proteins=50)
    library.model.TOTALVI.setup_anndata(adata, protein_expression_obsm_key="protein_expression", batch_key="batch")
    return scvi_training(library.model.TOTALVI(adata), early_stopping=False, train_size=0.9)


def multivi(fused: bool) -> Callable[[], Trained]:
    """Counts of 1,000 genes and the accessibility of 1,000 regions, which is Bernoulli."""
    library = scvi_tools()
    mdata = library.data.synthetic_iid(512, n_genes=1000, n_regions=1000, return_mudata=True)
    library.model.MULTIVI.setup_mudata(mdata, modalities={"rna_layer": "rna", "atac_layer": "accessibility"})
    model = library.model.MULTIVI(mdata, n_genes=1000, n_regions=1000)
    return scvi_training(model, adversarial_mixing=False, early_stopping=False)


def peakvi(fused: bool) -> Callable[[], Trained]:
    """The accessibility of 5,000 regions, whose loss is PyTorch's binary cross-entropy of probabilities."""
    library = scvi_tools()
    adata = library.data.synthetic_iid(512, n_genes=5000)
    adata.X = (adata.X > 1).astype("float32")
    library.model.PEAKVI.setup_anndata(adata, batch_key="batch")
    return scvi_training(library.model.PEAKVI(adata), early_stopping=False)


PROGRAMS: dict[str, Callable[[bool], Callable[[], Trained]]] = {
    "pytorch/examples VAE": examples,
    "Pyro VAE, TraceMeanField_ELBO": pyro,
    "diffusers AutoencoderKL": diffusers,
    "scvi-tools SCVI": scvi,
    "scvi-tools TOTALVI": totalvi,
    "scvi-tools MULTIVI": multivi,
    "scvi-tools PEAKVI": peakvi,
}


INTEGRATIONS = "pyro", "diffusers", "scvi"


def integration(name: str, fused: bool) -> AbstractContextManager[None]:
    module = name.partition(" ")[0].partition("-")[0].lower()
    if not fused or module not in INTEGRATIONS:
        return nullcontext()
    found: AbstractContextManager[None] = getattr(vaefast.integrations, module).enabled(noise="torch")
    return found


def once(name: str, fused: bool) -> tuple[float, Trained]:
    with integration(name, fused):
        train = PROGRAMS[name](fused)
        torch.manual_seed(3)
        begun = time.perf_counter()
        losses = train()
        return time.perf_counter() - begun, losses


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Seconds without and with, by turns after one of each; the largest relative difference of the losses."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    apart = 0.0
    for k in range(rounds + 1):
        found = {fused: once(name, fused) for fused in seconds}
        apart = max(apart, *(abs(a / b - 1) for a, b in zip(found[True][1], found[False][1], strict=True)))
        if k:
            for fused, (s, _) in found.items():
                seconds[fused].append(s)
    without, with_ = (statistics.median(s) for s in seconds.values())
    return {"program": name, "without": without, "with": with_, "losses_apart": apart}


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="benchmarks.programs", description="unchanged programs with and without vaefast")
    p.add_argument("--rounds", type=int, default=5, metavar="N")
    p.add_argument("--out", type=Path, metavar="FILE", help="where the records go, as JSON")
    args = p.parse_args(argv)
    records = [compare(name, args.rounds) for name in PROGRAMS]
    rows = [["program", "without, s", "with, s", "speed-up", "losses apart by"]]
    for r in records:
        rows.append([
            r["program"], f"{r['without']:.3f}", f"{r['with']:.3f}", f"{r['without'] / r['with']:.2f}",
            f"{r['losses_apart']:.0e}",
        ])  # fmt: skip
    print(run.aligned(rows))
    if args.out:
        document = {
            "date": datetime.date.today().isoformat(),
            "commit": facts.commit(),
            "machine": run.machine(torch.device("cpu")),
            "programs": records,
        }
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
