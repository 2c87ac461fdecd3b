"""mcsmoe: merge the experts of a Mixture-of-Experts model, compress what is left, and prove what was kept."""

__version__ = "0.1.0"
