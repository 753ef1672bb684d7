"""The plugin within lmms-eval, on the shipped model and a local task. Skipped where lmms-eval is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from selector.tasks import load_task

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: the extra lmms")

from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "checkpoints/llava-next-tiny")
LEARNED = "checkpoints/selector-llava-next-tiny"
# Others' code, which warns of much.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_visual: !function reading.visuals
doc_to_text: question
doc_to_target: {target}
generation_kwargs:
  max_new_tokens: 16
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
READING = 'def visuals(doc):\n    return [doc["image"].convert("RGB")]\n'


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks ``pages`` (answers) and ``choices`` (multiple choice) on 8 generated pages."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"image": s.image, "question": s.question, "answer": s.answer, "right": 1}
        for name in ("documents", "scenes")
        for s in load_task(name).samples(4, 0)
    ]
    pages = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    pages.to_parquet(str(folder / "pages.parquet"))

    (folder / "reading.py").write_text(READING)
    file = folder / "pages.parquet"
    answers = TASK.format(name="pages", file=file, kind="generate_until", target="answer", metric="exact_match")
    (folder / "pages.yaml").write_text(answers)
    choices = TASK.format(name="choices", file=file, kind="multiple_choice", target="right", metric="acc")
    choices = choices.replace("generation_kwargs:\n  max_new_tokens: 16\n", 'doc_to_choice: ["zebra crossing", "no"]\n')
    (folder / "choices.yaml").write_text(choices)
    return folder


@pytest.fixture
def evaluate(tasks, monkeypatch, tmp_path):
    """``evaluate("pages", model=..., keep=...)`` -> (results of the task, its samples in order)."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))

    def run(task, model="selector_llava_next", simple=False, more="", **given):
        arguments = ",".join(f"{name}={value}" for name, value in ({"pretrained": MODEL} | given).items()) + more
        manager = TaskManager("WARNING", include_path=str(tasks), model_name=model)
        cli = types.SimpleNamespace(output_path=str(tmp_path), process_with_media=False)
        results = evaluator.simple_evaluate(
            model, arguments, tasks=[task], task_manager=manager, batch_size=1, device="cpu", cli_args=cli,
            force_simple=simple, log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
        return results["results"][task], sorted(results["samples"][task], key=lambda sample: sample["doc_id"])

    return run


@pytest.fixture
def plain(monkeypatch):
    """Options of lmms-eval's own LLaVA, which imports a reader of videos that need not be there."""
    monkeypatch.setitem(sys.modules, "decord", types.SimpleNamespace(VideoReader=None, cpu=None))
    return {"model": "llava_hf", "device_map": "cpu"}


@pytest.fixture
def built():
    """``built("selector_llava_next", keep=16)`` -> the model as lmms-eval builds it."""

    def build(simple=False, **given):
        cls = MODEL_REGISTRY_V2.get_model_class("selector_llava_next", force_simple=simple)
        return cls(MODEL, **({"selector": "norm", "keep": 16, "device": "cpu"} | given))

    return build


def test_lmms_eval_knows_both_classes():
    manifest = MODEL_REGISTRY_V2.get_manifest("selector_llava_next")
    assert manifest.simple_class_path == "selector.lmms.model.SelectorSimple"
    assert manifest.chat_class_path == "selector.lmms.model.SelectorChat"
    for simple in (False, True):
        assert MODEL_REGISTRY_V2.get_model_class("selector_llava_next", force_simple=simple).is_simple is simple


@pytest.mark.parametrize("simple", [False, True])
def test_everything_kept_answers_as_the_plain_model(evaluate, plain, simple):
    score, ours = evaluate("pages", selector=LEARNED, keep=1.0, simple=simple)
    wanted, theirs = evaluate("pages", simple=simple, **plain)
    assert [s["filtered_resps"] for s in ours] == [s["filtered_resps"] for s in theirs]
    assert any(s["filtered_resps"] for s in ours)
    assert score["exact_match,none"] == wanted["exact_match,none"] > 0
    for sample in ours:
        [counts] = sample["token_counts"]
        assert counts["visual_tokens"] == counts["all_visual_tokens"]


def test_measured_tokens_are_logged_per_request(evaluate):
    _, samples = evaluate("pages", selector=LEARNED, keep=16)
    _, whole = evaluate("pages", selector=LEARNED, keep=1.0)
    assert len(samples) == 8
    for few, all_ in zip(samples, whole, strict=True):
        [counts], [full] = few["token_counts"], all_["token_counts"]
        assert list(counts["visual_tokens"]) == [16]
        assert counts["all_visual_tokens"] == full["all_visual_tokens"]
        assert full["input_tokens"] - counts["input_tokens"] == full["all_visual_tokens"][0] - 16
        assert counts["output_tokens"] >= 1


def test_batches_answer_as_one_by_one(built, tasks, monkeypatch):
    def asked(model):
        docs = [{"image": s.image, "question": s.question} for s in load_task("scenes").samples(5, 0)]
        model.task_dict = {"pages": {"test": docs}}
        metadata = {"task": "pages", "doc_id": 0, "repeats": 1}
        return model.generate_until(
            [
                Instance("generate_until", (doc["question"], {"max_new_tokens": 8 + place % 2}, show, place, "pages",
                         "test"), 0, metadata)
                for place, doc in enumerate(docs)
            ]
        )  # fmt: skip

    def show(doc):
        return [doc["image"]]

    alone, together = (asked(built(simple=True, batch_size=size)) for size in (1, 2))
    assert [reply.text for reply in alone] == [reply.text for reply in together]
    assert [reply.token_counts for reply in alone] == [reply.token_counts for reply in together]


def test_multiple_choice_takes_the_lower_loss(evaluate):
    """ "no" is a word that the model answers, and "zebra crossing" is none."""
    score, samples = evaluate("choices", selector=LEARNED, keep=16, simple=True)
    losses = [[float(loss) for loss, _ in sample["filtered_resps"]] for sample in samples]
    assert score["acc,none"] == sum(no < zebra for zebra, no in losses) / 8 > 0.5
    assert [list(counts["visual_tokens"]) for sample in samples for counts in sample["token_counts"]] == [[16]] * 16


def requests(visuals, simple):
    metadata = {"task": "pages", "doc_id": 0, "repeats": 1}
    if simple:
        arguments = ("what?", {"max_new_tokens": 4}, lambda _: visuals, 0, "pages", "test")
    else:
        parts = [{"type": "image", "url": visual} for visual in visuals] + [{"type": "text", "text": "what?"}]
        arguments = (
            "what?", lambda _: [{"role": "user", "content": parts}], {"max_new_tokens": 4}, 0, "pages", "test"
        )  # fmt: skip
    return [Instance("generate_until", arguments, 0, metadata)]


@pytest.mark.parametrize("simple", [False, True])
def test_errors_are_raised_and_are_no_empty_answers(built, monkeypatch, simple):
    model = built(simple=simple)
    model.task_dict = {"pages": {"test": [None]}}
    [reply] = model.generate_until(requests([], simple))  # no image: a question of text alone
    assert reply.token_counts.to_dict()["visual_tokens"] == ()
    with pytest.raises(ValueError, match=r"visuals must be PIL images, got str: 'video\.mp4'"):
        model.generate_until(requests(["video.mp4"], simple))

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model.answerer.model, "generate", fail, raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        model.generate_until(requests([Image.new("RGB", (96, 96))], simple))


def test_what_llava_hf_makes_of_an_error(evaluate, plain, monkeypatch):
    """The reason for classes of our own: there, a model that fails on every question is scored as answering nothing."""
    from transformers import LlavaNextForConditionalGeneration

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(LlavaNextForConditionalGeneration, "generate", fail)
    score, samples = evaluate("pages", **plain)
    assert [sample["filtered_resps"] for sample in samples] == [[""]] * 8
    assert score["exact_match,none"] == 0
    with pytest.raises(torch.OutOfMemoryError):
        evaluate("pages", selector="norm", keep=16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"selector": "svd-prun"}, "unknown selector 'svd-prun'"),
        ({"keep": 0}, "keep must be"),
        ({"batch_size": "auto"}, "batch_size must be an int >= 1 without max_batch_size, got 'auto'"),
        ({"device": "gpu9"}, "device must be auto or one that torch has here"),
    ],
)
def test_mistakes_are_named(built, given, message):
    with pytest.raises(Exception, match=message):
        built(**given)


def test_a_setting_without_effect_is_named(built):
    from loguru import logger

    said = []
    sink = logger.add(said.append, level="WARNING")
    model = built(simple=True)
    model.task_dict = {"pages": {"test": [None]}}
    [request] = requests([], simple=True)
    request.arguments[1].update({"until": ["\n"], "length_penalty": 2.0})
    model.generate_until([request])
    logger.remove(sink)
    assert [str(line).count("generation settings without effect: length_penalty") for line in said] == [1]


def test_the_command_line(tasks, tmp_path):
    """`python -m lmms_eval`, a spec with commas, and the samples that it logs."""
    words = [
        *(sys.executable, "-m", "lmms_eval", "--model", "selector_llava_next", "--include_path", tasks),
        *("--model_args", f"pretrained={MODEL},selector='svd-prune:energy=0.5,center=false',keep=0.25"),
        *("--tasks", "pages", "--batch_size", "2", "--log_samples", "--output_path", tmp_path),
    ]
    done = subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [log] = tmp_path.rglob("*samples_pages.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(samples) == 8
    for sample in samples:
        [counts] = sample["token_counts"]
        assert counts["visual_tokens"] == [int(0.25 * counts["all_visual_tokens"][0] + 0.5)]
    assert "svd-prune:energy=0.5,center=false, keep=0.25" in done.stdout
