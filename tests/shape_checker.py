"""The checker of annotations while tests run: beartype, for which an int is a float, as for Python's type checkers."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
