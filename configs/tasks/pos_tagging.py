"""Part-of-speech tagging of Ancient Greek by a Transformer, as in the shared basis' paper."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        dict(
            name='pos_tagging',
            source='conllu',  # conllu: the files below; tfds; or synthetic
            train_files=('agdt_greek/agdt21_grc-train.conllu',),  # below --data_dir; one or more
            dev_files=(
                'universal_dependencies/UD_Ancient_Greek-Perseus/grc_perseus-ud-dev.conllu',
            ),
            test_files=(
                'universal_dependencies/UD_Ancient_Greek-Perseus/grc_perseus-ud-test.conllu',
            ),
            tfds_config='grc_perseus',  # of TFDS's universal_dependencies, for source tfds
            tags='xpos',  # or upos
            min_count=1,  # rarer words are unknown; with 1, as in the paper, none is in training
            layers=6,
            width=512,  # of the embedding and between the layers
            heads=8,
            qkv=512,  # width of queries, keys and values, all heads together
            mlp=2048,  # hidden units
            dropout=0.3,
            word_dropout=0.0,  # the part of the words that training takes for unknown
            dtype='float32',  # or bfloat16: of the arithmetic; the parameters are float32
            buckets=(8, 12, 16, 24, 32, 48, 80, 160),  # lengths that sentences are padded to
            batch_size=128,  # sentences
            epochs=200,
            warmup_epochs=40,  # linear by step; then the inverse square root of the step
            seed=0,  # of the parameters, of the shuffling and of the dropout
            log_every=config_dict.placeholder(int),  # steps between two log lines; None: an epoch
            checkpoint_every_epochs=5,  # a multiple of log_every steps, rounded up
            evaluate_every_epochs=1,  # on dev and test; likewise
            max_consecutive_errors=5,  # non-finite gradients skipped in a row
        )
    )
