"""Inference engines: one file a backend, all with the interface of `common.engines.base`."""
