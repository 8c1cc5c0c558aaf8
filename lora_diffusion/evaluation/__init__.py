"""How good a candidate is: harness, sampling, statistics, selection, gates, suites."""
