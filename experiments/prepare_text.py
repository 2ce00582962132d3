"""Tokenises the text of a language model once, onto disk, for runs with ``task.source=tokens``.

python -m experiments.prepare_text --task=configs/tasks/language_model.py:1b --task.source=tfds \\
    --task.tfds_name=c4/en --data_dir=DATA --out=DATA/c4_tokens [--part=3/64]

python -m experiments.main --task=configs/tasks/language_model.py:1b --task.source=tokens \\
    --task.files="('c4_tokens',)" --data_dir=DATA ...

Each of the parts, 0/64 to 63/64, may be made on its own machine, at the same time; what is there
is not made again, what was cut off is. A document is in memory only while it is tokenised. A run
then reads its own training rows alone. Without --task.tokenizer_path a SentencePiece tokenizer is
trained first, on a hundred million characters at most, and written beside the parts; processes
that find one there take it.
"""

import json
import pathlib
import re

from absl import flags

from experiments import main as main_lib
from experiments.tasks.language_model import reading, stored, tokens

flags.DEFINE_string('out', None, 'Folder of the tokens.')
_PART = flags.DEFINE_string('part', '0/1', 'Which part is made, of how many.')


def _part(given: str) -> tuple[int, int]:
    found = re.fullmatch(r'(\d+)/(\d+)', given)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f'--part must be as 0/1 or 3/64, with 3 < 64, got {given!r}.')
    return int(found[1]), int(found[2])


def main(argv: list[str]) -> None:
    """Makes a part and prints how many tokens it has."""
    main_lib.refuse_arguments(argv)
    flag = flags.FLAGS
    with main_lib.clear_errors():
        index, count = _part(_PART.value)
        config = flag.task
        if config.name != 'language_model' or config.source == stored.SOURCE:
            raise ValueError(
                'a text is prepared of a language model, with task.source one of '
                f'{list(reading.SOURCES)}; got {config.name!r}, {config.get("source")!r}.'
            )
        documents = reading.of(config, flag.data_dir)
        folder = pathlib.Path(flag.out)
        text = reading.identity(config, flag.data_dir)
        how = config.tokenizer, config.vocab_size, config.tokenizer_path, documents.train
        tokenizer = tokens.make(*how, stored.kept(folder))
        # Another process may have been quicker, with another version of SentencePiece.
        tokenizer = tokens.make(*how, stored.publish(folder, tokenizer.model))
        made = stored.write(folder, text, documents, config.tokenizer, tokenizer, index, count)
    print(json.dumps(made))


if __name__ == '__main__':
    main_lib.run(main, 'task', 'out')
