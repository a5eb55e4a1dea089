"""The CUDA device code as the device of CPU tensors: a SIMT executor, how the package is built with it, and its tests.

``PYTHONPATH=tests python -m simt tests/simt`` in the repository runs pytest there, and any test file that asks for the
CPU's kernels may be named instead. A plain pytest does it through test_simt.py.
"""
