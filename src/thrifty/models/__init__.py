"""What a model is made of beyond transformers: loading, chat format, adapter strength."""
