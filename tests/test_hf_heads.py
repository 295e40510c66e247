"""LM heads of transformers models as the `linear_` losses take them, against the models' logits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'drift-gate[trl]'")

from support import tiny  # isort: skip  (before transformers: it keeps the hub offline)
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PhiConfig

from drift_gate import linear_token_log_probs
from drift_gate.integrations.teacher import HeadOptions, head_options, head_topk

SIZES = dict(
    vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "softcap": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "scale": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "divisor": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
    "bias": lambda: PhiConfig(**SIZES),
}


@pytest.fixture(params=CONFIGS)
def made(request):
    """A model, ids [2, 9], the hidden states of its head and the logits it makes of them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(std=1.0)  # far enough out for a cap of 2 to bend most logits
        if head.bias is not None:
            head.bias.normal_()
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        return model, ids, model.base_model(ids).last_hidden_state, model(ids).logits


def test_the_head_s_options_give_the_model_s_logits(made):
    model, ids, hidden, logits = made
    head = head_options(model, hidden.dtype)
    found, _ = linear_token_log_probs(hidden, labels=ids, temperature=0.8, **head._asdict())
    expected = (logits.double() / 0.8).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert head[1:] != (None, None, 1.0)  # or the model shows nothing


def test_the_likeliest_words(made):
    model, _, hidden, logits = made
    valid = torch.ones(2, 9)
    valid[0, 3:5] = 0
    ids, log_probs = head_topk(hidden, head_options(model, hidden.dtype), 5, valid, 0.8)
    expected, words = (logits.double() / 0.8).log_softmax(-1).topk(5)
    on = valid.bool()
    assert (ids[~on] == -1).all() and (log_probs[~on] == -torch.inf).all()
    assert torch.equal(ids[on], words[on])
    torch.testing.assert_close(log_probs[on].double(), expected[on], rtol=0, atol=1e-5)


def test_the_likeliest_words_chunk_by_chunk():
    """More valid rows than a chunk of the head holds, and a last chunk that is not full."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(300_000, 4), torch.randn(57, 4)
    head = HeadOptions(weight, None, None, 1.0)
    ids, log_probs = head_topk(hidden, head, 3, torch.ones(57))
    expected, words = (hidden.double() @ weight.double().T).log_softmax(-1).topk(3)
    assert torch.equal(ids, words)
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=3e-5)
    with pytest.raises(ValueError, match="k must be between 1 and V = 300000; got 0"):
        head_topk(hidden, head, 0, torch.ones(57))


def test_a_cap_of_scaled_logits_is_a_scale_of_capped_ones():
    """transformers caps what it has scaled; the losses scale what they have capped."""
    model = tiny.model(0)
    model.config.final_logit_softcapping, model.config.logit_scale = 2.0, 1.5
    head = head_options(model, torch.float32)
    hidden = torch.randn(40, 16)
    ids = torch.randint(0, 64, (40,))
    found, _ = linear_token_log_probs(hidden, labels=ids, **head._asdict())
    logits = 2 * torch.tanh(1.5 * (hidden @ head.weight.T).double() / 2)
    expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
