"""lm-eval's model and our tasks in lm-eval itself: `make test-lm-eval` installs it."""

import json
import re
import sys

import pytest
import torch

from npu_sparse import Budget, Indexer, SparsePrefill, cli, selectors, tasks
from npu_sparse.indexer import AdapterError
from npu_sparse.integrations.harness import HarnessMissingError, run_harness
from npu_sparse.integrations.lm_eval_tasks import LmEvalTasksConfig, write_lm_eval_tasks
from npu_sparse.runs.store import RunError
from npu_sparse.testing import tiny_model, tiny_tokenizer

LINES = [
    "Some special magic numbers are hidden within the following text. Make sure to memorize it.",
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "Memorize and track the chain(s) of variable assignment hidden in the following text. VAR ABCDE = 12345",
    "Question: Find all variables that are assigned the value 12345 in the text above. Answer:",
]
SPARSE = "k=24,block=16"
WHOLE = "k=4096,block=16"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama with a tokenizer, its untrained indexer beside it: `(checkpoint, adapter)`."""
    directory = tmp_path_factory.mktemp("lm-eval")
    tokenizer = tiny_tokenizer(LINES, special=("<bos>", "<eos>"), bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    Indexer.for_model(model, dim=64).save_pretrained(directory / "adapter")
    return str(directory / "model"), str(directory / "adapter")


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-lm-eval")


@pytest.fixture
def opened(lm_eval, checkpoint):
    """`opened(budget, **options)`: the model, detached afterwards from nothing: every one loads its own weights."""
    from npu_sparse.integrations.lm_eval import NpuSparseLM

    def make(budget="", **options):
        options = {"adapter": checkpoint[1], "device": "cpu", "dtype": "float32"} | options
        return NpuSparseLM(checkpoint[0], budget=budget, **options)

    return make


@pytest.fixture
def dense(lm_eval, checkpoint):
    """lm-eval's own model of the same weights."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(checkpoint[0], device="cpu", dtype="float32")


def words(count: int, seed: int = 0) -> str:
    return " ".join(f"word{(seed * 31 + n * n) % 97}" for n in range(count))


def requests(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=n) for n, one in enumerate(arguments)]


CHOICES = [(words(60), " green"), (words(60), " blue and yellow"), (words(90, 1), " g"), ("", " green grass"), (words(60), " gr")]
TEXTS = [(words(80, 2),), (words(40, 3),)]
PROMPTS = [(words(70, 4), {"until": [], "max_gen_toks": 8}), (words(50, 5), {"until": [], "max_gen_toks": 8})]


def likelihoods(model) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests("loglikelihood", *CHOICES), disable_tqdm=True)


# The model


def test_whole_context_budget_scores_and_writes_as_dense_does(opened, dense):
    ours = opened(WHOLE)
    for (score, greedy), (expected, expected_greedy) in zip(likelihoods(ours), likelihoods(dense)):
        assert score == pytest.approx(expected, abs=2e-3) and greedy == expected_greedy
    rolling = [model.loglikelihood_rolling(requests("loglikelihood_rolling", *TEXTS)) for model in (ours, dense)]
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-2)
    assert len({model.generate_until(requests("generate_until", *PROMPTS)).__repr__() for model in (ours, dense)}) == 1


def test_small_budget_changes_every_kind_of_answer(opened, dense):
    ours = opened(SPARSE)
    assert abs(likelihoods(ours)[0][0] - likelihoods(dense)[0][0]) > 1e-2
    rolling = [model.loglikelihood_rolling(requests("loglikelihood_rolling", *TEXTS)) for model in (ours, dense)]
    assert abs(rolling[0][0] - rolling[1][0]) > 1e-2
    assert ours.generate_until(requests("generate_until", *PROMPTS)) != dense.generate_until(
        requests("generate_until", *PROMPTS)
    )


def test_continuation_is_decoded_after_a_sparse_prompt(opened):
    """The log-likelihood is the one that decoding token by token on the prompt's cache gives."""
    ours = opened(SPARSE)
    context, continuation = CHOICES[1]
    whole, prompt = ours.tok_encode(context + continuation), ours.tok_encode(context)
    written = whole[len(prompt) :]
    assert len(written) > 2
    with torch.no_grad():
        out = ours.model(torch.tensor([prompt]))
        expected = 0.0
        for token in written:
            expected += float(torch.log_softmax(out.logits[0, -1], -1)[token])
            out = ours.model(torch.tensor([[token]]), past_key_values=out.past_key_values)
    assert likelihoods(ours)[1][0] == pytest.approx(expected, abs=1e-4)


def test_rolling_windows_are_sparse_to_their_end(opened):
    ours = opened(SPARSE)
    tokens = [ours.prefix_token_id, *ours.tok_encode(TEXTS[0][0])]
    with torch.no_grad():
        scores = torch.log_softmax(ours.model(torch.tensor([tokens[:-1]])).logits[0], -1)
    expected = float(scores.gather(-1, torch.tensor(tokens[1:])[:, None]).sum())
    (actual,) = ours.loglikelihood_rolling(requests("loglikelihood_rolling", TEXTS[0]))
    assert actual == pytest.approx(expected, abs=1e-3)


def test_batch_size_changes_nothing(opened):
    alone, together = opened(SPARSE), opened(SPARSE, batch_size=4)
    assert likelihoods(alone) == likelihoods(together)
    written = [model.generate_until(requests("generate_until", *PROMPTS)) for model in (alone, together)]
    assert written[0] == written[1]


def test_requests_that_share_a_forward_are_read_once(opened):
    ours = opened(SPARSE)
    forwards = []
    ours.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    context = ours.tok_encode(words(60))
    asked = [(("", ""), context, [continuation]) for continuation in (9, 30, 7, 30)]
    likely = ours._loglikelihood_tokens([*asked, (("", ""), context[1:], [9])], disable_tqdm=True)
    assert len(forwards) == 2
    assert likely[1] == likely[3] and len({score for score, _ in likely}) == 4


def test_long_context_is_cut_from_the_left(opened, dense):
    ours = opened(WHOLE, max_length=64)
    dense._max_length = 64
    scores = [[score for score, _ in likelihoods(model)] for model in (ours, dense)]
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)
    assert scores[0][0] != pytest.approx(likelihoods(opened(WHOLE))[0][0], abs=2e-3)


def test_dense_selector_is_the_same_instrument_without_a_budget(opened, dense):
    ours = opened(selector="dense", adapter=None)
    assert [score for score, _ in likelihoods(ours)] == pytest.approx([score for score, _ in likelihoods(dense)], abs=2e-3)
    assert ours.attached is None


@pytest.mark.parametrize("selector", ["oracle", "local", "random"])
def test_other_selectors_need_no_adapter(opened, selector):
    ours = opened(SPARSE, selector=selector, adapter=None)
    assert ours.attached.budget == Budget.parse(SPARSE)
    assert likelihoods(ours)[0][0] < 0


def test_results_say_what_ran(opened, checkpoint):
    info = opened(SPARSE).get_model_info()
    assert (info["npu_sparse_budget"], info["npu_sparse_selector"]) == ("k=24,block=16", "indexer")
    assert info["npu_sparse_evidence"] == "untrained" and re.fullmatch("[0-9a-f]{16}", info["npu_sparse_adapter"])
    assert opened(selector="dense", adapter=None).get_model_info()["npu_sparse_evidence"] == "dense"


@pytest.mark.parametrize(
    "options, error, sentence",
    [
        ({"budget": "k=8", "block": 16}, ValueError, 'must stand in quotes, budget="k=8,block=16", got block=16 beside it'),
        ({"budget": "colour=8"}, ValueError, "budget must name fields among"),
        ({"selector": "best"}, ValueError, "selector must be one of dense, oracle, indexer, "),
        ({"adapter": None}, ValueError, "adapter must name an indexer's directory for selector 'indexer', got none"),
        ({"selector": "dense", "budget": "k=8"}, ValueError, "budget must be empty for selector 'dense', got 'k=8'"),
        ({"adapter": "no/such/adapter"}, AdapterError, "must be a directory with config.json"),
        ({"parallelize": True}, ValueError, "parallelize must not be set for npu-sparse (an indexer lives on one device)"),
        ({"tp_plan": "auto"}, ValueError, "tp_plan must not be set"),
        ({"delta": "weights"}, ValueError, "delta must not be set"),
    ],
)
def test_mistakes_are_sentences(opened, options, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        opened(**options)


# The tasks


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """Two tasks of two prompts each, as lm-eval reads them."""
    directory = tmp_path_factory.mktemp("tasks") / "tasks"
    config = LmEvalTasksConfig(checkpoint[0], ("niah_single_1", "vt"), (1536,), count=2, max_new_tokens=4)
    written = write_lm_eval_tasks(config, directory)
    assert written == {"tasks": ["npu_sparse_niah_single_1_1536", "npu_sparse_vt_1536"]}
    return directory


def test_prompts_are_those_of_generate(folder, checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint[0])
    expected = tasks.generate("vt", tokenizer, length=1536, count=2, seed=0, max_new_tokens=4)
    stored = json.loads((folder / "npu_sparse_vt_1536.json").read_text())
    assert [(one["prompt"], tuple(one["answers"])) for one in stored] == [(one.prompt, one.answers) for one in expected]


def test_a_folder_is_written_again_or_refused(folder, checkpoint):
    before = (folder / "npu_sparse_vt_1536.json").read_bytes()
    same = dict(tasks=("niah_single_1", "vt"), lengths=(1536,), max_new_tokens=4)
    write_lm_eval_tasks(LmEvalTasksConfig(checkpoint[0], count=2, **same), folder)
    assert (folder / "npu_sparse_vt_1536.json").read_bytes() == before
    with pytest.raises(RunError, match="count = 2 there, 3 now"):
        write_lm_eval_tasks(LmEvalTasksConfig(checkpoint[0], count=3, **same), folder)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"tasks": ("vt", "vt")}, "tasks must name each value once, got vt, vt"),
        ({"tasks": ("no_such",)}, "task must be a known name, got 'no_such'"),
        ({"tasks": ("qa_1",)}, "qa_1 needs a question file"),
        ({"lengths": (0,)}, "lengths must be a positive integer, got 0"),
        ({"count": 0}, "count must be a positive integer, got 0"),
    ],
)
def test_tasks_that_cannot_be_written_are_sentences(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        LmEvalTasksConfig("tiny", **fields)


def test_lm_eval_asks_the_prompts_and_scores_by_our_rules(lm_eval, folder, checkpoint):
    """A stand-in that answers some prompts rightly: whatever else lm-eval does, the scores are known."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    stored = {name: json.loads((folder / f"{name}.json").read_text()) for name in
              ("npu_sparse_niah_single_1_1536", "npu_sparse_vt_1536")}  # fmt: skip
    vt = stored["npu_sparse_vt_1536"]
    right = {vt[0]["prompt"]: " ".join(vt[0]["answers"]), vt[1]["prompt"]: vt[1]["answers"][0]}
    asked = []

    class Answering(LM):
        def generate_until(self, requests):
            asked.extend(request.args for request in requests)
            return [right.get(request.args[0], "nothing") for request in requests]

        loglikelihood = loglikelihood_rolling = None

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    scores = simple_evaluate(model=Answering(), tasks=["npu_sparse"], task_manager=manager, bootstrap_iters=0)["results"]
    assert scores["npu_sparse_vt_1536"]["score,none"] == pytest.approx((1 + 1 / 5) / 2)
    assert scores["npu_sparse_niah_single_1_1536"]["score,none"] == 0
    assert {prompt for prompt, _ in asked} == {one["prompt"] for documents in stored.values() for one in documents}
    assert all(options["max_gen_toks"] == 4 and not options["do_sample"] for _, options in asked)


# The command


def test_command_runs_the_model_on_the_tasks(lm_eval, folder, checkpoint, tmp_path, capsys):
    model, adapter = checkpoint
    arguments = [
        "lm-eval", "--model", "npu-sparse", "--device", "cpu", "--tasks", "npu_sparse_vt_1536", "--include_path", str(folder),
        "--model_args", f'pretrained={model},adapter={adapter},budget="k=64,block=16",dtype=float32',
        "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    before = list(sys.argv)
    assert cli.main(arguments) == 0
    assert sys.argv == before
    assert "npu_sparse_vt_1536" in capsys.readouterr().out
    (results,) = (tmp_path / "out").rglob("results_*.json")
    report = json.loads(results.read_text())
    assert report["config"]["npu_sparse_budget"] == "k=64,block=16"
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    scores = [tasks.score(tasks.Example(**{**row["doc"], "answers": tuple(row["doc"]["answers"])}), row["resps"][0][0])
              for row in rows]  # fmt: skip
    assert report["results"]["npu_sparse_vt_1536"]["score,none"] == pytest.approx(sum(scores) / len(scores))
    assert rows[0]["resps"][0][0] == _written(model, adapter, rows[0]["doc"]["prompt"])


def _written(model: str, adapter: str, prompt: str) -> str:
    """What the model writes after this prompt under the same budget, without lm-eval."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    indexer = selectors.ByIndexer(Indexer.from_pretrained(adapter))
    with SparsePrefill.attach(loaded, indexer, Budget(k=64, block=16)):
        written = loaded.generate(**inputs, max_new_tokens=4, do_sample=False)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_mistake_in_model_arguments_is_one_sentence(lm_eval, folder, checkpoint, capsys):
    arguments = [
        "lm-eval", "--model", "npu-sparse", "--device", "cpu", "--tasks", "npu_sparse_vt_1536", "--include_path", str(folder),
        "--model_args", f"pretrained={checkpoint[0]},adapter={checkpoint[1]},budget=k=64,block=16",
    ]  # fmt: skip
    assert cli.main(arguments) == cli.USER_ERROR
    assert 'error: budget must stand in quotes, budget="k=64,block=16"' in capsys.readouterr().err


def test_without_lm_eval_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    with pytest.raises(HarnessMissingError, match=r"pip install -e '.\[lm-eval\]' in a clone"):
        run_harness(["run"])
    assert cli.main(["lm-eval", "--tasks", "vt"]) == cli.FAILURE
    assert capsys.readouterr().err.startswith("error: lm-eval must be installed (no module 'lm_eval")
