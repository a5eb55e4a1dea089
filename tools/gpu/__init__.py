"""A few minutes on a GPU, used well: ``python -m tools.gpu`` (``make gpu``).

``machine`` finds what is there, ``plan`` says what runs, ``stages`` runs it under one clock, ``results`` makes one
document of the answers. What the stages run, beside tests and benchmarks: ``smoke`` (every kernel against float64),
``outcomes`` (a pytest plugin), ``hot`` (for ncu). ``prebuild.sh`` makes the extension on a machine without a GPU,
``ab`` compares several such builds.
"""
