"""Where thrifty meets other libraries, one file each: what stands here is used from theirs, without our loops.

``peft`` (adapters), ``trl`` (rewards), ``trainer`` (objectives), ``logits`` (controls) and ``generate`` (decoders) of
transformers, ``datasets`` (tasks). docs/edges.md has a working example of each.
"""
