"""One module per table of docs/: ``python -m benchmarks.<name>`` prints it and writes JSON below results/."""
