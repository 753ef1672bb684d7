"""The testbed's training: labels and packing agree with the real processor and model, and every stage runs and
resumes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from transformers import AutoModelForImageTextToText, AutoProcessor

from selector.tasks.generated import charts, documents, scenes
from training.testbed.card import card
from training.testbed.join import Round, embed
from training.testbed.lessons import Lesson, by_length, collate, comparisons, facts, shortened
from training.testbed.make import EvaluationPlan, JoinPlan, ReaderPlan, TowerPlan, make
from training.testbed.model import build_model, reader_config
from training.testbed.reader import Grade, Reader, answer_loss
from training.testbed.state import Log, schedule, stage_seconds, stage_speeds
from training.testbed.symbols import CHARACTERS, INDEX, cut, cut_labels, page_labels
from training.testbed.tiles import batch
from training.testbed.tower import Phase, feature_layer, tower_config
from training.testbed.vocabulary import BOS, EOS, IMAGE_ID, PAD, build_processor, build_tokenizer, conversation, recital

SIZES = {"192x192": (1, 4), "192x96": (1, 4), "96x192": (1, 4)}
SHARES = {"documents": 0.4, "scenes": 0.3, "charts": 0.3}
PAGES = {"documents": SIZES, "scenes": SIZES}


@pytest.mark.parametrize(
    "text",
    ["what is TOTAL?", "415", "is there a red thing?", "USER: <image>\nread the page. ASSISTANT:TAX 9, UNIT 1A</s>"],
)
def test_known_text_survives_the_tokenizer(text: str):
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


@pytest.mark.slow
def test_every_question_and_answer_is_in_the_vocabulary():
    tokenizer = build_tokenizer()
    for task in (documents, scenes, charts):
        for sample in task.samples(100, 5):
            assert tokenizer.unk_token_id not in tokenizer.encode(f"{sample.question} {sample.answer}")


def test_unknown_words_become_unk():
    tokenizer = build_tokenizer()
    assert tokenizer.unk_token_id in tokenizer.encode("zebra")


def test_the_chat_template_gives_the_training_prompt():
    processor = build_processor()
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is TAX?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "12"}]},
        {"role": "user", "content": [{"type": "text", "text": "what is CITY?"}]},
        {"role": "assistant", "content": "7A"},
    ]
    ids, labels = conversation(processor.tokenizer, [("what is TAX?", "12"), ("what is CITY?", "7A")], 1)
    assert processor.apply_chat_template(chat) == processor.tokenizer.decode(ids)
    answers = [i for i, label in zip(ids, labels, strict=True) if label != -100]
    assert processor.tokenizer.decode(answers) == "12</s>7A</s>"
    start = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    assert start == "USER: <image>\nwhat is TAX? ASSISTANT:"


@pytest.mark.parametrize("size", list(documents.SIZES))
def test_cut_is_what_the_processor_does(size):
    page = documents.page("train", 0, 3, size)
    pixels = build_processor().image_processor(page.image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(cut(page.image), pixels, atol=1e-5)


def test_label_grid_spells_the_lines():
    for seed in range(20):
        page = documents.layout(Random(seed), (192, 192), 5)
        _, full = page_labels(documents.marks(page), page.size)
        rows = ["".join("" if c == 0 else CHARACTERS[c - 1] for c in row) for row in full[0]]
        assert "".join(rows) == "".join(f"{line.key}:{line.value}" for line in page.lines)


def test_areas_are_labelled_by_their_box_and_glyphs_stand_on_them():
    marks = (("A", (8.0, 8.0, 16.0, 16.0)), ("red bar", (0.0, 0.0, 24.0, 16.0)))
    _, full = page_labels(marks, (96, 96))
    assert (full[0] == INDEX["red bar"]).sum() == 5
    assert full[0, 1, 1] == INDEX["A"]
    assert full[1].sum() == 0


def test_every_object_has_one_centre_in_each_scale():
    size = (192, 96)
    things = scenes.layout(Random(2), size, 4)
    base, full = page_labels(scenes.marks(things), size)
    assert base[1].sum() == full[1].sum() == 4
    assert sorted(full[0][full[1] == 1]) == sorted(INDEX[thing.label] for thing in things)
    assert cut_labels(base, full).shape == (3, 2, 12, 12)


def test_tile_batches_are_deterministic():
    first, second = (batch(Random("a"), 8, {"scenes": 0.4, "charts": 0.2}) for _ in range(2))
    assert first[0].shape == (8, 3, 96, 96)
    assert first[1].shape == (8, 2, 12, 12)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def tiny_model():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return build_model(tokenizer, tower_config(16, 2, 2), reader_config(tokenizer, 16, 1, 2, 16)).eval(), tokenizer


def test_training_packs_as_the_model_does():
    model, tokenizer = tiny_model()
    grade = Grade(SHARES, batch=6, rate=1.0, until=1.0, at_most=1)
    lessons = [grade.lesson(Random(i), tokenizer, draw=True) for i in range(8)]
    assert len({one.image.size for one in lessons}) == 3
    ids, _, _ = collate(lessons)
    processor = build_processor()
    inputs = processor.image_processor([one.image for one in lessons], return_tensors="pt")
    pixels = torch.cat([torch.from_numpy(cut(one.image)) for one in lessons])
    with torch.no_grad():
        ours = embed(model, lessons, ids, feature_layer(model.model.vision_tower, pixels)[:, 1:])
    with torch.no_grad():
        packed = model.get_image_features(**inputs, return_dict=True).pooler_output
    for row, ours_row, one in zip(packed, ours, lessons, strict=True):
        slots = torch.tensor(one.ids) == model.config.image_token_id
        torch.testing.assert_close(ours_row[: len(one.ids)][slots], row, atol=1e-5, rtol=1e-4)


def test_left_out_background_keeps_symbols_and_positions():
    _, tokenizer = tiny_model()
    whole = Grade(SHARES, 1, 1.0, 1.0, 1, PAGES).lesson(Random(4), tokenizer)
    short = Grade(SHARES, 1, 1.0, 1.0, 1, PAGES, blanks=0.05).lesson(Random(4), tokenizer)
    assert len(short.ids) < len(whole.ids)
    assert [whole.ids[i] for i in short.positions] == short.ids
    assert [label for label in short.labels if label != -100] == [label for label in whole.labels if label != -100]
    np.testing.assert_array_equal(short.symbols, whole.symbols[:, short.kept])
    inked = (whole.symbols[0] > 0) & (whole.symbols[0] < whole.symbols[0].max())
    assert set(np.flatnonzero(inked)) <= set(short.kept)


def test_in_every_second_lesson_the_ends_of_words_stay():
    tokenizer = build_tokenizer()
    shares = []
    for index in range(24):
        whole = Grade(SHARES, 1, 1.0, 1.0, 1).lesson(Random(index), tokenizer)
        short = Grade(SHARES, 1, 1.0, 1.0, 1, blanks=1e-6).lesson(Random(index), tokenizer)
        inked = (whole.symbols[0] > 0) & (whole.symbols[0] < whole.symbols[0].max())
        ends = np.flatnonzero(inked[:-1] & ~inked[1:]) + 1
        shares.append(np.isin(ends, short.kept).mean())
    assert sum(share == 1 for share in shares) >= 6
    assert sum(share < 0.1 for share in shares) >= 6
    assert sum(0.1 <= share < 1 for share in shares) == 0


def test_groups_of_like_length_have_the_loss_and_gradients_of_all():
    tokenizer = build_tokenizer()
    grade = Grade(shares=SHARES, batch=5, rate=1e-3, until=1.1, at_most=1, pages=PAGES, drill=0.5, blanks=0.1)
    lessons = [grade.lesson(Random(f"groups/{i}"), tokenizer) for i in range(5)]
    torch.manual_seed(0)
    reader = Reader(reader_config(tokenizer, 32, 1, 2, 48), tokenizer)

    def told(part: list[Lesson]) -> tuple[torch.Tensor, Counter]:
        ids, labels, positions = collate(part)
        symbols = torch.cat([torch.from_numpy(one.symbols) for one in part], dim=1)
        return answer_loss(reader.language, reader.embed(ids, symbols), labels, positions, [one.kind for one in part])

    whole, hits = told(lessons)
    groups = by_length(lessons, 2)
    assert [len(part) for part, _ in groups] == [3, 2]
    assert max(len(one.ids) for one in groups[0][0]) <= min(len(one.ids) for one in groups[1][0])
    parts = [(told(part), share) for part, share in groups]
    torch.testing.assert_close(sum(loss * share for (loss, _), share in parts), whole)
    assert sum((found for (_, found), _ in parts), Counter()) == hits
    assert sum(hits.values()) == sum(label != -100 for one in lessons for label in one.labels)


def test_tower_features_are_those_of_the_feature_layer():
    model, _ = tiny_model()
    pixels = torch.randn(2, 3, 96, 96)
    expected = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[1][:, 1:]
    torch.testing.assert_close(feature_layer(model.model.vision_tower, pixels)[:, 1:], expected)


def test_schedule_and_log(tmp_path: Path):
    assert schedule(0, 100, 1.0, 10) == pytest.approx(0.1)
    assert schedule(10, 100, 1.0, 10) == pytest.approx(1.0)
    assert schedule(100, 100, 1.0, 10, last=0.2) == pytest.approx(0.2)
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"stage": "tower", "step": 1, "seconds": 50.0}) + "\n")
    log = Log(path, "tower")
    log(2, loss=1.0)
    assert stage_seconds(path)["tower"] >= 50.0
    assert stage_speeds(path) == {}
    log.count(300)
    log.count(200)
    log(3, loss=1.0)
    log(4, loss=1.0)  # nothing was counted since
    first, second = (json.loads(line) for line in path.read_text().splitlines()[-2:])
    assert stage_speeds(path) == {"tower": first["tokens_per_s"]}
    assert first["tokens_per_s"] > 0
    assert "tokens_per_s" not in second


@pytest.mark.slow
def test_every_stage_runs_and_resumes(tmp_path: Path):
    grade = Grade(SHARES, batch=2, rate=1e-3, until=1.1, at_most=2, blanks=0.1)

    def run(tower_steps: int, until="evaluate"):
        make(
            out=tmp_path / "out",
            work=tmp_path / "work",
            tower=TowerPlan(16, 2, 2, 3, 1, [Phase(tower_steps, 1e-3, 1e-4, {"scenes": 0.3, "documents": 0.3})]),
            reader=ReaderPlan(16, 1, 2, 16, 1, [grade]),
            join=JoinPlan(
                {"scenes": 0.5}, 2, 2, 1e-3, 1, [Round([grade]), Round([grade], last=0.5, parts=2, tower=0.5)]
            ),
            evaluation=EvaluationPlan(3, 0, 2),
            until=until,
        )

    run(1, "tower")
    assert torch.load(tmp_path / "work/tower.pt", weights_only=True)["step"] == 1
    run(2)
    assert torch.load(tmp_path / "work/tower.pt", weights_only=True)["step"] == 2
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["documents"]["seen"]["accuracy"] <= 1
    assert results["samples"] == 3
    card = (tmp_path / "out/README.md").read_text()
    assert f"{results['parameters']:,}" in card
    assert "| scenes |" in card
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    sample = next(documents.samples(1, 0))
    inputs = processor(images=sample.image, text="USER: <image>\nwhat is TAX? ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() in (444, 744)
    joined = torch.load(tmp_path / "work/join.pt", weights_only=True)["model"]
    torch.testing.assert_close(model.state_dict()["model.image_newline"], joined["model.image_newline"])


def test_special_ids_are_those_of_the_tokenizer():
    tokenizer = build_tokenizer()
    names = ["<pad>", "<s>", "</s>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(names) == [PAD, BOS, EOS, IMAGE_ID]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD, BOS, EOS)


def test_a_hint_asks_for_the_first_token_early():
    tokenizer = build_tokenizer()
    ids, labels = conversation(tokenizer, [("what is TAX?", "12")], 1, hint=True)
    asked = [
        (tokenizer.decode([i]), tokenizer.decode([label])) for i, label in zip(ids, labels, strict=True) if label >= 0
    ]
    # a label is what the token before it must predict: "?", the space and "ASSISTANT:" all predict "1"
    assert asked == [(" ", "1"), ("ASSISTANT:", "1"), ("1", "1"), ("2", "2"), ("</s>", "</s>")]


def test_every_question_has_a_short_form():
    for task in (documents, charts):
        for sample in task.samples(40, 6):
            short = shortened(sample.question)
            assert short.endswith("?")
            assert len(short) < len(sample.question)
    with pytest.raises(ValueError, match="must begin like"):
        shortened("why?")


def test_facts_of_a_scene():
    marks = (("red circle", (0.0, 0.0, 9.0, 9.0)), ("red cross", (20.0, 0.0, 29.0, 9.0)))
    found = facts("scenes", (), marks)
    assert len(found) == len(set(found)) == 4 + 2 + 6
    for fact in [("circles?", "1"), ("squares?", "0"), ("cross?", "red"), ("red?", "yes"), ("blue?", "no")]:
        assert fact in found


def test_a_recital_labels_the_answers_alone():
    tokenizer = build_tokenizer()
    ids, labels = recital(tokenizer, [("TAX?", "12"), ("DATE?", "7A")], 3)
    assert ids.count(IMAGE_ID) == 3
    assert tokenizer.decode([i for i in ids if i != IMAGE_ID]) == "USER: \nTAX?12,DATE?7A,"
    assert tokenizer.decode([label for label in labels if label >= 0]) == "12,7A,"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_the_shipped_settings_are_those_of_the_config():
    parser = ArgumentParser()
    parser.add_function_arguments(make)
    root = Path(__file__).parents[2]
    plans = []
    for path in ("configs/testbed/tiny.yaml", "checkpoints/llava-next-tiny/made-with.yaml"):
        settings = yaml.safe_load((root / path).read_text()) | {"out": "unused"}
        plans.append(parser.instantiate(parser.parse_object(settings)))
    for name in ("tower", "reader", "join", "evaluation"):
        assert getattr(plans[0], name) == getattr(plans[1], name)


def test_the_shipped_card_is_written_from_the_shipped_results():
    folder = Path(__file__).parents[2] / "checkpoints/llava-next-tiny"
    assert (folder / "README.md").read_text() == card(json.loads((folder / "results.json").read_text()))


def test_a_comparison_without_a_page_is_right_and_asks_for_the_deciding_token_alone():
    tokenizer = build_tokenizer()
    one = comparisons(Random(3), tokenizer, ["documents", "charts"], 12)
    turns = tokenizer.decode(one.ids).removeprefix("<s>").split("</s>")
    decided = [(place, label) for place, label in enumerate(one.labels) if label != -100]
    assert len(decided) == 12 == len(turns) - 1  # the last one is empty
    for turn, (place, label) in zip(turns[:-1], decided, strict=True):
        _, _, said = turn.partition(" ASSISTANT:")
        told, _, answer = said.partition(": ")
        values = {pair.split()[0]: int(pair.split()[1]) for pair in told.split(", ")}
        assert answer == max(values, key=lambda key: values[key])
        assert tokenizer.decode([label]) == answer[0]
        assert one.ids[place] == label
    assert one.symbols.shape == (2, 0)
    with pytest.raises(ValueError, match="compared must be 0"):
        Grade({"scenes": 1.0}, 1, 1.0, 1.0, 1, compared=1.0).lesson(Random(0), tokenizer)
