"""mkdocs hook: pages that are generated from the package at every build.

The command line reference comes from the argparse parser, the reference of config fields from the constructors that a
config may name, the API reference from one page per module, and the notebooks from their executed cells.
"""

import argparse
import dataclasses
import html
import inspect
import pathlib
import re
import sys
import types
import typing

import nbconvert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'fmcv_jax'
sys.path.insert(0, str(ROOT))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Appends the API reference to the navigation."""
  config.nav.append({'API': api_navigation()})
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  pages: dict[str, str | bytes] = {
    'reference/command_line.md': command_line(),
    'reference/config_fields.md': config_fields(),
    'index.md': repository_page('README.md'),
    'contributing.md': repository_page('CONTRIBUTING.md'),
    'changelog.md': repository_page('CHANGELOG.md'),
    **{api_page(module): api_source(module) for module in public_modules()},
  }
  for notebook in sorted((ROOT / 'docs/notebooks').glob('*.ipynb')):
    pages |= notebook_pages(notebook)
    files.remove(files.get_file_from_path(f'notebooks/{notebook.name}'))
  for uri, content in pages.items():
    files.append(File.generated(config, uri, content=content))
  return files


def repository_page(name: str) -> str:
  """A file of the repository's root, whose links are relative to the root, as a page of the site."""
  text = (ROOT / name).read_text().replace('](docs/', '](')
  for file, page in {'CONTRIBUTING.md': 'contributing.md', 'notebooks': 'notebooks/pretrain.md'}.items():
    text = text.replace(f']({file})', f']({page})')
  return text


# --- API


def public_modules() -> list[str]:
  """Dotted names of all modules, packages without a docstring of their own left out."""
  found = []
  for file in sorted(PACKAGE.rglob('*.py')):
    parts = file.relative_to(ROOT).with_suffix('').parts
    if any(part.startswith('_') and part != '__init__' for part in parts):
      continue
    if parts[-1] == '__init__':
      if not file.read_text().strip():
        continue
      parts = parts[:-1]
    found.append('.'.join(parts))
  return found


def api_page(module: str) -> str:
  parts = module.split('.')
  return 'api/' + ('/'.join(parts[1:]) or 'fmcv_jax') + '.md'


def api_source(module: str) -> str:
  options = '' if module != 'fmcv_jax' else '\n    options:\n      members: [load]'
  return f'---\ntitle: {module.rpartition(".")[2]}\n---\n\n# {module}\n\n::: {module}{options}\n'


def api_navigation() -> list:
  """The modules as nested sections that follow the folders of the package."""

  def section(tree: dict) -> list:
    return [
      item for name, value in tree.items() for item in ([value] if isinstance(value, str) else [{name: section(value)}])
    ]

  tree: dict = {}
  for module in public_modules():
    *folders, name = module.split('.')[1:] or ['fmcv_jax']
    here = tree
    for folder in folders:
      here = here.setdefault(folder, {})
      if isinstance(here, str):
        raise ValueError(f'{module}: {folder} is both a module and a package')
    if (PACKAGE.joinpath(*folders, name)).is_dir():  # a package with a docstring: the first page of its section
      here = here.setdefault(name, {})
    here[f'{name}.'] = api_page(module)
  return section(tree)


# --- command line


def command_line() -> str:
  """One section per command: its summary and a table of its arguments."""
  from fmcv_jax import __main__

  top = __main__.parser()
  commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
  rows = '\n'.join(f'| [`{name}`](#fmcv-{name}) | {cell(sub.description)} |' for name, sub in commands.choices.items())
  sections = '\n\n'.join(command(name, sub) for name, sub in commands.choices.items())
  return (
    '# Command line\n\n`fmcv COMMAND ...` and `python -m fmcv_jax COMMAND ...` are the same program. '
    'Exit status: 0 success, 2 user error (one line on stderr), 75 stopped and saved (run the command again to '
    f'resume), 130 interrupted.\n\n| command | |\n| --- | --- |\n{rows}\n\n{sections}\n'
  )


def command(name: str, parser: argparse.ArgumentParser) -> str:
  formatter = argparse.HelpFormatter(parser.prog, width=100)
  formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix='')
  rows = [argument(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
  table = '\n'.join(['| argument | |', '| --- | --- |', *rows])
  parts = [f'## fmcv {name}', parser.description, f'```\n{formatter.format_help().strip()}\n```', table, parser.epilog]
  return '\n\n'.join(part for part in parts if part)


def argument(action: argparse.Action) -> str:
  """The row of one argument: how it is given; its help, choices and default."""
  metavar = action.metavar or action.dest.upper()
  if not action.option_strings:
    given = f'`{metavar}`'
  else:
    given = ', '.join(f'`{flag}`' if action.nargs == 0 else f'`{flag} {metavar}`' for flag in action.option_strings)
  text = [action.help or '']
  if action.choices:
    text.append('One of ' + ', '.join(f'`{choice}`' for choice in action.choices) + '.')
  if action.required and action.option_strings:
    text.append('**Required.**')
  elif action.default not in (None, False, '', []) and 'default' not in text[0]:
    text.append(f'(default: `{action.default}`)')
  return f'| {given} | {cell(" ".join(text))} |'


# --- config fields


def config_fields() -> str:
  """One section per kind of constructor that a config may name, and the root of every config first."""
  from fmcv_jax import config as config_lib
  from fmcv_jax.experiment import Experiment
  from fmcv_jax.registry import KINDS

  parts = [
    '# Config fields',
    'A config is a tree of constructors, and their signatures are its schema: this page is generated from them. The '
    'path of a field is what `--config.PATH=VALUE` takes. A `name` may also be `package.module:attribute`, for code '
    'outside of fmcv_jax. Types such as `PositiveInt` and `Fraction` are the ranges of `fmcv_jax.bounds`.',
    constructor('Experiment', 'The root of every config.', Experiment, config_lib),
  ]
  for field in dataclasses.fields(Experiment):
    hint = typing.get_type_hints(Experiment)[field.name]
    for nested in (hint, *typing.get_args(hint)):
      if dataclasses.is_dataclass(nested) and nested not in KINDS:
        parts.append(constructor(f'config.{field.name}', summary(nested), nested, config_lib))
  for kind, table in KINDS.items():
    parts.append(f'## {kind.__name__}\n\n{len(table)} names.')
    parts += [
      constructor(f"name: '{name}'", summary(made), made, config_lib, level=3) for name, made in sorted(table.items())
    ]
  return '\n\n'.join(parts) + '\n'


def constructor(title: str, text: str, made, config_lib, *, level: int = 2) -> str:
  """A section: the summary of a constructor, the link to its page, and the table of its fields."""
  where = f'{made.__module__}.{made.__qualname__}'
  link = f'[`{where}`][{where}]' if inspect.getdoc(made) else f'`{where}`'
  rows = ['| field | type | default |', '| --- | --- | --- |']
  for name, (annotation, default) in config_lib._parameters(made).items():
    value = 'required' if default is inspect.Parameter.empty else default_text(default)
    rows.append(f'| `{name}` | {code(annotation_text(annotation))} | {value} |')
  return '\n\n'.join([f'{"#" * level} {title}', f'{text} {link}', '\n'.join(rows) if rows[2:] else 'No fields.'])


def summary(made) -> str:
  """The first sentence of a constructor's docstring."""
  text = inspect.getdoc(made) or ''
  if dataclasses.is_dataclass(made) and text.startswith(f'{made.__name__}('):  # the signature that dataclasses write
    text = ''
  return ' '.join(text.split('\n\n')[0].split())


def annotation_text(annotation) -> str:
  """A type as people write it: bare names, | for unions, and the named ranges of fmcv_jax.bounds by their names."""
  from fmcv_jax import bounds

  ranges = {value: name for name, value in vars(bounds).items() if typing.get_origin(value) is typing.Annotated}
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Annotated:
    return ranges.get(annotation, annotation_text(args[0]))
  if origin in (typing.Union, types.UnionType):
    return ' | '.join(map(annotation_text, args))
  if origin is typing.Literal:
    return ' | '.join(map(repr, args))
  if annotation is types.NoneType or annotation is Ellipsis:
    return 'None' if annotation is types.NoneType else '...'
  name = getattr(origin or annotation, '__name__', str(annotation))
  return f'{name}[{", ".join(map(annotation_text, args))}]' if args else name


def default_text(default) -> str:
  if dataclasses.is_dataclass(default):
    return f'`{type(default).__name__}`'
  text = repr(default)
  return code(text) if len(text) < 60 else '(see its page)'


def cell(text: str) -> str:
  """Text that stays within its cell of a table."""
  return text.replace('|', '&#124;').replace('\n', ' ')


def code(text: str) -> str:
  """Code in a cell of a table, where Markdown would read a vertical bar as the end of the cell."""
  return f'<code>{cell(html.escape(text))}</code>'


# --- notebooks


def notebook_pages(path: pathlib.Path) -> dict[str, str | bytes]:
  """The Markdown of an executed notebook and its images, by their place in docs/."""
  exporter = nbconvert.MarkdownExporter()
  exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
  body, resources = exporter.from_filename(str(path))
  folder = f'notebooks/{path.stem}_files'
  outputs = {pathlib.PurePath(name).name: data for name, data in resources['outputs'].items()}
  for name in outputs:
    body = body.replace(f']({name})', f']({path.stem}_files/{name})')
  body = re.sub(r'\x1b\[[0-9;]*m', '', body)  # colors of a terminal
  head, rest = body.split('\n', 1)
  source = f'\n\nThis page is the executed notebook `docs/notebooks/{path.name}`.\n'
  return {f'notebooks/{path.stem}.md': head + source + rest} | {
    f'{folder}/{name}': data for name, data in outputs.items()
  }
