"""The same small model on XPOS, trained on the treebank of the paper's table."""

from ml_collections import config_dict

from configs.tables import pos_tagging_small
from configs.tasks import pos_tagging_small as small

_MODEL = ('layers', 'width', 'heads', 'qkv', 'mlp', 'dropout', 'word_dropout')


def get_config() -> config_dict.ConfigDict:
    config = pos_tagging_small.rows_of({})  # no row is searched yet
    task = small.get_config()
    config.task = 'pos_tagging'
    config.settings = {name: task[name] for name in _MODEL}
    config.settings.update(epochs=20, warmup_epochs=4)
    return config
