"""The console: lines of a file or a pipe are not folded."""

from rich.table import Table

from fmcv_jax.console import make_console


def test_a_long_line_and_a_wide_table_are_whole_in_a_pipe(capsys):
  console = make_console()
  line = 'word ' * 60 + '/a/path/' + 'x' * 200
  console.print(line, highlight=False)
  table = Table('name', 'value')
  table.add_row('y' * 150, 'z' * 50)
  console.print(table)
  printed = capsys.readouterr().out.splitlines()
  assert printed[0] == line
  assert any('y' * 150 in row and 'z' * 50 in row for row in printed)
  make_console(stderr=True).print(line, highlight=False)
  assert capsys.readouterr().err.splitlines() == [line]
