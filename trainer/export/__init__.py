"""How does a run become a directory that others load: safetensors, configuration and tokenizer of an AfmoeForCausalLM?"""
