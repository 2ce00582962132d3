"""The Python of README and docs runs and prints what stands below it; what they name exists."""

import contextlib
import io
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
pages = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


@pages
def test_python_blocks_print_the_text_blocks(page):
    blocks = re.findall(r'```(python|text)\n(.*?)```', page.read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ['python', 'text'] * (len(blocks) // 2)
    names: dict = {}  # one program from block to block
    for (_, code), (_, expected) in zip(blocks[::2], blocks[1::2], strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue().strip() == expected.strip()


def test_there_are_python_blocks():
    """The swap, layouts, plans of all kinds and a sharded state are shown by code that runs."""
    text = ''.join(page.read_text() for page in PAGES)
    assert text.count('```python\n') == 5


@pages
def test_named_commands_configs_and_links_exist(page):
    text = page.read_text()
    for path in re.findall(r'configs/\w+/\w+\.py', text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r'python -m ([\w.]+)', text):
        assert (ROOT / (module.replace('.', '/') + '.py')).exists(), module
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    assert set(re.findall(r'(?:^|`)make ([\w-]+)', text, re.MULTILINE)) <= set(targets)
    for link, anchor in re.findall(r'\]\(([^)#:]+)(?:#([^):]*))?\)', text):
        assert (page.parent / link).exists(), link
        if anchor:
            headings = re.findall('^#+ (.*)$', (page.parent / link).read_text(), re.MULTILINE)
            found = [re.sub(r'[^\w -]', '', heading.lower()) for heading in headings]
            assert anchor in [heading.replace(' ', '-') for heading in found], (link, anchor)
