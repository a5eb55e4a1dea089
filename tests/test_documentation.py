"""Every block of Python in the README and the pages runs, and so does every docstring's example; the public names'
docstrings are whole; the README stays short. What the blocks take for granted is in ``documented.py``."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from documented import PAGES, ROOT, Block, blocks_of, example_of, names, run
from torch import distributed as dist

import vaefast
from vaefast import _backends, _options, presets

README = ROOT / "README.md"
MODULES = (
    "bayesian", "bounds", "debug", "diagnostics", "distributed", "distributions", "likelihoods", "presets",
    "priors", "schedules",
)  # fmt: skip
INTEGRATIONS = ("diffusers", "pyro", "scvi", "torch_distributions")
ALL = [block for page in PAGES for block in blocks_of(page)]
NAMESPACES: dict[str, tuple[dict[str, Any], set[int]]] = {}


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True, scope="module")
def _as_it_was() -> Iterator[None]:
    """What examples register or enable is no longer there afterwards."""
    registries: list[Any] = [
        presets.PRESETS,
        vaefast.likelihoods.LIKELIHOODS,
        _options._LIKELIHOODS,
        _backends._warned_of,
    ]
    before = [registry.copy() for registry in registries]
    yield
    vaefast.integrations.torch_distributions.disable()
    for registry, kept in zip(registries, before):
        registry.clear()
        registry.update(kept)


def params() -> list[Any]:
    return [
        pytest.param(block, id=f"{block.page}:{block.line}", marks=[pytest.mark.pypi] if block.needs else [])
        for block in ALL
    ]


@pytest.mark.filterwarnings("ignore:likelihood .* has no kernels")
@pytest.mark.parametrize("block", params())
def test_blocks_run(block: Block, one_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """As a reader runs them: from the page's head on, one after the other."""
    if block.part:
        pytest.skip(f"not a program by itself: {block.part}")
    if block.needs:
        module, _, package = block.needs.partition(" ")
        pytest.importorskip(
            module, reason=f"needs {package.strip('()') or module}; `make test-pypi` installs it and runs this"
        )
    if "plt" in block.code or "plot" in block.code:
        pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'vaefast[demo]'").use("Agg")
    if "sklearn" in block.code:
        pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'vaefast[demo]'")
    monkeypatch.chdir(tmp_path)
    namespace, done = NAMESPACES.setdefault(block.page, (names(), set()))
    for before in ALL:
        if before.page == block.page and before.line <= block.line and before.line not in done:
            if before.part or (before.needs and before.line < block.line):
                continue
            run("\n" * (before.line - 1) + before.code, namespace, str(ROOT / before.page))
            done.add(before.line)


# ---- docstrings


def public_names() -> dict[str, Any]:
    """Functions, classes and their methods, by the name under which they are documented."""
    found = {f"vaefast.{name}": getattr(vaefast, name) for name in vaefast.__all__}
    for module in MODULES:
        of = importlib.import_module(f"vaefast.{module}")
        found |= {f"vaefast.{module}.{name}": getattr(of, name) for name in of.__all__}
    for module in INTEGRATIONS:
        of = importlib.import_module(f"vaefast.integrations.{module}")
        found |= {f"vaefast.integrations.{module}.{name}": getattr(of, name) for name in of.__all__}
    found = {name: value for name, value in found.items() if inspect.isroutine(value) or inspect.isclass(value)}
    for name, value in list(found.items()):
        if inspect.isclass(value):
            found |= {
                f"{name}.{method}": f
                for method, f in vars(value).items()
                if inspect.isfunction(f)
                and not method.startswith("_")
                and method not in ("forward", "extra_repr", *getattr(value, "__dataclass_fields__", ()))
            }
    return found


NAMES = public_names()
# said once, for the class or the function whose arguments these take
AS = re.compile(
    r"[Aa]rguments, shapes, dtypes and errors are those of|as for :func:|As :meth:|:meth:`enable`|:meth:`rsample`"
)
# without the package's name
TEXT = (
    "show_config", "available_backends", "use_backend",
)  # fmt: skip
# what takes or gives no tensor
NO_TENSOR = (
    *TEXT, "bounds.LogProb", "Likelihood", "Parameterization", "ELBOTerms", "debug", "distributed.manual_seed",
    "distributions.Normal.to_event", "diagnostics.CollapseMonitor", "diagnostics.CollapseReport.plot",
    "presets.Preset", "schedules", "integrations", "likelihoods",
)  # fmt: skip
# what has no formula of its own: it hands on, keeps books, or chooses
NO_FORMULA = (
    *TEXT, "bounds.LogEvidence", "bounds.LogProb", "bounds.PIWAELosses",
    "check", "Likelihood", "Parameterization", "ELBOTerms", "elbo_loss", "ELBOLoss", "sample_with_kl",
    "likelihood_mean", "sample_likelihood", "presets", "distributed.manual_seed", "distributed.loss_scale",
    "distributed.global_mean", "debug", "diagnostics", "schedules.BetaSchedule", "integrations", "likelihoods",
)  # fmt: skip
# what cannot be called wrongly, or takes what its class took
NO_ERRORS = (
    "bounds.LogEvidence", "bounds.LogProb", "bounds.PIWAELosses",
    "show_config", "available_backends", "ELBOTerms", "ELBOTerms.of", "TCTerms", "debug.NanGuard",
    "debug.Finding", "DiagonalGaussian.mode",
    "distributions.Normal.sample", "distributions.Normal.rsample", "distributions.Normal.entropy",
    "diagnostics.CollapseReport", "diagnostics.CollapseMonitor.reset", "schedules.BetaSchedule.step",
    "schedules.BetaSchedule.reset_parameters", "likelihoods.Domain", "likelihoods.LikelihoodEntry",
    "integrations", "presets.Preset.filled", "presets.Preset.weigh", "bayesian.Prediction",
)  # fmt: skip
SHAPE = re.compile(r"``\[[^\]]*\]``|0-d|batch_shape|shape of|as for :|\bshape\b|Shape:")
UNIT = re.compile(r"\bnats?\b")
LOSSES = re.compile(r"kl|nll|loss(?!_scale)|elbo|log_prob|entropy|global_mean", re.IGNORECASE)
SOURCE = re.compile(r"et al\.|arXiv|Welling|Jeffreys|equation|:func:`vaefast|log 2 pi|:meth:|E_x\[|kl\[b")


def text_of(name: str) -> str:
    return (inspect.getdoc(NAMES[name]) or "") if name in NAMES else ""


def lacks(name: str) -> list[str]:
    doc, owner, short = text_of(name), name.rpartition(".")[0], name.removeprefix("vaefast.")
    is_method = owner in NAMES
    handed_on = bool(AS.search(doc))
    found = []
    if len(doc) < 40:
        return ["a docstring"]
    if not short.startswith(NO_TENSOR) and not SHAPE.search(doc) and not handed_on:
        found.append("shapes")
    if (
        LOSSES.search(name.rpartition(".")[2])
        and not short.startswith(NO_TENSOR)
        and not UNIT.search(doc)
        and not handed_on
    ):
        found.append("units")
    if not short.startswith(NO_ERRORS) and "Raises:" not in doc + text_of(owner) * is_method and not handed_on:
        found.append("what it raises")
    if not example_of(doc) and not (is_method and example_of(text_of(owner))):
        found.append("an example")
    if (
        not short.startswith(NO_FORMULA)
        and not SOURCE.search(doc)
        and not (is_method and SOURCE.search(text_of(owner)))
    ):
        found.append("the formula's source")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_are_whole(name: str) -> None:
    missing = lacks(name)
    assert not missing, f"{name} lacks {', '.join(missing)}"


def test_what_lacks_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def kl_of_mine(mu: torch.Tensor) -> None:
        """The KL of something to something else, and nothing more is said about it here."""

    monkeypatch.setitem(NAMES, "vaefast.kl_of_mine", kl_of_mine)
    assert lacks("vaefast.kl_of_mine") == ["shapes", "units", "what it raises", "an example", "the formula's source"]


WITH_EXAMPLE = [name for name in NAMES if example_of(text_of(name))]


@pytest.mark.filterwarnings("ignore:likelihood .* has no kernels")
@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_docstring_examples_run(name: str, one_process: None) -> None:
    """An example that ends in ``# SomeError: words`` raises that."""
    code = example_of(text_of(name))
    if "plot" in code:
        pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'vaefast[demo]'").use("Agg")
    namespace = names()
    for library in ("diffusers", "pyro", "scvi"):
        if name.startswith(f"vaefast.integrations.{library}."):
            return  # enable() and its like are one function for all; its example is torch_distributions'
    raised = re.search(r"^# (\w+Error): (.*)", code, re.MULTILINE)
    if raised is None:
        run(code, namespace, name)
        return
    with pytest.raises(Exception, match=re.escape(raised[2])) as caught:
        run(code, namespace, name)
    assert type(caught.value).__name__ == raised[1]


def test_every_public_name_has_a_page() -> None:
    index = (ROOT / "docs" / "api" / "index.md").read_text() + (ROOT / "docs" / "api" / "data.md").read_text()
    listed = set(re.findall(r"^   ([\w.]+)$", index, re.MULTILINE)) | {
        name.removeprefix("vaefast.") for name in re.findall(r"py:data:: ([\w.]+)", index)
    }
    modules = {f"integrations.{module}" for module in INTEGRATIONS} | {"distributions", "integrations"}
    wanted = {*vaefast.__all__, *modules}
    for module in MODULES:
        wanted |= {f"{module}.{name}" for name in importlib.import_module(f"vaefast.{module}").__all__}
    assert wanted <= listed, wanted - listed


@pytest.mark.parametrize("name", vaefast.LIKELIHOODS)
def test_every_likelihood_is_on_its_pages(name: str) -> None:
    theory, guide = (ROOT / "docs" / page for page in ("theory.md", "guides/likelihoods.md"))
    assert f'| `"{name}"` |' in guide.read_text()
    assert f"| `{name}` |" in theory.read_text()
    entry = vaefast.likelihoods.LIKELIHOODS.get(name)
    assert entry is None or entry.formula.replace("|", r"\|") in theory.read_text()


# ---- the README


def test_the_readme_is_one_screen() -> None:
    text = README.read_text()
    assert len(text.splitlines()) < 150
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert all(len(table.splitlines()) - 2 <= 10 for table in tables)
    # a reader has no part in how kernels name their ways
    assert not re.findall(r"\b(plain|wide|packs?|units?)\b", text)


@functools.cache
def anchors(page: Any) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize(
    "page",
    [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *PAGES[1:]],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_links_within_the_repository_lead_somewhere(page: Any) -> None:
    """Sphinx holds the site's; these are those that GitHub shows."""
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]*)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        at = (page.parent / path).resolve() if path else page
        generated = (ROOT / "docs" / "gallery", ROOT / "docs" / "api" / "generated")
        if at.is_relative_to(generated[0]) or at.is_relative_to(generated[1]):
            continue
        assert at.exists(), target
        if anchor and at.suffix == ".md":
            assert anchor in anchors(at), target
