"""Real data: what is on every machine, packages of Debian, local files, and data sets of the Hub."""
