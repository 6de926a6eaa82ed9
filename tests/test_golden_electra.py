"""ELECTRA is reproduced exactly: logits and gradients of a Hugging Face generator and discriminator that share embeddings.

The reference is frozen in golden/electra.npz, written by golden/make_electra_golden.py, so that no test needs torch.
"""

import functools

import jax
import numpy as np
import optax
from test_golden import PLAIN, encoder_of, golden, head_of

from mlm_jax.config import Config, ModelConfig, RtdConfig, ShardingConfig
from mlm_jax.objectives.rtd import ReplacedTokenDetection
from mlm_jax.objectives.scoring import score_targets
from mlm_jax.sharding import make_mesh

HEAD = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias")


def tree_of(kind: str) -> dict:
    """Both networks' weights or gradients, the embeddings with the generator."""

    def network(name: str, num_heads: int):
        def weight(short: str) -> np.ndarray:
            return golden("electra")[f"{name}/{kind}/{short}"]

        projection = {
            "projection_ED": weight("embeddings_project.weight").T,
            "projection_bias_D": weight("embeddings_project.bias"),
        }
        return weight, encoder_of(weight, num_heads) | projection

    weight, generator = network("generator", 2)
    params = {"generator": {"encoder": generator, "head": head_of(weight, *HEAD)}}
    weight, discriminator = network("discriminator", 4)
    del discriminator["embeddings"]
    head = {
        "transform_DD": weight("discriminator_predictions.dense.weight").T,
        "transform_bias_D": weight("discriminator_predictions.dense.bias"),
        "output_D1": weight("discriminator_predictions.dense_prediction.weight").T,
        "output_bias_1": weight("discriminator_predictions.dense_prediction.bias"),
    }
    return params | {"discriminator": {"encoder": discriminator, "head": head}}


@functools.cache
def result():
    """Our logits of both networks, their losses, and the gradient of ELECTRA's sum: NumPy arrays."""
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
    built = ReplacedTokenDetection(Config(name="electra", objective="rtd", model=model, rtd=rtd), PLAIN)
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
        shapes = jax.eval_shape(built.init, jax.random.key(0))
        assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
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
