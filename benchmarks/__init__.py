"""One module per table of the README: ``python -m benchmarks.<name>`` prints it and writes JSON below results/."""
