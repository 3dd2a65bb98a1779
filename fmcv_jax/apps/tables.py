"""Tables in the terminal."""

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
  """Prints a table; in a file or a pipe, lines are not folded."""
  console = Console(markup=False)
  if not console.is_terminal:
    console.width = 1000
  console.print(table)
