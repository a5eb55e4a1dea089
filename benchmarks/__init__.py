"""Benchmarks of vaefast: one harness over a registry of workloads and a registry of providers. README.md tells more."""
