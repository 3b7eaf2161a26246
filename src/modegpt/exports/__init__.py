"""Compressed and dense models for other engines."""
