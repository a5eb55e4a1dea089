"""Unchanged programs through the kernels: a module for each library, with ``enable``, ``disable`` and ``enabled``.

``enable()`` imports the library and puts fused methods and functions in the place of its own, for the whole process;
what the kernels do not cover still goes to the library's. It returns the names of what is fused, and of what looks like
it and is left to the library. ``disable()`` restores exactly what was there. Both may be called again without harm, and
``with enabled():`` does the two around a block. Importing these modules touches nothing and imports no library.

What the library refuses is refused as it does, and what it takes is taken. Under ``torch.jit.trace`` PyTorch's
operators are recorded, which draw the numbers that the same call draws in eager.

``noise="philox"`` draws in the kernel and keeps 16 bytes; ``noise="torch"`` draws the numbers that the library would
have drawn, so that a seeded program gives its own results to rounding. By default draws are Philox's, but those of few
numbers on a CPU, where a kernel gains nothing over the library's own way: they take that.

Example::

    vaefast.integrations.pyro.enable()
    with vaefast.integrations.diffusers.enabled(noise="torch"):
        posterior = autoencoder.encode(images).latent_dist
"""

from . import diffusers, pyro, scvi, torch_distributions

__all__ = ["diffusers", "pyro", "scvi", "torch_distributions"]
