"""Offline tools of slipstream: corpus, tokenizer, networks, distillation, export and goldens.

Nothing here runs inside the server. The modules know file formats (GGUF, safetensors) and
PyTorch; they know nothing of the engine, of scheduling or of the wire protocol.
"""
