"""The CPU kernels for ARM, cross-compiled, and run by an emulator beside those of this machine."""
