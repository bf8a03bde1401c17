import json
import shutil
import time
from dataclasses import replace

import pytest
import torch

from npu_sparse import Indexer
from npu_sparse.indexer import AdapterError
from npu_sparse.measure.clocks import StageTimer, amdahl_ceiling, dense_attention_timed
from npu_sparse.measure.prompts import prompt_ids
from npu_sparse.measure.ttft import STAGES, TtftConfig, page, run_ttft, time_to_first_token
from npu_sparse.measure.ttft import run as ttft
from npu_sparse.measure.ttft.config import LAYERS
from npu_sparse.measure.ttft.run import LeftOutError
from npu_sparse.measure.ttft.shapes import SHAPES, drawn
from npu_sparse.measure.variants import Subject
from npu_sparse.models.architectures import text_config
from npu_sparse.models.hybrid import attach as hybrid
from npu_sparse.ops.dispatch import KernelUnavailableError
from npu_sparse.runs.store import RunError, read_stage

CONFIG = TtftConfig(
    model="tiny", lengths=(96, 200), budget="k=32,block=16", runs=3, warmup=1, stage_runs=2, prompt="random", overhead=True,
    variants=("dense", "oracle-shared", "indexer", "indexer-shared", "local"), dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(model, indexer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ttft") / "run"
    return directory, run_ttft(CONFIG, directory, model=model, indexer=indexer)


def record(directory, length):
    return json.loads((directory / "records" / f"{length}.json").read_text())


def test_every_round_runs_every_variant_once_in_changing_order(finished):
    cell = record(finished[0], 96)
    names = {*CONFIG.variants, "attached"}
    assert len(cell["orders"]) == 3
    assert all(set(order) == names and len(order) == len(names) for order in cell["orders"])
    assert len({tuple(order) for order in cell["orders"]}) > 1
    assert all(len(times) == 3 and min(times) > 0 for times in cell["seconds"].values())


def test_a_variant_with_options_is_timed_beside_the_others(model, indexer, tmp_path):
    config = replace(
        CONFIG, lengths=(300,), variants=("dense", "indexer-shared", "indexer-shared+candidates=64+key_block=16"), runs=1,
        warmup=0, stage_runs=1, overhead=False,
    )  # fmt: skip
    result = run_ttft(config, tmp_path, model=model, indexer=indexer)
    assert [row["label"] for row in result["rows"]] == [
        "dense", "indexer, shared", "indexer, shared, candidates 64, key_block 16"
    ]  # fmt: skip
    one_level, two_levels = (row["stages_s"]["top-k"] for row in result["rows"][1:])
    assert one_level > 0 == two_levels  # which are one operator
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_warm_up_rounds_are_run_and_not_reported(model, indexer, tmp_path, monkeypatch):
    config = replace(CONFIG, lengths=(96,), variants=("dense",), overhead=False, runs=2, warmup=3, stage_runs=1)
    clock = iter(range(100))
    monkeypatch.setattr(ttft, "time_to_first_token", lambda model, ids, chunk: (float(next(clock)), 0))
    monkeypatch.setattr(page, "_breakdown", lambda runs: {"attention": 1.0, "total": 2.0, **dict.fromkeys(STAGES, 0.5)})
    run_ttft(config, tmp_path, model=model)
    assert record(tmp_path, 96)["seconds"] == {"dense": [3.0, 4.0]}


def test_stages_of_sparse_prefill_add_up_to_its_total(finished):
    rows = [row for row in finished[1]["rows"] if row["variant"].startswith("indexer")]
    assert len(rows) == 4
    for row in rows:
        stages = row["stages_s"]
        assert set(stages) == {*STAGES, "total"}
        assert all((stages[name] > 0) == (name != "exact") for name in STAGES)  # no exact end was asked for
        assert sum(stages[name] for name in STAGES) == pytest.approx(stages["total"])


def test_each_variant_spends_time_only_in_the_stages_it_has(finished):
    spent = {
        row["variant"]: {name for name in STAGES if row["stages_s"][name] > 0}
        for row in finished[1]["rows"]
        if row["stages_s"] is not None
    }
    assert spent["dense"] == {"attention", "rest"}
    assert spent["oracle-shared"] == spent["local"] == {"scoring", "top-k", "attention", "rest"}
    assert spent["indexer"] == set(STAGES) - {"exact"}


def test_an_exact_end_has_a_stage_of_its_own(model, indexer, tmp_path):
    config = replace(CONFIG, lengths=(300,), variants=("dense", "indexer-shared+exact_last=48"), runs=1, warmup=0, stage_runs=1)
    (row,) = [row for row in run_ttft(config, tmp_path, model=model, indexer=indexer)["rows"] if "+" in row["variant"]]
    assert row["label"] == "indexer, shared, exact_last 48"
    assert all(row["stages_s"][name] > 0 for name in STAGES)


def test_a_stage_that_takes_longer_is_seen_in_its_own_column(model, indexer):
    timer = StageTimer(torch.device("cpu"))
    for name, seconds in (("scoring", 0.02), ("top-k", 0.001), ("scoring", 0.02)):
        with timer(name):
            time.sleep(seconds)
    assert 0.04 <= timer.seconds["scoring"] < 0.3
    assert timer.seconds["top-k"] < timer.seconds["scoring"]


def test_timing_dense_attention_changes_nothing(model):
    ids = torch.arange(1, 60)[None]
    native = text_config(model)._attn_implementation
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        timer = StageTimer(torch.device("cpu"))
        with dense_attention_timed(model, timer):
            assert text_config(model)._attn_implementation != native
            timed = model(input_ids=ids).logits
    assert torch.equal(plain, timed)
    assert text_config(model)._attn_implementation == native
    assert timer.seconds["attention"] > 0


def test_amdahl_ceiling_is_the_speed_up_with_free_attention():
    assert amdahl_ceiling(4.0, 3.0) == 4.0
    assert amdahl_ceiling(2.0, 0.0) == 1.0
    for attention_s in (2.0, 2.5, -0.1):
        with pytest.raises(ValueError, match="attention_s must lie in"):
            amdahl_ceiling(2.0, attention_s)


def test_ceiling_of_the_report_is_that_of_its_dense_stages(finished):
    result = finished[1]
    for entry in result["ceilings"]:
        (dense,) = [r for r in result["rows"] if r["variant"] == "dense" and r["length"] == entry["length"]]
        stages = dense["stages_s"]
        assert entry["ceiling"] == pytest.approx(stages["total"] / (stages["total"] - stages["attention"]))
        assert entry["ceiling"] > 1


def test_rows_name_evidence_budget_and_speed_up(finished):
    rows = {row["variant"]: row for row in finished[1]["rows"] if row["length"] == 200}
    assert rows["dense"]["speed_up"] == {"value": 1, "low": 1, "high": 1}
    assert rows["dense"]["evidence"] == rows["attached"]["evidence"] == "dense"
    assert rows["indexer-shared"]["evidence"] == "untrained" and rows["indexer-shared"]["block"] == 16
    assert rows["indexer"]["block"] == 1
    shared = rows["indexer-shared"]["speed_up"]
    assert 0 < shared["low"] <= shared["value"] <= shared["high"]


def test_attached_but_dense_gives_the_dense_token_and_keeps_index_keys_up_to_date(finished):
    cell = record(finished[0], 200)
    assert cell["first_tokens"]["attached"] == cell["first_tokens"]["dense"]


def test_setting_of_the_measurement_is_reported(finished):
    directory, result = finished
    machine = result["machines"][0]
    assert machine["threads"] == torch.get_num_threads() and machine["dtype"] == "float32"
    assert machine["device"] == "cpu" and len(machine["load_average"]) == 3 and machine["dense_attention"] == "sdpa"
    text = (directory / "report.md").read_text()
    assert "load average" in text and "untrained: these are figures of the runtime" in text
    assert (directory / "report.png").read_bytes().startswith(b"\x89PNG")
    assert all(row["peak_bytes"] is None or row["peak_bytes"] > 1 << 20 for row in result["rows"])


def test_measured_lengths_are_not_measured_again(model, indexer, finished, tmp_path, monkeypatch):
    directory, result = tmp_path / "run", finished[1]
    shutil.copytree(finished[0], directory)
    measured, measure = [], ttft._measure
    monkeypatch.setattr(ttft, "_measure", lambda *args: measured.append(args[2]) or measure(*args))
    before = record(directory, 96)
    (directory / "records" / "200.json").unlink()
    again = run_ttft(CONFIG, directory, model=model, indexer=indexer)
    assert measured == [200]
    assert record(directory, 96) == before
    assert again["rows"][0] == result["rows"][0]


def test_lengths_measured_with_another_indexer_are_not_joined(model, finished, tmp_path):
    config = replace(CONFIG, variants=("dense", "indexer"), overhead=False, runs=1, stage_runs=1)
    run_ttft(config, tmp_path, model=model, indexer=Indexer.for_model(model, dim=64))
    (tmp_path / "records" / "200.json").unlink()
    with pytest.raises(RunError, match="same adapter"):
        run_ttft(config, tmp_path, model=model, indexer=Indexer.for_model(model, dim=64, seed=1))


def test_first_token_is_the_one_that_the_model_generates(model):
    ids = torch.arange(1, 80)[None]
    elapsed, token = time_to_first_token(model, ids)
    with torch.inference_mode():
        assert token == int(model(input_ids=ids).logits[0, -1].argmax())
    assert elapsed > 0


def test_a_prompt_in_chunks_gives_the_same_token_from_pieces_of_that_length(model):
    ids, seen = torch.arange(1, 80)[None], []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    whole = time_to_first_token(model, ids)[1]
    assert time_to_first_token(model, ids, 32)[1] == whole
    handle.remove()
    assert seen == [79, 32, 32, 15]


def test_text_prompts_have_the_length_and_follow_the_seed(model, tokenizer, tmp_path):
    for n in range(6):
        (tmp_path / f"{n}.txt").write_text(f"Text {n}. " + "The sky is blue. " * 20)
    config = replace(CONFIG, prompt="text", texts=(str(tmp_path),))
    subject = Subject(model, tokenizer, None)
    prompts = [prompt_ids(replace(config, seed=seed), subject, 150) for seed in (0, 0, 1)]
    assert all(ids.shape == (1, 150) for ids in prompts)
    assert torch.equal(prompts[0], prompts[1]) and not torch.equal(prompts[0], prompts[2])
    with pytest.raises(ValueError, match="texts must hold 4000 tokens"):
        prompt_ids(config, subject, 4000)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": ()}, "lengths must name at least one"),
        ({"lengths": (96, 0)}, "length must be a positive integer, got 0"),
        ({"lengths": (96, 20)}, "k must not exceed the context, got k = 32 for 20 tokens"),
        ({"variants": ("dense", "fast")}, "got 'fast'"),
        ({"variants": ("indexer",)}, "must include 'dense'"),
        ({"runs": 0}, "runs must be a positive integer, got 0"),
        ({"warmup": -1}, "warmup must be >= 0"),
        ({"prompt": "novel"}, "prompt must be one of text, random"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_errors_come_before_anything_is_measured(model, tmp_path, monkeypatch):
    monkeypatch.setattr(ttft, "_measure", None)
    with pytest.raises(ValueError, match="must fit the model's 4096 positions, got 5000"):
        run_ttft(replace(CONFIG, lengths=(96, 5000)), tmp_path / "a", model=model)
    foreign = Indexer.for_model(model, dim=64)
    foreign.base = {**foreign.base, "weights_fingerprint": "0" * 16}
    with pytest.raises(AdapterError, match="another base"):
        run_ttft(CONFIG, tmp_path / "b", model=model, indexer=foreign)


@pytest.mark.parametrize("layers", [("fast",), ("stock", "fast")])
@pytest.mark.parametrize(
    "shape, error, message",
    [
        ("qwen2.5-tiny", ValueError, r"model must have Gated DeltaNet layers .*, got 'qwen2'"),
        ("qwen3.5-tiny", KernelUnavailableError, "FastHybrid's kernels need triton: run `pip install triton`"),
    ],
)
def test_fast_layers_that_do_not_run_are_refused_before_anything_is_measured(
    tmp_path, monkeypatch, layers, shape, error, message
):
    if error is KernelUnavailableError:  # as on a GPU
        implementation = hybrid._implementation
        monkeypatch.setattr(hybrid, "_missing", lambda module: True)
        monkeypatch.setattr(hybrid, "_implementation", lambda impl, device: implementation(impl, "cuda"))
    monkeypatch.setattr(ttft, "_measure", lambda *_: pytest.fail("measured"))
    config = replace(SHAPE, shape=shape, layers=layers, chunk=0)
    with pytest.raises(error, match=message):
        run_ttft(config, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("4*.json"))


def test_config_survives_json():
    assert TtftConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


def tabulated(directory) -> dict:
    """As the end of `run_ttft`, without the pictures; what is written must be JSON."""
    config = read_stage(directory, "ttft", TtftConfig)
    records = list(ttft._cells(config, directory).records().values())
    if len(records) < len(config.lengths):
        raise RunError("config.json names other lengths")
    ttft._check_agree(directory, records)
    result = json.loads(json.dumps(page.tabulate(config, records), allow_nan=False))
    page.markdown(result)
    return result


def test_a_record_of_another_budget_is_not_quoted(finished, model, indexer, tmp_path):
    other = replace(CONFIG, budget=CONFIG.budget.replace(k=48), lengths=(96,), stage_runs=1, warmup=0)
    run_ttft(other, tmp_path / "other", model=model, indexer=indexer)
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.copy(tmp_path / "other/records/96.json", tmp_path / "run/records/96.json")
    with pytest.raises(RunError, match=r"96.json (must be the record of budgets|cannot be read .it.stages)"):
        run_ttft(CONFIG, tmp_path / "run", model=model, indexer=indexer)


def test_a_run_of_version_0_1_is_read_and_resumed(finished, model, indexer, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    expected = tabulated(tmp_path / "run")["rows"]
    for path in (tmp_path / "run/records").iterdir():
        path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "budgets"}))
    written = json.loads((tmp_path / "run/config.json").read_text())
    del written["budget"]
    (tmp_path / "run/config.json").write_text(json.dumps({**written, "k": 32, "block": 16, "reduce": "max", "sink": 0}))
    monkeypatch.setattr(ttft, "_measure", None)
    again = run_ttft(CONFIG, tmp_path / "run", model=model, indexer=indexer)
    assert json.loads(json.dumps(again["rows"])) == expected


def test_another_model_is_refused_before_anything_is_measured(finished, model, indexer, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run/records/200.json").unlink()
    monkeypatch.setattr(ttft, "_measure", None)
    with pytest.raises(RunError, match="must have been measured with the same adapter"):
        run_ttft(CONFIG, tmp_path / "run", model=model, indexer=Indexer.for_model(model, dim=64, seed=1))


def test_a_mutated_record_or_config_is_one_sentence_with_a_name_or_is_read(finished, tmp_path, mutations):
    """No traceback, and no figure that is not a number: records and the config."""
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    expected = tabulated(directory)["rows"]
    for name in ("records/96.json", "config.json"):
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
    assert tabulated(directory)["rows"] == expected


# Baselines, other layers, shapes, and what does not run

SHAPE = TtftConfig(
    shape="qwen3.5-tiny", lengths=(48,), budget="k=16,block=8", variants=("dense", "indexer-shared"), baselines=("sdpa", "eager"),
    layers=("stock", "fast"), runs=1, warmup=0, stage_runs=1, parts=True, chunk=32, dtype="float32", dim=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("compared") / "run"
    return directory, run_ttft(SHAPE, directory)


def test_baselines_are_compared_with_the_same_other_layers(compared):
    result = json.loads((compared[0] / "report.json").read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    assert set(rows) == {f"{name} ({kind} layers)" for name in ("dense sdpa", "dense eager", "indexer-shared") for kind in LAYERS}
    assert {row["evidence"] for row in rows.values()} == {"dense", "untrained"}
    for row in rows.values():
        assert set(row["over"]) == {f"dense {name} ({row['layers']} layers)" for name in ("sdpa", "eager")}
        best = min((rows[name] for name in row["over"]), key=lambda one: one["ttft_s"]["median"])
        assert row["over_best_dense"]["value"] == pytest.approx(best["ttft_s"]["median"] / row["ttft_s"]["median"])
        assert {"gdn", "feed-forward", "norms"} < set(row["stages_s"]) and row["stages_s"]["gdn"] > 0
    assert {entry["label"] for entry in result["ceilings"]} == {name for name in rows if name.startswith("dense")}


def test_random_weights_are_said_wherever_figures_are(compared):
    assert compared[1]["weights"] == "random weights of qwen3.5-tiny's shape"
    assert "nothing here says anything about quality" in (compared[0] / "report.md").read_text()


def test_every_shape_is_a_model_of_its_family():
    for shape, family in (("qwen3.5-tiny", "qwen3_5_text"), ("qwen2.5-tiny", "qwen2")):
        assert shape in SHAPES and drawn(shape, dtype=torch.float32, device="cpu").config.model_type == family


def test_the_dense_implementation_is_that_of_the_row_and_afterwards_the_models_own(model, tmp_path, monkeypatch):
    seen, clock = [], ttft.time_to_first_token

    def watched(model, ids, chunk):
        seen.append((text_config(model)._attn_implementation, chunk))
        return clock(model, ids, chunk)

    monkeypatch.setattr(ttft, "time_to_first_token", watched)
    config = replace(CONFIG, lengths=(96,), variants=("dense",), overhead=False, baselines=("eager",), runs=2, warmup=1, chunk=40)
    run_ttft(config, tmp_path, model=model)
    assert seen[:3] == [("eager", 40)] * 3 and text_config(model)._attn_implementation == "sdpa"


def failing(monkeypatch, error: Exception, fails) -> None:
    prefill = ttft._prefill

    def broken(config, subject, way, *rest):
        if fails(way):
            raise error
        return prefill(config, subject, way, *rest)

    monkeypatch.setattr(ttft, "_prefill", broken)


def test_dense_out_of_memory_leaves_the_others_without_speed_ups(model, indexer, tmp_path, monkeypatch):
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), lambda way: way.dense)
    config = replace(CONFIG, lengths=(96,), variants=("dense", "indexer-shared"), overhead=False, runs=1, stage_runs=1)
    result = run_ttft(config, tmp_path, model=model, indexer=indexer)
    (row,) = result["rows"]
    assert (row["variant"], row["speed_up"], row["over"], row["over_best_dense"]) == ("indexer-shared", None, {}, None)
    assert result["refused"] == [["dense", "out of memory at 96 tokens: CUDA out of memory"]] and result["ceilings"] == []
    assert "- dense: out of memory at 96 tokens" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(ttft, "_measure", None)
    assert run_ttft(config, tmp_path, model=model, indexer=indexer)["rows"][0]["seconds"] == row["seconds"]


def test_another_failure_is_raised_after_the_others_are_measured(model, indexer, tmp_path, monkeypatch):
    failing(monkeypatch, ValueError("no such kernel"), lambda way: not way.dense)
    config = replace(CONFIG, lengths=(96,), variants=("dense", "indexer-shared"), overhead=False, runs=1, stage_runs=1)
    with pytest.raises(LeftOutError, match=r"did not: indexer-shared \(ValueError at 96 tokens: no such kernel\)"):
        run_ttft(config, tmp_path / "a", model=model, indexer=indexer)
    assert [row["variant"] for row in json.loads((tmp_path / "a/report.json").read_text())["rows"]] == ["dense"]
    monkeypatch.setenv("NPU_SPARSE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="^no such kernel$"):
        run_ttft(config, tmp_path / "b", model=model, indexer=indexer)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shape": "llama-7b"}, "shape must be one of qwen3.5-0.8b, qwen3.5-9b, .*, got 'llama-7b'"),
        ({"model": "m"}, "must have a model or a shape, and not both, got 'm' and 'qwen3.5-tiny'"),
        ({"shape": None}, "must have a model or a shape, and not both, got '' and None"),
        ({"prompt": "text"}, "prompt must be random where a shape has no tokenizer"),
        ({"layers": ("quick",)}, "layers must be stock, fast or both, got"),
        ({"baselines": ("fa2", "fa2")}, "baselines must not be named twice"),
        ({"chunk": -1}, "chunk must be a whole number of tokens, got -1"),
        ({"runs": "many"}, "runs must be a positive integer, got 'many'"),
        ({"runs": "64=4,256=0"}, "runs must be a positive integer, got 0"),
        ({"warmup": "64=4,x=2"}, "warmup must be a number, or LENGTH=NUMBER joined by commas, got '64=4,x=2'"),
        ({"heads": 0}, "heads must be a positive integer, got 0"),
    ],
)
def test_a_comparison_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SHAPE, **change)
