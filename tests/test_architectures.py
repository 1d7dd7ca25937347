"""Every supported architecture against transformers: same logits from the float32 graph, same tokens from int8.

transformers is the oracle: what it computes from a checkpoint is what the checkpoint means.
"""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import tiny_models, write_gguf
from decoders import CONTEXT, tiny_checkpoint, tiny_runner
from hearthd.build.checkpoints.checkpoint import open_checkpoint
from hearthd.build.decoder.architecture import ARCHITECTURES, DecoderSpec
from hearthd.build.decoder.recipe import Recipe
from hearthd.errors import BuildError
from hearthd.runtime.runner import OnnxRunner

IDS = [3, 7, 40, 41, 99, 100, 12, 13, 14, 15, 200, 5, 6, 50, 51, 52, 53, 54, 55, 9, 8, 2, 30]

# A head size that attention's kernel takes only filled up, with each rope and with norms over heads.
VARIANTS = [
    *((name, {}) for name in sorted(tiny_models())),
    ("smollm2", {"head_dim": 20}),
    ("qwen3", {"head_dim": 24}),
    ("llama3", {"head_dim": 8}),
    ("tinyllama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("llama-bias", {"mlp_bias": True}),
    ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    ("phi3", {"partial_rotary_factor": 0.75, "head_dim": 24}),
    ("phi4", {"hidden_size": 96, "head_dim": 24, "partial_rotary_factor": 0.5, "sliding_window": 5}),
    ("gemma3", {"head_dim": 24, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("gemma3", {"sliding_window": 1, "attention_bias": True, "tie_word_embeddings": False}),
    ("smollm3", {"no_rope_layers": [0, 1, 1, 0, 1]}),
    ("granite", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
]


def name_of(variant: tuple[str, dict[str, object]]) -> str:
    return "-".join([variant[0], *variant[1]])


def transformers_logits(path: Path, ids: list[int] = IDS) -> NDArray[np.float32]:
    """Logits after each token, float32 (tokens, vocab_size)."""
    torch = pytest.importorskip("torch", reason="`make test` installs the reference group")
    transformers = pytest.importorskip("transformers", reason="`make test` installs the reference group")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy(), np.float32)


def decoded(runner: OnnxRunner) -> NDArray[np.float32]:
    """The same, prefilled in chunks of 1, 2, 3, ... tokens and read at each chunk's end; NaN elsewhere."""
    logits = np.full((len(IDS), runner.vocab_size), np.nan, np.float32)
    start, size = 0, 1
    while start < len(IDS):
        chunk = IDS[start : start + size]
        rows = runner.forward(np.asarray([chunk]), 0, np.asarray([start], np.int32))
        start, size = start + len(chunk), size + 1
        logits[start - 1] = rows[0]
    return logits


def assert_same(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    read = ~np.isnan(found[:, 0])
    assert read.sum() > 5
    np.testing.assert_allclose(found[read], expected[read], rtol=2e-4, atol=2e-4 * float(np.abs(expected).max()))


@pytest.mark.reference
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_float_graph_gives_the_logits_of_transformers(tmp_path: Path, variant: tuple[str, dict[str, object]]) -> None:
    name, changes = variant
    checkpoint = tiny_checkpoint(tmp_path, name, **changes)
    expected = transformers_logits(tmp_path / name)
    assert_same(decoded(tiny_runner(tmp_path / "plain", checkpoint, Recipe.reference())), expected)
    if DecoderSpec.from_config(checkpoint.config).rotatable:
        assert_same(decoded(tiny_runner(tmp_path / "rotated", checkpoint, Recipe({}, rotated=True))), expected)


@pytest.mark.reference
@pytest.mark.parametrize("name", sorted(tiny_models()))
def test_gguf_gives_the_logits_of_the_directory(tmp_path: Path, name: str) -> None:
    tiny_checkpoint(tmp_path, name)
    expected = transformers_logits(tmp_path / name)
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_models()[name], encoding="F32")
    with open_checkpoint(path) as checkpoint:
        assert_same(decoded(tiny_runner(tmp_path / "graph", checkpoint, Recipe.reference())), expected)


def test_every_architecture_of_the_table_is_compared() -> None:
    compared = {model.config["architectures"][0] for model in tiny_models().values()}
    assert compared == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported; these are: .*LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000 .* 1 to 512 is allowed"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
    ],
)
def test_what_the_graph_cannot_follow_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    config = dict(tiny_models()["smollm2"].config) | changes
    with pytest.raises(BuildError, match=message):
        DecoderSpec.from_config(config)


def test_rope_positions_reach_the_whole_context(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    runner = tiny_runner(tmp_path / "graph", checkpoint, Recipe.reference())
    ids = np.asarray([[(7 * at) % 200 for at in range(CONTEXT)]])
    assert np.all(np.isfinite(runner.forward(ids, 0, np.asarray([0], np.int32))))


@pytest.mark.reference
@pytest.mark.parametrize("name", sorted(tiny_models()))
def test_greedy_answer_after_a_chunked_prefill_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path, name)
    torch = pytest.importorskip("torch", reason="`make test` installs the reference group")
    transformers = pytest.importorskip("transformers", reason="`make test` installs the reference group")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
    ids = torch.tensor([IDS])
    # Nothing of generation_config.json, which may have a repetition penalty.
    greedy = transformers.GenerationConfig(
        max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=list(checkpoint.eos_ids)
    )
    model.generation_config = greedy
    answer = model.generate(ids, attention_mask=torch.ones_like(ids))
    expected = answer[0, len(IDS) :].tolist()

    runner = tiny_runner(tmp_path / "graph", checkpoint, Recipe.reference())
    end_of_turn = list(checkpoint.eos_ids)
    found: list[int] = []
    waiting, past = list(IDS), 0
    while len(found) < len(expected):
        chunk, waiting = waiting[:5], waiting[5:]
        logits = runner.forward(np.asarray([chunk]), 0, np.asarray([past], np.int32))[0].copy()
        past += len(chunk)
        if not waiting:
            # As min_new_tokens does: the answer does not end.
            logits[end_of_turn] = -np.inf
            found.append(int(logits.argmax()))
            waiting = [found[-1]]
    assert found == expected


def read_at_once(runner: OnnxRunner, ids: list[int]) -> NDArray[np.float32]:
    """Logits after the last of `ids`, float32 (vocab_size,)."""
    return runner.forward(np.asarray([ids]), 0, np.asarray([0], np.int32))[0].copy()


def long_prompt(size: int) -> list[int]:
    return np.random.default_rng(size).integers(3, 400, size).tolist()


@pytest.mark.reference
@pytest.mark.parametrize("name", ["gemma3", "phi3"])
@pytest.mark.parametrize("size", [6, 7, 8, 9, 10, 95])
def test_a_window_ends_at_the_token_where_it_ends_in_transformers(tmp_path: Path, name: str, size: int) -> None:
    """Windows of 7 and 9 tokens: prompts one shorter and one longer, read at once, and token by token."""
    checkpoint = tiny_checkpoint(tmp_path, name)
    ids = long_prompt(size)
    expected = transformers_logits(tmp_path / name, ids)
    runner = tiny_runner(tmp_path / "graph", checkpoint, Recipe.reference())
    tolerance = {"rtol": 2e-4, "atol": 2e-4 * float(np.abs(expected).max())}
    np.testing.assert_allclose(read_at_once(runner, ids), expected[-1], **tolerance)
    one_by_one = [
        runner.forward(np.asarray([[each]]), 1, np.asarray([at], np.int32))[0].copy() for at, each in enumerate(ids)
    ]
    np.testing.assert_allclose(np.asarray(one_by_one), expected, **tolerance)


@pytest.mark.parametrize("name", ["gemma3", "phi3"])
def test_windows_of_a_batch_end_at_each_rows_own_length(tmp_path: Path, name: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path, name)
    runner = tiny_runner(tmp_path / "graph", checkpoint, Recipe.reference())
    prompts = [long_prompt(size) for size in (3, 40, 11, 70)]
    for slot, prompt in enumerate(prompts):
        runner.forward(np.asarray([prompt]), slot, np.asarray([0], np.int32))
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    together = runner.forward(np.asarray([[5]] * 4), 0, lengths).copy()
    # Two rows are the fewest that the engine runs.
    for first in range(3):
        pair = runner.forward(np.asarray([[5]] * 2), first, lengths[first : first + 2])
        np.testing.assert_array_equal(together[first : first + 2], pair)
    for slot, prompt in enumerate(prompts):
        at_once = runner.forward(np.asarray([[*prompt, 5]]), slot, np.asarray([0], np.int32))[0]
        np.testing.assert_allclose(together[slot], at_once, rtol=2e-4, atol=2e-4 * float(np.abs(at_once).max()))


@pytest.mark.reference
def test_long_rope_is_exact_up_to_where_the_bundle_ends(tmp_path: Path) -> None:
    """transformers takes the long factors from one token more on; a bundle's context ends before."""
    checkpoint = tiny_checkpoint(tmp_path, "phi4", original_max_position_embeddings=CONTEXT - 1)
    spec = DecoderSpec.from_config(checkpoint.config)
    assert spec.max_context_length == CONTEXT - 1
    assert checkpoint.config["max_position_embeddings"] == 2048
    runner = tiny_runner(tmp_path / "graph", checkpoint, Recipe.reference())
    ids = long_prompt(CONTEXT)
    inside = transformers_logits(tmp_path / "phi4", ids[:-1])[-1]
    tolerance = {"rtol": 2e-4, "atol": 2e-4 * float(np.abs(inside).max())}
    np.testing.assert_allclose(read_at_once(runner, ids[:-1]), inside, **tolerance)
    # The table that this test writes reaches one position further than a bundle's.
    beyond = transformers_logits(tmp_path / "phi4", ids)[-1]
    assert np.abs(read_at_once(runner, ids) - beyond).max() > 10 * tolerance["atol"]


def test_long_rope_is_not_long_where_the_context_was_not_extended() -> None:
    config = dict(tiny_models()["phi4"].config)
    (rope,) = DecoderSpec.from_config(config).ropes
    # sqrt(1 + ln(2048 / 128) / ln(128))
    assert rope.magnitude == pytest.approx(1.2536, abs=1e-4)
    assert rope.max_positions == 128
    (same,) = DecoderSpec.from_config(config | {"max_position_embeddings": 128}).ropes
    assert same.magnitude == 1.0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "gemma3",
            {"layer_types": ["chunked_attention"] * 7},
            r"layer types \['chunked_attention'\] are not",
        ),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types is no list with one kind for each of 7 layers"),
        ("gemma3", {"sliding_window": 0}, "sliding_window is 0"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma3", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping 30\.0 is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("gemma3", {"hidden_act": "silu"}, "hidden_act 'silu' is not supported .*; gelu_pytorch_tanh is"),
        ("gemma3", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1"),
        ("phi4", {"partial_rotary_factor": 0.7}, "is 11; an even number"),
        ("phi4", {"rope_scaling": {"rope_type": "longrope"}}, r"short_factor has shape \(\)"),
        ("phi4", {"original_max_position_embeddings": None}, "original_max_position_embeddings is None"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is no list of 0 and 1 for each of 5 layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("granite", {"residual_multiplier": "small"}, "residual_multiplier is 'small'"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
    ],
)
def test_what_a_family_cannot_follow_is_refused_by_name(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        DecoderSpec.from_config(dict(tiny_models()[name].config) | changes)


NUMBERS = [
    *("rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "sliding_window", "rope_scaling"),
    *("sliding_window_pattern", "layer_types", "rope_local_base_freq", "query_pre_attn_scalar", "hidden_act"),
    *("no_rope_layers", "no_rope_layer_interval", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
    *("attention_multiplier", "max_position_embeddings", "final_logit_softcapping"),
]
HOSTILE = [0, -1, 10**400, 1e-300, float("nan"), float("inf"), "x", [], {}, [[]], [{}], {"rope_type": []}, True]


@pytest.mark.parametrize("name", ["smollm3", "granite", "phi4", "gemma3", "llama3"])
@pytest.mark.parametrize("key", NUMBERS)
def test_hostile_value_is_read_or_refused_but_nothing_else(name: str, key: str) -> None:
    for value in HOSTILE:
        with contextlib.suppress(BuildError):
            DecoderSpec.from_config(tiny_models()[name].config | {key: value})


@pytest.mark.parametrize("name", ["phi4", "llama3"])
def test_hostile_rope_scaling_is_read_or_refused_but_nothing_else(name: str) -> None:
    config = tiny_models()[name].config
    for key in (*config["rope_scaling"], "factor", "attention_factor"):
        for value in HOSTILE:
            with contextlib.suppress(BuildError):
                DecoderSpec.from_config(config | {"rope_scaling": config["rope_scaling"] | {key: value}})
