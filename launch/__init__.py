"""Starts a chapter's pipeline on one machine; also what tests and benchmarks start it with."""
