"""The compiler passes: each rewrites a model in one way and says what it requires and ensures."""
