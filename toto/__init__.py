"""The plain library of toto: no Prefect here; one module a tool or idea."""

__version__ = "0.1.0"
