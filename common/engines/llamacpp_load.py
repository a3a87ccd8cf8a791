"""Loading the llama.cpp engine's model: its context, its block cache and its scheduler."""

from dataclasses import dataclass

from common.engines.block_cache import BlockCache
from common.engines.llama_context import ContextSize, LlamaContext
from common.engines.llamacpp_settings import LlamaCppSettings
from common.engines.scheduler import Scheduler
from common.model_files import find_model, model_name
from common.protocol import EngineInfo


@dataclass(frozen=True)
class Loaded:
    """Belongs to the engine's thread, but for `info` and the context's vocabulary."""

    context: LlamaContext
    cache: BlockCache
    scheduler: Scheduler
    info: EngineInfo


def load(settings: LlamaCppSettings) -> Loaded:
    """Load the model.

    Raises:
        OSError: there is no such model file.
        LlamaCppError: llama.cpp cannot load or run the model.
    """
    path = find_model(settings.model)
    context = LlamaContext(
        path,
        ContextSize(
            cells=settings.cache_tokens,
            sequences=settings.max_sequences,
            batch=settings.max_running + settings.prefill_chunk,
            threads=settings.threads,
            batch_threads=settings.batch_threads,
        ),
    )
    cache = BlockCache(
        context,
        cells=context.cells,
        block_size=settings.block_size,
        max_sequences=settings.max_sequences,
    )
    scheduler = Scheduler(
        cache,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        prefill_chunk=settings.prefill_chunk,
        import_blocks=settings.import_blocks,
    )
    info = EngineInfo(
        model=model_name(path),
        backend="llamacpp",
        context_length=min(context.vocab.context_length_train, context.cells),
        block_size=settings.block_size,
        total_blocks=context.cells // settings.block_size,
        worker_id=settings.worker_id,
        max_running=settings.max_running,
    )
    return Loaded(context, cache, scheduler, info)
