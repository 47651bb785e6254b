from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusco.demo.data import held_out_batch, load_corpus, sample_batch
from fusco.errors import FuscoError


def write_sources(folder: Path, num_files: int) -> None:
    for i in range(num_files):
        (folder / f"module_{i:02d}.py").write_text(f"VALUE = {i:04d}\n")


def test_standard_library_is_enough_text() -> None:
    corpus = load_corpus()
    assert len(corpus.train) > 1_000_000
    assert len(corpus.held_out) > 100_000
    assert b"def " in bytes(corpus.train[:100_000].tolist())


def test_every_tenth_file_is_held_out_and_in_no_other_part(tmp_path: Path) -> None:
    write_sources(tmp_path, 20)
    corpus = load_corpus(tmp_path)
    held_out = bytes(corpus.held_out.tolist()).decode().split()
    train = bytes(corpus.train.tolist()).decode().split()
    assert [word for word in held_out if word.isdigit()] == ["0009", "0019"]
    assert len([word for word in train if word.isdigit()]) == 18
    assert "0009" not in train
    assert corpus.num_files == 20


def test_packages_are_read_and_tests_are_not(tmp_path: Path) -> None:
    write_sources(tmp_path, 9)
    for name in ("package", "test", "no_package"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside.py").write_text(name)
    for name in ("package", "test"):
        (tmp_path / name / "__init__.py").write_text(f"{name} itself")
    corpus = load_corpus(tmp_path)
    assert bytes(corpus.held_out.tolist()) == b"package itself"
    assert corpus.num_files == 11


def test_too_few_sources_are_refused(tmp_path: Path) -> None:
    write_sources(tmp_path, 9)
    with pytest.raises(FuscoError, match=r"got 9 Python files .* at least 10"):
        load_corpus(tmp_path)


def test_batches_depend_on_seed_and_step_alone() -> None:
    text = torch.arange(251, dtype=torch.uint8).repeat(40)

    def draw(seed: int, step: int) -> torch.Tensor:
        batch = sample_batch(text, step=step, seed=seed, num_sequences=8, sequence_length=16)
        assert torch.equal(batch.targets, (batch.inputs + 1) % 251)
        return batch.inputs

    assert torch.equal(draw(0, 3), draw(0, 3))
    assert not torch.equal(draw(0, 3), draw(0, 4))
    assert not torch.equal(draw(0, 3), draw(1, 3))


def test_shards_are_the_global_batch_in_order() -> None:
    batch = held_out_batch(load_corpus(), seed=0, num_sequences=8, sequence_length=4)
    shards = [batch.shard(rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([shard.inputs for shard in shards]), batch.inputs)
    assert torch.equal(torch.cat([shard.targets for shard in shards]), batch.targets)
