"""How the gallery runs the examples: few epochs, what they write in out/gallery, and the pictures from there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

matplotlib.use("Agg")

OUT = Path(__file__).resolve().parents[2] / "out" / "gallery"
ORDER = (
    "digits_vae", "hierarchical_vae", "counts_vae", "discretized_vae", "priors_vae", "importance_vae", "discrete_vae",
    "bayesian_digits", "bayesian_regression", "bayesian_linear", "ppca_identity", "ddp_vae",
)  # fmt: skip
# the picture by which the index shows an example
FIRST = ("latent.png", "levels.png", "counts.png", "scale.png", "priors.png", "bounds.png", "classes.png")
EPOCHS = {
    "digits_vae": 20, "hierarchical_vae": 12, "counts_vae": 12, "discretized_vae": 20, "priors_vae": 20,
    "importance_vae": 4, "discrete_vae": 20, "bayesian_digits": 60,
}  # fmt: skip


class Order:
    """A key to sort the files by."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, file: str) -> int:
        name = Path(file).stem
        return ORDER.index(name) if name in ORDER else len(ORDER)

    def __repr__(self) -> str:
        return "Order"


def arguments(gallery_conf: dict[str, Any], script_vars: dict[str, Any]) -> list[str]:
    source = Path(script_vars["src_file"])
    name = source.stem
    shutil.rmtree(OUT / name, ignore_errors=True)
    # from the examples' folder, in which they run: what they print has no path of the machine's
    out = os.path.relpath(OUT / name, source.parent)
    if name in ("bayesian_linear", "bayesian_regression"):
        return ["--out", out]
    epochs = EPOCHS.get(name)
    if epochs is None:
        return []
    return ["--epochs", str(epochs), "--out", out, *(["--rounds", "50"] if name == "digits_vae" else [])]


def pictures(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Each picture that the example wrote, once, as wide as the page."""
    folder, shown = OUT / Path(block_vars["src_file"]).stem, []
    written = sorted(folder.glob("*.png"), key=lambda file: (file.name not in FIRST, file.stat().st_mtime_ns))
    for picture in written:
        name = next(block_vars["image_path_iterator"])
        shutil.move(picture, name)
        shown.append(figure_rst([name], gallery_conf["src_dir"]))
    return "".join(shown)


def thumbnail() -> str:
    """For the examples that draw nothing: a picture of the identity that they are about."""
    OUT.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(4, 2.8))
    figure.text(0.5, 0.5, "$\\log\\, p(x) =$\n$\\mathrm{ELBO} + \\mathrm{KL}$", fontsize=30, ha="center", va="center")
    figure.savefig(OUT / "identity.png", dpi=100)
    return str(OUT / "identity.png")
