"""The registries on both sides hold the same names, and the public face is whole: signatures, docstrings, exports."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import vaefast
from vaefast import Parameterization, reference
from vaefast._options import PER_DRAW, REDUCTIONS

FUNCTIONS = [n for n in vaefast.__all__ if inspect.isroutine(getattr(vaefast, n))]
SHARED = [n for n in FUNCTIONS if hasattr(reference, n)]
KL_OPTIONS = (
    "free_bits=0.0 free_bits_per='dim' balance=None capacity=None symmetric=False prior_parameterization='logvar' "
    "kl_weight=None batch_dims=1 prior=None"
)
CONTRACT = {
    "reparameterize": "mu logvar * parameterization='logvar' eps=None generator=None noise=None num_samples=None "
    "temperature=1.0",
    "gaussian_kl": "mu logvar prior_mu=None prior_logvar=None * parameterization='logvar' reduction='batchmean' "
    + KL_OPTIONS.replace("kl_weight", "weight"),
    "kl_per_dim": "mu logvar prior_mu=None prior_logvar=None * parameterization='logvar' "
    "prior_parameterization='logvar'",
    "sample_with_kl": "mu logvar prior_mu=None prior_logvar=None * parameterization='logvar' reduction='batchmean' "
    "eps=None generator=None noise=None num_samples=None " + KL_OPTIONS + " estimator='analytic' temperature=1.0",
    "multi_tensor_gaussian_kl": "mus raws prior_mus=None prior_raws=None * parameterization='logvar' "
    "prior_parameterization=None "
    "reduction='batchmean' batch_dims=1",
    "multi_tensor_sample_with_kl": "mus raws prior_mu=0.0 prior_logvar=0.0 * parameterization='logvar' "
    "prior_parameterization='logvar' "
    "reduction='sum' generator=None batch_dims=1",
    "reconstruction_loss": "recon target * likelihood='bernoulli' reduction='batchmean' weight=None "
    "overwrite_recon=False batch_dims=1",
    "elbo_loss": "recon target mu logvar prior_mu=None prior_logvar=None * likelihood='bernoulli' beta=1.0 "
    "parameterization='logvar' reduction='batchmean' weight=None "
    + KL_OPTIONS
    + " preset=None process_group=None overwrite_recon=False",
    "elbo_terms": "recon target mu logvar prior_mu=None prior_logvar=None * likelihood='bernoulli' beta=1.0 "
    "parameterization='logvar' reduction='batchmean' weight=None "
    + KL_OPTIONS
    + " preset=None process_group=None overwrite_recon=False",
}


def shape_of(f: Any) -> str:
    """Names, kinds and defaults of a signature, without annotations."""
    parts, starred = [], False
    for p in inspect.signature(f).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        parts.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    return " ".join(parts)


@pytest.mark.parametrize(
    ("compiled", "python"),
    [
        ("likelihoods", reference.LIKELIHOODS),
        ("parameterizations", reference.PARAMETERIZATIONS),
        ("reductions", (*REDUCTIONS, PER_DRAW)),
    ],
    ids=["likelihoods", "parameterizations", "reductions"],
)
def test_compiled_and_python_registries_agree(extension: Any, compiled: str, python: Iterable[str]) -> None:
    found = getattr(extension, compiled)()
    # likelihoods have no numbers outside the extension
    assert sorted(found) == sorted(python) if compiled == "likelihoods" else list(found) == list(python)


def test_public_list_is_the_registry() -> None:
    assert vaefast.LIKELIHOODS == (*reference.LIKELIHOODS, *reference.COMPOSED)


def test_every_parameterization_can_be_named() -> None:
    for name in reference.PARAMETERIZATIONS:
        assert Parameterization(name).name == name


@pytest.mark.parametrize("name", list(reference.LIKELIHOODS))
def test_entries_are_well_formed(name: str) -> None:
    entry = reference.LIKELIHOODS[name]
    assert 1 <= entry.required <= len(entry.params)
    assert len(set(entry.params)) == len(entry.params)
    assert entry.support
    assert entry.formula


@pytest.mark.parametrize("name", list(CONTRACT))
def test_signatures_are_the_contract(name: str) -> None:
    assert shape_of(getattr(vaefast, name)) == CONTRACT[name]
    assert shape_of(getattr(reference, name)) == CONTRACT[name]


def test_reference_has_every_function_of_the_contract() -> None:
    assert sorted(SHARED) == sorted(CONTRACT)
    assert set(reference.__all__) >= set(CONTRACT)


@pytest.mark.parametrize("name", vaefast.__all__)
def test_exports_are_there_and_documented(name: str) -> None:
    thing = getattr(vaefast, name)
    if name == "LIKELIHOODS":
        return
    assert thing.__doc__
    if inspect.ismodule(thing) or name == "ELBOTerms":
        return
    assert "Example::" in thing.__doc__


@pytest.mark.parametrize("name", [*CONTRACT, "DiagonalGaussian", "ELBOLoss", "Parameterization", "use_backend"])
def test_docstrings_tell_arguments_and_errors(name: str) -> None:
    """Its own, or by naming the function that tells them."""
    doc = getattr(vaefast, name).__doc__
    if "those of :func:`elbo_terms`" in doc:
        doc += vaefast.elbo_terms.__doc__
    assert "Raises:" in doc
    documented = inspect.signature(getattr(vaefast, name)).parameters
    assert "Args:" in doc
    if name in CONTRACT:
        missing = [p for p in documented if p not in doc]
        assert not missing
        assert "Returns:" in doc


@pytest.mark.parametrize("name", vaefast.LIKELIHOODS)
def test_every_likelihood_is_in_the_documentation(name: str) -> None:
    assert f'"{name}"' in vaefast.reconstruction_loss.__doc__


@pytest.mark.parametrize("name", list(reference.PARAMETERIZATIONS))
def test_every_parameterization_is_in_the_documentation(name: str) -> None:
    assert f'"{name}"' in Parameterization.__doc__
    assert f'"{name}"' in vaefast.reparameterize.__doc__


def _stub() -> dict[str, ast.FunctionDef]:
    path = Path(vaefast.__file__).with_name("_C.pyi")
    return {f.name: f for f in ast.parse(path.read_text()).body if isinstance(f, ast.FunctionDef)}


# a schema's types as the stub writes them
TYPES = {"Tensor[]": "Sequence[Tensor]", "float[]": "Sequence[float]"}


def stub_type(schema: str) -> str:
    plain = schema.rstrip("?")
    return TYPES.get(plain, plain) + (" | None" if schema.endswith("?") else "")


def stub_type_of_pybind(told: str) -> str:
    floats = "typing.SupportsFloat | typing.SupportsIndex"
    return told.replace(floats, "float").replace("collections.abc.", "").replace("torch.", "")


def test_the_stub_names_every_entry_of_the_extension(extension: Any) -> None:
    assert sorted(_stub()) == sorted(name for name in dir(extension) if not name.startswith("_"))


@pytest.mark.parametrize("name", list(_stub()))
def test_the_stub_has_the_extensions_arguments(extension: Any, name: str) -> None:
    """Names, order and types from the operator's schema; how many, from what pybind11 tells. Of what is no operator,
    since an optimizer or another operator calls it, the types."""
    stated = [(a.arg, ast.unparse(a.annotation or ast.Constant(None))) for a in _stub()[name].args.posonlyargs]
    told = getattr(extension, name).__doc__.partition("(")[2].partition(") ->")[0]
    assert len(re.findall(r"arg\d+:", told)) == len(stated)
    if not hasattr(torch.ops.vaefast, name) and name != "elbo_loss":
        types = [stub_type_of_pybind(t) for t in re.findall(r"arg\d+: ([^,]+)", told)]
        assert [annotation for _, annotation in stated] == types
    elif stated:
        schema = getattr(torch.ops.vaefast, "elbo" if name == "elbo_loss" else name).default._schema
        types = [re.sub(r"^Optional\[(.*)\]$", r"\1?", str(a.type)) for a in schema.arguments]
        types = [re.sub(r"^List\[(.*)\]$", r"\1[]", t) for t in types]
        assert stated == [(a.name, stub_type(t)) for a, t in zip(schema.arguments, types)]
