"""Reading and writing: PEFT, bitsandbytes, GGUF, safetensors."""
