"""ELECTRA is reproduced exactly: logits and gradients of a Hugging Face generator and discriminator that share embeddings.

The reference is frozen in golden/electra.npz, written by golden/make_electra_golden.py, so that no test needs torch.
"""

import functools

import jax
import numpy as np
import optax
from test_golden import PLAIN, golden, shapes_of

from mlm_jax.config import Config, ModelConfig, RtdConfig, ShardingConfig
from mlm_jax.interop.tensors import layout, to_params
from mlm_jax.objectives.rtd import ReplacedTokenDetection
from mlm_jax.objectives.scoring import score_targets
from mlm_jax.sharding import make_mesh


def objective() -> ReplacedTokenDetection:
    model = ModelConfig(
        vocab_size=72,
        num_layers=2,
        embed_dim=24,
        table_dim=16,
        num_heads=4,
        mlp_dim=40,
        max_positions=20,
        num_token_types=2,
        activation="gelu_erf",
    )
    rtd = RtdConfig(generator_size=0.5)
    return ReplacedTokenDetection(Config(name="electra", objective="rtd", model=model, rtd=rtd), PLAIN)


def tree_of(kind: str) -> dict:
    """Both networks' weights or gradients, the embeddings with the generator."""
    shapes = shapes_of(objective())

    def network(name: str, head: str) -> dict:
        tensors = layout("electra", head, tied=True).tensors
        return to_params(shapes[name], tensors, lambda theirs: golden("electra")[f"{name}/{kind}/{short(theirs)}"])

    return {"generator": network("generator", "masked"), "discriminator": network("discriminator", "detection")}


def short(theirs: str) -> str:
    return theirs.removeprefix("electra.")


@functools.cache
def result():
    """Our logits of both networks, their losses, and the gradient of ELECTRA's sum: NumPy arrays."""
    built = objective()
    tokens, types, labels = (golden("electra")[f"input/{key}"] for key in ("input_ids", "token_type_ids", "labels"))
    segment_ids = golden("electra")["input/attention_mask"]
    corrupted, replaced = np.where(labels >= 0, labels, tokens), labels >= 0

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params):
        def loss(params):
            generator = built.generator.bind(params["generator"])
            hidden = generator.encoder(tokens, segment_ids, None, types)
            first = generator.head(hidden, generator.encoder.embeddings.tokens_VD[...])
            nll = (score_targets(first, np.maximum(labels, 0))[0] * replaced).sum() / replaced.sum()
            discriminator = built.discriminator.bind(built.discriminator_params(params))
            second = discriminator.head(discriminator.encoder(corrupted, segment_ids, None, types))
            entropy = optax.sigmoid_binary_cross_entropy(second, replaced.astype(np.float32))
            detection = (entropy * segment_ids).sum() / segment_ids.sum()
            return nll + 50 * detection, (first, second, nll, detection)

        return jax.value_and_grad(loss, has_aux=True)(params)

    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        params = tree_of("weight")
        return jax.device_get(run(params))


def test_logits_and_losses():
    (_, (first, second, nll, detection)), _ = result()
    real = golden("electra")["input/attention_mask"] == 1
    # Float32 through two layers, in two orders of summation; the logits reach 4.
    np.testing.assert_allclose(first[real], golden("electra")["generator/logits"][real], atol=1e-4, rtol=0)
    np.testing.assert_allclose(second[real], golden("electra")["discriminator/logits"][real], atol=1e-4, rtol=0)
    np.testing.assert_allclose(nll, golden("electra")["generator/loss"], rtol=1e-5)
    np.testing.assert_allclose(detection, golden("electra")["discriminator/loss"], rtol=1e-5)


def test_gradients_of_the_sum():
    """Of every parameter; those of the shared embeddings have a part from either network."""
    _, grads = result()
    leaves, expected = jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(tree_of("gradient"))
    for (path, grad), other in zip(leaves, expected, strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(grad, other, atol=1e-4 * np.abs(other).max() + 1e-6, rtol=0, err_msg=name)
