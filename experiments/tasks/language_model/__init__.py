"""Language modelling: a decoder that says the next token of a text."""

import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import precond_optax
from experiments import mesh
from experiments.tasks import Task
from experiments.tasks.language_model import batches, loss, model, reading, stored, tokens

# The layers are stacked along their leaves' first axis. An entry of a head is an output of its
# kernel, and an input of the last one. Rows of the embedding and columns of the output are
# tokens, of which most have no gradient in a step, and tens of thousands of them.
LAYOUT = {
    '^(embedding|output)$': precond_optax.LeafRule(precondition=False),
    'attention/(query|key|value)$': precond_optax.LeafRule(batch_axes=1, merge_axes=((-2, -1),)),
    'attention/out$': precond_optax.LeafRule(batch_axes=1, merge_axes=((1, 2),)),
    '^layers/': precond_optax.LeafRule(batch_axes=1),
}

_TEXT = 'text.json'  # of a run's files: which rows it has, so that it goes on with the same
_LEAST = dict(
    layers=1, width=1, heads=1, kv_heads=1, mlp=1, vocab_size=1, length=1, batch_size=1, steps=1,
    accumulation=1, evaluate_batches=0, evaluate_every_steps=1,
)  # fmt: skip
_SIZES = (
    'layers', 'width', 'heads', 'kv_heads', 'mlp', 'vocab_size', 'tied', 'qk_norm', 'rotary_base',
    'attention', 'remat',
)  # fmt: skip
_DTYPES = ('float32', 'bfloat16')


def _check(config: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for fields that only this task has."""
    for name, low in _LEAST.items():
        value = config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f'task.{name} must be an integer >= {low}, got {value!r}.')
    if config['batch_size'] % config['accumulation']:
        raise ValueError(
            'task.batch_size must be a multiple of task.accumulation, got '
            f'{config["batch_size"]} and {config["accumulation"]}.'
        )
    width, heads, kv_heads = (config[name] for name in ('width', 'heads', 'kv_heads'))
    if width % (2 * heads) or heads % kv_heads:
        raise ValueError(
            'task.width must be an even multiple of task.heads, and task.heads a multiple of '
            f'task.kv_heads, got {width}, {heads} and {kv_heads}.'
        )
    if config['source'] == stored.SOURCE and not config['evaluate_batches']:
        raise ValueError(
            'task.evaluate_batches must be an integer >= 1 with source '
            f'{stored.SOURCE!r}: each process has the rows of an evaluation in memory; got 0.'
        )
    for name, allowed in dict(
        remat=list(model.REMAT),
        attention=list(model.ATTENTION),
        compute_dtype=list(_DTYPES),
        param_dtype=list(_DTYPES),
    ).items():
        if config[name] not in allowed:
            raise ValueError(f'task.{name} must be one of {allowed}, got {config[name]!r}.')
    if not config['rotary_base'] > 1:
        raise ValueError(f'task.rotary_base must be above 1, got {config["rotary_base"]!r}.')
    if not 0 <= config['z_loss'] < math.inf:
        raise ValueError(f'task.z_loss must be a number >= 0, got {config["z_loss"]!r}.')


def sizes(config: Mapping[str, Any], end: int | None = None) -> model.Sizes:
    """The network of a config; ``end`` is the tokenizer's, for ``mask_documents``."""
    return model.Sizes(
        **{name: config[name] for name in _SIZES},
        compute_dtype=jnp.dtype(config['compute_dtype']),
        param_dtype=jnp.dtype(config['param_dtype']),
        end=end if config['mask_documents'] else None,
    )


class Text(NamedTuple):
    """What is trained on and what is held out, as rows of tokens."""

    tokenizer: tokens.Tokenizer
    train: batches.Rows
    validation: batches.Rows
    about: Mapping[str, Any]  # which text it is


def _load(
    config: Mapping[str, Any], data_dir: str | None, workdir: str | pathlib.Path | None
) -> Text:
    kind, path = config['tokenizer'], config['tokenizer_path']
    file = None if workdir is None else pathlib.Path(workdir) / tokens.FILE
    kept = file.read_bytes() if file and file.exists() else b''
    if config['source'] == stored.SOURCE:
        held = stored.load(stored.folder(config['files'], data_dir), kind)
        tokenizer = tokens.make(kind, config['vocab_size'], path, (), kept or held.model)
        held.check(kind, tokenizer)
        streams: Mapping[str, Sequence[np.ndarray]] = held.streams
        about = dict(held.first.about)
    else:
        documents = reading.of(config, data_dir)
        tokenizer = tokens.make(kind, config['vocab_size'], path, documents.train, kept)
        streams = {
            split: [batches.pack(texts, tokenizer)] for split, texts in documents._asdict().items()
        }
        about = {f'{s} tokens': _digest(own[0]) for s, own in streams.items()}
    rows = {split: batches.Rows(own, config['length'], split) for split, own in streams.items()}
    return Text(tokenizer, **rows, about=about)


def _digest(stream: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(stream).data).hexdigest()


def _evaluation(
    config: Mapping[str, Any], logits: Callable[[Any, jax.Array], jax.Array], text: Text
) -> Callable[[Any, str], dict[str, jax.Array]]:
    """A function from parameters and a split to its metrics, one microbatch's logits at a time."""
    size, count, parts = (
        config[name] for name in ('batch_size', 'evaluate_batches', 'accumulation')
    )
    # As many of training, where 0 means all of the validation text.
    counts = {'validation': count, 'train': count or -(-len(text.validation) // size)}
    held = {
        split: batches.held(getattr(text, split), size // parts, number * parts)
        for split, number in counts.items()
    }
    num_bytes = text.tokenizer.num_bytes

    @jax.jit
    def summed(params: Any, batch: Any) -> dict[str, jax.Array]:
        told = logits(params, batch['inputs'])
        return loss.sums(told, batch['targets'], batch['weights'], jnp.asarray(num_bytes))

    @jax.jit
    def ratios(parts: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
        return loss.metrics(jax.tree.map(lambda *x: jnp.sum(jnp.stack(x)), *parts))

    def metrics(params: Any, split: str) -> dict[str, jax.Array]:
        found = ratios([summed(params, batch) for batch in held[split]])
        return {f'{split}_{name}': value for name, value in found.items()}

    return metrics


def make_task(
    config: Mapping[str, Any],
    data_dir: str | None,
    workdir: str | pathlib.Path | None = None,
) -> Task:
    """The task; see ``configs/tasks/language_model.py`` for the fields of ``config``.

    A run is given in steps, so it is one epoch of all of them, whatever passes over the text
    that makes. One that goes on has the tokenizer that its ``workdir`` holds.
    """
    _check(config)
    length, size, steps = config['length'], config['batch_size'], config['steps']

    def schedule(peak: float, anneal: bool = True) -> optax.Schedule:
        shape = (config['warmup_steps'], config['decay'], config['final_fraction'])
        return loss.warmup_then_decay(peak, steps, *shape, anneal)

    schedule(1.0)  # raises what is wrong with it
    text = _load(config, data_dir, workdir)
    index, count = mesh.reader(config)
    source = batches.Source(
        text.train, size, steps, config['seed'], shard_index=index, shard_count=count
    )
    own = sizes(config, text.tokenizer.end)
    logits = model.forward(own)
    metrics = _evaluation(config, logits, text)

    def batch_loss(params: Any, batch: Any) -> jax.Array:
        told = logits(params, batch['inputs'])
        return loss.training_loss(told, batch['targets'], config['z_loss'])

    def validate(params: Any) -> dict[str, jax.Array]:
        return metrics(params, 'validation')

    def evaluate(params: Any) -> dict[str, jax.Array]:
        return {'train_loss': metrics(params, 'train')['train_loss']} | validate(params)

    def describe(params: Any) -> dict[str, Any]:
        trained = steps * size * length
        return {
            'train_tokens': len(text.train) * length,
            'validation_tokens': len(text.validation) * length,
            'tokens_seen': trained,
            'passes': trained / (len(text.train) * length),
        }

    about = {**text.about, 'rows': {'train': len(text.train), 'validation': len(text.validation)}}
    artifacts = {_TEXT: (json.dumps(about, indent=2, sort_keys=True) + '\n').encode()}
    if text.tokenizer.model:
        artifacts[tokens.FILE] = text.tokenizer.model

    return Task(
        batch_size=size,
        epochs=1,
        init=lambda key: model.init(own, key),
        loss=batch_loss,
        schedule=schedule,
        evaluate=evaluate,
        stream=batches.stream(source, len(text.train), ahead=config['source'] == stored.SOURCE),
        validate=validate,
        describe=describe,
        layout=LAYOUT,
        logical_axes=model.logical_axes(own),
        tokens_per_step=size * length,
        flops_per_token=model.flops_per_token(own, length),
        artifacts=artifacts,
    )
