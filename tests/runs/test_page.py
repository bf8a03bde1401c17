from npu_sparse.runs.page import markdown_table


def test_a_table_has_a_row_for_each_dict():
    rows = [{"k": 512, "score": 0.123456}, {"k": None, "score": True}]
    table = markdown_table(rows, {"k": "budget", "score": "F1"})
    assert table == "| budget | F1 |\n| --- | --- |\n| 512 | 0.1235 |\n|  | True |\n"
    assert markdown_table(rows).startswith("| k | score |")
