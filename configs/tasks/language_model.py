"""A decoder-only language model in five sizes, `--task=configs/tasks/language_model.py:SIZE`.

All share their architecture; what a size has is in `SIZES`. Parameters, with the embedding:

  tiny    0.1M   bytes; tinyshakespeare: for tests and a first look on a CPU
  small   25M    from here on the novels
  base    124M
  large   342M
  1b      1.01B

No axis of a kernel is longer than 4096, up to which Shampoo and the shared basis precondition
without being asked; only the vocabulary's is.
"""

from typing import Any

from ml_collections import config_dict

_NOVELS = dict(source='text', files=('text/books/*.txt',), tokenizer='sentencepiece')

SIZES: dict[str, dict[str, Any]] = {
    'tiny': dict(
        layers=2,
        width=64,
        heads=4,
        kv_heads=4,
        mlp=192,
        vocab_size=384,  # of which bytes and the end of a document are 257
        tied=True,
        tokenizer='bytes',
        source='text',
        files=('text/tinyshakespeare.txt',),
        length=64,
        batch_size=8,
        steps=200,
        warmup_steps=20,
        log_every=10,
        checkpoint_every_steps=100,
        evaluate_every_steps=100,
    ),
    'small': dict(
        layers=6,
        width=512,
        heads=8,
        kv_heads=8,
        mlp=1536,
        vocab_size=8192,
        tied=True,
        **_NOVELS,
        length=256,
        batch_size=16,
        steps=2000,
        warmup_steps=200,
        log_every=20,
        checkpoint_every_steps=200,
        evaluate_every_steps=200,
    ),
    'base': dict(
        layers=12,
        width=768,
        heads=12,
        kv_heads=12,
        mlp=2560,
        vocab_size=32768,
        tied=True,
        **_NOVELS,
        length=1024,
        batch_size=64,
        steps=4000,
        warmup_steps=400,
        log_every=20,
        checkpoint_every_steps=500,
        evaluate_every_steps=200,
    ),
    'large': dict(
        layers=24,
        width=1024,
        heads=16,
        kv_heads=16,
        mlp=2816,
        vocab_size=32768,
        tied=True,
        remat='dots',
        **_NOVELS,
        length=2048,
        batch_size=128,
        steps=10_000,
        warmup_steps=1000,
        log_every=20,
        checkpoint_every_steps=500,
        evaluate_every_steps=500,
    ),
    '1b': dict(
        layers=32,
        width=1536,
        heads=12,  # of 128; so the tensor axis has 1, 2 or 4
        kv_heads=12,
        mlp=4096,
        vocab_size=32768,
        tied=False,
        remat='full',
        **_NOVELS,
        length=2048,
        batch_size=256,
        steps=20_000,
        warmup_steps=2000,
        log_every=20,
        checkpoint_every_steps=500,
        evaluate_every_steps=500,
    ),
}


def get_config(size: str = 'tiny') -> config_dict.ConfigDict:
    """The config of a size.

    Raises:
      ValueError: if there is no such size.

    Example:
      >>> get_config('1b').layers
      32
    """
    if size not in SIZES:
        raise ValueError(f'the sizes of the language model are {list(SIZES)}, got {size!r}.')
    config = dict(
        name='language_model',
        # Data.
        # text: the files below; tfds; tokens: of either, as experiments/prepare_text.py has
        # written them; or synthetic.
        source='text',
        # Below --data_dir: files, folders of *.txt, or patterns; of tokens, their folder.
        files=('text/books/*.txt',),
        # Of each file, its end; of more than 1 / 0.02 files, whole ones. Likewise of TFDS's
        # documents where it has one split.
        validation_fraction=0.02,
        tfds_name='tiny_shakespeare',  # or c4/en, lm1b, ...: its builder and config
        tfds_splits=('train', 'validation'),  # lm1b has 'test'; 'train[:1%]' is a part
        tokenizer='bytes',  # or sentencepiece
        tokenizer_path='',  # of a SentencePiece model; '': one is trained on the training text
        length=64,  # tokens in a row
        # Network; the size's own.
        tied=True,  # the output is the embedding
        qk_norm=True,  # RMSNorm of queries and keys
        mask_documents=False,  # no attention across the ends of documents
        rotary_base=10_000.0,
        attention='auto',  # xla; cudnn; auto: cudnn where it is there and can, else xla
        remat='none',  # full: nothing of a layer is kept; dots: its products with parameters
        compute_dtype='bfloat16',
        param_dtype='float32',  # the master weights
        # Training.
        batch_size=8,  # rows of a step, on all devices and in all accumulated parts
        accumulation=1,  # parts of a batch, one after the other, in evaluations too
        steps=200,
        warmup_steps=20,  # linear
        decay='cosine',  # or linear, or constant; after the warm-up
        final_fraction=0.1,  # of the peak learning rate, in the last step
        z_loss=0.0,  # times the mean squared logarithm of the softmax' denominator; 1e-4, say
        seed=0,  # of the parameters and of the order of the rows
        mesh=dict(data=1, fsdp=-1, tensor=1),  # -1: what is left of the devices
        log_every=10,  # steps between two log lines
        checkpoint_every_steps=100,  # a multiple of log_every, rounded up
        evaluate_every_steps=100,  # likewise
        log_grad_norm=True,  # costs a pass over the gradients
        max_to_keep=1,  # checkpoints
        evaluate_batches=16,  # of validation and of training text, evenly apart; 0: all
        max_consecutive_errors=5,  # non-finite gradients skipped in a row
    )
    config.update(SIZES[size])
    return config_dict.ConfigDict(config)
