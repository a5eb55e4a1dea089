"""``python -m tools.randomness``: the noise through a battery of tests of random numbers, and the draws made of it
against their distributions; see :mod:`tools.randomness.__main__`."""
