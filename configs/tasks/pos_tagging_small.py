"""A small tagger on a small treebank: UPOS of UD Ancient Greek PTNK."""

from ml_collections import config_dict

from configs.tasks import pos_tagging

_SPLITS = ('train', 'dev', 'test')


def get_config() -> config_dict.ConfigDict:
    config = pos_tagging.get_config()
    folder = 'universal_dependencies/UD_Ancient_Greek-PTNK'
    config.update(
        **{f'{split}_files': (f'{folder}/grc_ptnk-ud-{split}.conllu',) for split in _SPLITS},
        tags='upos',
        layers=2,
        width=64,
        heads=4,
        qkv=64,
        mlp=256,
        dropout=0.1,
        word_dropout=0.1,
        buckets=(16, 24, 32, 48, 80),
        batch_size=32,
        epochs=20,
        warmup_epochs=4,
    )
    return config
