"""The runner on a real graph: chunks, batches, slots and termination change no number."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from checkpoints import tiny_models
from decoders import CONTEXT, scales_of, tiny_checkpoint, tiny_runner
from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.matmuls import matmul_names
from hearthd.build.decoder.recipe import MatMulForm, MatMulRecipe, Recipe
from hearthd.errors import BundleError, ShortOfMemoryError
from hearthd.kv.kv_cache import RunTerminated
from hearthd.runtime.kv_buffers import KVSlots, PromptBuffers
from hearthd.runtime.runner import DecoderShape, OnnxRunner
from hearthd.runtime.session import open_session

PROMPTS = ([5, 9, 200, 31, 77, 12, 40], [8, 3], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72])


LONG = [(17 * place * place + 5 * place + 3) % 250 for place in range(60)]

# No bundle has the form that a build tries the others with.
SERVED = [form for form in MatMulForm if form is not MatMulForm.SWITCHED]


def recipe_of(form: MatMulForm, spec: DecoderSpec) -> Recipe:
    """Every matmul in one form; the static scale covers what random layers give."""
    return Recipe({name: MatMulRecipe(form, 0.05) for name in matmul_names(spec)}, rotated=True)


@pytest.fixture(
    scope="module",
    params=[(form, False) for form in SERVED] + [(MatMulForm.STATIC, True), (MatMulForm.FLOAT, True)],
    ids=lambda kind: f"{kind[0].value}, {'int8' if kind[1] else 'float32'} cache",
)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnnxRunner:
    form, has_int8_cache = request.param
    directory = tmp_path_factory.mktemp("runner")
    checkpoint = tiny_checkpoint(directory)
    recipe = recipe_of(form, DecoderSpec.from_config(checkpoint.config))
    runner = tiny_runner(directory / "graph", checkpoint, recipe)
    if not has_int8_cache:
        return runner
    return tiny_runner(directory / "int8", checkpoint, recipe, kv_scales=scales_of(runner, PROMPTS[2]))


@pytest.fixture(scope="module", params=sorted(tiny_models()))
def cached_in_int8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnnxRunner:
    """A runner of each architecture, with weights in float32, so that only the cache is rounded."""
    directory = tmp_path_factory.mktemp("int8_cache")
    checkpoint = tiny_checkpoint(directory, request.param)
    plain = tiny_runner(directory / "float32", checkpoint, Recipe.reference())
    scales = scales_of(plain, LONG)
    return tiny_runner(directory / "int8", checkpoint, Recipe.reference(), kv_scales=scales)


def prefill(runner: OnnxRunner, slot: int, ids: list[int], chunk: int = 64) -> np.ndarray:
    for start in range(0, len(ids), chunk):
        part = np.asarray([ids[start : start + chunk]], np.int64)
        logits = runner.forward(part, slot, np.asarray([start], np.int32))
    return logits[0].copy()


def continue_alone(runner: OnnxRunner, slot: int, ids: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    token = int(prefill(runner, slot, ids).argmax())
    tokens = [token]
    for step in range(steps):
        logits = runner.forward(np.asarray([[token]]), slot, np.asarray([len(ids) + step], np.int32))
        token = int(logits[0].argmax())
        tokens.append(token)
    return tokens, logits[0].copy()


def test_a_batch_gives_each_row_what_it_gets_alone(runner: OnnxRunner) -> None:
    steps = 12
    alone = [continue_alone(runner, 0, list(prompt), steps) for prompt in PROMPTS]
    tokens = [int(prefill(runner, slot, list(prompt)).argmax()) for slot, prompt in enumerate(PROMPTS)]
    together = [[token] for token in tokens]
    for step in range(steps):
        past = np.asarray([len(prompt) + step for prompt in PROMPTS], np.int32)
        logits = runner.forward(np.asarray(tokens)[:, None], 0, past)
        tokens = [int(row.argmax()) for row in logits]
        for row, token in zip(together, tokens, strict=True):
            row.append(token)
    for row, (expected, last_logits) in enumerate(alone):
        assert together[row] == expected
        np.testing.assert_array_equal(logits[row], last_logits)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_give_the_logits_of_the_whole_prompt(runner: OnnxRunner, chunk: int) -> None:
    prompt = list(PROMPTS[2])
    # Attention adds up in another order: the last bits differ, and may take an int8 activation over its next step.
    np.testing.assert_allclose(prefill(runner, 1, prompt, chunk), prefill(runner, 0, prompt), rtol=0, atol=0.02)


@pytest.mark.parametrize("chunk", [2, 3, 7, 16])
def test_where_a_prompt_is_cut_changes_no_bit_of_an_int8_cache(cached_in_int8: OnnxRunner, chunk: int) -> None:
    runner = cached_in_int8
    expected = prefill(runner, 0, LONG)
    # No chunk of one token: runs of one are those that write.
    assert runner.min_run == 2
    assert len(LONG) % chunk != 1
    np.testing.assert_array_equal(prefill(runner, 1, LONG, chunk), expected)
    np.testing.assert_array_equal(runner.read_slot(1, len(LONG)), runner.read_slot(0, len(LONG)))


def test_what_was_cached_in_int8_is_gone_on_with_as_if_it_had_just_been_read(cached_in_int8: OnnxRunner) -> None:
    """The prompt buffers are filled from a slot after others used them, and after their memory was given back."""
    runner = cached_in_int8
    expected = prefill(runner, 0, LONG)
    cut = len(LONG) - 9
    prefill(runner, 1, LONG[:cut])
    continue_alone(runner, 2, PROMPTS[0], 1)
    runner.copy_slot(1, 3, cut)
    for slot in (1, 3):
        found = runner.forward(np.asarray([LONG[cut:]]), slot, np.asarray([cut], np.int32))
        np.testing.assert_array_equal(found[0], expected)


def test_decoding_over_an_int8_cache_means_what_reading_means(cached_in_int8: OnnxRunner) -> None:
    """Both kernels see the same numbers: they differ by rounding of float32 alone."""
    runner = cached_in_int8
    expected = prefill(runner, 0, LONG)
    prefill(runner, 1, LONG[:-1])
    found = runner.forward(np.asarray([LONG[-1:]]), 1, np.asarray([len(LONG) - 1], np.int32))
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-3 * expected.std())
    last = len(LONG) - 1
    steps = runner.read_slot(1, len(LONG))[..., last, :].astype(int) - runner.read_slot(0, len(LONG))[..., last, :]
    assert np.abs(steps).max() <= 1


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 9])
def test_a_run_to_verify_is_bit_for_bit_as_many_steps(cached_in_int8: OnnxRunner, length: int) -> None:
    """Logits and KV; at several lengths of context, since kernels go through it in blocks."""
    runner = cached_in_int8
    assert runner.can_verify
    for num_past in (1, 2, 7, 15, 16, 17, 31, 33, 50):
        prefill(runner, 0, LONG[:num_past])
        prefill(runner, 2, LONG[:num_past])
        drafted = LONG[num_past : num_past + length]
        steps = [
            runner.forward(np.asarray([[token]]), 0, np.asarray([num_past + at], np.int32))[0].copy()
            for at, token in enumerate(drafted)
        ]
        found = runner.verify(np.asarray(drafted), 2, num_past)
        np.testing.assert_array_equal(found, np.stack(steps))
        np.testing.assert_array_equal(runner.read_slot(2, num_past + length), runner.read_slot(0, num_past + length))


def test_a_step_after_a_draft_that_failed_sees_nothing_of_it(cached_in_int8: OnnxRunner) -> None:
    runner = cached_in_int8
    expected = continue_alone(runner, 0, LONG[:20], 5)
    token = int(prefill(runner, 1, LONG[:20]).argmax())
    tokens = [token]
    for step in range(5):
        runner.verify(np.asarray([token, 3, 4, 5, 6, 7, 8]), 1, 20 + step)
        logits = runner.forward(np.asarray([[token]]), 1, np.asarray([20 + step], np.int32))
        token = int(logits[0].argmax())
        tokens.append(token)
    assert tokens == expected[0]
    np.testing.assert_array_equal(logits[0], expected[1])


def test_a_draft_leaves_the_prompt_of_another_slot_alone(cached_in_int8: OnnxRunner) -> None:
    runner = cached_in_int8
    expected = prefill(runner, 0, LONG)
    prefill(runner, 2, LONG[:9])
    prefill(runner, 1, LONG[:30])
    runner.verify(np.asarray(LONG[9:12]), 2, 9)
    found = runner.forward(np.asarray([LONG[30:]]), 1, np.asarray([30], np.int32))
    np.testing.assert_array_equal(found[0], expected)


def test_what_a_float32_cache_gives_depends_on_the_run_and_verifies_nothing(tmp_path: Path) -> None:
    assert not tiny_runner(tmp_path / "graph", tiny_checkpoint(tmp_path), Recipe.reference()).can_verify


def test_an_int8_cache_is_close_to_a_float32_one(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    plain = tiny_runner(tmp_path / "float32", checkpoint, Recipe.reference())
    runner = tiny_runner(tmp_path / "int8", checkpoint, Recipe.reference(), kv_scales=scales_of(plain, LONG))
    expected = prefill(plain, 0, LONG)
    assert np.abs(prefill(runner, 0, LONG) - expected).mean() < 0.05 * expected.std()


def test_memory_of_a_read_prompt_is_given_back(tmp_path: Path) -> None:
    # 16 MB of float32 for this prompt, and 4 MB of int8 that stay.
    shape = DecoderShape(num_layers=4, num_kv_heads=4, head_dim=64, vocab_size=8)
    slots = KVSlots(shape, num_slots=1, context_length=4096, dtype=np.int8)
    prompt = PromptBuffers(slots)
    prompt.hold(0, 0, 2048)
    for array in prompt.arrays:
        array[:, :, :2048] = 1
    prompt.extend(2048)
    slots.write(0, 0, [np.ones((4, 2048, 64), np.int8)] * 8)
    held = resident_bytes()
    assert not prompt.ends_reading(1, 3)
    assert prompt.ends_reading(0, 1)
    assert not prompt.ends_reading(0, 1)
    prompt.end_rest(0)
    assert resident_bytes() > held - 2**20
    # Held once.
    prompt.end_rest(1)
    assert resident_bytes() < held - 15 * 2**20
    prompt.hold(0, 2048, 1)
    assert all(np.all(array[:, :, :2048] == 1) for array in prompt.arrays)


def test_what_runs_have_freed_is_given_back_with_it() -> None:
    shape = DecoderShape(num_layers=1, num_kv_heads=1, head_dim=64, vocab_size=8)
    prompt = PromptBuffers(KVSlots(shape, num_slots=1, context_length=64, dtype=np.int8))
    prompt.hold(0, 0, 1)
    with ThreadPoolExecutor(1) as pool:
        # As ONNX Runtime's: each so small that it lies among others of its thread, and one stays behind them.
        blocks = pool.submit(lambda: [bytes([1]) * 50_000 for _ in range(1000)]).result()
        held = resident_bytes()
        del blocks[:-1]
        assert resident_bytes() > held - 5 * 2**20
        prompt.end_rest(1)
        assert resident_bytes() < held - 40 * 2**20


def test_swapped_slots_continue_as_if_they_had_stayed(runner: OnnxRunner) -> None:
    first, second = list(PROMPTS[0]), list(PROMPTS[2])
    expected = [continue_alone(runner, 0, first, 1)[1], continue_alone(runner, 0, second, 1)[1]]
    tokens = [int(prefill(runner, 0, first).argmax()), int(prefill(runner, 2, second).argmax())]
    runner.swap_slots(0, 2, len(first), len(second))
    for slot, prompt, token, logits in ((2, first, tokens[0], expected[0]), (0, second, tokens[1], expected[1])):
        found = runner.forward(np.asarray([[token]]), slot, np.asarray([len(prompt)], np.int32))
        np.testing.assert_array_equal(found[0], logits)


def test_a_copied_slot_is_independent_of_its_source(runner: OnnxRunner) -> None:
    prompt = list(PROMPTS[0])
    expected = continue_alone(runner, 0, prompt, 1)[1]
    token = int(prefill(runner, 0, prompt).argmax())
    runner.copy_slot(0, 3, len(prompt))
    prefill(runner, 0, list(PROMPTS[2]))
    found = runner.forward(np.asarray([[token]]), 3, np.asarray([len(prompt)], np.int32))
    np.testing.assert_array_equal(found[0], expected)


def test_preset_tokens_need_no_run(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    spec = DecoderSpec.from_config(checkpoint.config)
    plain = tiny_runner(tmp_path / "graph", checkpoint, Recipe.reference())
    prompt = list(PROMPTS[0])
    expected = prefill(plain, 0, prompt)
    runner = OnnxRunner(
        tmp_path / "graph" / "model.onnx",
        DecoderShape(spec.num_layers, spec.num_kv_heads, spec.padded_head_dim, spec.vocab_size),
        num_slots=2,
        context_length=CONTEXT,
        num_threads=1,
        preset_tokens=tuple(prompt[:2]),
        preset=plain.read_slot(0, 2),
    )
    runner.load_preset(1)
    found = runner.forward(np.asarray([prompt[2:]]), 1, np.asarray([2], np.int32))
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def test_terminate_stops_a_run_and_the_next_one_works(runner: OnnxRunner) -> None:
    prompt = [7] * (CONTEXT - 1)
    expected = prefill(runner, 0, prompt)
    stop, terminated = threading.Event(), threading.Event()

    def keep_terminating() -> None:
        while not stop.is_set():
            runner.terminate()

    thread = threading.Thread(target=keep_terminating)
    thread.start()
    try:
        for _ in range(200):
            try:
                prefill(runner, 0, prompt)
            except RunTerminated:
                terminated.set()
                break
    finally:
        stop.set()
        thread.join()
    assert terminated.is_set()
    np.testing.assert_array_equal(prefill(runner, 0, prompt), expected)


def test_terminate_between_runs_stops_nothing(runner: OnnxRunner) -> None:
    runner.terminate()
    assert np.all(np.isfinite(prefill(runner, 0, [1, 2, 3])))


def test_a_graph_that_onnx_runtime_refuses_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load .*model\.onnx") as caught:
        OnnxRunner(path, DecoderShape(1, 1, 16, 8), num_slots=1, context_length=8, num_threads=1)
    assert "\n" not in str(caught.value)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_kv_slots_cost_memory_only_as_far_as_they_are_filled() -> None:
    # Each as large as NumPy would ask huge pages for.
    shape = DecoderShape(num_layers=16, num_kv_heads=3, head_dim=64, vocab_size=8)
    slots = KVSlots(shape, num_slots=4, context_length=2048, dtype=np.float32)
    before = resident_bytes()
    slots.write(0, 0, [np.ones((3, 1, 64), np.float32)] * 32)
    assert resident_bytes() - before < 8 * 2**20
    assert slots.arrays[31][0, 2, 0, 63] == 1
    assert not slots.arrays[0][1].any()


@pytest.mark.parametrize("lost", [False, True], ids=["the old graph comes back", "and the old graph is gone, too"])
def test_threads_that_cannot_be_had_leave_a_runner_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, lost: bool
) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    runner = tiny_runner(tmp_path / "graph", checkpoint, Recipe.reference())
    expected, before = prefill(runner, 0, LONG), runner.num_threads
    refused = {before, before + 1} if lost else {before + 1}

    def open_unless_refused(path: Path, num_threads: int, **options: bool) -> object:
        if num_threads in refused:
            raise ShortOfMemoryError("there is not enough memory")
        return open_session(path, num_threads, **options)

    monkeypatch.setattr("hearthd.runtime.runner.open_session", open_unless_refused)
    with pytest.raises(ShortOfMemoryError):
        runner.change_threads(before + 1)
    assert runner.num_threads == before
    if lost:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="cannot be loaded again"):
                prefill(runner, 0, LONG)
        refused.clear()
    np.testing.assert_array_equal(prefill(runner, 0, LONG), expected)
    refused.clear()
    runner.change_threads(before + 1)
    assert runner.num_threads == before + 1
    np.testing.assert_array_equal(prefill(runner, 0, LONG), expected)
