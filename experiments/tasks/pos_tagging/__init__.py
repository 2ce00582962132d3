"""Part-of-speech tagging: a Transformer encoder on sentences of a treebank."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import precond_optax
from experiments import mesh
from experiments.tasks import Task
from experiments.tasks.pos_tagging import batches, loss, model, reading, vocabulary

# An entry of a head is an output, and an input of the last kernel, as in the paper; rows of the
# embedding are words, which have nothing of a matrix.
LAYOUT = {
    '^embed/': precond_optax.LeafRule(precondition=False),
    'attention/(query|key|value)/': precond_optax.LeafRule(merge_axes=((-2, -1),)),
    'attention/out/': precond_optax.LeafRule(merge_axes=((0, 1),)),
}

SIZES = ('layers', 'width', 'heads', 'qkv', 'mlp')
_VOCABULARY = 'vocabulary.json'  # of a run's files
_WORST = 10  # pairs of tags in the table of confusions


def _check(config: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for fields that only this task has."""
    for name in (*SIZES, 'batch_size', 'min_count'):
        value = config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f'task.{name} must be an integer >= 1, got {value!r}.')
    if config['width'] % 2 or config['qkv'] % config['heads']:
        raise ValueError(
            'task.width must be even and task.qkv a multiple of task.heads, got '
            f'{config["width"]}, {config["qkv"]} and {config["heads"]}.'
        )
    for name in ('dropout', 'word_dropout'):
        if not 0 <= config[name] < 1:
            raise ValueError(f'task.{name} must be in [0, 1), got {config[name]!r}.')
    if config['dtype'] not in ('float32', 'bfloat16'):
        raise ValueError(f"task.dtype must be 'float32' or 'bfloat16', got {config['dtype']!r}.")
    buckets = config['buckets']
    if not buckets or any(not isinstance(n, int) for n in buckets) or min(buckets) < 1:
        raise ValueError(f'task.buckets must be integers >= 1, one at least, got {buckets!r}.')
    if list(buckets) != sorted(set(buckets)):
        raise ValueError(f'task.buckets must rise, got {buckets!r}.')


def _load(config: Mapping[str, Any], data_dir: str | None) -> reading.Splits:
    """The sentences, if the longest bucket holds them all."""
    files = tuple(tuple(config[f'{split}_files']) for split in reading.Splits._fields)
    splits = reading.load(config['source'], config['tags'], files, config['tfds_config'], data_dir)
    longest = max(len(s.words) for corpus in splits for s in corpus)
    if longest > config['buckets'][-1]:
        raise ValueError(
            f'task.buckets must reach the longest sentence, of {longest} words, got '
            f'{config["buckets"]!r}.'
        )
    if not 1 <= config['batch_size'] <= len(splits.train):
        raise ValueError(
            f'task.batch_size must be in [1, {len(splits.train)}] for these data, got '
            f'{config["batch_size"]}.'
        )
    return splits


def _kept(vocab: vocabulary.Vocabulary, splits: reading.Splits) -> bytes:
    """What each row of the embedding and each output stands for, and which sentences it is of."""
    sentences = hashlib.sha256(repr(splits).encode()).hexdigest()
    content = {'words from 2 on': vocab.words, 'tags': vocab.tags, 'sentences': sentences}
    return (json.dumps(content, ensure_ascii=False, indent=0) + '\n').encode()


def make_task(config: Mapping[str, Any], data_dir: str | None) -> Task:
    """The task; see ``configs/tasks/pos_tagging.py`` for the fields of ``config``."""
    _check(config)
    splits = _load(config, data_dir)
    vocab = vocabulary.build(splits.train, config['min_count'])
    encoded = {
        split: vocabulary.encode(corpus, vocab) for split, corpus in splits._asdict().items()
    }
    buckets, size, seed = tuple(config['buckets']), config['batch_size'], config['seed']
    index, count = mesh.reader(config)
    source = batches.Source(
        encoded['train'],
        buckets,
        size,
        config['epochs'],
        seed,
        shard_index=index,
        shard_count=count,
    )
    make = functools.partial(
        model.Tagger,
        vocab.num_words,
        len(vocab.tags),
        dropout=float(config['dropout']),
        dtype=jnp.dtype(config['dtype']),
        **{name: config[name] for name in SIZES},
    )
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(params=key)), nnx.Param))

    def logits(params: Any, words: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return nnx.merge(graphdef, params)(words, key)

    def batch_loss(params: Any, batch: Any) -> jax.Array:
        # What is dropped hangs on the seed and the step, so a resumed run drops the same.
        def key(stream: int) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), stream)
            key = jax.random.fold_in(key, batch['step'])
            return jax.random.fold_in(key, batch['microbatch']) if 'microbatch' in batch else key

        words = batch['words']
        if config['word_dropout']:
            words = model.drop_words(key(3), words, config['word_dropout'])
        return loss.mean_loss(logits(params, words, key(2)), batch['tags'])

    def schedule(peak: float, anneal: bool = True) -> optax.Schedule:
        return loss.warmup_then_inverse_root(
            peak, config['epochs'], config['warmup_epochs'], source.steps_per_epoch, anneal
        )

    plans = {split: batches.plan(own.lengths, buckets, size) for split, own in encoded.items()}
    held = {
        split: [batches.collate(encoded[split], rows, n, size) for n, rows in planned]
        for split, planned in plans.items()
    }

    # Each process has all of these batches. In a mesh the devices divide them, and whoever asks
    # for what is no scalar is given the whole.
    @jax.jit
    def counted(params: Any, words: jax.Array, tags: jax.Array) -> dict[str, jax.Array]:
        words, tags = (mesh.constrain(x, ('batch', 'length')) for x in (words, tags))
        return loss.counts(logits(params, words), words, tags)

    @jax.jit
    def ratios(counts: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
        return loss.ratios(jax.tree.map(lambda *parts: jnp.sum(jnp.stack(parts)), *counts))

    def metrics(params: Any, split: str) -> dict[str, jax.Array]:
        found = ratios([counted(params, **batch) for batch in held[split]])
        return {f'{split}_{name}': value for name, value in found.items()}

    def validate(params: Any) -> dict[str, jax.Array]:
        return metrics(params, 'dev') | metrics(params, 'test')

    def evaluate(params: Any) -> dict[str, jax.Array]:
        return {'train_loss': metrics(params, 'train')['train_loss']} | validate(params)

    @jax.jit
    def predict(params: Any, words: jax.Array) -> jax.Array:
        found = jnp.argmax(logits(params, mesh.constrain(words, ('batch', 'length'))), axis=-1)
        return mesh.constrain(found, (None, None))

    def answers(params: Any) -> Iterator[tuple[str, str]]:
        for batch, (_, rows) in zip(held['dev'], plans['dev'], strict=True):
            for row, told in zip(rows, np.asarray(predict(params, batch['words'])), strict=False):
                for tag, number in zip(splits.dev[row].tags, told, strict=False):
                    yield tag, vocab.tags[number]

    def describe(params: Any) -> dict[str, Any]:
        return {
            'dev_confusions': loss.confusions(answers(params), _WORST),
            'most_frequent_tag': {
                f'{split}_accuracy': vocabulary.most_frequent_tag_accuracy(splits.train, corpus)
                for split, corpus in (('dev', splits.dev), ('test', splits.test))
            },
            'padding_waste': batches.padding_waste(encoded['train'].lengths, buckets, size),
        }

    return Task(
        batch_size=size,
        epochs=config['epochs'],
        init=init,
        loss=batch_loss,
        schedule=schedule,
        evaluate=evaluate,
        stream=batches.stream(source, len(splits.train)),
        validate=validate,
        tracked='dev_accuracy',
        describe=describe,
        layout=LAYOUT,
        artifacts={_VOCABULARY: _kept(vocab, splits)},
    )
