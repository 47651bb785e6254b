"""What records say of where they were made."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import fusco
from fusco.machine import append_jsonl, circumstances, source_commit


def test_circumstances() -> None:
    found = circumstances()
    assert set(found) == {"hardware", "torch", "python", "fusco", "commit"}
    assert (found["torch"], found["fusco"]) == (torch.__version__, fusco.__version__)
    assert found["commit"] == source_commit()
    assert circumstances(commit="told")["commit"] == "told"


def test_records_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    for number in range(2):
        append_jsonl(path, [{"number": number}])
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [0, 1]
