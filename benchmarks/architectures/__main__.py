"""``python -m benchmarks.architectures``: see :mod:`benchmarks.architectures.command`."""

from benchmarks.architectures.command import main

if __name__ == "__main__":
    main()
