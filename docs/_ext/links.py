"""Links that the pages need not write: a name of vaefast in code leads to its page, an example to the gallery's."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import vaefast

NAME = re.compile(r"^(?:vaefast\.)?(\w+(?:\.\w+)*)(?:\(.*\))?$", re.DOTALL)
MODULES = {"diagnostics", "distributed", "distributions", "integrations", "likelihoods", "presets", "schedules"}


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    if app.env.docname.startswith(("api/", "gallery/")):
        return
    for literal in list(doctree.findall(nodes.literal)):
        found = NAME.match(literal.astext())
        if found is None or isinstance(literal.parent, (nodes.reference, addnodes.pending_xref, nodes.title)):
            continue
        first = found[1].partition(".")[0]
        if first in vaefast.__all__ or (first in MODULES and literal.astext().startswith("vaefast.")):
            options = {"refdomain": "py", "reftype": "obj", "reftarget": f"vaefast.{found[1]}", "of_name": True}
            reference = addnodes.pending_xref("", refdoc=app.env.docname, refexplicit=True, **options)
            literal.replace_self(reference)
            reference += literal


def link_examples(app: Sphinx, doctree: nodes.document) -> None:
    for download in list(doctree.findall(addnodes.download_reference)):
        path = PurePosixPath(download["reftarget"])
        if path.parent.name == "examples" and path.suffix == ".py":
            options = {"refdomain": "std", "reftype": "doc", "reftarget": f"/gallery/{path.stem}", "refwarn": True}
            reference = addnodes.pending_xref("", refdoc=app.env.docname, refexplicit=True, **options)
            reference += [nodes.inline("", "", *download.children)]
            download.replace_self(reference)


def keep_code(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """What has no page stays code."""
    return contnode if node.get("of_name") else None


def setup(app: Sphinx) -> dict[str, Any]:
    # before what is nitpicky about references looks at them
    app.connect("doctree-read", link_names)
    app.connect("doctree-read", link_examples)
    app.connect("missing-reference", keep_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
