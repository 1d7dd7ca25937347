"""Every supported architecture against transformers: same logits from the float32 graph, same tokens from int8.

transformers is the oracle: what it computes from a checkpoint is what the checkpoint means.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import tiny_models, write_gguf
from decoders import CONTEXT, tiny_checkpoint, tiny_runner
from hearthd.build.architecture import ARCHITECTURES, DecoderSpec
from hearthd.build.checkpoint import open_checkpoint
from hearthd.build.recipe import Recipe
from hearthd.errors import BuildError
from hearthd.runner import OnnxRunner

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


def transformers_logits(path: Path) -> NDArray[np.float32]:
    """Logits after each of IDS, float32 (tokens, vocab_size)."""
    torch = pytest.importorskip("torch", reason="`make test` installs the reference group")
    transformers = pytest.importorskip("transformers", reason="`make test` installs the reference group")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    with torch.no_grad():
        return np.asarray(model(torch.tensor([IDS])).logits[0].numpy(), np.float32)


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
