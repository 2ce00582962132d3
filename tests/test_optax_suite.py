"""Optax's own test tables, run on our factories, with Adam as the control.

The modules ship in Optax's wheel. Each is executed with its table of optimizers replaced by the
rows of `tests/cases.py` just before its test classes are made; its checks are untouched.
"""

import ast
import functools
import pathlib
import types
from typing import Any

import optax
import pytest

from tests import cases


def rows(learning_rate: float, **columns: Any) -> tuple[dict[str, Any], ...]:
    """Our cases in the form of Optax's tables."""
    return tuple(
        {
            'opt_name': case.name,
            'opt_kwargs': {'learning_rate': learning_rate, **case.keywords},
            **columns,
        }
        for case in cases.TABLE
    )


def factory(name: str) -> Any:
    """A row's factory, with its static arguments at hand."""
    case = cases.BY_NAME[name]

    @functools.wraps(case.factory)
    def make(*args, **keywords):
        return case.factory(*args, **keywords)

    make.static_args = case.static_args
    return make


def inject_hyperparams(inner, static_args=(), **keywords):
    """Optax's, with the row's static arguments, as its own tests do by name for Optax's."""
    static = (*static_args, *inner.static_args)
    return optax.inject_hyperparams(inner, static_args=static, **keywords)


class _VersionsAreNew(ast.NodeTransformer):
    """Makes ``jax.__version__ < '0.7.2'`` false: as strings, '0.10.2' is less, and the tests of
    sharding are skipped.
    """

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        if ast.unparse(node.left) == 'jax.__version__':
            return ast.Constant(value=False)
        return node


def load(module: str, tables: dict[str, Any]) -> types.ModuleType:
    """Executes a module of Optax with the tables replaced before its first class."""
    root = pathlib.Path(optax.__file__).parent
    path = root / module
    tree = ast.parse(path.read_text(), str(path))
    first = next(i for i, node in enumerate(tree.body) if isinstance(node, ast.ClassDef))
    replace = ast.parse('globals().update(_replaced_tables)').body
    tree.body[first:first] = replace
    tree = ast.fix_missing_locations(_VersionsAreNew().visit(tree))
    loaded = types.ModuleType(f'optax_suite_{path.stem}')
    loaded.__file__ = str(path)
    loaded._replaced_tables = tables
    # Optax's modules set XLA_FLAGS when imported; the devices are conftest's.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XLA_FLAGS', '')
        exec(compile(tree, str(path), 'exec'), loaded.__dict__)
    return loaded


_injecting = types.SimpleNamespace(inject_hyperparams=inject_hyperparams)

unwrapped = {'wrapper_name': None, 'wrapper_kwargs': None}

_contrib = load(
    'contrib/_common_test.py',
    {
        '_ALL_OPTIMIZERS_UNDER_TEST': rows(1e-2, **unwrapped),
        '_MAIN_OPTIMIZERS_UNDER_TEST': rows(1e-2, **unwrapped),
        '_get_opt_factory': factory,
        '_inject': _injecting,
    },
)
_alias = load(
    '_src/alias_test.py',
    {
        '_OPTIMIZERS_UNDER_TEST': rows(1e-1),  # Adam's in that table
        '_get_opt': lambda self, name: factory(name),
        '_inject': _injecting,
    },
)
_sharding = load(
    '_src/sharding_test.py', {'OPTIMIZERS': {c.name: c.make(1.0) for c in cases.TABLE}}
)
_float64 = load(
    '_src/float64_test.py',
    {
        'ALL_MODULES': [
            (row['opt_name'], factory(row['opt_name']), row['opt_kwargs']) for row in rows(0.1)
        ]
    },
)


def over_the_table(suite: type, drop: tuple[str, ...] = ()) -> type:
    """The suite without the tests that do not run over the table.

    A row for real leaves only must refuse a complex one by its clear error: then that test is
    skipped, by any other error it fails.
    """

    def tolerant(method):
        @functools.wraps(method)
        def run(self):
            try:
                method(self)
            except ValueError as error:
                if 'must be of a real floating dtype of 16 bits or more' not in str(error):
                    raise
                self.skipTest('refuses complex leaves')

        return run

    methods = {
        name: None if name.startswith(drop) else tolerant(getattr(suite, name))
        for name in dir(suite)
        if name.startswith('test_')
    }
    return type(suite.__name__, (suite,), {**methods, '__module__': __name__})


ContribTest = over_the_table(_contrib.ContribTest)
AliasTest = over_the_table(_alias.AliasTest, ('test_explicit_dtype',))
ShardingTest = over_the_table(_sharding.ShardingTest, ('test_microbatch',))
Float64Test = over_the_table(_float64.Float64Test)


@pytest.mark.parametrize(
    ('suite', 'at_least'),
    [(ContribTest, 15), (AliasTest, 14), (ShardingTest, 3), (Float64Test, 1)],
    ids=lambda value: getattr(value, '__name__', ''),
)
def test_the_tables_were_replaced(suite, at_least):
    """Every row runs through every test of the suites, and nothing else does."""
    tests = [name for name in dir(suite) if name.startswith('test_') and getattr(suite, name)]
    assert len(tests) >= at_least * len(cases.TABLE)
