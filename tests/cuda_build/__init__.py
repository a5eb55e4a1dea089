"""Reads the machine code that a CUDA build holds: what the hardware will execute, judged where there is no GPU.

``make cuda-baseline`` (or ``python -m cuda_build --write``, with ``tests`` on the path) writes what it finds: registers
and shared memory of every kernel to ``baseline.json`` here, which the gates of ``test_cuda_build.py`` hold later builds
to, and the share of a copy's speed that each is predicted to reach to ``benchmarks/predictions.json``. Without
``--write`` it prints the same as tables. Run it after a change of the kernels, and commit the files with the change.
``--fit RESULTS`` prints the model's constants as what ``make gpu`` measured would have them.

``units`` compiles the kernels (``kernels.cu``, ``alone.cu``), ``binary`` takes a library or a cubin apart, ``sass``
parses a kernel, ``paths`` finds the shortest way round its hot loop, ``operations`` says what that way has to do, and
``gates`` what must hold of every kernel; ``model`` goes from there to a time on a GPU, and ``predictions`` writes it
down.
"""
