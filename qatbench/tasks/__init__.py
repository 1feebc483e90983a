"""Tasks: data set -> Question, the one prompt renderer and answer extractor per protocol."""
