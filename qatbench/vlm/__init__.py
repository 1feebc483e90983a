"""Models: architecture facts, loading, batching, option scoring and generation."""
