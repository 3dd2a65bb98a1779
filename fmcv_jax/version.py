"""The version of the package, for what may not import the public API."""

__version__ = '0.1.0'
