from npu_sparse.runs.figures import new_figure, write_figure


def test_a_figure_is_a_png(tmp_path):
    figure, axes = new_figure(columns=2)
    assert axes.shape == (1, 2)
    axes[0, 0].plot([1, 2], [3, 4])
    write_figure(tmp_path / "a.png", figure)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
