"""Benchmarks of hallucination, read and scored exactly as their official scripts do. Needs torch only."""
