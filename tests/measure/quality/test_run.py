import json
import shutil
from dataclasses import replace

import pytest
import torch

from npu_sparse import Budget, Indexer
from npu_sparse.indexer import AdapterError
from npu_sparse.measure.decode import generate_texts
from npu_sparse.measure.quality import MACRO, EvalConfig, adopt_records, prepare_prompts, report_eval, run_eval
from npu_sparse.measure.quality import run as quality
from npu_sparse.measure.quality.page import markdown, tabulate
from npu_sparse.runs import stats
from npu_sparse.runs.store import RunError
from npu_sparse.tasks import encode, generate, score
from npu_sparse.testing import tiny_model

CONFIG = EvalConfig(
    model="tiny", tasks=("niah_single_1", "vt"), length=900, count=3, budget="k=32,block=16", batch=2, max_new_tokens=6,
    variants=("dense", "oracle", "oracle-shared", "indexer", "indexer-shared", "local", "random"), min_dense_score=0.0,
    dtype="float32", instruments=("generated",),
)  # fmt: skip


@pytest.fixture
def evaluate(model, tokenizer, indexer):
    def run(config, output, **options):
        return run_eval(config, output, **{"model": model, "tokenizer": tokenizer, "indexer": indexer, **options})

    return run


@pytest.fixture(scope="module")
def finished(model, tokenizer, indexer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("eval") / "run"
    return directory, run_eval(CONFIG, directory, model=model, tokenizer=tokenizer, indexer=indexer)


@pytest.fixture
def counted(monkeypatch):
    """The (task, variant) of every cell that is computed from here on."""
    cells, compute = [], quality._compute_cell

    def counting(config, directory, cell, *rest):
        cells.append(cell)
        compute(config, directory, cell, *rest)

    monkeypatch.setattr(quality, "_compute_cell", counting)
    return cells


def records(directory):
    return {path.stem: json.loads(path.read_text()) for path in (directory / "records").iterdir()}


def test_every_variant_of_a_task_runs_on_the_same_prompts(finished):
    directory, _ = finished
    cells = records(directory)
    assert len(cells) == len(CONFIG.tasks) * len(CONFIG.variants)
    for task in CONFIG.tasks:
        of_task = [record for record in cells.values() if record["task"] == task]
        assert len({record["prompts"] for record in of_task}) == 1
        order = [[(sample["index"], sample["length"]) for sample in record["samples"]] for record in of_task]
        assert all(samples == order[0] for samples in order)
        assert [index for index, _ in order[0]] == [0, 1, 2]


def test_rows_name_the_evidence_and_the_budget_they_ran_at(finished):
    _, result = finished
    named = {row["variant"]: (row["evidence"], row["k"], row["block"]) for row in result["rows"]}
    assert named == {
        "dense": ("dense", None, None),
        "oracle": ("oracle", 32, 1),
        "oracle-shared": ("oracle", 32, 16),
        "indexer": ("untrained", 32, 1),
        "indexer-shared": ("untrained", 32, 16),
        "local": ("control", 32, 1),
        "random": ("control", 32, 1),
    }


def test_report_says_that_untrained_scores_mean_nothing(finished):
    directory, _ = finished
    assert "untrained" in (text := (directory / "report.md").read_text()) and "say nothing about quality" in text
    assert (directory / "report.png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_not_computed_again(evaluate, finished, counted):
    directory, result = finished
    assert evaluate(CONFIG, directory) == result
    assert counted == []


def test_a_finished_run_reports_without_a_model(finished):
    directory, result = finished
    assert run_eval(CONFIG, directory, indexer=object()) == result
    assert report_eval(directory) == result


def test_an_interrupted_run_computes_only_what_is_missing(evaluate, tmp_path, counted):
    config = replace(CONFIG, variants=("dense", "local"))
    result = evaluate(config, tmp_path)
    lost = tmp_path / "records" / "vt-local.json"
    lost.unlink()
    counted.clear()
    again = evaluate(config, tmp_path)
    assert counted == [("vt", "local")]
    assert again["rows"] == result["rows"]


def test_shards_merge_to_the_report_of_a_single_run(evaluate, finished, tmp_path, counted):
    _, single = finished
    first = evaluate(CONFIG, tmp_path, shard=(0, 3))
    assert first["complete"] is False and len(first["missing"]) == 9
    evaluate(CONFIG, tmp_path, shard=(2, 3))
    assert evaluate(CONFIG, tmp_path, shard=(1, 3)) == single
    assert len(counted) == len(set(counted)) == 14


def test_prompts_prepared_beforehand_are_the_prompts_of_the_run(evaluate, finished, tokenizer, tmp_path, monkeypatch):
    _, single = finished
    prepare_prompts(CONFIG, tmp_path, tokenizer=tokenizer)
    monkeypatch.setattr(quality, "generate", None)
    assert evaluate(CONFIG, tmp_path) == single


def test_questions_at_the_front_are_another_run_and_its_report_says_so(evaluate, finished, tmp_path):
    directory, _ = finished
    config = replace(CONFIG, tasks=("niah_single_1",), variants=("dense", "local"), question="front")
    evaluate(config, tmp_path)
    prompts = json.loads((tmp_path / "prompts" / "niah_single_1.json").read_text())
    assert all(example["prompt"].startswith("What is the special") for example in prompts)
    words = "the question at the front of the prompt"
    assert words in (tmp_path / "report.md").read_text() and words not in (directory / "report.md").read_text()
    with pytest.raises(ValueError, match="question must be at the end for vt, got 'middle'"):
        evaluate(replace(CONFIG, question="middle"), tmp_path / "refused")


def test_a_run_of_before_questions_could_be_moved_is_resumed(evaluate, tmp_path, counted):
    config = replace(CONFIG, tasks=("niah_single_1",), variants=("dense", "local"))
    evaluate(config, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "question"}))
    counted.clear()
    evaluate(config, tmp_path)
    assert counted == []


def test_only_solved_skips_sparse_variants_of_unsolved_tasks(evaluate, tmp_path, counted):
    config = replace(CONFIG, variants=("dense", "local"), min_dense_score=1.0, only_solved=True)
    result = evaluate(config, tmp_path)
    assert counted == [("niah_single_1", "dense"), ("vt", "dense")]
    assert not any(task["solved"] for task in result["tasks"].values())
    assert {row["task"] for row in result["rows"]} == {"niah_single_1", "vt"}
    assert "not in the macro average" in (tmp_path / "report.md").read_text()


def test_a_shard_whose_dense_cells_another_shard_lost_computes_them(evaluate, tmp_path, counted):
    config = replace(CONFIG, variants=("dense", "local"), only_solved=True)
    result = evaluate(config, tmp_path, shard=(3, 4))
    assert counted == [("vt", "dense"), ("vt", "local")]
    assert result["missing"] == [["niah_single_1", "dense"], ["niah_single_1", "local"]]


def test_macro_average_and_gaps_take_only_tasks_that_dense_solves():
    def record(task, variant, scores):
        samples = [{"index": n, "length": 9, "score": s, "output": ""} for n, s in enumerate(scores)]
        common = {"prompts": task, "base": {}, "adapter": None, "machine": {}, "budget": None}
        return {"task": task, "variant": variant, "evidence": "dense", "samples": samples, **common}

    config = replace(CONFIG, tasks=("vt", "fwe", "cwe"), variants=("dense", "oracle"), min_dense_score=0.5)
    scores = {"vt": ([1, 1, 1], [1, 0, 0]), "fwe": ([1, 1, 0], [1, 1, 0]), "cwe": ([0, 0, 1], [1, 1, 1])}
    cells = {(t, v): record(t, v, s) for t, both in scores.items() for v, s in zip(("dense", "oracle"), both)}
    result = tabulate(config, cells)
    macro = {row["variant"]: row["score"]["value"] for row in result["rows"] if row["task"] == MACRO}
    assert macro == pytest.approx({"dense": (1 + 2 / 3) / 2, "oracle": (1 / 3 + 2 / 3) / 2})
    change = {gap["task"]: gap["change"]["value"] for gap in result["gaps"]}
    assert change == pytest.approx({MACRO: -1 / 3, "vt": -2 / 3, "fwe": 0, "cwe": 2 / 3})
    assert [gap["gap"] for gap in result["gaps"]] == ["oracle gap"] * 4


def test_variants_with_options_run_at_their_own_budget_and_are_compared_with_their_base(evaluate, tmp_path, counted):
    variants = (
        "dense", "indexer-shared+candidates=64+key_block=16", "indexer-shared", "indexer-shared+share_layers=2", "oracle",
        "oracle+k=64", "local",
    )  # fmt: skip
    config = replace(CONFIG, tasks=("vt",), variants=variants, budget=CONFIG.budget.replace(candidates=128))
    result = evaluate(config, tmp_path)
    budgets = {record["variant"]: record["budget"] for record in records(tmp_path).values()}
    assert budgets.pop("dense") is None
    names = ("k", "block", "candidates", "key_block", "share_layers")
    assert {name: tuple(budget[field] for field in names) for name, budget in budgets.items()} == {
        "indexer-shared": (32, 16, 128, 64, 1),
        "indexer-shared+candidates=64+key_block=16": (32, 16, 64, 16, 1),
        "indexer-shared+share_layers=2": (32, 16, 128, 64, 2),
        "oracle": (32, 1, 0, 64, 1),
        "oracle+k=64": (64, 1, 0, 64, 1),
        "local": (32, 1, 0, 64, 1),
    }
    pairs = {(change["from"], change["to"]) for change in result["options"]}
    assert pairs == {
        (before, after) for after in variants if "+" in after for before in ("dense", after.partition("+")[0])
    }
    text = (tmp_path / "report.md").read_text()
    assert "## Options" in text and "| indexer, shared, candidates 64, key_block 16 | indexer, shared |" in text
    assert "All sparse rows: candidates 128, key_block 64." not in text and "All sparse rows: candidates 128." in text
    counted.clear()
    assert evaluate(config, tmp_path) == result and not counted


def test_an_options_change_is_paired_by_prompt():
    def record(variant, scores):
        samples = [{"index": n, "length": 9, "score": s, "output": ""} for n, s in enumerate(scores)]
        common = {"prompts": "vt", "base": {}, "adapter": None, "machine": {}, "budget": None}
        return {"task": "vt", "variant": variant, "evidence": "oracle", "samples": samples, **common}

    scores = {"dense": [1, 1, 0, 1], "oracle": [1, 0, 0, 1], "oracle+k=64": [0, 1, 1, 1]}
    config = replace(CONFIG, tasks=("vt",), count=4, variants=tuple(scores))
    result = tabulate(config, {("vt", name): record(name, values) for name, values in scores.items()})
    changes = {(entry["from"], entry["task"]): entry["change"] for entry in result["options"]}
    assert changes["oracle", "vt"]["value"] == pytest.approx(1 / 4)
    assert changes["dense", "vt"]["value"] == pytest.approx(0)
    assert changes["oracle", MACRO] == changes["oracle", "vt"]
    paired = stats.macro_difference([scores["oracle"]], [scores["oracle+k=64"]], seed=config.seed)
    assert (changes["oracle", "vt"]["low"], changes["oracle", "vt"]["high"]) == (paired.low, paired.high)
    assert paired.low < 0 < paired.high


def test_batches_and_early_stops_do_not_change_what_is_found(model, tokenizer, monkeypatch):
    examples = generate("vt", tokenizer, length=900, count=5, seed=1, max_new_tokens=12)
    ids = [encode(tokenizer, example) for example in examples]
    plain = []
    for prompt in ids:
        with torch.inference_mode():
            tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        plain.append(tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True))
    assert generate_texts(model, tokenizer, examples, ids, batch=2) == plain

    # rows whose outputs contain their answers stop early, at different times, and keep them
    asked = [
        replace(example, answers=(text[2 * n : 2 * n + 2],)) for n, (example, text) in enumerate(zip(examples, plain))
    ]
    steps, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: steps.append(1) or forward(*args, **kwargs))
    early = generate_texts(model, tokenizer, asked, ids, batch=5)
    for example, text, whole in zip(asked, early, plain):
        assert whole.startswith(text) and score(example, text) == 1
    assert len(steps) < 12


def test_what_is_found_after_a_sparse_prefill_does_not_depend_on_the_batch(evaluate, tmp_path, tokenizer):
    """Blocks of queries and keys, and random draws, would begin at a batch's padding."""
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=0)  # of peaked attention
    indexer = Indexer.for_model(model, dim=64)
    names = ("dense", "oracle-shared", "indexer-shared", "random", "indexer+candidates=64")
    config = replace(CONFIG, tasks=("niah_single_1",), variants=names, budget="k=64,block=16,key_block=16", max_new_tokens=8)
    examples = generate("niah_single_1", tokenizer, length=900, count=3, seed=config.seed)
    assert len({len(encode(tokenizer, example)) for example in examples}) == 3
    found = {}
    for batch in (1, 3):
        evaluate(replace(config, batch=batch), tmp_path / str(batch), model=model, indexer=indexer)
        for name in names:
            (path,) = (tmp_path / str(batch) / "records").glob(f"niah_single_1-{name}.json")
            record = json.loads(path.read_text())
            found[batch, name] = [sample["output"] for sample in record["samples"]]
            assert record.get("batch") == (None if name == "dense" else 1)
    assert [name for name in names if found[1, name] != found[3, name]] == []


def test_sparse_prompts_that_were_generated_in_batches_are_not_joined_by_others(evaluate, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    record = tmp_path / "run/records/vt-oracle-shared.json"
    record.write_text(json.dumps({key: value for key, value in json.loads(record.read_text()).items() if key != "batch"}))
    (tmp_path / "run/records/vt-local.json").unlink()
    with pytest.raises(RunError, match="the same number of sparse prompts generated together, got (1 and 2|2 and 1)"):
        evaluate(CONFIG, tmp_path / "run")


def test_records_of_the_same_cell_are_adopted_from_another_budget(evaluate, finished, tmp_path, counted):
    directory, single = finished
    config = replace(CONFIG, budget=CONFIG.budget.replace(block=64))
    copied = adopt_records(config, tmp_path / "b64", [directory])
    assert {name for _, name in copied} == {"dense", "oracle", "indexer", "local", "random"}
    result = evaluate(config, tmp_path / "b64")
    assert {name for _, name in counted} == {"oracle-shared", "indexer-shared"}
    assert result["prompts"] == single["prompts"]
    with pytest.raises(RunError, match="differ .* in k, block, tail and variants only"):
        adopt_records(replace(CONFIG, seed=9), tmp_path / "seed9", [directory])


def test_another_config_in_the_same_directory_is_refused(evaluate, finished):
    with pytest.raises(RunError, match="holds another run"):
        evaluate(replace(CONFIG, budget=CONFIG.budget.replace(k=48)), finished[0])


def test_cells_of_another_indexer_are_never_mixed_in(evaluate, model, tmp_path, counted):
    config = replace(CONFIG, tasks=("vt",), variants=("dense", "indexer", "indexer-shared"))
    evaluate(config, tmp_path)
    (tmp_path / "records" / "vt-indexer-shared.json").unlink()
    counted.clear()
    with pytest.raises(RunError, match="same adapter weights"):
        evaluate(config, tmp_path, indexer=Indexer.for_model(model, dim=64, seed=1))
    assert counted == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tasks": ("vtt",)}, "did you mean vt"),
        ({"tasks": ()}, "tasks must name at least one"),
        ({"tasks": ("qa_1",)}, "qa_1 needs a question file"),
        ({"variants": ("dense", "orakel")}, "variants must be among .* got 'orakel'"),
        ({"variants": ("dense", "indexer+k=0")}, "k must be >= 1, got 0"),
        ({"variants": ("dense", "indexer-shared+candidates=8")}, "candidates must be 0 or hold the k keys"),
        ({"variants": ("oracle",)}, "must include 'dense'"),
        ({"variants": ("dense", "dense")}, "named twice"),
        ({"count": 0}, "count must be a positive integer, got 0"),
        ({"batch": -1}, "batch must be a positive integer, got -1"),
        ({"budget": "k=2048"}, "k must not exceed the context, got k = 2048 for 900 tokens"),
        ({"budget": "k=3"}, "k must hold the keys that are always kept"),
        ({"budget": "k=32,block=16,recent=20"}, "k must hold the keys that are always kept"),
        ({"budget": "block=48"}, "block .b_sel. must be one of"),
        ({"max_new_tokens": 900}, "max_new_tokens must lie in"),
        ({"min_dense_score": 50}, "min_dense_score must lie in"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_errors_come_before_anything_is_computed(evaluate, model, tmp_path, counted):
    with pytest.raises(ValueError, match="adapter must name an indexer's directory"):
        run_eval(CONFIG, tmp_path / "a")
    with pytest.raises(ValueError, match="must fit the model's 4096 positions, got 5000"):
        evaluate(replace(CONFIG, length=5000), tmp_path / "b")
    with pytest.raises(ValueError, match="shard must be"):
        evaluate(CONFIG, tmp_path / "c", shard=(2, 2))
    foreign = Indexer.for_model(model, dim=64)
    foreign.base = {**foreign.base, "weights_fingerprint": "0" * 16}
    with pytest.raises(AdapterError, match="another base"):
        evaluate(CONFIG, tmp_path / "d", indexer=foreign)
    assert counted == []


def test_config_survives_json_and_forgets_the_device_index():
    config = replace(CONFIG, device="cuda:1", texts=("builtin", "stdlib"))
    assert EvalConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == replace(config, device="cuda")


def tabulated(directory) -> dict:
    """As `report_eval`, without the pictures; what is written must be JSON."""
    config = quality._read_config(directory)
    records = quality._records(config, directory)
    if len(records) < len(quality._cells(config)):
        raise RunError("config.json names other cells")
    quality._check_agree(config, list(records.values()))
    result = tabulate(config, records)
    json.dumps(markdown(result), allow_nan=False)
    json.dumps(result, allow_nan=False)
    return result


def test_a_record_of_another_budget_is_not_quoted(evaluate, finished, tmp_path):
    """Two runs that differ in k, one of whose records came into the other's directory."""
    other = replace(CONFIG, budget=CONFIG.budget.replace(k=48), tasks=("vt",), variants=("dense", "oracle"))
    evaluate(other, tmp_path / "other")
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    shutil.copy(tmp_path / "other/records/vt-oracle.json", directory / "records/vt-oracle.json")
    with pytest.raises(RunError, match=r"vt-oracle.json must be the record of budget .*'k': 32.*, got .*'k': 48.*: delete it"):
        report_eval(directory)
    shutil.copy(directory / "records/vt-local.json", directory / "records/vt-oracle.json")
    with pytest.raises(RunError, match=r"vt-oracle.json must be the record of variant 'oracle', got 'local'"):
        report_eval(directory)


def test_a_run_of_version_0_1_is_read_and_resumed(evaluate, tmp_path, counted):
    """Its config has the Budget in fields of its own, and its records have Budgets without the fields that came later."""
    config = replace(CONFIG, tasks=("vt",), variants=("dense", "oracle-shared"), instruments=("generated",))
    first = evaluate(config, tmp_path)
    former = {"k": 32, "block": 16, "reduce": "max", "sink": 0, "recent": 0, "share_layers": 1, "tail": False, "candidates": 0}
    written = json.loads((tmp_path / "config.json").read_text())
    assert Budget.parse(written.pop("budget")) == config.budget
    (tmp_path / "config.json").write_text(json.dumps({**written, **former, "key_block": 64}))
    path = tmp_path / "records/vt-oracle-shared.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "budget": {name: record["budget"][name] for name in former}}))
    counted.clear()
    assert evaluate(config, tmp_path)["rows"] == first["rows"] and counted == []
    with pytest.raises(RunError, match="holds another run"):
        evaluate(replace(config, budget=config.budget.replace(k=48)), tmp_path)


def test_a_mutated_record_or_config_is_one_sentence_with_a_name_or_is_read(finished, tmp_path, mutations):
    """No traceback, and no figure that is not a number: records, prompts' digests in them, and the config."""
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    for name in ("records/vt-dense.json", "records/niah_single_1-indexer-shared.json", "config.json"):
        path = directory / name
        whole = path.read_bytes()
        for n, damaged in enumerate(mutations(json.loads(whole), 90, seed=len(name))):
            path.write_bytes(damaged)
            try:
                tabulated(directory)
            except RunError as error:
                assert name in str(error) or (name == "config.json" and "records/" in str(error)) or "the same" in str(error), n
                assert "\n" not in str(error)
        path.write_bytes(whole)
    assert tabulated(directory)["rows"] == finished[1]["rows"]


def test_records_from_before_a_field_of_the_budget_are_adopted(evaluate, tmp_path):
    config = replace(CONFIG, tasks=("vt",), variants=("dense", "local"))
    evaluate(config, tmp_path / "old")
    path = tmp_path / "old" / "records" / "vt-local.json"
    record = json.loads(path.read_text())
    del record["budget"]["exact_last"]
    path.write_text(json.dumps(record))
    assert adopt_records(config, tmp_path / "new", [tmp_path / "old"]) == [("vt", "dense"), ("vt", "local")]
