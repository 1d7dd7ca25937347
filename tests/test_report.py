"""A build's report says what the manifest says, needs nothing but itself, and never costs a model."""

import itertools
import json
import math
import os
import re
import stat
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import tiny_models, write_gguf
from decoders import tiny_checkpoint
from hearthd.build import build_commands
from hearthd.build.builder import build_bundle
from hearthd.build.checkpoints.checkpoint import Checkpoint
from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.graph import GraphOptions, write_graph
from hearthd.build.decoder.matmuls import matmul_names
from hearthd.build.decoder.recipe import MatMulName, Recipe
from hearthd.build.decoder.weights import DecoderWeights, Linear
from hearthd.build.quantization.documents import first_tokens
from hearthd.build.quantization.quality import Reference
from hearthd.build.report import build_report as report_module
from hearthd.build.report.answers import answers, verdict
from hearthd.build.report.build_report import BuildReport
from hearthd.build.report.greedy_comparison import NEAR_TIE, PROMPTS, Comparison, Parting, compare_answers, pieces
from hearthd.build.report.page import escape
from hearthd.build.report.plots import Series, log_plot
from hearthd.build.report.weight_ranges import weight_ranges
from hearthd.bundles.bundle import Manifest
from hearthd.bundles.store import Store
from hearthd.errors import BuildError
from hearthd.text.tokenizer import ChatTokenizer, Message
from model_command import run

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "</title><script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Reads a page as HTML; every element must be closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._row: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "caption":
            self._caption = ""
        if tag == "tr":
            self._row = []
        if tag in ("th", "td"):
            self._row.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "caption":
            self.tables[self._caption] = []
        if tag == "tr":
            self.tables[self._caption].append(self._row)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] == "caption":
            self._caption += data
        if self.open and self.open[-1] in ("th", "td"):
            self._row[-1] += data

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def rows(self, caption: str) -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in self.tables[caption][1:]}


def quiet(*_: object) -> None:
    """Report nothing."""


def built(directory: Path, name: str = "smollm2") -> tuple[Manifest, str]:
    """Build a tiny model of random weights with a report; its manifest and the page."""
    bundle = directory / "bundle"
    bundle.mkdir()
    report = BuildReport(directory / "report.html", model_directory=bundle)
    checkpoint = tiny_checkpoint(directory, name)
    checkpoint.source, checkpoint.license = f"somewhere {HOSTILE}", f"none {HOSTILE}"
    manifest = build_bundle(
        checkpoint, bundle, name="tiny", force=True, report=quiet, observe=lambda each: report.observe(each, quiet)
    )
    assert report.error is None
    return manifest, report.path.read_text(encoding="utf-8")


# The page


# With tied embeddings and rotated, and an architecture that cannot be rotated.
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_the_report_is_a_whole_page_that_needs_nothing_else(name: str, tmp_path: Path) -> None:
    manifest, text = built(tmp_path, name)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert "tiny: build report" in page.text
    tags = {tag for tag, _ in page.elements}
    assert tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "image", "use"} == set()
    names = {name for _, attributes in page.elements for name in attributes}
    assert names & {"src", "href", "xlink:href", "srcset", "action", "data", "style"} == set()
    assert [name for name in names if name.startswith("on")] == []
    assert "@import" not in text
    assert "url(" not in text
    assert re.search(r"https?://", text) is None
    policy = [attributes.get("content") for tag, attributes in page.elements if tag == "meta"]
    assert "default-src 'none'; style-src 'unsafe-inline'" in policy
    plots = [attributes for tag, attributes in page.elements if tag == "svg"]
    # KL by kind, the recipe, and for losses, activations and weights one for each kind of matmul in a layer.
    assert len(plots) == 2 + 3 * 4
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in plots)
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    assert str(manifest.num_layers) in page.text


def test_the_report_has_the_numbers_of_the_manifest(tmp_path: Path) -> None:
    manifest, text = built(tmp_path)
    page = Page(text)
    figures = json.loads(manifest.to_json())["quality"]
    rows = page.rows("Faithfulness by kind of text")
    for kind, each in {"all text": figures, **figures["kinds"]}.items():
        change = each["perplexity_int8"] / each["perplexity_fp32"] - 1
        assert rows[kind] == [
            f"{each['kl_mean']:.4f}",
            f"{change * 100:+.2f} %",
            f"{each['top1_agreement']:.1%}",
            f"{each['perplexity_fp32']:.2f}",
            f"{each['perplexity_int8']:.2f}",
            f"{each['tokens']:,}",
        ]
    spec = DecoderSpec.from_config(tiny_models()["smollm2"].config | {"eos_token_id": [0]})
    recipe = manifest.recipe
    counted: dict[str, int] = {}
    for name in matmul_names(spec):
        form = recipe["matmuls"][str(name)]["form"]
        label = form.replace("per_row_two_terms", "two terms").replace("_", " ")
        counted[label] = counted.get(label, 0) + 1
        # Each cell of the grid says what it is.
        assert f"<title>{name}: {label}</title>" in text
        static, per_row, chosen, step = page.rows(f"KL in nats of {name.kind} by layer")[
            str(name.layer) if name.layer >= 0 else "-"
        ]
        losses = recipe["losses"][str(name)]
        assert (float(static), float(per_row), chosen) == (losses["static"], losses["per_row"], label)
        assert step == (f"{recipe['matmuls'][str(name)]['scale']:.6g}" if form == "static" else "-")
    head, *counts = page.tables["Matmuls by kind and form"]
    total = dict(zip(head[1:-1], map(int, counts[-1][1:-1]), strict=True))
    assert {label: number for label, number in total.items() if number} == counted
    for kind in ("qkv", "o", "gate_up", "down"):
        for what in ("input magnitude", "weight"):
            assert list(page.rows(f"{what} of {kind} by layer")) == [str(layer) for layer in range(spec.num_layers)]


def test_what_others_wrote_stays_text(tmp_path: Path) -> None:
    _, text = built(tmp_path)
    assert "<script" not in text
    assert "</title><script>alert(1)</script>\"'&" in Page(text).text
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text) is None
    assert escape("\x00\ud800<a href='x'>\n") == "\ufffd\ufffd&lt;a href=&#x27;x&#x27;&gt;\n"


def test_a_plot_on_a_logarithmic_axis_puts_equal_factors_at_equal_distances() -> None:
    plot = log_plot("t<", [Series("a", "calm", [1e-4, 1e-2, 0.0, 1.0])], unit="nats", zero_label="none")
    heights = [float(found) for found in re.findall(r'cy="([\d.]+)"', plot)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[3], abs=0.2)
    # Nothing stands on the axis; what is 0 has a line of its own below the smallest.
    assert heights[2] > heights[0]
    assert ">none<" in plot
    assert 'aria-label="t&lt;"' in plot
    assert "layer 1, a: 0.01 nats" in plot


def test_weight_ranges_are_those_of_the_matrices(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    spec = DecoderSpec.from_config(checkpoint.config)
    weights = DecoderWeights(checkpoint, spec, rotated=True)
    found = weight_ranges(weights, spec, quiet)
    assert list(found) == list(matmul_names(spec))
    down = weights.layer(1).down.weight.astype(np.float64)
    of_down = found[MatMulName("down", 1)]
    assert of_down.peak == pytest.approx(np.abs(down).max())
    assert of_down.std == pytest.approx(down.std(), rel=1e-5)
    assert of_down.step == pytest.approx(math.sqrt(np.mean((np.abs(down).max(axis=0) / 127) ** 2)))
    assert found[MatMulName("lm_head")].peak == pytest.approx(np.abs(weights.head()[1].weight).max())


# Greedy answers


class LouderToken(DecoderWeights):
    """The same weights, but for one token's column of the head."""

    def __init__(self, source: Checkpoint, spec: DecoderSpec, token_id: int, factor: float) -> None:
        super().__init__(source, spec, rotated=False)
        self._column, self._factor = token_id, factor

    def head(self) -> tuple[NDArray[np.float32], Linear]:
        norm, linear = super().head()
        weight = linear.weight.copy()
        weight[:, self._column] *= self._factor
        return norm, replace(linear, weight=weight)


class Asked:
    """A tiny float32 graph, and one beside it that is the same or has a louder token, both asked all the prompts."""

    def __init__(self, directory: Path, *, louder: tuple[int, float] = (0, 1.0), context_length: int = 192) -> None:
        checkpoint = tiny_checkpoint(directory)
        spec = DecoderSpec.from_config(checkpoint.config)
        self.tokenizer = ChatTokenizer(
            checkpoint.tokenizer_json, checkpoint.chat_template, eos_ids=checkpoint.config["eos_token_id"]
        )
        for name in ("reference", "bundle"):
            (directory / name).mkdir()
        self.reference = Reference(
            checkpoint, spec, directory / "reference", context_length=context_length, num_threads=1
        )
        weights = LouderToken(checkpoint, spec, *louder)
        write_graph(directory / "bundle", spec, weights, Recipe.reference(), GraphOptions(192))
        self.comparisons = compare_answers(
            self.reference,
            directory / "bundle",
            spec,
            self.tokenizer,
            preset=self.reference.keys_and_values(first_tokens(self.tokenizer)),
            context_length=context_length,
            num_threads=1,
            max_tokens=12,
            report=quiet,
        )


def test_a_graph_answers_as_it_does_itself(tmp_path: Path) -> None:
    asked = Asked(tmp_path)
    assert [(each.kind, each.prompt) for each in asked.comparisons] == list(PROMPTS)
    for each in asked.comparisons:
        assert each.tested == each.reference
        assert each.parting is None
        assert len(each.reference) == 12 or each.reference[-1] in asked.tokenizer.eos_ids
    html = answers(asked.comparisons, asked.tokenizer)
    assert "<mark>" not in html
    assert html.count("The same 12 tokens.") >= 1
    assert verdict(asked.comparisons).startswith("Of 6 answers 6 are the same to the last token, 0 part")


def test_the_answer_is_the_likeliest_token_of_every_position(tmp_path: Path) -> None:
    """Against one run over the whole text, without KV of earlier runs."""
    asked = Asked(tmp_path)
    for each in asked.comparisons:
        prompt = asked.tokenizer.encode_chat([Message("user", each.prompt)])
        logits = np.concatenate([part for part, _ in asked.reference.session.run([*prompt, *each.reference])])
        assert tuple(logits[len(prompt) - 1 : -1].argmax(axis=1)) == each.reference


def test_the_token_where_answers_part_is_the_one_that_was_changed(tmp_path: Path) -> None:
    same = Asked(tmp_path / "same")
    first = same.comparisons[0]
    prompt = same.tokenizer.encode_chat([Message("user", first.prompt)])
    logits = np.concatenate([part for part, _ in same.reference.session.run([*prompt, *first.reference])])
    at_answer = logits[len(prompt) - 1 : -1]
    # A token that is not said, and comes next at some position behind the first: made loud enough to be said there.
    louder, factor, expected = next(
        found
        for token_id in at_answer[3].argsort()[::-1]
        for factor in (1.05, 1.2, 1.5, 2.0, 3.0)
        if (found := _with_louder(at_answer, int(token_id), factor))
        and found[2][0] > 0
        and token_id not in (*first.reference, *same.tokenizer.eos_ids)
        and pieces(same.tokenizer, [token_id])[0].strip().isalnum()
    )
    asked = Asked(tmp_path / "louder", louder=(louder, factor))
    changed = asked.comparisons[0]
    assert changed.reference == first.reference
    assert [each.position for each in changed.partings] == expected
    position = expected[0]
    assert changed.parting is not None
    assert changed.parting.tested_token == changed.tested[position] == louder
    assert changed.parting.reference_token == first.reference[position]
    assert changed.parting.lead == pytest.approx(
        at_answer[position, first.reference[position]] - at_answer[position, louder], rel=1e-3
    )
    assert changed.tested[:position] == first.reference[:position]
    assert changed.num_agreed == len(first.reference) - len(expected)
    # The rest of the other answer is its own: what that graph says after its own words.
    html = answers([changed], asked.tokenizer)
    marked = re.findall(r"<mark>(.*?)</mark>", html)
    texts = [pieces(asked.tokenizer, ids)[position] for ids in (changed.reference, changed.tested)]
    tokens = (changed.reference[position], louder)
    assert marked == [escape(text) or f"token {token}" for text, token in zip(texts, tokens, strict=True)]
    assert f"They part at token {position + 1}:" in html
    assert f"{changed.num_agreed} of {len(changed.reference)} tokens" in html


def _with_louder(logits: NDArray[np.float32], token_id: int, factor: float) -> tuple[int, float, list[int]] | None:
    """Return the positions at which another token is the likeliest when this one's logit is multiplied."""
    louder = logits.copy()
    louder[:, token_id] *= factor
    changed = np.flatnonzero(louder.argmax(axis=1) != logits.argmax(axis=1))
    # Not so near that float32 rounding decides.
    two = np.sort(louder, axis=1)[:, -2:]
    return (token_id, factor, changed.tolist()) if len(changed) and (two[:, 1] - two[:, 0]).min() > 1e-3 else None


@pytest.mark.parametrize(("lead", "judged"), [(NEAR_TIE, "a near tie."), (NEAR_TIE + 0.01, "a real error.")])
def test_the_threshold_decides_between_a_near_tie_and_an_error(lead: float, judged: str, tmp_path: Path) -> None:
    tokenizer = Asked(tmp_path).tokenizer
    ids = tokenizer.encode_text("<i>two</i> & three")
    other = tokenizer.encode_text("four")[0]
    comparison = Comparison("chat", "<p>?", tuple(ids), (ids[0], other), (Parting(1, ids[1], other, lead),))
    html = answers([comparison], tokenizer)
    assert f"nats ({math.exp(lead):.2f} times) likelier: {judged}" in html
    assert "&lt;p&gt;?" in html
    assert "<i>" not in html
    assert "&lt;i&gt;two&lt;/i&gt; &amp; three" in re.sub("</?(mark|span)[^>]*>", "", html)
    assert ("verdict good" in html) == (lead <= NEAR_TIE)
    assert f"{int(lead <= NEAR_TIE)} part at a near tie and {int(lead > NEAR_TIE)} at a real error" in html


def test_a_prompt_that_leaves_no_room_is_left_out(tmp_path: Path) -> None:
    asked = Asked(tmp_path, context_length=24)
    lengths = [len(asked.tokenizer.encode_chat([Message("user", text)])) for _, text in PROMPTS]
    assert [each.prompt for each in asked.comparisons] == [
        text for (_, text), length in zip(PROMPTS, lengths, strict=True) if length < 24
    ]
    assert "no answers were compared" in verdict(())
    assert "no answers were compared" in answers((), asked.tokenizer)


# Where it is written, and what becomes of the model


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    return tmp_path / "state"


def build(tmp_path: Path, *arguments: str | Path) -> int:
    checkpoint = tmp_path / "tiny.gguf"
    if not checkpoint.exists():
        write_gguf(checkpoint, tiny_models()["smollm2"])
    return run("build", checkpoint, "--quiet", *arguments)


def test_the_command_writes_the_report_and_says_where(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "directory" / "report.html"
    assert build(tmp_path, "--force", "--json", "--report", path) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["report"] == str(path)
    kl_mean = Store(state / "models").open("tiny").manifest.quality["kl_mean"]
    assert f"mean KL {kl_mean:.4f} nats" in Page(path.read_text(encoding="utf-8")).text
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    # A second one takes the place of the first; without the option there is none.
    assert build(tmp_path, "--force", "--report", path) == 0
    assert f"report: {path}" in capsys.readouterr().out
    assert build(tmp_path, "--force", "--json") == 0
    assert "report" not in json.loads(capsys.readouterr().out)


def test_a_model_that_is_refused_has_its_report(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hearthd.build.builder.MAX_KL", -1.0)
    with pytest.raises(BuildError, match="--force"):
        build(tmp_path, "--report", tmp_path / "report.html")
    assert Store(state / "models").names() == []
    assert "Not faithful, and kept with --force only" in Page((tmp_path / "report.html").read_text()).text


def test_a_report_that_fails_leaves_the_model_and_is_one_line(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room\nfor it")

    monkeypatch.setattr(report_module, "compare_answers", fail)
    path = tmp_path / "report.html"
    with pytest.raises(
        BuildError, match=r"is installed in .*, but its report was not written: MemoryError: no room for"
    ):
        build(tmp_path, "--force", "--json", "--report", path)
    assert "report" not in json.loads(capsys.readouterr().out)
    assert Store(state / "models").open("tiny").manifest.name == "tiny"
    assert not path.exists()


def test_a_report_that_cannot_be_written_in_the_end_leaves_no_part_of_it(tmp_path: Path, state: Path) -> None:
    path = tmp_path / "report.html"
    report = BuildReport(path, model_directory=tmp_path / "bundle")
    path.mkdir()
    (tmp_path / "bundle").mkdir()
    checkpoint = tiny_checkpoint(tmp_path)
    build_bundle(
        checkpoint,
        tmp_path / "bundle",
        name="tiny",
        force=True,
        report=quiet,
        observe=lambda each: report.observe(each, quiet),
    )
    assert report.error is not None
    assert report.error.startswith("IsADirectoryError")
    assert (tmp_path / "bundle" / "manifest.json").exists()
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".report")] == []


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("report.png", "ends in .html"),
        ("file/report.html", "cannot be written to .*: (Not a directory|File exists); check"),
        ("directory.html", "is there and no file"),
        ("state/models/tiny/report.html", "model's own directory"),
        (f"{'x' * 300}/report.html", "File name too long"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_built(
    where: str, reason: str, tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.html").mkdir()
    monkeypatch.setattr(build_commands, "open_checkpoint", lambda path: pytest.fail("the build began"))
    monkeypatch.setattr(build_commands, "fetch", lambda *_: pytest.fail("the build began"))
    with pytest.raises(BuildError, match=reason) as caught:
        build(tmp_path, "--report", tmp_path / where)
    assert "\n" not in str(caught.value)
    where = where.replace("tiny/", "smollm2-135m/")
    with pytest.raises(BuildError, match=reason):
        run("add", "smollm2-135m", "--report", tmp_path / where)
    assert Store(state / "models").names() == []
