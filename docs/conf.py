"""The site: Sphinx over these pages, the package's docstrings and the examples; ``make docs`` builds it in out/docs.

Nothing is downloaded and no kernel is needed: formulas become MathML, and examples run on whichever engine there is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

os.environ["TQDM_DISABLE"] = "1"  # no bars in the gallery

import gallery_of_examples  # noqa: E402

import vaefast  # noqa: E402

project = "vaefast"
author = "The vaefast developers"
copyright = f"2026, {author}"
version = release = vaefast.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "links",
    "mathml",
]
exclude_patterns = ["_ext", "_templates", "gallery/*.ipynb", "gallery/*.py", "gallery/*.md5", "gallery/*.json"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = "vaefast"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
napoleon_custom_sections = ["Shape"]
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "code"

# every reference is resolved, but those into torch and the libraries beside it, which are not fetched
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(torch|diffusers|pyro|scvi)(\..*)?")]

# a few epochs each: the pictures are those of the examples, a little less trained
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/(ppca_identity|(?!ddp)\w+_vae|bayesian_\w+)\.py",
    "ignore_pattern": r"common\.py",
    "within_subsection_order": "gallery_of_examples.Order",
    "image_scrapers": ("gallery_of_examples.pictures",),
    "reset_argv": "gallery_of_examples.arguments",
    "default_thumb_file": gallery_of_examples.thumbnail(),
    "reset_modules": (),
    "capture_repr": (),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "plot_gallery": "True",
    # with joblib, which scikit-learn brings
    "parallel": os.cpu_count(),
    "abort_on_example_error": True,
}
suppress_warnings = ["config.cache"]
