"""Beside a run, reading what it wrote."""
