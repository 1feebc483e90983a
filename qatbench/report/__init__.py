"""Reports: a pure function of a Comparison."""
