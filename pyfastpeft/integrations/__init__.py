"""Where the package meets transformers, peft and bitsandbytes."""
