"""LM heads of transformers models as the `linear_` losses take them, against the models' logits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'drift-gate[trl]'")

from torch.distributed.fsdp import fully_shard

from support import tiny  # isort: skip  (before transformers: it keeps the hub offline)
from transformers import (
    AutoModelForCausalLM,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GraniteConfig,
    HyperCLOVAXConfig,
    PhiConfig,
    Qwen2ForCausalLM,
    RecurrentGemmaConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from drift_gate import linear_token_log_probs, linear_top_k_log_probs
from drift_gate.integrations.teacher import head_of

SIZES = dict(
    vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "softcap": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "scale": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "divisor": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
    "bias": lambda: PhiConfig(**SIZES),
    "multiplier": lambda: HyperCLOVAXConfig(**SIZES, logits_scaling=3.0),
    "head multiplier": lambda: FalconH1Config(
        **SIZES, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16,
        mamba_d_state=8,
    ),
    "another name": lambda: RecurrentGemmaConfig(
        **SIZES, logits_soft_cap=2.0, lru_width=16, block_types=["attention"]
    ),
}  # fmt: skip


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


def test_the_head_gives_the_model_s_logits(made):
    model, ids, hidden, logits = made
    head = head_of(model, hidden.dtype)
    found, _ = linear_token_log_probs(hidden, head, ids, temperature=0.8)
    expected = (logits.double() / 0.8).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert (head.bias, head.softcap, head.logit_scale) != (
        None,
        None,
        1.0,
    )  # or the model shows nothing


def test_the_likeliest_words(made):
    model, _, hidden, logits = made
    valid = torch.ones(2, 9)
    valid[0, 3:5] = 0
    ids, log_probs = linear_top_k_log_probs(
        hidden, head_of(model, hidden.dtype), 5, temperature=0.8, response_mask=valid
    )
    expected, words = (logits.double() / 0.8).log_softmax(-1).topk(5)
    on = valid.bool()
    assert (ids[~on] == -1).all() and (log_probs[~on] == -torch.inf).all()
    assert torch.equal(ids[on], words[on])
    torch.testing.assert_close(log_probs[on].double(), expected[on], rtol=0, atol=1e-5)


def test_the_likeliest_words_chunk_by_chunk():
    """More rows than a chunk of the head holds, and a last chunk that is not full."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(300_000, 4), torch.randn(57, 4)
    ids, log_probs = linear_top_k_log_probs(hidden, weight, 3)
    expected, words = (hidden.double() @ weight.double().T).log_softmax(-1).topk(3)
    assert torch.equal(ids, words)
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=3e-5)


class Finished(Qwen2ForCausalLM):
    """Does something to the logits of its head."""

    finish = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.finish(out.logits)
        return out


def finished(finish, **config):
    model = tiny.model(0)
    model.__class__ = Finished
    model.finish = finish
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def log_probs_of(model, hidden, ids):
    """By the model's own forward, float64 [N]."""
    decoder, before = model.base_model, model.base_model.forward
    decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden[None])
    try:
        logits = model(ids[None]).logits[0]
    finally:
        decoder.forward = before
    return logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def drawn():
    """Hidden states [40, 16] and labels [40]."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(40, 16, generator=generator)
    return hidden, torch.randint(0, 64, (40,), generator=generator)


def test_a_cap_of_scaled_logits_is_a_scale_of_capped_ones():
    """transformers caps what it has scaled; the losses scale what they have capped."""
    model = finished(
        lambda z: 2 * torch.tanh(1.5 * z / 2), final_logit_softcapping=2.0, logit_scale=1.5
    )
    hidden, ids = drawn()
    found, _ = linear_token_log_probs(hidden, head_of(model, torch.float32), ids)
    torch.testing.assert_close(found.double(), log_probs_of(model, hidden, ids), rtol=0, atol=1e-5)


def test_what_a_config_names_and_the_model_does_not_do_is_left_out():
    """A wrapper of a text model need not cap as the text model alone does."""
    model = tiny.model(0)
    model.config.final_logit_softcapping, model.config.logit_scale = 2.0, 1.5
    head = head_of(model, torch.float32)
    assert (head.softcap, head.logit_scale) == (None, 1.0)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    text = dict(**SIZES, head_dim=8, final_logit_softcapping=2.0)
    wrapper = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    assert head_of(wrapper, torch.float32).softcap is None


@pytest.mark.parametrize(
    "finish",
    [
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: 1.1 * z,
        lambda z: z.index_fill(-1, torch.tensor([7]), -torch.inf),
        lambda z: z[..., :-1],
    ],
    ids=["softcap", "scale", "mask", "fewer words"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_the_head_does_not_make_are_refused(finish, dtype):
    model = finished(finish).to(dtype)
    both = r"Finished does not make the logits of its head, Linear \[64, 16\] with softcap None"
    with pytest.raises(ValueError, match=both):
        head_of(model, dtype)


def test_a_mask_of_words_is_refused():
    """Chameleon never says an image's tokens."""
    image = {f"IMGIMG{name}Z": 6 + i for i, name in enumerate("ABCD")}
    vq = dict(
        embed_dim=8, num_embeddings=4, latent_channels=8, base_channels=32, channel_multiplier=[1],
        resolution=16,
    )  # fmt: skip
    config = ChameleonConfig(**SIZES, vq_config=vq, vocabulary_map={"<image>": 5, **image})
    with pytest.raises(ValueError, match="for word 6 it has -3.4028e"):
        head_of(ChameleonForConditionalGeneration(config), torch.float32)


class Gained(torch.nn.Linear):
    """A head with a parameter that does nothing yet."""

    def __init__(self, of):
        super().__init__(of.in_features, of.out_features, bias=False)
        self.weight, self.gain = of.weight, torch.nn.Parameter(torch.ones(of.out_features))

    def forward(self, x):
        return super().forward(x) * self.gain


@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_a_parameter_that_would_get_no_gradient_is_refused(frozen):
    """Before it has moved its logits are right."""
    model = tiny.model(0)
    model.lm_head = Gained(model.lm_head).requires_grad_(not frozen)
    if frozen:
        assert torch.equal(head_of(model, torch.float32).weight, model.lm_head.weight)
        return
    with pytest.raises(ValueError, match="Qwen2ForCausalLM trains gain of its head, Gained"):
        head_of(model, torch.float32)


def test_a_model_is_asked_once_and_left_as_it_was():
    calls = []
    model = finished(lambda z: calls.append(len(z)) or z)
    before = dict(vars(model.model))
    heads = [head_of(model, torch.float32) for _ in range(3)]
    assert len(calls) == 1 and all(head.weight is model.lm_head.weight for head in heads)
    assert vars(model.model) == before


def test_a_decoder_that_is_not_called_is_refused():
    model = tiny.model(0)
    model.model = torch.nn.ModuleDict()  # which is called by nobody
    model.forward = lambda **_: BaseModelOutputWithPast(last_hidden_state=torch.zeros(1, 3, 16))
    model.get_input_embeddings = lambda: model.lm_head
    with pytest.raises(ValueError, match="Qwen2ForCausalLM does not tell its logits"):
        head_of(model, torch.float32)


# Adapters of PEFT.


def adapted(**options):
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'drift-gate[dev]'")
    torch.manual_seed(5)
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"]} | options
    model = peft.get_peft_model(tiny.model(0), peft.LoraConfig(**options))
    return model, model.get_output_embeddings()


def test_an_adapter_of_the_head_is_part_of_its_weight():
    model, head = adapted()
    hidden, ids = drawn()
    names = ("lora_A", "lora_B")
    parameters = [getattr(head, name)["default"].weight for name in names]
    for step in range(2):  # B is 0 at first
        found, _ = linear_token_log_probs(hidden, head_of(model, torch.float32), ids)
        expected = log_probs_of(model.get_base_model(), hidden, ids)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
        for x, y in zip(
            torch.autograd.grad(found.sum(), parameters),
            torch.autograd.grad(expected.sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
            assert step == 0 or x.abs().max() > 0
        with torch.no_grad():
            parameters[1].normal_()
    with model.disable_adapter():
        base = head_of(model, torch.float32).weight.clone()
    assert torch.equal(base, head.base_layer.weight)
    assert (head_of(model, torch.float32).weight - base).abs().max() > 1
    model.merge_adapter()
    merged = head_of(model, torch.float32).weight
    assert torch.equal(merged, head.base_layer.weight) and not torch.equal(merged, base)


def test_a_copy_of_the_head_that_peft_trains_is_the_head():
    model, head = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert head_of(model, torch.float32).weight is head.modules_to_save["default"].weight


def test_words_that_peft_trains_alone_are_in_the_weight():
    words = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 2]}}
    model, head = adapted(**words)
    weight = head_of(model, torch.float32).weight
    (delta,) = [x for x in head.parameters() if x.requires_grad]
    (grad,) = torch.autograd.grad(weight.sum(), delta)
    assert grad.shape == (2, 16) and (grad == 1).all()


def test_an_adapter_of_another_kind_is_refused():
    """DoRA's magnitudes; at first the logits are right."""
    with pytest.raises(ValueError, match="trains lora_magnitude_vector.default.weight of its head"):
        head_of(adapted(use_dora=True)[0], torch.float32)


def test_dropout_inside_the_head_is_refused_in_training():
    model, _ = adapted(lora_dropout=0.1)
    model.train()
    with pytest.raises(ValueError, match="must not drop out in training.* with p = 0.1"):
        head_of(model, torch.float32)
    model.eval()
    assert head_of(model, torch.float32).weight.requires_grad


def test_a_head_that_fsdp2_shards_is_sharded_afterwards(tmp_path):
    """The trial is a forward of the root, which would leave its parameters whole."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = fully_shard(tiny.model(0))
        hidden, ids = drawn()
        for _ in range(2):
            head = head_of(model, torch.float32)
            linear_token_log_probs(hidden, head, ids)[0].sum().backward()
        assert hasattr(model.lm_head.weight.grad, "full_tensor")
        gradient = model.lm_head.weight.grad.full_tensor()
    finally:
        torch.distributed.destroy_process_group()
    plain = tiny.model(0)
    linear_token_log_probs(hidden, plain.lm_head.weight, ids)[0].sum().backward()
    torch.testing.assert_close(gradient, 2 * plain.lm_head.weight.grad)
