"""Operators of our own dialect that passes bring in; those of normalisations stand beside them in `standard`."""
