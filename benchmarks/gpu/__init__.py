"""Everything that needs a GPU, by one command: ``bash benchmarks/gpu.sh``; ``benchmarks/README.md`` describes it.

Data flows one way: :mod:`steps` hold cases, a :mod:`worker` process runs those it is told to, the :mod:`pool` of the
parent process tells it and enforces the limits, :mod:`results` keeps what comes back, :mod:`summary` prints it. The
parent needs nothing but Python: what fails to import fails in a worker, and is reported.
"""
