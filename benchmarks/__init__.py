"""Measurements, one file a question; never imported by product code."""
