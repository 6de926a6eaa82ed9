"""FLOPs per token against hand counts and published tables, device peaks, and MFU."""

import dataclasses
import types

import jax
import pytest

from mlm_jax import config, flops
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_objective

BASE = config.ModelConfig(vocab_size=30522, num_layers=12, embed_dim=768, num_heads=12, mlp_dim=3072)
LARGE = config.ModelConfig(vocab_size=30522, num_layers=24, embed_dim=1024, num_heads=16, mlp_dim=4096)


def device(kind: str, platform: str = "gpu") -> jax.Device:
    return types.SimpleNamespace(device_kind=kind, platform=platform)  # the two attributes that are read


@pytest.mark.parametrize(
    ("model", "length", "millions"),
    [
        (BASE, 128, 518),
        (BASE, 512, 561),
        (BASE, 1024, 617),
        (LARGE, 128, 1831),
        (LARGE, 512, 1944),
        (LARGE, 1024, 2095),
    ],
)
def test_bert_costs_what_the_formula_says(model, length, millions):
    # Counted apart from the code: 6 · N · 12 D² (as F = 4 D), without 0.85 of the 9 D² behind the last layer's attention,
    # 12 · N · D · S, 6 · 0.15 · (D² + D V), in millions.
    assert round(flops.train_flops_per_token(model, length, 0.15) / 1e6) == millions


def test_a_tiny_model_by_hand():
    # A forward pass is 2 FLOPs a weight and token: 3·4·4 weights before and 2·2·3·4 for scores and mixing; for half of the
    # tokens the (4·4 + 2·4·8) weights behind and 4·4 + 4·10 of the head. The backward pass is twice the forward.
    model = config.ModelConfig(vocab_size=10, num_layers=1, embed_dim=4, num_heads=1, mlp_dim=8)
    forward = 2 * 48 + 2 * 2 * 3 * 4 + 0.5 * 2 * (80 + 56)
    assert flops.train_flops_per_token(model, 3.0, 0.5) == pytest.approx(3 * forward)


def test_two_networks_and_a_projection_by_hand():
    # Tables of 2 projected to 8 and to 4. Discriminator: 2·8 + (4·8·8 + 2·8·16) weights and a head of 8·8 + 8 for every
    # token. Generator: 2·4 + 3·4·4 weights, and (4·4 + 2·4·8) + 4·2 + 2·10 for half of the tokens. Scores and mixing 4·S·D.
    model = config.ModelConfig(vocab_size=10, num_layers=1, embed_dim=8, table_dim=2, num_heads=2, mlp_dim=16)
    cfg = config.Config(name="x", objective="rtd", model=model, rtd=config.RtdConfig(generator_size=0.5))
    objective = make_objective(cfg, Compute.resolve(cfg.compute))
    forward = 2 * (16 + 512 + 72) + 4 * 3 * 8 + 2 * (8 + 48) + 4 * 3 * 4 + 0.5 * 2 * (80 + 28)
    assert objective.flops_per_token(3.0, 0.5) == pytest.approx(3 * forward)


def test_what_needs_all_hidden_states_pays_for_all_of_the_last_layer():
    # 4·4·4 + 2·4·8 weights and 4·S·D for every token; a head of 4·4 + 4·10 for half of them. SpanBERT has two matrices of
    # 4·4 more for a half of these; an image its two patches for every three tokens, which attend to all five and are
    # embedded from 3·2·2 numbers.
    model = config.ModelConfig(vocab_size=10, num_layers=1, embed_dim=4, num_heads=1, mlp_dim=8)
    with_image = dataclasses.replace(model, image_size=2, patch_size=2)
    forward, head = 2 * 128 + 4 * 3 * 4, 0.5 * 2 * 56

    def found(objective, model=model):
        cfg = config.Config(name="x", objective=objective, model=model)
        return make_objective(cfg, Compute.resolve(cfg.compute)).flops_per_token(3.0, 0.5)

    assert found("hybrid") == pytest.approx(3 * (forward + head))
    assert found("span") == pytest.approx(3 * (forward + head + 0.25 * 2 * 2 * 16))
    patches = with_image.num_patches
    seeing_all = 2 * 128 + 4 * (3 + patches) * 4
    assert found("image_text", with_image) == pytest.approx(
        3 * (seeing_all + head + (seeing_all + 2 * 12 * 4) * patches / 3)
    )


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 920),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
    ],
)
def test_peaks_by_the_names_that_devices_give_themselves(kind, tera):
    assert flops.device_peak_flops(device(kind)) == tera * 1e12


def test_no_peak_is_guessed():
    assert flops.device_peak_flops(jax.devices()[0]) is None
    assert flops.device_peak_flops(device("NVIDIA H200 MIG 1g.18gb")) is None
    assert flops.device_peak_flops(device("a device of next year")) is None
    assert flops.mfu(1e6, 5e8, 1, jax.devices()[0]) is None


def test_mfu_counts_all_devices():
    # 1.6 million tokens/s of 588 MFLOP on eight v5e chips of 197 TFLOP/s.
    assert flops.mfu(1.6e6, 588e6, 8, device("TPU v5 lite", "tpu")) == pytest.approx(0.597, abs=1e-3)
