"""The README's Python runs and prints what stands below it."""

import contextlib
import io
import pathlib
import re

README = pathlib.Path(__file__).parents[1] / 'README.md'


def test_python_blocks_print_the_text_blocks():
    blocks = re.findall(r'```(python|text)\n(.*?)```', README.read_text(), re.DOTALL)
    kinds, texts = zip(*blocks, strict=True)
    assert kinds == ('python', 'text') * 5
    names: dict = {}  # one program from block to block
    for code, expected in zip(texts[::2], texts[1::2], strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue().strip() == expected.strip()


def test_named_commands_and_configs_exist():
    text = README.read_text()
    root = README.parent
    for path in re.findall(r'configs/\w+/\w+\.py', text):
        assert (root / path).exists(), path
    for module in re.findall(r'python -m ([\w.]+)', text):
        assert (root / (module.replace('.', '/') + '.py')).exists(), module
    targets = re.findall(r'^([\w-]+):', (root / 'Makefile').read_text(), re.MULTILINE)
    assert set(re.findall(r'^make (\w+)', text, re.MULTILINE)) <= set(targets)
    for link in re.findall(r'\]\(([^)#:]+)\)', text):
        assert (root / link).exists(), link
