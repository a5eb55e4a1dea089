"""``python -m tools.sanitizers address|thread``: the compiled core under gcc's sanitizers; see
:mod:`tools.sanitizers.__main__`."""
