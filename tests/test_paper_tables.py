"""Tables 1 and 2 of the paper, from the verdicts of a study."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from lazyllm.ablation.paper_tables import paper_rows, paper_sections
from lazyllm.ablation.results import Results
from lazyllm.cli.main import app
from tests.studies import load, small

CELLS = [{"name": "fifth", "schedule": "Constant(keep=0.2, start=1)"}, {"name": "half"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    small(cells=CELLS, tasks={"records": 2, "summary": 2}).run(path, load=load)
    return path


def timed(results: Results, seconds) -> Results:
    """The same results with times by cell: to the first token, and for each further one."""
    records = [
        replace(
            record,
            verdict={
                **record.verdict,
                "ttft_seconds": seconds[record.cell][0],
                "step_seconds": seconds[record.cell][1],
                "reply": [1] * 11,
                "score": None if record.task == "summary" else 0.5,
                "growth": [[1.0, 0.25], [1.0, 0.5]] if record.cell == "half" else [],
            },
        )
        for record in results.records
    ]
    return Results(results.plan, records, results.items)


def test_rows_hold_scores_shares_and_ratios_of_times(folder):
    times = {"stock": (4.0, 0.2), "half": (1.0, 0.1), "fifth": (2.0, 0.4)}
    rows = {(row.task, row.method): row for row in paper_rows(timed(Results.load(folder), times))}
    assert list(rows)[:3] == [("records", "stock"), ("records", "fifth"), ("records", "half")]
    half = rows["records", "half"]
    assert (half.score, half.first_token, half.computed) == (0.5, 4.0, 0.75)
    assert half.reply == pytest.approx((4 + 10 * 0.2) / (1 + 10 * 0.1))
    assert rows["records", "fifth"].reply == pytest.approx((4 + 10 * 0.2) / (2 + 10 * 0.4))
    assert rows["records", "stock"].computed == rows["summary", "stock"].first_token == 1
    assert rows["summary", "half"].score is None


def test_tables_have_dashes_where_nothing_is_known(folder):
    results = Results.load(folder)
    records = [replace(record, worker=record.address) for record in results.records]
    apart = Results(results.plan, records, results.items)
    first, second = paper_sections(apart)
    assert {row[3] for row in [*first.rows, *second.rows] if row[1] != "stock"} == {"-"}
    assert {row[2] for row in first.rows if row[0] == "summary"} == {"-"}
    assert {row[2] for row in second.rows if row[1] == "stock"} == {"100.0"}


def test_the_command_prints_both(folder):
    done = CliRunner().invoke(app, ["study", "table", str(folder), "--paper"])
    assert done.exit_code == 0
    assert done.output.count("| task | method |") == 2
