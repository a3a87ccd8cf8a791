"""The block cache against llama.cpp's own cells."""

from collections.abc import Iterator

from common.engines.llama_context import ContextSize, LlamaContext
from common.kv import block_hashes
from common.model_files import DEFAULT_MODEL, find_model
from tests.common.engines.cache_driver import CacheMachine, WritableMemory

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

CELLS, BLOCK, IDS, BATCH = 256, 16, 6, 64


class LlamaMemory:
    """llama.cpp's cells; what a sequence holds is read off the size of its state."""

    def __init__(self, context: LlamaContext) -> None:
        self.context = context
        context.clear()
        self.write(0, 0, [0])
        self.one_cell = context.state_bytes(0)
        self.write(0, 1, [0])
        self.per_cell = context.state_bytes(0) - self.one_cell
        context.clear()

    def share(self, source: int, target: int, start: int, end: int) -> None:
        self.context.share(source, target, start, end)

    def remove(self, sequence: int, start: int, end: int) -> None:
        self.context.remove(sequence, start, end)

    def write(self, sequence: int, start: int, tokens: list[int]) -> None:
        for offset, token in enumerate(tokens):
            self.context.add(1000 + token, start + offset, sequence, logits=False)
        self.context.decode()

    def check(self, sequence: int, tokens: list[int]) -> None:
        ends = (0, len(tokens) - 1) if tokens else (-1, -1)
        assert self.context.positions(sequence) == ends
        if tokens:
            extra = self.context.state_bytes(sequence) - self.one_cell
            assert extra == self.per_cell * (len(tokens) - 1)

    def used_cells(self) -> int | None:
        return None


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaContext]:
    size = ContextSize(cells=CELLS, sequences=IDS, batch=BATCH, threads=1, batch_threads=1)
    context = LlamaContext(find_model(DEFAULT_MODEL), size)
    yield context
    context.close()


def test_index_and_cells_agree_after_any_sequence_of_requests(llama: LlamaContext) -> None:
    class OnLlama(CacheMachine):
        cells, block_size, ids, max_chunk = CELLS, BLOCK, IDS, BATCH

        def make_memory(self) -> WritableMemory:
            return LlamaMemory(llama)

        def hashes(self, tokens: list[int]) -> list[int]:
            return block_hashes(tokens, BLOCK)

        def teardown(self) -> None:
            """Nothing leaks: a sequence that needs every cell fits."""
            super().teardown()
            for start in range(0, CELLS, BATCH):
                self.memory.write(0, start, [1] * BATCH)
            self.memory.check(0, [1] * CELLS)

    run_state_machine_as_test(
        OnLlama,
        settings=settings(
            max_examples=5,
            stateful_step_count=40,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # shrinking would take minutes
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_shared_prefix_gives_the_logits_of_a_computed_one(llama: LlamaContext) -> None:
    llama.clear()
    tokens = [1000 + i * 7 % 90 for i in range(40)]

    def last_logits(sequence: int, start: int) -> list[float]:
        for i in range(start, 40):
            index = llama.add(tokens[i], i, sequence, logits=i == 39)
        llama.decode()
        values: list[float] = llama.logits(index).tolist()
        return values

    computed = last_logits(0, 0)
    llama.share(0, 1, 0, 32)
    assert last_logits(1, 32) == pytest.approx(computed, abs=0.5)
    llama.clear()
