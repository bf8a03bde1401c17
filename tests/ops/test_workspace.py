"""Out of memory in a long prefill: one sentence that names the workspace to choose, and never another path."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from npu_sparse import Budget, Indexer, SparsePrefill, cli, selectors
from npu_sparse.measure.quality import EvalConfig
from npu_sparse.ops import workspace
from npu_sparse.testing import tiny_model, tiny_tokenizer, tokens

T = 1500
BUDGET = Budget(k=24, block=1)
LITTLE = 8 << 20  # bytes of the largest tensor that a small device has room for


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def ids():
    return tokens(1, T)


def plant(monkeypatch, error=None, most_bytes=LITTLE):
    """Makes products fail whose result is larger than `most_bytes`, as on a device without room for it."""
    product = torch.matmul

    def limited(a, b):
        out = product(a, b)
        if out.numel() * out.element_size() > most_bytes:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34.33 MiB. GPU 0 has 8.00 MiB.\nmore")
        return out

    monkeypatch.setattr(torch, "matmul", limited)


def prefill(model, ids, **options):
    with SparsePrefill.attach(model, selectors.Oracle(), BUDGET, **options), torch.inference_mode():
        return model(ids).logits


def test_following_the_advice_leads_to_the_same_result(model, ids, monkeypatch):
    expected = prefill(model, ids)
    plant(monkeypatch)
    mib, tried = workspace.DEFAULT_MIB, []
    while True:
        try:
            actual = prefill(model, ids, workspace_mib=mib)
            break
        except torch.OutOfMemoryError as error:
            tried.append(mib)
            sentence = str(error)
            assert re.fullmatch(
                rf"out of memory in the sparse attention of layer 0 at {T} tokens with workspace_mib={mib}: attach with "
                r"workspace_mib=(\d+) \(--workspace-mib \1\), or prefill fewer tokens at a time", sentence,
            ), sentence  # fmt: skip
            mib = int(re.search(r"attach with workspace_mib=(\d+)", sentence)[1])
    assert tried == [256, 64, 16]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_every_back_ends_own_error_becomes_the_same_sentence(model, ids, monkeypatch, error):
    plant(monkeypatch, error)
    with pytest.raises(torch.OutOfMemoryError, match=r"attach with workspace_mib=64 \(--workspace-mib 64\)") as raised:
        prefill(model, ids)
    assert raised.value.__cause__ is error


def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert workspace.is_exhausted(raised.value)


def test_another_error_stays_what_it_is(model, ids, monkeypatch):
    plant(monkeypatch, RuntimeError("device lost"))
    with pytest.raises(RuntimeError, match="^device lost$"):
        prefill(model, ids)


def test_where_a_smaller_workspace_would_not_help_none_is_named(model, ids, monkeypatch):
    plant(monkeypatch, most_bytes=0)
    with pytest.raises(torch.OutOfMemoryError, match="no smaller workspace would help, prefill fewer tokens at a time"):
        prefill(model, ids[:, :600], workspace_mib=1)
    with workspace.sized(64 << 20):
        assert "workspace_mib=16" in str(workspace.out_of_memory(layer=3, tokens=1 << 22, rows=(1 << 24) - 1))
        assert "no smaller" in str(workspace.out_of_memory(layer=3, tokens=1 << 22, rows=1 << 24))  # a slice is one row


def test_the_model_is_left_attached_and_as_it_was(model, ids, monkeypatch):
    dense = model(ids[:, :50]).logits
    attached = SparsePrefill.attach(model, selectors.Oracle(), BUDGET)
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids)
    sparse = model(ids[:, :50]).logits
    assert not torch.equal(sparse, dense)
    attached.detach()
    assert torch.equal(model(ids[:, :50]).logits, dense)


def test_every_model_has_its_own_workspace(model, ids, monkeypatch):
    other, sizes = tiny_model("llama"), []
    observe = lambda *_: sizes.append(workspace.size() >> 20)  # noqa: E731
    with (
        SparsePrefill.attach(model, selectors.Oracle(), BUDGET, observe=observe, workspace_mib=8),
        SparsePrefill.attach(other, Indexer.for_model(other, dim=64), BUDGET, observe=observe),
        torch.inference_mode(),
    ):
        for runs in (model, other, model):
            runs(ids[:, :40])
    assert sizes == [8] * 3 + [256] * 3 + [8] * 3


def test_a_workspace_is_its_threads_own(model, ids):
    """Two models in two threads: each in slices of its own size, and nobody else's are changed."""
    other, sizes = tiny_model("llama"), {8: set(), 16: set()}
    before = workspace.size()

    def attach(runs, mib):
        note = lambda *_: sizes[mib].add(workspace.size() >> 20)  # noqa: E731
        return SparsePrefill.attach(runs, selectors.Oracle(), BUDGET, observe=note, workspace_mib=mib)

    @torch.inference_mode()
    def read(runs):
        for _ in range(20):
            runs(ids[:, :40])

    with attach(model, 8), attach(other, 16), ThreadPoolExecutor(2) as pool:
        list(pool.map(read, (model, other)))
    assert sizes == {8: {8}, 16: {16}} and workspace.size() == before


@pytest.mark.slow
def test_compiled_models_have_their_own_workspaces(ids, monkeypatch):
    """Each graph works in slices of the size that it was traced with, and leaves those of others as they are."""
    model, other = (tiny_model("llama", num_hidden_layers=1) for _ in range(2))
    sizes, sized = [], workspace.sized

    def compiled(runs):
        return torch.compile(lambda ids: runs(ids, use_cache=True).logits, fullgraph=True, backend="aot_eager")

    with (
        SparsePrefill.attach(model, selectors.Oracle(), BUDGET, workspace_mib=8),
        SparsePrefill.attach(other, selectors.Oracle(), BUDGET, workspace_mib=16),
        torch.inference_mode(),
    ):
        torch.compiler.reset()
        one, two = compiled(model), compiled(other)
        one(ids[:, :40]), two(ids[:, :40])
        monkeypatch.setattr(workspace, "sized", lambda size: sizes.append(size >> 20) or sized(size))  # in MiB
        for run, mib in ((one, 8), (two, 16), (one, 8)):
            sizes.clear()
            run(ids[:, :40])
            assert set(sizes) == {mib}
    assert workspace.size() == workspace.DEFAULT_MIB << 20


def test_a_backward_pass_works_in_slices_of_its_forward(monkeypatch):
    model, sizes, elements = tiny_model("llama"), [], workspace.elements
    with SparsePrefill.attach(model, selectors.Local(), BUDGET, workspace_mib=8):
        loss = model(torch.arange(1, 41)[None]).logits.square().sum()
    monkeypatch.setattr(workspace, "elements", lambda: sizes.append(workspace.size() >> 20) or elements())
    loss.backward()
    assert set(sizes) == {8}


@pytest.mark.parametrize(
    "mib, error, message",
    [
        (0, ValueError, "workspace_mib must be >= 1, got 0"),
        (1.5, TypeError, "workspace_mib must be an integer, got 1.5"),
        (True, TypeError, "workspace_mib must be an integer, got True"),
    ],
)
def test_what_is_no_size_is_refused(model, mib, error, message):
    with pytest.raises(error, match=message):
        SparsePrefill.attach(model, selectors.Oracle(), BUDGET, workspace_mib=mib)
    with pytest.raises(error, match=message):
        EvalConfig("m", workspace_mib=mib)


@pytest.fixture
def saved(tmp_path) -> str:
    """The directory of a checkpoint."""
    tiny_model("llama", vocab_size=300, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny_tokenizer(["some words"], size=300).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_line_ends_with_the_sentence_and_status_1(saved, monkeypatch, tmp_path, capsys):
    plant(monkeypatch)
    command = [
        "eval", saved, "--length", str(T), "--count", "1", "--tasks", "niah_single_1", "--variants", "dense,oracle", "--budget",
        "k=24", "--dtype", "float32", "--max-new-tokens", "16",
    ]  # fmt: skip
    assert cli.main([*command, "--output", str(tmp_path / "large")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: out of memory in the sparse attention of layer 0 at ")
    assert " with workspace_mib=256: " in last and "--workspace-mib 64" in last
    assert not (tmp_path / "large/report.md").exists()


def test_the_command_line_times_what_fits_and_says_what_to_choose_for_the_rest(saved, monkeypatch, tmp_path, capsys):
    plant(monkeypatch)
    command = [
        "ttft", saved, "--lengths", str(T), "--k", "24", "--variants", "dense,oracle", "--prompt", "random", "--runs", "1",
        "--warmup", "0", "--stage-runs", "1", "--dtype", "float32",
    ]  # fmt: skip
    assert cli.main([*command, "--output", str(tmp_path / "large")]) == 0
    sentence = "out of memory in the sparse attention of layer 0 at 1500 tokens with workspace_mib=256: "
    for text in (capsys.readouterr().err, (tmp_path / "large/report.md").read_text()):
        assert sentence in text and "--workspace-mib 64" in text
    assert cli.main([*command, "--workspace-mib", "4", "--output", str(tmp_path / "small")]) == 0
    assert "--workspace-mib" not in capsys.readouterr().err
    assert "out of memory" not in (tmp_path / "small/report.md").read_text()
