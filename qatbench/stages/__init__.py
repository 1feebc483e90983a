"""Stages: each reads one artifact and writes the next."""
