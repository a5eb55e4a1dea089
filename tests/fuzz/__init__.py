"""A differential fuzzer: random calls of the public functions, held against float64 formulas written anew.

``make fuzz MINUTES=5``, or ``PYTHONPATH=tests python -m fuzz``; see :mod:`fuzz.__main__`. ``cases.py`` says what a call
can be, ``values.py`` makes its tensors, ``calls.py`` calls; ``formulas.py`` has the mathematics, ``oracle.py`` what a
call must give and how near, and ``check.py`` holds the two against each other.
"""
