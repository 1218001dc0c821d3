"""Where the package meets transformers, TRL, peft and bitsandbytes."""
