"""Start an engine by the name of its backend."""

