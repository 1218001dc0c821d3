"""Soft prompts in transformers models.

- :mod:`.prefixes`: in a causal model, where each layer gets the prompt as a prefix of keys and values
- :mod:`.first_label`: there, how the prompt is trained to the text's first token
- :mod:`.bidirectional`: in encoders and encoder–decoders
- :mod:`.prompt_tokens`: there, prompts at the embedding as tokens in front of each row's own
- :mod:`.decoders`: what a causal model consists of, and which ones can take a prefix
- :mod:`.bare`: how a prompt runs through the model by itself
- :mod:`.kept_prompts`: what a prompt comes to, kept until something changes that it depends on
- :mod:`.checkpointing`: the gradients of prefixes under reentrant checkpointing
- :mod:`.prompt_operator`: what a prompt comes to, as one operator of compiled code
"""
