"""Routing policies, one a file. Each is a function from a `Snapshot` to scores."""
