"""The built-in benchmark: a seeded generator that writes the ScienceQA layout."""
