"""Scripts behind docs/benchmarks/: ratios, measured in one process run."""
