# SPDX-License-Identifier: Apache-2.0
"""Pages of docs/: their code runs, and questions are answered in two clicks."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tiny_minicpm import PATCH, assert_close, tiny_model

from uhd_ops.cli import main
from uhd_ops.integrations.transformers import restore

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TEXTS = {path.stem: path.read_text() for path in DOCS.glob("*.md")}
# A block of code, and what it prints.
CODE = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
# Pages whose code needs data, a process group or other libraries: a test beside those runs it.
ELSEWHERE = {
    "corpus": "test_corpus.py",
    "own_vit": "test_own_models.py",
    "serving": "serving_suite.py",
    "training": "test_training.py",
}
TOKENS = {
    **{"image_token": "<image>", "image_start_token": "<img>", "image_end_token": "</img>"},
    **{"slice_start_token": "<slice>", "slice_end_token": "</slice>", "video_token": "<video>"},
    **{"image_id_start_token": "<id>", "image_id_end_token": "</id>"},
}
TEMPLATE = (
    "{% for part in messages[0]['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
)


def save_minicpm():
    """Save a tiny MiniCPM-V 4.6 and its processor where its page looks for the released one."""
    words = {word: index for index, word in enumerate(["<unk>", *TOKENS.values()])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    options = {"unk_token": "<unk>", "pad_token": "<unk>", "extra_special_tokens": TOKENS}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **options)
    tokenizer.add_tokens([*TOKENS.values()], special_tokens=True)
    size = {"patch_size": PATCH, "scale_resolution": 64}
    processor = transformers.MiniCPMV4_6Processor(
        transformers.MiniCPMV4_6ImageProcessor(**size),
        transformers.MiniCPMV4_6VideoProcessor(**size),
        tokenizer,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained("openbmb/MiniCPM-V-4.6")
    made = tiny_model(dtype=torch.float32, image_token_id=tokenizer.image_token_id)
    made.save_pretrained("openbmb/MiniCPM-V-4.6")


SLOW = {"export"}
WITH_CODE = sorted(page for page, text in TEXTS.items() if "```python" in text)
PAGES = [
    pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())
    for page in WITH_CODE
    if page not in ELSEWHERE and page != "minicpmv"
]


@pytest.mark.parametrize("page", PAGES)
def test_code(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in CODE.finditer(TEXTS[page]):
        lines = "\n" * TEXTS[page].count("\n", 0, block.start(1))  # tracebacks have the page's
        code = compile(lines + block[1], f"docs/{page}.md", "exec")
        exec(code, namespace)  # that is the point of this test
        assert capsys.readouterr().out == (block[2] or "")


def test_minicpm_page(tmp_path, monkeypatch):
    """What it loads is accelerated, and computes what transformers' own model does."""
    monkeypatch.chdir(tmp_path)
    save_minicpm()
    namespace = {}
    for block in CODE.finditer(TEXTS["minicpmv"]):
        exec(compile(block[1], "docs/minicpmv.md", "exec"), namespace)
    inputs, answer, model = (namespace[name] for name in ("inputs", "answer", "model"))
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 20
    inputs["pixel_values"] = inputs["pixel_values"].double()
    ours = model.double()(**inputs).logits
    assert_close(ours, restore(model)(**inputs).logits)  # an error if nothing was accelerated


def test_every_page_with_code_is_run():
    assert ELSEWHERE.keys() < set(WITH_CODE)
    for page, file in ELSEWHERE.items():
        text = (ROOT / "python_tests" / file).read_text()
        assert f'"{page}.md"' in text
        assert "exec(" in text
    for page in WITH_CODE:
        assert TEXTS[page].count("```python") == len(CODE.findall(TEXTS[page])), page


# What somebody who knows timm looks for, and a line of code that is the answer.
QUESTIONS = {
    "pick a layer": "CompressorConfig(layers=layer)",
    "freeze": "freeze_for_stage(model, stage, **parts)",
    "count tokens": "plan.num_merged_tokens",
    "load MiniCPM-V": "accelerate(AutoModelForImageTextToText.from_pretrained(name)",
    "own ViT": "uhd_ops.register_family(",
    "multi-GPU": "fully_shard(model, mesh=mesh)",
    "export": "torch.export.export(",
    "visualise": "uhd_ops.plot.views(",
}
LINK = re.compile(r"\]\(([\w/]+)\.md(?:#([\w-]+))?\)")


def slug(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def section(page, anchor):
    """The text behind a heading, to the next one of its level; the whole page without an anchor."""
    if not anchor:
        return TEXTS[page]
    for heading in re.finditer(r"^(#+) (.*)$", TEXTS[page], re.MULTILINE):
        if slug(heading[2]) == anchor:
            rest = TEXTS[page][heading.end() :]
            return re.split(rf"^#{{1,{len(heading[1])}}} ", rest, flags=re.MULTILINE)[0]
    raise AssertionError(f"docs/{page}.md has no heading #{anchor}")


def links(text):
    """What a text links to, as page and anchor; not what is written when the site is built."""
    return [(page, anchor) for page, anchor in LINK.findall(text) if page in TEXTS]


@pytest.mark.parametrize("question", QUESTIONS)
def test_two_clicks_from_the_start_page(question):
    table = TEXTS["index"].partition("```{toctree}")[0]
    first = [section(*link) for link in links(table)]
    second = [section(*link) for text in first for link in links(text)]
    found = [block[1] for text in (*first, *second) for block in CODE.finditer(text)]
    if "(generated/gallery/index.rst)" in table:  # which links to what is made of each script
        found += [script.read_text() for script in (DOCS / "gallery").glob("plot_*.py")]
    assert any(QUESTIONS[question] in code for code in found)


def test_links_between_pages():
    for page, text in TEXTS.items():
        for target, anchor in LINK.findall(text):
            if not target.startswith("generated/"):
                assert target in TEXTS, f"docs/{page}.md: {target}"
                section(target, anchor)


COMMAND = re.compile(r"(?:^|`)uhd-ops ([a-z][\w-]*)([^`\n]*)", re.MULTILINE)


def test_commands_have_the_options_that_pages_give_them(capsys):
    help_of, found = {}, 0
    for page, text in TEXTS.items():
        for command, arguments in COMMAND.findall(text):
            if command not in help_of:
                with pytest.raises(SystemExit, match="0"):
                    main([command, "--help"])
                help_of[command] = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
            options = set(re.findall(r"--[\w-]+", arguments))
            assert options <= help_of[command], f"docs/{page}.md: uhd-ops {command}"
            found += len(options)
    assert found > 5


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^(\w+)$", TEXTS["index"], re.MULTILINE))
    assert listed >= TEXTS.keys() - {"index"}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    yield importlib.import_module("measured")
    del sys.modules["measured"]


@pytest.fixture
def site_pages(measured):
    yield importlib.import_module("site_pages")
    del sys.modules["site_pages"]


def test_every_public_name_says_what_it_takes(site_pages):
    """Args or Attributes of every parameter; Returns of what returns something."""
    bad = []
    for group, names in site_pages.PAGES.items():
        if group.page == "reference":  # whose signatures are those of the operators
            continue
        for name in names:
            thing = getattr(importlib.import_module(group.module), site_pages.last(name))
            text = inspect.getdoc(thing) or ""
            if callable(thing):
                parameters = inspect.signature(thing).parameters
                told = set(re.findall(r"^ +[*]{0,2}(\w+):", text, re.MULTILINE))
                bad += [f"{name}: {parameter}" for parameter in parameters.keys() - told]
            if inspect.isfunction(thing) and thing.__annotations__.get("return") != "None":
                bad += [f"{name}: Returns"] * ("Returns:" not in text)
    assert not bad, "\n".join(bad)
    assert sum(map(len, site_pages.PAGES.values())) > 80


def test_every_kind_of_result_has_a_page(measured):
    kinds = {path.name.partition("_")[0] for path in (ROOT / "benchmarks/results").glob("*.json")}
    of_experiments = {"warm", "train", "stability"}  # docs/warm_start.md and docs/stability.md
    assert kinds >= {"cpu", "host", "tower"}
    assert kinds - of_experiments <= measured.SECTIONS.keys()


def test_benchmarks_page(measured, tmp_path):
    measured.write(tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    for kind, sentence in {
        "cpu": "window_attention 2x2 forward",
        "host": "EarlyCompressor",
    }.items():
        name, record = measured.newest(kind, ROOT / "benchmarks" / "results")
        assert f"commit {record['environment']['commit']}: `benchmarks/results/{name}`" in page
        assert sentence in page
    name, record = measured.newest("cpu", ROOT / "benchmarks" / "results")
    for row in record["rows"]:
        assert f"| {row['case']} | {row['dtype']} | {row['ours_ms']:.2f} |" in page
    pictures = set(re.findall(r"\((\w+\.svg)\)", page)) | {"costs.svg"}
    assert pictures == {path.name for path in tmp_path.glob("*.svg")}
