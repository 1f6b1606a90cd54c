"""Arithmetic that several operators share: convolutions, moments, windows, reductions in a fixed order."""
