"""The two sets of engines of `benchmarks.disagg`: real ones, and simulated ones like large GPUs."""

from dataclasses import dataclass

from benchmarks.disagg_workload import Kind, Shape


@dataclass(frozen=True)
class Engines:
    """Which engines are measured, what they are asked, and which prefill chunks are tried.

    `kind` is that of the results. `settings` are `--engine-arg`s of every engine.
    `prefill_chunk` is that of an engine that only computes prompts; all in tokens.
    """

    kind: str
    backend: str
    settings: tuple[str, ...]
    prefill_chunk: int
    chunks: tuple[int, ...]
    quick_chunks: tuple[int, ...]
    conditional_chunks: tuple[int, ...]
    long: Shape
    chat: Shape
    seconds: float

    @property
    def shapes(self) -> dict[Kind, Shape]:
        return {"long": self.long, "chat": self.chat}


# llama.cpp with the default model, one thread each: two engines have two cores.
REAL = Engines(
    kind="measured",
    backend="llamacpp",
    settings=("threads=1", "batch_threads=1"),
    prefill_chunk=128,
    chunks=(4, 8, 32, 128),
    quick_chunks=(4, 32),
    conditional_chunks=(4, 16),
    long=Shape(prompt=(512, 768), output=(4, 12), per_s=0.15),
    chat=Shape(prompt=(16, 40), output=(192, 320), per_s=0.16),
    seconds=30.0,
)

# About a model of 70B parameters on four H100, from its arithmetic, not from a measurement. A
# step reads 140 GB of weights at 4 x 3.35 TB/s, of which 70% are reached: 15 ms. A prompt's token
# takes 140 GFLOP of 4 x 990 TFLOP/s, of which 42% are reached: 12,000 tokens/s. Its KV has 328 kB,
# of which 16 GB/s are moved: 50,000 tokens/s.
SIMULATED = Engines(
    kind="simulated",
    backend="simulated",
    settings=(
        "decode_base_ms=15",
        "decode_ms_per_request=0.1",
        "prefill_tokens_per_s=12000",
        "transfer_tokens_per_s=50000",
        "context_length=16384",
        "cache_tokens=400000",
    ),
    prefill_chunk=2048,
    chunks=(128, 256, 512, 2048),
    quick_chunks=(128, 512),
    conditional_chunks=(64, 256),
    long=Shape(prompt=(2048, 6144), output=(32, 96), per_s=1.6),
    chat=Shape(prompt=(16, 40), output=(64, 128), per_s=3.0),
    seconds=20.0,
)
